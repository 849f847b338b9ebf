"""What training did inside a model: four panels between checkpoints, or over training (Figure 5 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bupo.report import style
from bupo.report.logs import last_internal_rollout, read_log
from bupo.report.results import Comparison, Means, ModelReading, TrainingReading, load_readings

_DASHED: Any = (0, (4, 3))


def write_comparison_figure(comparison: Comparison | Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write ``inside.png`` and ``inside.svg``; raises `InputError` for an incomplete comparison."""
    comparison = Comparison.parse(comparison, "the comparison")
    return style.save(comparison_figure(comparison), Path(folder), "inside")


def comparison_figure(comparison: Comparison) -> Figure:
    """Cosine (its change from the first model), entropy, perplexity and divergence, with bands of 2 standard errors."""
    layer, layers, models = comparison.layer, comparison.layers, comparison.models
    look = style.looks([model.name for model in models])
    with style.styled():
        figure = style.new_figure(height=6.4)
        (cosine, entropy), (perplexity, divergence) = figure.subplots(2, 2)
        changes = any(model.change for model in models)  # of a few hundredths, invisible on the cosines themselves

        def curve(axes: Axes, first: int, means: Means, model: ModelReading) -> None:
            x, (colour, marker) = range(first, first + len(means.mean)), look[model.name]
            errors = means.standard_error
            style.line_with_band(axes, x, means.mean, errors, color=colour, marker=marker, label=model.name)

        for model in models:
            shown = model.change if changes else model
            if shown is not None:
                curve(cosine, 1, shown.cosine_of_layer, model)
            curve(entropy, 1, model.entropy, model)
            curve(divergence, layer + 1, model.divergence, model)
        near = f"cos(state {layer}, each layer's)"
        cosine.set_title(f"Change of {near}" if changes else near)
        entropy.set_title("Entropy of the layer policies (nats)")
        for axes in (cosine, entropy):
            style.layer_axis(axes, layers)
            axes.axvline(layer, color=style.SOFT, linewidth=1, linestyle=_DASHED)
        if changes:
            cosine.axhline(0, color=style.SOFT, linewidth=1.2)
        entropy.set_ylim(bottom=0)
        divergence.set_title(f"KL(layer {layer} || later policies), nats")
        _later_axis(divergence, layer, layers)
        divergence.set_ylim(bottom=0)
        _perplexities(perplexity, models, look)
        for axes in (cosine, entropy, divergence):
            axes.set_xlabel("layer")
        if len(models) > 1:
            style.legend_below(figure, entropy)
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
        error = style.BAND * (model.perplexity.standard_error or 0)
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
    return style.save(training_figure([(run.name, readings, switch)]), run / "inside", "inside")[0]


def training_figure(runs: Sequence[tuple[str, Sequence[TrainingReading], float | None]]) -> Figure:
    """Cosine to the top layers, entropy, perplexity and divergence over rollout batches.

    Bands are two standard errors of the change since the start, paired by token.

    Args:
        runs: name, readings, and the last rollout batch of the internal phase (None: the phase never switched).
    """
    look = style.looks([name for name, _, _ in runs])
    layers = {readings[0].layer for _, readings, _ in runs}
    which = f"layer {layers.pop()}" if len(layers) == 1 else "its layer"
    titles = (
        f"Cosine of {which}'s states to the top quarter's", f"Entropy of {which}'s policy (nats)",
        "Perplexity of the full policy", f"KL({which} || output), nats",
    )  # fmt: skip
    with style.styled():
        figure = style.new_figure(8.4, 6.2)
        panels = list(figure.subplots(2, 2, sharex=True).flat)
        for name, readings, switch in runs:
            x, (colour, marker) = [reading.rollouts_done for reading in readings], look[name]
            for axes, point in zip(panels, (_top_cosine, _entropy, _perplexity, _to_output), strict=True):
                values, errors = zip(*map(point, readings), strict=True)
                style.line_with_band(axes, x, values, errors, color=colour, marker=marker, label=name)
            if len(readings[0].divergence.mean) > 1:
                values, errors = zip(*(_at(r, "divergence", 0) for r in readings), strict=True)
                style.line_with_band(panels[3], x, values, errors, color=colour, linestyle=":")
            for axes in panels if switch is not None else ():
                axes.axvline(switch, color=colour, linewidth=1.2, linestyle=_DASHED)
        low, high = panels[3].get_ylim()
        panels[3].set_ylim(min(low, 0.0), high + 0.12 * (high - low))  # room for the note
        note = {"transform": panels[3].transAxes, "ha": "right", "va": "top", "fontsize": 8.5, "color": style.SOFT}
        panels[3].text(0.99, 0.98, "dotted: to the next layer", **note)
        for axes, title in zip(panels, titles, strict=True):
            axes.set_title(title)
        for axes in panels[2:]:
            axes.set_xlabel("rollout batches trained on")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        style.legend_below(figure, panels[0])
    return figure


Point = tuple[float, float]  # a value, and the standard error of its change since the start


def _at(reading: TrainingReading, name: str, place: int) -> Point:
    error = style.numbers(getattr(reading.change, name).standard_error)[place] if reading.change else 0.0
    return getattr(reading, name).mean[place], error


def _entropy(reading: TrainingReading) -> Point:
    return _at(reading, "entropy", reading.layer - 1)


def _to_output(reading: TrainingReading) -> Point:
    return _at(reading, "divergence", -1)


def _perplexity(reading: TrainingReading) -> Point:
    value, ratio = reading.perplexity.value, reading.change.perplexity_ratio if reading.change else None
    return value, value * (ratio.standard_error or 0) / ratio.value if ratio else 0.0


def _top_cosine(reading: TrainingReading) -> Point:
    """Mean over the top quarter of the layers above l; their errors share the same tokens, so they are averaged too."""
    first = min(max(reading.layer, reading.layers - max(1, reading.layers // 4)), reading.layers - 1)
    values, errors = zip(*(_at(reading, "cosine_of_layer", i) for i in range(first, reading.layers)), strict=True)
    return sum(values) / len(values), sum(errors) / len(errors)
