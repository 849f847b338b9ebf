"""Figures of an analysis over the layers: entropy flow, entropy change, residual cosine, and the choice of a layer."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bupo.report.results import Analysis
from bupo.report.style import (
    BAND,
    BLUE,
    GREEN,
    INK,
    PINK,
    RED,
    REGION_COLOURS,
    SOFT,
    layer_axis,
    legend_below,
    line_with_band,
    looks,
    new_figure,
    save,
    styled,
    titled,
)

KNEE_LINE: dict[str, Any] = {"color": PINK, "linewidth": 1.3, "linestyle": (0, (1, 1.5)), "zorder": 2.4}


@dataclass(frozen=True)
class Panel:
    """One panel of layer curves: where its numbers stand in ``analysis.json``, and how it is labelled."""

    group: str
    title: str
    unit: str
    lines: tuple[tuple[str, str, str, str], ...]  # name within the group, label, colour, marker


_MODULES = (("attn", "attention", RED, "s"), ("ffn", "FFN", GREEN, "^"))
_FLOW = Panel(
    "sites", "Entropy of the internal policies", "entropy (nats)",
    (("layer_out", "layer policy", BLUE, "o"), ("attn_out", "attention", RED, "s"), ("ffn_out", "FFN", GREEN, "^")),
)  # fmt: skip
_CHANGE = Panel("entropy_change", "Entropy change within each module", "entropy change (nats)", _MODULES)
_COSINE = Panel("residual_cosine", "Residual cosine of the modules", "cosine similarity", _MODULES)
# (group, name, title, unit) of the panels that overlay several models
_OVERLAY = (
    ("sites", "layer_out", "Entropy of the layer policy", "nats"),
    ("residual_cosine", "ffn", "Residual cosine of the FFN", "cosine"),
    ("entropy_change", "ffn", "Entropy change in the FFN", "nats"),
    ("entropy_change", "attn", "Entropy change in attention", "nats"),
)
_LENSES = (("raw", "logit lens (Eq. 5)", BLUE, "o"), ("norm", "through the final norm", RED, "s"))


def write_analysis_figures(analysis: Analysis | Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write entropy_flow, entropy_change, residual_cosine and, where known, layer_choice, each as PNG and SVG.

    Args:
        analysis: content of ``analysis.json``.

    Returns: the paths, six or eight.

    Raises:
        InputError: the analysis is incomplete; nothing was written.
    """
    analysis = Analysis.parse(analysis, "the analysis")
    figures = {name: draw(analysis) for name, draw in FIGURES.items()}
    if analysis.layer_choice is not None:
        figures["layer_choice"] = layer_choice(analysis)
    return [path for name, figure in figures.items() for path in save(figure, Path(folder), name)]


def entropy_flow(analysis: Analysis | Mapping[str, Any]) -> Figure:
    """Entropies (nats) of the layer, attention and FFN policies, with ln V and the model output's entropy."""
    analysis = Analysis.parse(analysis, "the analysis")
    with styled():
        figure, axes = _curves(analysis, _FLOW)
        levels: list[tuple[float | None, str, Any]] = [(analysis.final_entropy, "model output", (0, (4, 2)))]
        if analysis.vocabulary:
            levels.append((math.log(analysis.vocabulary), "uniform (ln V)", (0, (1, 1.5))))
        for value, label, dashes in levels:
            if value is not None:
                axes.axhline(value, color=SOFT, linewidth=1.2, linestyle=dashes, label=f"{label}: {value:.2f}")
        axes.set_ylim(bottom=0)
        _finish(figure, axes, analysis)
    return figure


def entropy_change(analysis: Analysis) -> Figure:
    """Entropy change (nats) within each module, with the regions and the boundary layer or why there is none."""
    with styled():
        figure, axes = _curves(analysis, _CHANGE)
        axes.axhline(0, color=SOFT, linewidth=1.2)
        _finish(figure, axes, analysis)
        if analysis.boundary_layer is None:
            reason = "\n".join(textwrap.wrap(f"No boundary layer: {analysis.boundary_reason.rstrip('.')}.", 100))
            axes.set_xlabel(f"layer\n{reason}", linespacing=1.4, fontsize=8.5)
    return figure


def residual_cosine(analysis: Analysis) -> Figure:
    """Cosine between what a module adds to the residual stream and the stream it adds it to (appendix B.5)."""
    with styled():
        figure, axes = _curves(analysis, _COSINE)
        axes.axhline(0, color=SOFT, linewidth=1.2)
        _finish(figure, axes, analysis)
    return figure


FIGURES = {"entropy_flow": entropy_flow, "entropy_change": entropy_change, "residual_cosine": residual_cosine}


def layer_choice(analysis: Analysis) -> Figure:
    """Agreement with the model's output, divergence from it and entropy, for both lenses over layers 1..L."""
    assert analysis.layer_choice is not None
    curves, errors = analysis.layer_choice.curves, analysis.layer_choice.standard_errors
    knee = analysis.layer_choice.knee
    x = range(1, analysis.layers + 1)
    with styled():
        figure = new_figure(8.6, 3.5)
        panels = figure.subplots(1, 3)
        for axes, kind, title, unit, scale in zip(
            panels,
            ("top1", "kl", "entropy"),
            ("Same top token as output", "KL from the output", "Entropy"),
            ("per cent of tokens", "nats", "nats"),
            (100, 1, 1),
            strict=True,
        ):
            titled(axes, title, unit)
            for lens, label, colour, marker in _LENSES:
                y, error = (
                    [v if v is None else scale * v for v in values]
                    for values in (curves[lens][kind], errors.get(lens, {}).get(kind, [None] * analysis.layers))
                )
                line_with_band(axes, x, y, error, color=colour, marker=marker, linewidth=1.5, label=label)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("layer")
            layer_axis(axes, analysis.layers, most=8)
            _mark_boundary(axes, analysis)
            if knee is not None and knee.layer is not None:
                axes.axvline(knee.layer, label=f"knee (a candidate): layer {knee.layer}", **KNEE_LINE)
        panels[0].set_ylim(0, 105)
        _tame_divergence(panels[1], max(v for lens in ("raw", "norm") for v in curves[lens]["kl"] if v is not None))
        legend_below(figure, panels[0])
    return figure


def overlay(analyses: Sequence[tuple[str, Analysis]]) -> Figure:
    """Several models in one figure; x is the relative depth where their numbers of layers differ.

    Dashed lines mark boundary layers.
    """
    relative = len({analysis.layers for _, analysis in analyses}) > 1
    look = looks([name for name, _ in analyses])
    with styled():
        figure = new_figure(8.6, 6.2)
        panels = list(figure.subplots(2, 2, sharex=True).flat)
        for axes, (group, series, title, unit) in zip(panels, _OVERLAY, strict=True):
            titled(axes, title, unit)
            for name, analysis in analyses:
                x = [i / analysis.layers if relative else i for i in range(1, analysis.layers + 1)]
                colour, marker = look[name]
                if series in getattr(analysis, group):
                    line_with_band(axes, x, *analysis.series(group, series), color=colour, marker=marker, label=name)
                if analysis.boundary_layer and group == "entropy_change":
                    axes.axvline(x[analysis.boundary_layer - 1], color=colour, linewidth=1.2, linestyle="--")
            if group == "sites":
                axes.set_ylim(bottom=0)
            else:
                axes.axhline(0, color=SOFT, linewidth=1.2)
        for axes in panels[2:]:
            axes.set_xlabel("depth (layer / number of layers)" if relative else "layer")
        if not relative:
            layer_axis(panels[0], analyses[0][1].layers)
        legend_below(figure, panels[0])
    return figure


def _curves(analysis: Analysis, panel: Panel) -> tuple[Figure, Axes]:
    """A figure of one panel with its curves, titled and described."""
    figure = new_figure()
    axes = figure.subplots()
    described = f"{_short(analysis.model)}, {analysis.layers} layers"
    if analysis.tokens:
        described += f", {analysis.tokens:,} tokens"
    if analysis.standard_errors:
        described += f"; bands: {BAND:.0f} standard errors"
    axes.set_title(panel.title, pad=21)
    axes.text(0, 1.025, described, transform=axes.transAxes, fontsize=9, color=SOFT)
    axes.set_xlabel("layer")
    axes.set_ylabel(panel.unit)
    layer_axis(axes, analysis.layers)
    for name, label, colour, marker in panel.lines:
        if name in getattr(analysis, panel.group):
            values, errors = analysis.series(panel.group, name)
            x = range(1, analysis.layers + 1)
            line_with_band(axes, x, values, errors, color=colour, marker=marker, label=label)
    return figure, axes


def _finish(figure: Figure, axes: Axes, analysis: Analysis) -> None:
    """Shade the regions, mark the boundary layer, and put the legend below."""
    regions = {name: span for name, span in analysis.regions.items() if span and name in REGION_COLOURS}
    if regions:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.1 * (high - low))  # room for the names
    for name, (first, last) in regions.items():
        axes.axvspan(first - 0.5, last + 0.5, color=REGION_COLOURS[name], alpha=0.1, linewidth=0, zorder=0)
        narrow = (last - first + 1) / analysis.layers <= 0.16
        axes.text(
            (first + last) / 2, 0.985, f"{name[:4]}." if narrow else name, transform=axes.get_xaxis_transform(),
            ha="center", va="top", fontsize=8.5, color=SOFT, style="italic", zorder=4,
        )  # fmt: skip
    _mark_boundary(axes, analysis)
    labels = axes.get_legend_handles_labels()[1]
    legend_below(figure, axes, len(labels) if len(labels) <= 5 and sum(map(len, labels)) <= 70 else 3)


def _mark_boundary(axes: Axes, analysis: Analysis) -> None:
    layer = analysis.boundary_layer
    if layer is not None:
        axes.axvline(layer, color=INK, linewidth=1.4, linestyle="--", label=f"boundary: layer {layer}", zorder=2.5)


def _tame_divergence(axes: Axes, largest: float) -> None:
    """Scale the axis logarithmically above 1 nat where divergences are large."""
    if largest > 5:
        axes.set_yscale("symlog", linthresh=1, linscale=0.6)
        axes.set_yticks([t for t in (0, 1, 3, 10, 30, 100, 300, 1000, 3000) if t <= 1.5 * largest])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(bottom=0)


def _short(model: str, width: int = 34) -> str:
    """The end of a model's name or path, which must fit beside the title."""
    name = "/".join(Path(model).parts[-2:])
    return name if len(name) <= width else "…" + name[-width + 1 :]
