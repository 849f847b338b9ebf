"""Figures of an analysis over the layers: entropy flow, entropy change, residual cosine, and the choice of a layer."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bupo.report import style
from bupo.report.results import Analysis, Values

LAYER, ATTENTION, FFN = (style.BLUE, "o"), (style.RED, "s"), (style.GREEN, "^")
# panels that overlay several models: path in analysis.json, title, unit, scale, and whether values have a sign
OVERLAY = (
    ("sites.layer_out", "Entropy of the layer policy", "nats", 1, False),
    ("residual_cosine.ffn", "Residual cosine of the FFN", "cosine", 1, True),
    ("entropy_change.ffn", "Entropy change in the FFN", "nats", 1, True),
    ("entropy_change.attn", "Entropy change in attention", "nats", 1, True),
    ("layer_choice.norm.recovered", "Agreement with the output", "recovered, per cent", 100, False),
    ("layer_choice.norm.entropy", "Entropy through the final norm", "nats", 1, False),
)


def write_analysis_figures(analysis: Analysis | Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write entropy_flow, entropy_change, residual_cosine and, where known, layer_choice, each as PNG and SVG.

    Args:
        analysis: content of ``analysis.json``.

    Returns: the paths, six or eight.

    Raises:
        InputError: the analysis is incomplete; nothing was written.
    """
    analysis = Analysis.parse(analysis, "the analysis")
    return [path for name, figure in draw(analysis).items() for path in style.save(figure, Path(folder), name)]


def draw(analysis: Analysis) -> dict[str, Figure]:
    """All figures of an analysis, by file name."""
    figures = {"entropy_flow": entropy_flow, "entropy_change": entropy_change, "residual_cosine": residual_cosine}
    if analysis.layer_choice is not None:
        figures["layer_choice"] = layer_choice
    return {name: figure(analysis) for name, figure in figures.items()}


def entropy_flow(analysis: Analysis | Mapping[str, Any]) -> Figure:
    """Entropies (nats) of the layer, attention and FFN policies, with ln V and the model output's entropy."""
    analysis = Analysis.parse(analysis, "the analysis")
    lines = {"sites.layer_out": ("layer policy", LAYER), "sites.attn_out": ("attention", ATTENTION),
             "sites.ffn_out": ("FFN", FFN)}  # fmt: skip
    levels: list[tuple[float | None, str, Any]] = [
        (analysis.final_entropy, "model output", (0, (4, 2))),
        (math.log(analysis.vocabulary) if analysis.vocabulary else None, "uniform (ln V)", (0, (1, 1.5))),
    ]

    def finish(axes: Axes) -> None:
        for value, label, dashes in levels:
            if value is not None:
                axes.axhline(value, color=style.SOFT, linewidth=1.2, linestyle=dashes, label=f"{label}: {value:.2f}")
        axes.set_ylim(bottom=0)

    return _single(analysis, "Entropy of the internal policies", "entropy (nats)", lines, finish)


def entropy_change(analysis: Analysis) -> Figure:
    """Entropy change (nats) within each module, with the regions and the boundary layer or why there is none."""
    lines = {"entropy_change.attn": ("attention", ATTENTION), "entropy_change.ffn": ("FFN", FFN)}

    def finish(axes: Axes) -> None:
        _zero_line(axes)
        if analysis.boundary_layer is None:
            reason = "\n".join(textwrap.wrap(f"No boundary layer: {analysis.boundary_reason.rstrip('.')}.", 100))
            axes.set_xlabel(f"layer\n{reason}", linespacing=1.4, fontsize=8.5)

    return _single(analysis, "Entropy change within each module", "entropy change (nats)", lines, finish)


def residual_cosine(analysis: Analysis) -> Figure:
    """Cosine between what a module adds to the residual stream and the stream it adds it to (appendix B.5)."""
    lines = {"residual_cosine.attn": ("attention", ATTENTION), "residual_cosine.ffn": ("FFN", FFN)}
    return _single(analysis, "Residual cosine of the modules", "cosine similarity", lines, _zero_line)


def layer_choice(analysis: Analysis) -> Figure:
    """Agreement with the model's output, divergence from it and entropy over layers 1..L."""
    lenses = {"raw": ("logit lens (Eq. 5)", LAYER), "norm": ("through the final norm", ATTENTION)}
    agreement = {"recovered": ("recovered information", FFN), "top1": ("same top token", (style.PINK, "D"))}
    knee = analysis.layer_choice.knee if analysis.layer_choice else None
    with style.styled():
        figure = style.new_figure(8.6, 3.7)
        panels = figure.subplots(1, 3)
        for kind, (label, look) in agreement.items():
            _curve(panels[0], analysis, f"layer_choice.norm.{kind}", label, look, scale=100)
        for axes, kind in zip(panels[1:], ("kl", "entropy"), strict=True):
            for lens, (label, look) in lenses.items():
                _curve(axes, analysis, f"layer_choice.{lens}.{kind}", label, look)
        for axes, title, unit in zip(
            panels, ("Agreement with the output", "KL from the output", "Entropy"), ("per cent", "nats", "nats"),
            strict=True,
        ):  # fmt: skip
            style.titled(axes, title, unit)
            axes.set_xlabel("layer")
            style.layer_axis(axes, analysis.layers, most=8)
            axes.set_ylim(bottom=0)
            _mark_boundary(axes, analysis)
            if knee is not None and knee.layer is not None:
                dotted: Any = {"color": style.PINK, "linewidth": 1.3, "linestyle": (0, (1, 1.5)), "zorder": 2.4}
                axes.axvline(knee.layer, label=f"knee (a candidate): layer {knee.layer}", **dotted)
        panels[0].set_ylim(0, 105)
        largest = panels[1].get_ylim()[1]
        if largest > 5:  # logarithmic above 1 nat
            panels[1].set_yscale("symlog", linthresh=1, linscale=0.6)
            panels[1].set_yticks([t for t in (0, 1, 3, 10, 30, 100, 300, 1000, 3000) if t <= 1.5 * largest])
            panels[1].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        style.legend_below(figure, columns=3)
    return figure


def overlay(analyses: Sequence[tuple[str, Analysis]]) -> Figure:
    """Several models in one figure; x is the relative depth where their numbers of layers differ.

    Dashed lines mark boundary layers.
    """
    relative = len({analysis.layers for _, analysis in analyses}) > 1
    look = style.looks([name for name, _ in analyses])
    shown = [panel for panel in OVERLAY if any(_series(analysis, panel[0]) for _, analysis in analyses)]
    rows = -(-len(shown) // 2)
    with style.styled():
        figure = style.new_figure(8.6, 3.1 * rows)
        panels = list(figure.subplots(rows, 2, sharex=True, squeeze=False).flat)
        for axes, (path, title, unit, scale, signed) in zip(panels, shown, strict=False):
            style.titled(axes, title, unit)
            for name, analysis in analyses:
                _curve(axes, analysis, path, name, look[name], scale=scale, relative=relative)
                if analysis.boundary_layer and path.startswith("entropy_change"):
                    at = analysis.boundary_layer / (analysis.layers if relative else 1)
                    axes.axvline(at, color=look[name][0], linewidth=1.2, linestyle="--")
            if signed:
                _zero_line(axes)
            else:
                axes.set_ylim(bottom=0)
        for axes in panels[2 * rows - 2 :]:
            axes.set_xlabel("depth (layer / number of layers)" if relative else "layer")
        if not relative:
            style.layer_axis(panels[0], analyses[0][1].layers)
        for axes in panels[len(shown) :]:
            axes.remove()
        style.legend_below(figure, panels[0])
    return figure


def _series(analysis: Analysis, path: str) -> tuple[Values, Values | None] | None:
    """Values over layers 1..L and their standard errors, for instance of ``entropy_change.ffn``; None if absent."""
    group, _, name = path.partition(".")
    if group == "layer_choice":
        lens, _, name = name.partition(".")
        block = analysis.layer_choice
        values, errors = (block.curves.get(lens, {}), block.standard_errors.get(lens, {})) if block else ({}, {})
    else:
        values = getattr(analysis, group)
        errors = analysis.standard_errors if group == "sites" else getattr(analysis, f"{group}_standard_errors")
    return (values[name], errors.get(name)) if name in values else None


def _curve(
    axes: Axes, analysis: Analysis, path: str, label: str, look: tuple[str, str], *, scale: float = 1,
    relative: bool = False,
) -> None:  # fmt: skip
    """One line with its band, where the analysis has it."""
    if (series := _series(analysis, path)) is not None:
        x = [i / analysis.layers if relative else i for i in range(1, analysis.layers + 1)]
        y, errors = ([scale * v for v in style.numbers(values)] if values else None for values in series)
        assert y is not None
        style.line_with_band(axes, x, y, errors, color=look[0], marker=look[1], label=label)


def _single(
    analysis: Analysis, title: str, unit: str, lines: Mapping[str, tuple[str, tuple[str, str]]],
    finish: Callable[[Axes], None],
) -> Figure:  # fmt: skip
    """A figure of one panel: its curves, the regions shaded, the boundary layer marked."""
    described = f"{_short(analysis.model)}, {analysis.layers} layers"
    described += f", {analysis.tokens:,} tokens" if analysis.tokens else ""
    described += f"; bands: {style.BAND:.0f} standard errors" if analysis.standard_errors else ""
    with style.styled():
        figure = style.new_figure()
        axes = figure.subplots()
        axes.set_title(title, pad=21)
        axes.text(0, 1.025, described, transform=axes.transAxes, fontsize=9, color=style.SOFT)
        axes.set_xlabel("layer")
        axes.set_ylabel(unit)
        style.layer_axis(axes, analysis.layers)
        for path, (label, look) in lines.items():
            _curve(axes, analysis, path, label, look)
        finish(axes)
        _shade_regions(axes, analysis)
        _mark_boundary(axes, analysis)
        labels = axes.get_legend_handles_labels()[1]
        style.legend_below(figure, axes, len(labels) if len(labels) <= 5 and sum(map(len, labels)) <= 70 else 3)
    return figure


def _shade_regions(axes: Axes, analysis: Analysis) -> None:
    regions = {name: span for name, span in analysis.regions.items() if span and name in style.REGION_COLOURS}
    if regions:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.1 * (high - low))  # room for the names
    for name, (first, last) in regions.items():
        axes.axvspan(first - 0.5, last + 0.5, color=style.REGION_COLOURS[name], alpha=0.1, linewidth=0, zorder=0)
        narrow = (last - first + 1) / analysis.layers <= 0.16
        axes.text(
            (first + last) / 2, 0.985, f"{name[:4]}." if narrow else name, transform=axes.get_xaxis_transform(),
            ha="center", va="top", fontsize=8.5, color=style.SOFT, style="italic", zorder=4,
        )  # fmt: skip


def _mark_boundary(axes: Axes, analysis: Analysis) -> None:
    if (layer := analysis.boundary_layer) is not None:
        line: Any = {"color": style.INK, "linewidth": 1.4, "linestyle": "--", "zorder": 2.5}
        axes.axvline(layer, label=f"boundary: layer {layer}", **line)


def _zero_line(axes: Axes) -> None:
    axes.axhline(0, color=style.SOFT, linewidth=1.2)


def _short(model: str, width: int = 34) -> str:
    """The end of a model's name or path, which must fit beside the title."""
    name = "/".join(Path(model).parts[-2:])
    return name if len(name) <= width else "…" + name[-width + 1 :]
