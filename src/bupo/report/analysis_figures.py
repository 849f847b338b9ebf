"""Figures over the layers: entropy flow, entropy change, residual cosine, the choice of a layer, and a lens."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bupo.report import style
from bupo.report.results import Analysis, Readings
from bupo.report.style import Look, styled

# one colour per meaning over a whole page: these three, those of lenses, and those of models do not overlap
LAYER, ATTENTION, FFN = (style.INK, "o"), (style.ORANGE, "s"), (style.GREEN, "^")
LINES = {"layer": ("layer policy", LAYER), "attn": ("attention", ATTENTION), "ffn": ("FFN", FFN)}
REGION_COLOURS = {"exploration": style.ORANGE, "integration": style.SKY, "convergence": style.GREEN}
# panels that overlay several models: path in analysis.json, title, unit, and whether values have a sign
OVERLAY = (
    ("sites.layer_out", "Entropy of the layer policy", "nats", False),
    ("residual_cosine.ffn", "Residual cosine of the FFN", "cosine", True),
    ("entropy_change.ffn", "Entropy change in the FFN", "nats", True),
    ("entropy_change.attn", "Entropy change in attention", "nats", True),
)
# panels of readings through lenses: kind in the file, title, unit, limits
READINGS = (
    ("recovered", "Recovered information", "per cent", (0, 105)),
    ("top1", "Same most likely token", "per cent", (0, 105)),
    ("kl", "KL from the output", "nats", (0, None)),
    ("entropy", "Entropy", "nats", (0, None)),
    ("change", "Entropy change", "nats", (None, None)),
)
_LENSES = {
    "raw": ("logit lens (Eq. 5)", (style.BROWN, "o")),
    "norm": ("final norm", (style.TEAL, "s")),
    "ridge": ("ridge", (style.PURPLE, "^")),
}
_OTHER_LENSES = ((style.SAND, "D"), (style.MINT, "v"), (style.LILAC, "P"))


def write_analysis_figures(analysis: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write entropy_flow, entropy_change, residual_cosine and, where known, layer_choice, each as PNG and SVG.

    Raises `InputError`, and writes nothing, if the content of ``analysis.json`` is incomplete.
    """
    figures = draw(Analysis.parse(analysis, "the analysis"))
    return [path for name, figure in figures.items() for path in style.save(figure, Path(folder), name)]


def draw(analysis: Analysis) -> dict[str, Figure]:
    """All figures of an analysis, by file name."""
    drawn = (entropy_flow, entropy_change, residual_cosine, *([layer_choice] if analysis.layer_choice else []))
    return {figure.__name__: figure(analysis) for figure in drawn}


@styled()
def entropy_flow(analysis: Analysis | Mapping[str, Any]) -> Figure:
    """Entropies (nats) of the layer, attention and FFN policies, with ln V and the model output's entropy."""
    title = "Entropy of the internal policies"
    return _over_layers(Analysis.parse(analysis, "the analysis"), "sites", title, "entropy (nats)")


@styled()
def entropy_change(analysis: Analysis) -> Figure:
    """Entropy change (nats) within each module, with the regions and the boundary layer or why there is none."""
    title = "Entropy change within each module"
    figure = _over_layers(analysis, "entropy_change", title, "entropy change (nats)")
    if analysis.boundary_layer is None:
        reason = "\n".join(textwrap.wrap(f"No boundary layer: {analysis.boundary_reason.rstrip('.')}.", 100))
        figure.axes[0].set_xlabel(f"layer\n{reason}", linespacing=1.4, fontsize=8.5)
    return figure


@styled()
def residual_cosine(analysis: Analysis) -> Figure:
    """Cosine between what a module adds to the residual stream and the stream it adds it to (appendix B.5)."""
    return _over_layers(analysis, "residual_cosine", "Residual cosine of the modules", "cosine similarity")


@styled()
def layer_choice(analysis: Analysis | Readings) -> Figure:
    """Agreement with the model's output, divergence from it, entropy and its change, through every lens measured."""
    readings = analysis.layer_choice if isinstance(analysis, Analysis) else analysis
    assert readings is not None
    figure, panels = style.grid(len(READINGS), 3, 8.6, 5.6)
    for axes, panel in zip(panels, READINGS, strict=True):
        reading(axes, analysis, readings, panel)
        largest = axes.get_ylim()[1]
        if panel[0] == "kl" and largest > 5:  # logarithmic above 1 nat
            axes.set_yscale("symlog", linthresh=1, linscale=0.6)
            axes.set_yticks([t for t in (0, 1, 3, 10, 30, 100, 300, 1000, 3000) if t <= 1.5 * largest])
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    style.legend_below(figure, columns=3)
    return figure


def reading(axes: Axes, analysis: Analysis | Readings, readings: Readings, panel: Any) -> None:
    """Draw one kind of `READINGS` through every lens, with the knees and, of an analysis, the boundary layer."""
    (kind, title, unit, limits), lenses, x = panel, lens_looks(readings.curves), range(1, readings.layers + 1)
    for lens, curves in readings.curves.items():
        (label, look), errors = lenses[lens], readings.standard_errors.get(lens, {}).get(kind)
        scale = 100 if unit == "per cent" else 1
        style.line_with_band(axes, x, curves.get(kind, [None] * len(x)), errors, look, scale=scale, label=label)
        if (knee := readings.knees.get(lens)) and knee.layer is not None:
            dotted: Any = {"color": look[0], "linewidth": 1.3, "linestyle": (0, (1, 1.5)), "zorder": 2.4}
            axes.axvline(knee.layer, label=f"knee (a candidate), {label}: layer {knee.layer}", **dotted)
    if isinstance(analysis, Analysis):
        _mark_boundary(axes, analysis)
    axes.set(title=title, ylabel=unit, xlabel="layer", ylim=limits)
    style.layer_axis(axes, len(x), most=8)
    style.level(axes)


def lens_looks(lenses: Iterable[str]) -> dict[str, tuple[str, Look]]:
    """Label, colour and marker of each lens; one from a folder is called by the end of its path."""
    others = dict.fromkeys(lens for lens in lenses if lens not in _LENSES)
    looks = {lens: ("/".join(Path(lens).parts[-2:]), _OTHER_LENSES[i % 3]) for i, lens in enumerate(others)}
    return {**_LENSES, **looks}


@styled()
def overlay(analyses: Sequence[tuple[str, Analysis]]) -> Figure:
    """Several models, dashed at their boundary layers; x is the relative depth where numbers of layers differ."""
    relative = len({analysis.layers for _, analysis in analyses}) > 1
    look = style.looks([name for name, _ in analyses])
    lenses = lens_looks(n for _, analysis in analyses if analysis.layer_choice for n in analysis.layer_choice.curves)
    through = [
        (f"layer_choice.curves.{lens}.{kind}", f"{title}, {label}", unit, False)
        for lens, (label, _) in lenses.items()
        for kind, title, unit, _ in (READINGS[0], READINGS[3])
    ]
    shown = [panel for panel in (*OVERLAY, *through) if any(panel[0] in analysis.curves for _, analysis in analyses)]
    rows = -(-len(shown) // 2)
    figure, panels = style.grid(len(shown), 2, 8.6, 3.1 * rows, sharex=True)
    for axes, (path, title, unit, signed) in zip(panels, shown, strict=True):
        axes.set(title=title, ylabel=unit)
        for name, analysis in analyses:
            depth = analysis.layers if relative else 1
            _curve(axes, analysis, path, name, look[name], depth)
            if analysis.boundary_layer and path.startswith("entropy_change"):
                axes.axvline(analysis.boundary_layer / depth, color=look[name][0], linewidth=1.2, linestyle="--")
        if signed:
            style.level(axes)
        else:
            axes.set_ylim(0, 105 if unit == "per cent" else None)
    for axes in panels[2 * rows - 2 :]:
        axes.set_xlabel("depth (layer / number of layers)" if relative else "layer")
    if not relative:
        style.layer_axis(panels[0], analyses[0][1].layers)
    style.legend_below(figure, panels[0])
    return figure


def _curve(axes: Axes, analysis: Analysis, path: str, label: str, look: Look, depth: int = 1) -> None:
    """One line with its band over layer / depth, where the analysis has it; shares are drawn in per cent."""
    if path in analysis.curves:
        scale = 100 if path.endswith(("recovered", "top1")) else 1
        x = np.arange(1, analysis.layers + 1) / depth
        style.line_with_band(axes, x, *analysis.curves[path], look, scale=scale, label=label)


def _over_layers(analysis: Analysis, group: str, title: str, unit: str) -> Figure:
    """A figure of one panel, described, with the curves of a group, the regions, the boundary layer and a legend."""
    model = "/".join(Path(analysis.model).parts[-2:])
    described = model if len(model) <= 34 else "…" + model[-33:]  # it must fit beside the title
    described += f", {analysis.layers} layers"
    described += f", {analysis.tokens:,} tokens" if analysis.tokens else ""
    described += f"; bands: {style.BAND:.0f} standard errors" if analysis.standard_errors else ""
    figure, (axes,) = style.grid(1, 1, 7.2, 3.9)
    axes.set_title(title, pad=21)
    axes.text(0, 1.025, described, transform=axes.transAxes, fontsize=9, color=style.SOFT)
    axes.set(xlabel="layer", ylabel=unit)
    style.layer_axis(axes, analysis.layers)
    if group == "sites":
        for site, line in LINES.items():
            _curve(axes, analysis, f"sites.{site}_out", *line)
        uniform = math.log(analysis.vocabulary) if analysis.vocabulary else None
        levels = (("model output", analysis.final_entropy, (4, 2)), ("uniform (ln V)", uniform, (1, 1.5)))
        for label, value, dashes in levels:
            if value is not None:
                style.level(axes, value, linestyle=(0, dashes), label=f"{label}: {value:.2f}")
        axes.set_ylim(bottom=0)
    else:
        for module in ("attn", "ffn"):
            _curve(axes, analysis, f"{group}.{module}", *LINES[module])
        style.level(axes)
    regions = {name: span for name, span in analysis.regions.items() if span and name in REGION_COLOURS}
    if regions:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.1 * (high - low))  # room for the names
    for name, (first, last) in regions.items():
        axes.axvspan(first - 0.5, last + 0.5, color=REGION_COLOURS[name], alpha=0.1, linewidth=0, zorder=0)
        narrow = (last - first + 1) / analysis.layers <= 0.16
        axes.text(
            (first + last) / 2, 0.985, f"{name[:4]}." if narrow else name, transform=axes.get_xaxis_transform(),
            ha="center", va="top", fontsize=8.5, color=style.SOFT, style="italic", zorder=4,
        )  # fmt: skip
    _mark_boundary(axes, analysis)
    style.legend_below(figure, axes, columns=5)
    return figure


def _mark_boundary(axes: Axes, analysis: Analysis) -> None:
    if (layer := analysis.boundary_layer) is not None:
        dashed: Any = {"color": style.INK, "linewidth": 1.4, "linestyle": "--", "zorder": 2.5}
        axes.axvline(layer, label=f"boundary: layer {layer}", **dashed)
