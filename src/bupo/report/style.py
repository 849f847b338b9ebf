"""One look for all figures, and how they are saved. matplotlib is imported only when a figure is made."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart with every common colour vision, and in print
BLUE, ORANGE, GREEN, RED, PINK, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
CYCLE = (BLUE, RED, GREEN, PINK, ORANGE, SKY)
# The page replaces these three by its own variables, so that figures follow light and dark.
INK, SOFT, GRID = "#1b1f24", "#5c6570", "#dde1e6"
MARKERS = ("o", "s", "^", "D", "v", "P")
REGION_COLOURS = {"exploration": ORANGE, "integration": SKY, "convergence": GREEN}
ROLE_LOOKS = {"start": (SOFT, "o"), "grpo": (BLUE, "s"), "bupo": (RED, "^")}
WIDTH = 7.2  # inches; at 2 x 100 dots an inch readable at the width of a README

_RC: dict[str, Any] = {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # names may hold dollar signs
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
    """Within it, figures have the common look."""
    import matplotlib

    settings: Any = {**_RC, **{key.replace("__", "."): value for key, value in more.items()}}
    with matplotlib.rc_context(settings):
        yield


def new_figure(width: float = WIDTH, height: float = 3.9) -> Figure:
    """A figure without a window (no pyplot: nothing global to close)."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def role(name: str) -> str | None:
    """Which of ``start``, ``grpo`` and ``bupo`` a model is by its name, or None."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    for known, hints in (("bupo", ("bupo",)), ("grpo", ("grpo",)), ("start", ("start", "base", "initial"))):
        if any(hint in words for hint in hints):
            return known
    return None


def looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each name: the same model looks the same in every figure of a page."""
    free = [(c, m) for c, m in zip(CYCLE, MARKERS, strict=True) if (c, m) not in ROLE_LOOKS.values()]
    named = {ROLE_LOOKS[known][0] for known in map(role, names) if known}
    free.sort(key=lambda look: look[0] in named)  # a colour that no model has by its name first
    found: dict[str, tuple[str, str]] = {}
    for name in names:
        own = ROLE_LOOKS.get(role(name) or "")
        if own is None or own in found.values():
            own = next((look for look in free if look not in found.values()), None)
        number = len(found)
        found[name] = own or (CYCLE[number % len(CYCLE)], MARKERS[(number // len(CYCLE) + number) % len(MARKERS)])
    return found


def layer_axis(axes: Axes, layers: int) -> None:
    """x from layer 1 to ``layers``, both ends ticked, whole numbers only."""
    from matplotlib.ticker import FixedLocator

    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, layers) if layers / s <= 14)
    ticks = [1, *range(step if step > 1 else 2, layers + 1, step)]
    if layers - ticks[-1] >= 0.4 * step:
        ticks.append(layers)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    margin = max(0.5, 0.015 * (layers - 1))
    axes.set_xlim(1 - margin, layers + margin)


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``name.png`` and ``name.svg``, each whole or not at all; the same figure gives the same bytes."""
    import os

    folder.mkdir(parents=True, exist_ok=True)
    metadata: Mapping[str, Mapping[str, None]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    paths = []
    for kind in ("png", "svg"):
        path = folder / f"{name}.{kind}"
        temporary = folder / f".{name}.{os.getpid()}.{kind}"
        try:
            with styled():
                figure.savefig(temporary, dpi=200, facecolor="white", metadata=dict(metadata[kind]))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        paths.append(path)
    return paths


def inline_svg(figure: Figure, name: str, alt: str) -> str:
    """The figure as an ``<svg>`` element for a page: own ids, text as text, colours that follow the page's.

    Args:
        name: unique on the page; letters, digits and dashes.
        alt: what the figure shows, read by screen readers.
    """
    from markupsafe import escape

    stream = io.StringIO()
    with styled(svg__fonttype="none"):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(\bid="|url\(#|href="#)', lambda found: f"{found[1]}{name}-", text)
    for colour, variable in ((INK, "--ink"), (SOFT, "--soft"), (GRID, "--grid")):
        text = text.replace(colour, f"var({variable})")
    text = text.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans', sans-serif")
    head = re.match(r"<svg[^>]*>", text)
    assert head is not None
    box = re.search(r'viewBox="[^"]*"', head[0])
    assert box is not None
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} {box[0]} role="img" aria-label="{escape(alt)}">' + text[head.end() :]
