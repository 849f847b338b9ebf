"""The evidence of a layer choice: criteria over the layers, their answers and how often a bootstrap repeats them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bupo.errors import InputError
from bupo.report.style import BLUE, GREEN, INK, ORANGE, PINK, RED, SKY, SOFT, layer_axis, looks, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Analysis = Mapping[str, Any]
BAND = 2.0  # standard errors to each side
READINGS = {
    "raw": ("as it is (Eq. 5)", BLUE, "o"),
    "norm": ("final norm applied", RED, "s"),
    "fitted": ("fitted temperature", GREEN, "^"),
}
NEEDED = {
    "raw": ("entropy", "kl", "top1"),
    "norm": ("entropy", "kl", "top1"),
    "fitted": ("entropy", "kl", "temperature"),
    "norm_fitted": ("temperature", "recovered"),
}
CRITERIA = {
    "boundary": ("boundary rule", ORANGE),
    "norm_entropy": ("same rule, normed", RED),
    "fitted_entropy": ("same rule, fitted", GREEN),
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
        complete = all(
            isinstance(a["share"], int | float) and isinstance(a["other"], Mapping) and isinstance(a["reason"], str)
            for a in answers
        )
        named = all(a["name"] and isinstance(a["layer"], int | None) for a in block["criteria"])
        lengths = {len(column) for columns in curves.values() for column in columns}
    except (KeyError, TypeError):
        raise InputError(f"{where}: its layer_choice is incomplete; {again}") from None
    if not complete or not named or lengths != {analysis["layers"]}:
        raise InputError(f"{where}: its layer_choice does not fit {analysis['layers']} layers; {again}")


def layer_choice(analysis: Analysis) -> Figure:
    """Agreement, divergence, entropy and temperature over layers 1..L, and every criterion's bootstrap shares.

    Args:
        analysis: content of ``analysis.json`` with a ``layer_choice``.
    """
    block, layers = analysis["layer_choice"], analysis["layers"]
    curves = block["curves"]
    with styled():
        figure = new_figure(8.6, 8.8)
        grid = figure.add_gridspec(3, 2, height_ratios=(1, 1, 0.95))
        panels = [figure.add_subplot(grid[i // 2, i % 2]) for i in range(4)]
        agreement, divergence, entropies, temperatures = panels
        _titled(agreement, "Agreement with the final policy", "per cent")
        _line(agreement, block, "norm_fitted", "recovered", "recovered information", BLUE, "o", 100)
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
        _temperatures(temperatures, block, layers)
        for axes in panels:
            layer_axis(axes, layers)
            _mark(axes, analysis)
        for axes in panels[2:]:
            axes.set_xlabel("layer")
        for axes in (agreement, temperatures):
            axes.legend(loc="best", fontsize=8)
        handles, labels = divergence.get_legend_handles_labels()
        entropies.legend(handles, labels, loc="best", fontsize=8)
        _shares(figure.add_subplot(grid[2, :]), analysis)
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
            _line(left, block, "norm_fitted", "recovered", name, colour, marker, 100, x)
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
    """``layer 22, in 44 % of bootstrap draws (23: 25 %, 19: 11 %)``."""
    layer = "none" if answer.get("layer") is None else f"layer {answer['layer']}"
    others = ", ".join(f"{name}: {percent(share)}" for name, share in list(answer["other"].items())[:4])
    return f"{layer}, in {percent(answer['share'])} of bootstrap draws" + (f" ({others})" if others else "")


def percent(share: float) -> str:
    """``83 %``; a share that is not all or nothing is not rounded to it."""
    return f"{100 * share:.{1 if 0 < share < 0.005 or 0.995 <= share < 1 else 0}f} %"


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
        wide = [BAND * scale * e for e in errors]
        low, high = ([v + sign * w for v, w in zip(values, wide, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0, zorder=2)


def _temperatures(axes: Axes, block: Mapping[str, Any], layers: int) -> None:
    """Fitted temperatures on a logarithmic axis; where none is finite, a mark at the top edge."""
    _titled(axes, "Fitted temperature", "T")
    axes.set_yscale("log")
    for name, label, colour, marker in (
        ("fitted", "state as it is", GREEN, "^"),
        ("norm_fitted", "final norm applied", BLUE, "o"),
    ):
        values = block["curves"][name]["temperature"]
        known = [float("nan") if v is None else v for v in values]
        x = range(1, layers + 1)
        axes.plot(x, known, color=colour, marker=marker, markersize=3.5, linewidth=1.5, label=label, zorder=3)
        infinite = [i + 1 for i, v in enumerate(values) if v is None]
        if infinite:
            axes.plot(
                infinite, [0.97] * len(infinite), linestyle="none", marker="^", markersize=5, markerfacecolor="none",
                color=colour, transform=axes.get_xaxis_transform(), label=f"{label}: infinite", zorder=3,
            )  # fmt: skip
    finite = [v for name in ("fitted", "norm_fitted") for v in block["curves"][name]["temperature"] if v is not None]
    low, high = (min(finite), max(finite)) if finite else (1.0, 1.0)
    axes.set_ylim(low / 2, max(high * 3, low * 8))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if high / low < 10:
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        axes.tick_params(axis="y", which="minor", labelsize=8)
    axes.axhline(1, color=SOFT, linewidth=1, linestyle=(0, (1, 1.5)))


def _mark(axes: Axes, analysis: Analysis) -> None:
    layer = analysis["layer_choice"]["recommendation"]["layer"]
    if layer is not None:
        axes.axvline(layer, color=INK, linewidth=1.3, linestyle="--", zorder=2.5)


def _shares(axes: Axes, analysis: Analysis) -> None:
    """A row a criterion: a bar at every layer (and at none), as high as its share of the bootstrap draws."""
    block, layers = analysis["layer_choice"], analysis["layers"]
    best = block["recommendation"]
    rows = [("recommendation", INK, best)]
    rows += [(*CRITERIA.get(a["name"], (str(a["name"]), SOFT)), a) for a in block["criteria"]]
    column = layers + max(1.5, 0.05 * layers)  # where draws without a layer are shown
    answered: list[str] = []
    for number, (_, colour, answer) in enumerate(rows):
        base = len(rows) - 1 - number
        own = NONE if answer["layer"] is None else str(answer["layer"])
        for name, share in {own: answer["share"], **answer["other"]}.items():
            at = column if name == NONE else float(name)
            axes.bar(
                at, 0.82 * share, bottom=base, width=0.8, color=colour, alpha=0.9 if name == own else 0.35, linewidth=0,
                zorder=3,
            )  # fmt: skip
        answered.append(f"{own if own == NONE else f'layer {own}'}: {percent(answer['share'])}")
        axes.axhline(base, color=SOFT, linewidth=0.6, alpha=0.6)
    places = [len(rows) - 1 - i + 0.35 for i in range(len(rows))]
    axes.set_yticks(places, [label for label, _, _ in rows])
    axes.tick_params(axis="y", length=0)
    right = axes.secondary_yaxis("right")
    right.set_yticks(places, answered)
    right.tick_params(axis="y", length=0)
    right.spines["right"].set_visible(False)
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(-0.05, len(rows))
    where = "none" if best["layer"] is None else f"layer {best['layer']}"
    axes.set_title(f"Which layer, and how sure: recommended is {where}")
    layer_axis(axes, layers)
    ticks = [int(t) for t in axes.get_xticks() if t <= layers]
    axes.set_xticks([*ticks, column], [*map(str, ticks), NONE])
    axes.set_xlim(axes.get_xlim()[0], column + 0.6)
    axes.axvline((layers + column) / 2, color=SOFT, linewidth=0.8, linestyle=(0, (1, 1.5)))
    if best["layer"] is not None:
        axes.axvline(best["layer"], color=INK, linewidth=1.3, linestyle="--", zorder=1)
    axes.set_xlabel(f"layer; bars: share of {block['draws']} bootstrap draws ({block['bootstrap']})")
