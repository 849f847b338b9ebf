"""What training did inside a model: four panels between checkpoints, or over training (Figure 5 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bupo.report.logs import last_internal_rollout, read_log
from bupo.report.results import Comparison, ModelReading, TrainingReading, load_readings
from bupo.report.style import (
    BAND,
    SOFT,
    layer_axis,
    legend_below,
    line_with_band,
    looks,
    new_figure,
    numbers,
    save,
    styled,
)

_DASHED: Any = (0, (4, 3))


def write_comparison_figure(comparison: Comparison | Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write ``inside.png`` and ``inside.svg``; raises `InputError` for an incomplete comparison."""
    comparison = Comparison.parse(comparison, "the comparison")
    return save(comparison_figure(comparison), Path(folder), "inside")


def comparison_figure(comparison: Comparison) -> Figure:
    """Cosine (its change from the first model), entropy, perplexity and divergence, with bands of 2 standard errors."""
    layer, layers, models = comparison.layer, comparison.layers, comparison.models
    look = looks([model.name for model in models])
    with styled():
        figure = new_figure(height=6.4)
        (cosine, entropy), (perplexity, divergence) = figure.subplots(2, 2)
        changes = any(model.change for model in models)  # of a few hundredths, invisible on the cosines themselves
        for model in models:
            style: dict[str, Any] = dict(zip(("color", "marker"), look[model.name], strict=True), label=model.name)
            shown = model.change if changes else model
            x = range(1, layers + 1)
            if shown is not None:
                line_with_band(cosine, x, shown.cosine_of_layer.mean, shown.cosine_of_layer.standard_error, **style)
            line_with_band(entropy, x, model.entropy.mean, model.entropy.standard_error, **style)
            later = range(layer + 1, layers + 2)
            line_with_band(divergence, later, model.divergence.mean, model.divergence.standard_error, **style)
        near = f"cos(state {layer}, each layer's)"
        cosine.set_title(f"Change of {near}" if changes else near)
        entropy.set_title("Entropy of the layer policies (nats)")
        for axes in (cosine, entropy):
            layer_axis(axes, layers)
            axes.axvline(layer, color=SOFT, linewidth=1, linestyle=_DASHED)
        if changes:
            cosine.axhline(0, color=SOFT, linewidth=1.2)
        entropy.set_ylim(bottom=0)
        divergence.set_title(f"KL(layer {layer} || later policies), nats")
        _later_axis(divergence, layer, layers)
        divergence.set_ylim(bottom=0)
        _perplexities(perplexity, models, look)
        for axes in (cosine, entropy, divergence):
            axes.set_xlabel("layer")
        if len(models) > 1:
            legend_below(figure, entropy)
    return figure


def _later_axis(axes: Axes, layer: int, layers: int) -> None:
    """Tick the layers above the chosen one, and at the end the output, which includes the final norm."""
    later = list(range(layer + 1, layers + 1))
    step = max(1, -(-len(later) // 7))
    shown = [m for m in later if (layers - m) % step == 0 and layers - m >= step * 0.7] if step > 1 else later
    axes.set_xticks([*shown, layers + 1], [*map(str, shown), "output"])
    axes.set_xlim(layer + 0.5, layers + 1.5)


def _perplexities(axes: Axes, models: Sequence[ModelReading], look: Mapping[str, tuple[str, str]]) -> None:
    axes.set_title("Perplexity of the full policy")
    for place, model in enumerate(models):
        colour, marker = look[model.name]
        error = BAND * (model.perplexity.standard_error or 0)
        axes.errorbar(
            [place], [model.perplexity.value], yerr=[error], color=colour, marker=marker, markersize=6, capsize=3,
            linestyle="none",
        )  # fmt: skip
    short = [m.name if len(m.name) <= 14 else m.name[:13] + "…" for m in models]
    axes.set_xticks(range(len(models)), short, rotation=0 if len(models) <= 3 else 30)
    axes.set_xlim(-0.6, len(models) - 0.4)
    axes.grid(axis="x", visible=False)


def write_training_figure(run: Path) -> Path | None:
    """Write ``inside/inside.png`` and ``.svg`` of a training run that made two readings or more; return the first."""
    readings = load_readings(run / "inside")
    if len(readings) < 2:
        return None
    switch = last_internal_rollout(read_log(run / "log.jsonl"))
    return save(training_figure([(run.name, readings, switch)]), run / "inside", "inside")[0]


def training_figure(runs: Sequence[tuple[str, Sequence[TrainingReading], float | None]]) -> Figure:
    """Cosine to the top layers, entropy, perplexity and divergence over rollout batches.

    Bands are two standard errors of the change since the start, paired by token.

    Args:
        runs: name, readings, and the last rollout batch of the internal phase (None: the phase never switched).
    """
    look = looks([name for name, _, _ in runs])
    layers = {readings[0].layer for _, readings, _ in runs}
    which = f"layer {layers.pop()}" if len(layers) == 1 else "its layer"
    with styled():
        figure = new_figure(8.4, 6.2)
        panels = (cosine, entropy), (perplexity, divergence) = figure.subplots(2, 2, sharex=True)
        for name, readings, switch in runs:
            colour, marker = look[name]
            x = [reading.rollouts_done for reading in readings]
            style: dict[str, Any] = {"color": colour, "marker": marker, "label": name}
            for axes, point in ((cosine, _top_cosine), (perplexity, _perplexity)):
                line_with_band(axes, x, *zip(*map(point, readings), strict=True), **style)
            own = [_at(r, "entropy", r.layer - 1) for r in readings]
            line_with_band(entropy, x, *zip(*own, strict=True), **style)
            output = [_at(r, "divergence", -1) for r in readings]
            line_with_band(divergence, x, *zip(*output, strict=True), **style)
            if len(readings[0].divergence.mean) > 1:
                following = [_at(r, "divergence", 0) for r in readings]
                line_with_band(divergence, x, *zip(*following, strict=True), color=colour, linestyle=":", marker="")
            if switch is not None:
                for axes in panels[0].tolist() + panels[1].tolist():
                    axes.axvline(switch, color=colour, linewidth=1.2, linestyle=_DASHED)
        low, high = divergence.get_ylim()
        divergence.set_ylim(min(low, 0.0), high + 0.12 * (high - low))  # room for the note
        note = {"transform": divergence.transAxes, "ha": "right", "va": "top", "fontsize": 8.5, "color": SOFT}
        divergence.text(0.99, 0.98, "dotted: to the next layer", **note)
        cosine.set_title(f"Cosine of {which}'s states to the top quarter's")
        entropy.set_title(f"Entropy of {which}'s policy (nats)")
        perplexity.set_title("Perplexity of the full policy")
        divergence.set_title(f"KL({which} || output), nats")
        for axes in (perplexity, divergence):
            axes.set_xlabel("rollout batches trained on")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        legend_below(figure, cosine)
    return figure


Point = tuple[float, float]  # a value, and the standard error of its change since the start


def _at(reading: TrainingReading, name: str, place: int) -> Point:
    error = numbers(getattr(reading.change, name).standard_error)[place] if reading.change else 0.0
    return getattr(reading, name).mean[place], error


def _perplexity(reading: TrainingReading) -> Point:
    value, ratio = reading.perplexity.value, reading.change.perplexity_ratio if reading.change else None
    return value, value * (ratio.standard_error or 0) / ratio.value if ratio else 0.0


def _top_cosine(reading: TrainingReading) -> Point:
    """Mean over the top quarter of the layers above l; their errors share the same tokens, so they are averaged too."""
    first = min(max(reading.layer, reading.layers - max(1, reading.layers // 4)), reading.layers - 1)
    values, errors = zip(*(_at(reading, "cosine_of_layer", i) for i in range(first, reading.layers)), strict=True)
    return sum(values) / len(values), sum(errors) / len(errors)
