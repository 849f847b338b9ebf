"""The common look of all figures, the elements they share, and how they are saved."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bupo.run_folder import write_bytes

Look = tuple[str, str]  # colour and marker
BAND = 2.0  # half-width of bands, in standard errors; the boundary rule uses the same
# Okabe and Ito's palette, which stays distinguishable under colour blindness and in print
BLUE, ORANGE, GREEN, RED, PINK, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
CYCLE = (BLUE, RED, PINK, SKY, GREEN, ORANGE)  # of models and runs; what is read in a model has other colours
BROWN, TEAL, PURPLE, SAND, MINT, LILAC = "#8c510a", "#35978f", "#762a83", "#c9a45c", "#80cdc1", "#b08cc4"  # of lenses
MARKERS = ("o", "s", "^", "D", "v", "P")
_SETTINGS: Any = matplotlib.rc_params_from_file(
    Path(__file__).parent / "templates" / "figures.mplstyle", use_default_template=False
)
INK, SOFT, GRID = (_SETTINGS[key] for key in ("text.color", "axes.edgecolor", "grid.color"))
DASHED: Any = (0, (4, 3))
ROLE_LOOKS = {"start": (SOFT, "o"), "grpo": (BLUE, "s"), "bupo": (RED, "^")}
_ROLE_WORDS = {"bupo": "bupo", "grpo": "grpo", "start": "start", "base": "start", "initial": "start"}


@contextmanager
def styled(**more: Any) -> Iterator[None]:
    """Apply the common look to figures made or saved inside the context, or by the decorated function."""
    settings: Any = {**_SETTINGS, **{key.replace("__", "."): value for key, value in more.items()}}
    with matplotlib.rc_context(settings):
        yield


def new_figure(width: float = 7.2, height: float = 3.9) -> Figure:
    """Return an empty figure of so many inches (without pyplot, so there is nothing global to close)."""
    return Figure(figsize=(width, height))


def grid(number: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure and its ``number`` panels in rows of ``columns``; ``options`` go to ``Figure.subplots``."""
    figure = new_figure(width, height)
    panels = list(figure.subplots(-(-number // columns), columns, squeeze=False, **options).flat)
    for axes in panels[number:]:
        axes.remove()
    return figure, panels[:number]


def role(name: str) -> str | None:
    """Return ``start``, ``grpo`` or ``bupo`` if the name contains one of the role's words, else None."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return next((found for word, found in _ROLE_WORDS.items() if word in words), None)


def looks(names: Sequence[str]) -> dict[str, Look]:
    """Assign a colour and a marker to each name, so that a model looks the same in every figure of a page."""
    role_colours = {ROLE_LOOKS[r][0] for r in map(role, names) if r}
    free = sorted(zip(CYCLE, MARKERS, strict=True), key=lambda look: look[0] in role_colours)  # those come last
    assigned: dict[str, Look] = {}
    for n, name in enumerate(names):
        wanted = [ROLE_LOOKS.get(role(name) or ""), *free, (CYCLE[n % 6], MARKERS[(n // 6 + n) % 6])]
        assigned[name] = next((look for look in wanted if look and look not in assigned.values()), wanted[-1])  # type: ignore[assignment]
    return assigned


def line_with_band(axes: Axes, x: Any, y: Any, errors: Any, look: Look, *, scale: float = 1, **options: Any) -> None:
    """Plot ``scale * y`` (None leaves a gap) and, where standard errors are known, a band of two of them."""
    (colour, marker), values = look, scale * np.array(y, dtype=float)
    wide = BAND * scale * np.array([] if errors is None else errors, dtype=float)
    size = 4 if len(values) <= 40 else 2.5
    axes.plot(x, values, **{"color": colour, "marker": marker, "markersize": size, "zorder": 3, **options})
    if (wide > 0).any():
        axes.fill_between(x, values - wide, values + wide, color=colour, alpha=0.18, linewidth=0, zorder=2)


def level(axes: Axes, value: float = 0, **options: Any) -> None:
    """Draw a soft horizontal line."""
    axes.axhline(value, **{"color": SOFT, "linewidth": 1.2, **options})


def legend_below(figure: Figure, source: Axes | None = None, columns: int = 4) -> None:
    """Put one legend below the whole figure, with the entries of ``source`` (default: of all axes, each once).

    It has at most ``columns``, and as many as the figure is wide enough for.
    """
    found = [axes.get_legend_handles_labels() for axes in ([source] if source else figure.axes)]
    entries = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    for ncols in range(min(columns, len(entries)), 0, -1):
        legend = figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=ncols)
        if ncols == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()


def layer_axis(axes: Axes, layers: int, most: int = 14) -> None:
    """Let x run from layer 1 to ``layers`` with at most about ``most`` ticks on whole numbers, both ends ticked."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, layers) if layers / s <= most)
    ticks = [1, *range(step if step > 1 else 2, layers + 1, step)]
    if layers - ticks[-1] >= 0.4 * step:
        ticks.append(layers)
    margin = max(0.5, 0.015 * (layers - 1))
    axes.set(xticks=ticks, xlim=(1 - margin, layers + margin))


@styled()
def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``name.png`` and ``name.svg`` atomically; the same figure gives the same bytes."""
    paths = []
    for kind, left_out in (("png", ["Software"]), ("svg", ["Date", "Creator"])):
        stream = io.BytesIO()
        figure.savefig(stream, format=kind, dpi=200, facecolor="white", metadata=dict.fromkeys(left_out))
        paths.append(write_bytes(folder / f"{name}.{kind}", stream.getvalue()))
    return paths


@styled(svg__fonttype="none")
def inline_svg(figure: Figure, name: str, alt: str) -> Markup:
    """Return the figure as an ``<svg>`` element whose ids start with ``name`` and whose colours follow the page's."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", stream.getvalue(), flags=re.S)
    text = re.sub(r'(\bid="|url\(#|href="#)', lambda match: f"{match[1]}{name}-", text)
    for colour, variable in ((INK, "--ink"), (SOFT, "--soft"), (GRID, "--grid")):
        text = text.replace(colour, f"var({variable})")
    text = text.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans', sans-serif")
    head = re.search(r'<svg[^>]*(viewBox="[^"]*")[^>]*>', text)
    assert head is not None
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    # matplotlib escapes the texts that it draws
    return Markup(f'<svg {namespaces} {head[1]} role="img" aria-label="{escape(alt)}">{text[head.end() :]}')
