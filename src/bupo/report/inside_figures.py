"""Figures of training: its curves, and what it did inside a model, between checkpoints or over training (Figure 5)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bupo.report import style
from bupo.report.logs import TrainingRun
from bupo.report.results import Comparison, Means, TrainingReading

_PANELS = (
    ("reward", "Reward", "mean reward"),
    ("entropy", "Entropy", "nats per token"),
    ("internal_entropy", "Entropy of the internal policy", "nats per token"),
    ("length", "Response length", "tokens"),
    ("clip", "Clip fraction", "share of tokens"),
)


@style.styled()
def training_curves(runs: Sequence[tuple[str, TrainingRun]]) -> Figure:
    """Reward, entropies, response length and clip fraction over rollout batches; dashes mark the switch of phases.

    Faint lines are the values, bold ones their running means (over about a tenth of the run, never across the switch).
    """
    look = style.looks([name for name, _ in runs])
    shown = [panel for panel in _PANELS if any(run.series(panel[0])[0] for _, run in runs)]
    figure, panels = style.grid(len(shown), 2, 8.4, 2.5 * -(-len(shown) // 2) + 0.5, sharex=True)
    for axes, (name, title, unit) in zip(panels, shown, strict=True):
        axes.set(title=title, ylabel=unit)
        for label, run in runs:
            colour, switch = look[label][0], run.switch
            _running_mean(axes, *run.series(name), label, colour, switch)
            if switch is not None:
                phase = f"{label}, internal phase ends"
                axes.axvline(switch + 0.5, color=colour, linewidth=1.2, linestyle=style.DASHED, label=phase)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    for axes in panels[-2:]:
        axes.set_xlabel("rollout batch")
        axes.tick_params(labelbottom=True)
    style.legend_below(figure, columns=3)
    return figure


def _running_mean(axes: Axes, x: list[float], y: list[float], label: str, colour: str, switch: float | None) -> None:
    half = round(len(y) / 10) // 2
    if half < 1:
        axes.plot(x, y, color=colour, label=label)
        return
    axes.plot(x, y, color=colour, alpha=0.3, linewidth=1)
    for internal in (True, False):
        phase = [i for i, at in enumerate(x) if (switch is not None and at <= switch) is internal]
        windows = [[y[j] for j in phase if abs(j - i) <= half] for i in phase]
        means = [sum(window) / len(window) for window in windows]
        axes.plot([x[i] for i in phase], means, color=colour, label=label if phase else None)


@style.styled()
def comparison_figure(comparison: Comparison) -> Figure:
    """Cosine (its change from the first model), entropy, perplexity and divergence, with bands of 2 standard errors."""
    layer, layers, models = comparison.layer, comparison.layers, comparison.models
    look = style.looks([model.name for model in models])
    figure, panels = style.grid(4, 2, 7.2, 6.4)
    cosine, entropy, perplexity, divergence = panels
    changes = any(model.change for model in models)  # of a few hundredths, invisible on the cosines themselves
    for place, model in enumerate(models):
        curves = [(entropy, 1, model.entropy), (divergence, layer + 1, model.divergence)]
        if shown := model.change if changes else model:
            curves.append((cosine, 1, shown.cosine_of_layer))
        for axes, first, means in curves:
            x = range(first, first + len(means.mean))
            style.line_with_band(axes, x, means.mean, means.standard_error, look[model.name], label=model.name)
        (colour, marker), value = look[model.name], model.perplexity
        bar: Any = {"yerr": [style.BAND * (value.standard_error or 0)], "capsize": 3, "linestyle": "none"}
        perplexity.errorbar([place], [value.value], color=colour, marker=marker, markersize=6, **bar)
    near = f"cos(state {layer}, each layer's)"
    cosine.set_title(f"Change of {near}" if changes else near)
    entropy.set_title("Entropy of the layer policies (nats)")
    divergence.set_title(f"KL(layer {layer} || later policies), nats")
    for axes in (cosine, entropy):
        style.layer_axis(axes, layers)
        axes.axvline(layer, color=style.SOFT, linewidth=1, linestyle=style.DASHED)
    if changes:
        style.level(cosine)
    later = list(range(layer + 1, layers + 1))  # then follows the output, which includes the final norm
    step = max(1, -(-len(later) // 7))
    ticks = [m for m in later if (layers - m) % step == 0 and layers - m >= step * 0.7] if step > 1 else later
    divergence.set_xticks([*ticks, layers + 1], [*map(str, ticks), "output"])
    divergence.set_xlim(layer + 0.5, layers + 1.5)
    for axes in (entropy, divergence):
        axes.set_ylim(bottom=0)
    for axes in (cosine, entropy, divergence):
        axes.set_xlabel("layer")
    short = [m.name if len(m.name) <= 14 else m.name[:13] + "…" for m in models]
    perplexity.set(title="Perplexity of the full policy", xlim=(-0.6, len(models) - 0.4))
    perplexity.set_xticks(range(len(models)), short, rotation=0 if len(models) <= 3 else 30)
    perplexity.grid(axis="x", visible=False)
    if len(models) > 1:
        style.legend_below(figure, entropy)
    return figure


def write_training_figure(run: Path) -> Path | None:
    """Write ``inside/inside.png`` and ``.svg`` of a training run that made two readings or more; return the first."""
    if len(list((run / "inside").glob("after-*.json"))) < 2:
        return None
    made = TrainingRun.load(run / "log.jsonl")
    return style.save(training_figure([(run.name, made.readings, made.switch)]), run / "inside", "inside")[0]


@style.styled()
def training_figure(runs: Sequence[tuple[str, Sequence[TrainingReading], float | None]]) -> Figure:
    """Cosine to the top layers, entropy, perplexity and divergence over rollout batches, with bands of their changes.

    ``runs`` are names, readings, and the last rollout batch of the internal phase (None: the phase never switched).
    """
    look = style.looks([name for name, _, _ in runs])
    layers = {readings[0].layer for _, readings, _ in runs}
    which = f"layer {layers.pop()}" if len(layers) == 1 else "its layer"
    figure, panels = style.grid(4, 2, 8.4, 6.2, sharex=True)
    for name, readings, switch in runs:
        x, colour = [reading.done for reading in readings], look[name][0]
        *shown, dotted = (zip(*points, strict=True) for points in zip(*map(_points, readings), strict=True))
        for axes, (values, errors) in zip(panels, shown, strict=True):
            style.line_with_band(axes, x, values, errors, look[name], label=name)
        if len(readings[0].divergence.mean) > 1:
            values, errors = dotted
            style.line_with_band(panels[3], x, values, errors, (colour, ""), linestyle=":")
        for axes in panels:
            if switch is not None:
                axes.axvline(switch, color=colour, linewidth=1.2, linestyle=style.DASHED)
    low, high = panels[3].get_ylim()
    panels[3].set_ylim(min(low, 0.0), high + 0.12 * (high - low))  # room for the note
    note: Any = {"transform": panels[3].transAxes, "ha": "right", "va": "top", "fontsize": 8.5, "color": style.SOFT}
    panels[3].text(0.99, 0.98, "dotted: to the next layer", **note)
    panels[0].set_title(f"Cosine of {which}'s states to the top quarter's")
    panels[1].set_title(f"Entropy of {which}'s policy (nats)")
    panels[2].set_title("Perplexity of the full policy")
    panels[3].set_title(f"KL({which} || output), nats")
    for axes in panels[2:]:
        axes.set_xlabel(" or ".join(sorted({readings[0].unit for _, readings, _ in runs})))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    style.legend_below(figure, panels[0])
    return figure


@style.styled()
def drift_figure(readings: Sequence[TrainingReading]) -> Figure:
    """How far the states of every layer have turned since the first reading, at most at eight moments of training."""
    moments = readings[1:] or readings
    shown = [moments[i] for i in np.linspace(0, len(moments) - 1, min(8, len(moments))).round().astype(int)]
    figure, (axes,) = style.grid(1, 1, 7.2, 3.4)
    for place, reading in enumerate(shown, start=1):
        last, drift = reading is shown[-1], reading.drift or Means()
        look, more = (style.BLUE, "o" if last else ""), {"alpha": 0.25 + 0.75 * place / len(shown)}
        x, errors = range(1, len(drift.mean) + 1), drift.standard_error if last else None
        style.line_with_band(axes, x, drift.mean, errors, look, label=f"{reading.done} {reading.unit}", **more)
    axes.set(title="Drift of the states since the start", xlabel="layer", ylabel="1 − cosine")
    axes.set_ylim(bottom=0)
    style.layer_axis(axes, readings[0].layers)
    style.legend_below(figure)
    return figure


def _points(reading: TrainingReading) -> list[tuple[float, float]]:
    """The value of each panel and of the dotted line, each with the standard error of its change since the start."""
    change, layer, layers = reading.change, reading.layer, reading.layers

    def mean(name: str, places: Sequence[int]) -> tuple[float, float]:  # errors too: layers share the same tokens
        values = getattr(reading, name).mean
        errors = np.array(getattr(change, name).standard_error, float) if change else np.zeros(len(values))
        return sum(values[i] for i in places) / len(places), sum(errors[i] for i in places) / len(places)

    top = range(min(max(layer, layers - max(1, layers // 4)), layers - 1), layers)
    value, ratio = reading.perplexity.value, change.perplexity_ratio if change else None
    perplexity = value, value * (ratio.standard_error or 0) / ratio.value if ratio else 0.0
    to_next, to_output = mean("divergence", [0]), mean("divergence", [-1])
    return [mean("cosine_of_layer", top), mean("entropy", [layer - 1]), perplexity, to_output, to_next]
