"""The common look of all figures, the elements they share, and how they are saved."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from bupo.run_folder import write_bytes

Values = Sequence[float | None]
BAND = 2.0  # half-width of bands, in standard errors; the boundary rule uses the same

# Okabe and Ito's palette, which stays distinguishable under colour blindness and in print
BLUE, ORANGE, GREEN, RED, PINK, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
CYCLE = (BLUE, RED, GREEN, PINK, ORANGE, SKY)
# The page replaces these three by CSS variables, so that figures follow its light or dark scheme.
INK, SOFT, GRID = "#1b1f24", "#5c6570", "#dde1e6"
MARKERS = ("o", "s", "^", "D", "v", "P")
REGION_COLOURS = {"exploration": ORANGE, "integration": SKY, "convergence": GREEN}
ROLE_LOOKS = {"start": (SOFT, "o"), "grpo": (BLUE, "s"), "bupo": (RED, "^")}
WIDTH = 7.2  # inches; readable at the width of a README with 200 dots per inch

_RC: dict[str, Any] = {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # model names may contain dollar signs
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "lines.solid_capstyle": "round",
    "svg.hashsalt": "bupo",
}


@contextmanager
def styled(**more: Any) -> Iterator[None]:
    """Apply the common look to figures made or saved inside the context."""
    settings: Any = {**_RC, **{key.replace("__", "."): value for key, value in more.items()}}
    with matplotlib.rc_context(settings):
        yield


def new_figure(width: float = WIDTH, height: float = 3.9) -> Figure:
    """Return an empty figure (without pyplot, so there is nothing global to close)."""
    return Figure(figsize=(width, height))


def role(name: str) -> str | None:
    """Return ``start``, ``grpo`` or ``bupo`` if the name contains one of the role's words, else None."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    for found, hints in (("bupo", ("bupo",)), ("grpo", ("grpo",)), ("start", ("start", "base", "initial"))):
        if any(hint in words for hint in hints):
            return found
    return None


def looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Assign a colour and a marker to each name, so that a model looks the same in every figure of a page."""
    free = [(c, m) for c, m in zip(CYCLE, MARKERS, strict=True) if (c, m) not in ROLE_LOOKS.values()]
    role_colours = {ROLE_LOOKS[r][0] for r in map(role, names) if r}
    free.sort(key=lambda look: look[0] in role_colours)  # prefer colours that no role on this page uses
    assigned: dict[str, tuple[str, str]] = {}
    for name in names:
        look = ROLE_LOOKS.get(role(name) or "")
        if look is None or look in assigned.values():
            look = next((candidate for candidate in free if candidate not in assigned.values()), None)
        n = len(assigned)
        assigned[name] = look or (CYCLE[n % len(CYCLE)], MARKERS[(n // len(CYCLE) + n) % len(MARKERS)])
    return assigned


def line_with_band(axes: Axes, x: Sequence[float], y: Values, errors: Values | None = None, **style: Any) -> None:
    """Plot ``y`` with markers, and a band of two standard errors where they are known.

    Args:
        y: values; None leaves a gap.
        errors: standard errors of ``y``; None, as a whole or for single values, draws no band there.
        style: passed to ``Axes.plot``; a ``color`` is required.
    """
    values = numbers(y)
    axes.plot(x, values, **{"markersize": 4 if len(values) <= 40 else 2.5, "zorder": 3, **style})
    if errors is not None:
        wide = [BAND * e for e in numbers(errors)]
        if any(w > 0 for w in wide):
            low, high = ([v + sign * w for v, w in zip(values, wide, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0, zorder=2)


def numbers(values: Values) -> list[float]:
    """The values with NaN in place of None, which matplotlib leaves out."""
    return [math.nan if v is None else float(v) for v in values]


def titled(axes: Axes, title: str, unit: str) -> None:
    """Set the title of a panel and the unit on its vertical axis."""
    axes.set_title(title)
    axes.set_ylabel(unit)


def legend_below(figure: Figure, source: Axes | None = None, columns: int = 4) -> None:
    """Put one legend below the whole figure, with the entries of ``source`` (default: of all axes, each once)."""
    panels = figure.axes if source is None else [source]
    entries = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=min(columns, len(entries)))


def layer_axis(axes: Axes, layers: int, most: int = 14) -> None:
    """Let x run from layer 1 to ``layers`` with at most about ``most`` ticks on whole numbers, both ends ticked."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, layers) if layers / s <= most)
    ticks = [1, *range(step if step > 1 else 2, layers + 1, step)]
    if layers - ticks[-1] >= 0.4 * step:
        ticks.append(layers)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    margin = max(0.5, 0.015 * (layers - 1))
    axes.set_xlim(1 - margin, layers + margin)


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``name.png`` and ``name.svg`` atomically; the same figure gives the same bytes."""
    metadata: Mapping[str, dict[str, None]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    paths = []
    for kind, left_out in metadata.items():
        stream = io.BytesIO()
        with styled():
            figure.savefig(stream, format=kind, dpi=200, facecolor="white", metadata=left_out)
        paths.append(write_bytes(Path(folder) / f"{name}.{kind}", stream.getvalue()))
    return paths


def inline_svg(figure: Figure, name: str, alt: str) -> str:
    """Return the figure as an ``<svg>`` element whose ids are unique on the page and whose colours follow it.

    Args:
        name: unique on the page; letters, digits and dashes.
        alt: what the figure shows, for screen readers.
    """
    stream = io.StringIO()
    with styled(svg__fonttype="none"):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(\bid="|url\(#|href="#)', lambda match: f"{match[1]}{name}-", text)
    for colour, variable in ((INK, "--ink"), (SOFT, "--soft"), (GRID, "--grid")):
        text = text.replace(colour, f"var({variable})")
    text = text.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans', sans-serif")
    head = re.match(r"<svg[^>]*>", text)
    assert head is not None
    box = re.search(r'viewBox="[^"]*"', head[0])
    assert box is not None
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} {box[0]} role="img" aria-label="{escape(alt)}">' + text[head.end() :]
