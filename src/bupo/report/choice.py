"""The evidence of a layer choice: criteria over the layers, their answers and how often a bootstrap repeats them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bupo.errors import InputError
from bupo.report.style import BLUE, INK, ORANGE, PINK, RED, SKY, layer_axis, looks, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Analysis = Mapping[str, Any]
BAND = 2.0  # standard errors to each side
READINGS = {
    "raw": ("as it is (Eq. 5)", BLUE, "o"),
    "norm": ("final norm applied", RED, "s"),
}
NEEDED = {
    "raw": ("entropy", "kl", "top1"),
    "norm": ("entropy", "kl", "top1", "recovered"),
}
CRITERIA = {
    "boundary": ("boundary rule", ORANGE),
    "knee": ("knee of agreement", SKY),
}
NONE = "none"


def check_choice(analysis: Analysis, where: str) -> None:
    """Raise `InputError` unless the analysis's ``layer_choice``, where it has one, can be drawn."""
    block = analysis.get("layer_choice")
    if block is None:
        return
    again = "write it again with `bupo analyze`"
    try:
        curves = {name: [block["curves"][name][kind] for kind in kinds] for name, kinds in NEEDED.items()}
        answers = [block["recommendation"], *block["criteria"]]
        complete = all(isinstance(a["reason"], str) for a in answers)
        named = all(a["name"] and isinstance(a["layer"], int | None) for a in block["criteria"])
        lengths = {len(column) for columns in curves.values() for column in columns}
    except (KeyError, TypeError):
        raise InputError(f"{where}: its layer_choice is incomplete; {again}") from None
    if not complete or not named or lengths != {analysis["layers"]}:
        raise InputError(f"{where}: its layer_choice does not fit {analysis['layers']} layers; {again}")


def layer_choice(analysis: Analysis) -> Figure:
    """Agreement, divergence and entropy over layers 1..L; dashed: the recommended layer.

    Args:
        analysis: content of ``analysis.json`` with a ``layer_choice``.
    """
    block, layers = analysis["layer_choice"], analysis["layers"]
    curves = block["curves"]
    with styled():
        figure = new_figure(8.6, 6.2)
        grid = figure.add_gridspec(2, 2)
        panels = [figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, :])]
        agreement, divergence, entropies = panels
        _titled(agreement, "Agreement with the final policy", "per cent")
        _line(agreement, block, "norm", "recovered", "recovered information", BLUE, "o", 100)
        _line(agreement, block, "norm", "top1", "same top token", PINK, "s", 100)
        agreement.set_ylim(min(0, agreement.get_ylim()[0]), 105)
        _titled(divergence, "KL from the final policy", "nats")
        for name, (label, colour, marker) in READINGS.items():
            _line(divergence, block, name, "kl", label, colour, marker)
        largest = max(max(curves[name]["kl"]) for name in READINGS)
        if largest > 5:
            divergence.set_yscale("symlog", linthresh=1, linscale=0.6)
            divergence.set_yticks([t for t in (0, 1, 3, 10, 30, 100, 300, 1000, 3000) if t <= 1.5 * largest])
            divergence.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        divergence.set_ylim(bottom=0)
        _titled(entropies, "Entropy of the layer policy", "nats")
        for name, (label, colour, marker) in READINGS.items():
            _line(entropies, block, name, "entropy", label, colour, marker)
        entropies.set_ylim(bottom=0)
        for axes in panels:
            layer_axis(axes, layers)
            _mark(axes, analysis)
        for axes in panels:
            axes.set_xlabel("layer")
        agreement.legend(loc="best", fontsize=8)
        handles, labels = divergence.get_legend_handles_labels()
        entropies.legend(handles, labels, loc="best", fontsize=8)
    return figure


def overlay(analyses: Sequence[tuple[str, Analysis]]) -> Figure:
    """Recovered information and normed entropy of several models over each other; dashed: recommended layers."""
    relative = len({a["layers"] for _, a in analyses}) > 1
    look = looks([name for name, _ in analyses])
    with styled():
        figure = new_figure(8.6, 3.8)
        left, right = figure.subplots(1, 2)
        _titled(left, "Agreement with the final policy", "recovered, per cent")
        _titled(right, "Entropy, final norm applied", "nats")
        for name, analysis in analyses:
            block, layers = analysis["layer_choice"], analysis["layers"]
            x = [(i + 1) / layers if relative else i + 1 for i in range(layers)]
            colour, marker = look[name]
            _line(left, block, "norm", "recovered", name, colour, marker, 100, x)
            _line(right, block, "norm", "entropy", name, colour, marker, 1, x)
            layer = block["recommendation"]["layer"]
            for axes in (left, right) if layer is not None else ():
                axes.axvline(x[layer - 1], color=colour, linewidth=1.2, linestyle="--")
        right.set_ylim(bottom=0)
        for axes in (left, right):
            axes.set_xlabel("depth (layer / number of layers)" if relative else "layer")
            if not relative:
                layer_axis(axes, analyses[0][1]["layers"])
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(analyses)))
    return figure


def answer_text(answer: Mapping[str, Any]) -> str:
    """``layer 22``, or ``none``."""
    return "none" if answer.get("layer") is None else f"layer {answer['layer']}"


def _titled(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_ylabel(unit)


def _line(
    axes: Axes,
    block: Mapping[str, Any],
    reading: str,
    kind: str,
    label: str,
    colour: str,
    marker: str,
    scale: float = 1,
    x: Sequence[float] | None = None,
) -> None:
    values = [scale * v for v in block["curves"][reading][kind]]
    x = x or range(1, len(values) + 1)
    size = 3.5 if len(values) <= 40 else 2
    axes.plot(x, values, color=colour, marker=marker, markersize=size, linewidth=1.5, label=label, zorder=3)
    errors = (block.get("standard_errors") or {}).get(reading, {}).get(kind)
    if errors is not None:
        wide = [BAND * scale * (e or 0) for e in errors]
        low, high = ([v + sign * w for v, w in zip(values, wide, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0, zorder=2)


def _mark(axes: Axes, analysis: Analysis) -> None:
    layer = analysis["layer_choice"]["recommendation"]["layer"]
    if layer is not None:
        axes.axvline(layer, color=INK, linewidth=1.3, linestyle="--", zorder=2.5)
