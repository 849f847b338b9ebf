"""The figures of an analysis: entropy flow, entropy change, residual cosine and layer choice over the layers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bupo.errors import InputError
from bupo.report.choice import check_choice, layer_choice
from bupo.report.style import (
    BLUE,
    GREEN,
    INK,
    RED,
    REGION_COLOURS,
    SOFT,
    layer_axis,
    looks,
    new_figure,
    save,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Analysis = Mapping[str, Any]
BAND = 2.0  # standard errors to each side, as in the rule that finds the boundary


def check_analysis(analysis: Any, where: str = "the analysis") -> None:
    """Raise `InputError` if this is no analysis of schema 1 that the figures can be drawn from."""
    if not isinstance(analysis, Mapping) or analysis.get("schema") != 1:
        found = analysis.get("schema") if isinstance(analysis, Mapping) else None
        raise InputError(f"{where} is no analysis of schema 1 (its schema is {found!r}); write it with `bupo analyze`")
    layers = analysis.get("layers")
    if not isinstance(layers, int) or layers < 1:
        raise InputError(f"{where} has no number of layers; write it again with `bupo analyze`")
    needed = {"sites": ("attn_out", "ffn_out", "layer_out"), "entropy_change": ("attn", "ffn"), "residual_cosine": ()}
    for group, names in needed.items():
        columns = analysis.get(group)
        if not isinstance(columns, Mapping):
            raise InputError(f"{where} lacks {group!r}; write it again with `bupo analyze`")
        for name in names:
            if not isinstance(columns.get(name), Sequence) or len(columns[name]) != layers:
                raise InputError(f"{where}: {group}.{name} is not a list over its {layers} layers")
    check_choice(analysis, where)


def write_analysis_figures(analysis: Analysis, folder: str | Path) -> list[Path]:
    """Write entropy_flow, entropy_change, residual_cosine and, where there is one, layer_choice, each as PNG and SVG.

    Args:
        analysis: content of ``analysis.json``, schema 1.

    Returns: the paths, six or eight.

    Raises:
        InputError: it is not.
    """
    check_analysis(analysis)
    made = {"entropy_flow": entropy_flow, "entropy_change": entropy_change, "residual_cosine": residual_cosine}
    if analysis.get("layer_choice"):
        made["layer_choice"] = layer_choice
    return [path for name, draw in made.items() for path in save(draw(analysis), Path(folder), name)]


def entropy_flow(analysis: Analysis) -> Figure:
    """Entropies (nats) of the layer, attention and FFN policies over layers 1..L, with ln V and the output's."""
    with styled():
        figure, axes = _axes(analysis, "Entropy of the internal policies", "entropy (nats)")
        for site, label, colour, marker in (
            ("layer_out", "layer policy", BLUE, "o"),
            ("attn_out", "attention", RED, "s"),
            ("ffn_out", "FFN", GREEN, "^"),
        ):
            _line(axes, analysis, "sites", "standard_errors", site, label, colour, marker)
        lines: list[tuple[float | None, str, Any]] = [(analysis.get("final_entropy"), "model output", (0, (4, 2)))]
        if analysis.get("vocabulary"):
            lines.append((math.log(analysis["vocabulary"]), "uniform (ln V)", (0, (1, 1.5))))
        for value, label, dashes in lines:
            if value is not None:
                axes.axhline(value, color=SOFT, linewidth=1.2, linestyle=dashes, label=f"{label}: {value:.2f}")
        axes.set_ylim(bottom=0)
        _regions(axes, analysis)
        _boundary(axes, analysis)
        _legend_below(figure, axes)
    return figure


def entropy_change(analysis: Analysis) -> Figure:
    """Entropy change (nats) that each module makes, Eq. 11-13, with the regions and the boundary layer."""
    with styled():
        figure, axes = _axes(analysis, "Entropy change within each module", "entropy change (nats)")
        axes.axhline(0, color=SOFT, linewidth=1.2)
        for name, label, colour, marker in (("attn", "attention", RED, "s"), ("ffn", "FFN", GREEN, "^")):
            _line(axes, analysis, "entropy_change", "entropy_change_standard_errors", name, label, colour, marker)
        _regions(axes, analysis)
        _boundary(axes, analysis, reason=True)
        _legend_below(figure, axes)
    return figure


def residual_cosine(analysis: Analysis) -> Figure:
    """Cosine between what a module adds to the residual stream and the stream it adds it to (appendix B.5)."""
    with styled():
        figure, axes = _axes(analysis, "Residual cosine of the modules", "cosine similarity")
        axes.axhline(0, color=SOFT, linewidth=1.2)
        for name, label, colour, marker in (("attn", "attention", RED, "s"), ("ffn", "FFN", GREEN, "^")):
            if name in analysis["residual_cosine"]:
                _line(axes, analysis, "residual_cosine", "residual_cosine_standard_errors", name, label, colour, marker)
        _regions(axes, analysis)
        _boundary(axes, analysis)
        _legend_below(figure, axes)
    return figure


OVERLAY = (
    ("sites", "standard_errors", "layer_out", "Entropy of the layer policy", "nats"),
    ("residual_cosine", "residual_cosine_standard_errors", "ffn", "Residual cosine of the FFN", "cosine"),
    ("entropy_change", "entropy_change_standard_errors", "ffn", "Entropy change in the FFN", "nats"),
    ("entropy_change", "entropy_change_standard_errors", "attn", "Entropy change in attention", "nats"),
)


def overlay(analyses: Sequence[tuple[str, Analysis]]) -> Figure:
    """Several models or checkpoints over each other; relative depth on x where their numbers of layers differ.

    Layer-policy entropy, both entropy changes and the FFN's residual cosine; a dashed line marks a boundary layer.
    """
    relative = len({a["layers"] for _, a in analyses}) > 1
    look = looks([name for name, _ in analyses])
    with styled():
        figure = new_figure(8.6, 6.2)
        panels = figure.subplots(2, 2, sharex=True).flat
        for axes, (group, errors, site, title, unit) in zip(panels, OVERLAY, strict=True):
            for name, analysis in analyses:
                layers = analysis["layers"]
                x = [(i + 1) / layers if relative else i + 1 for i in range(layers)]
                colour, marker = look[name]
                if site in analysis[group]:
                    _line(axes, analysis, group, errors, site, name, colour, marker, x)
                if analysis.get("boundary_layer") and group == "entropy_change":
                    axes.axvline(x[analysis["boundary_layer"] - 1], color=colour, linewidth=1.2, linestyle="--")
            axes.set_title(title)
            axes.set_ylabel(unit)
            if group == "sites":
                axes.set_ylim(bottom=0)
            else:
                axes.axhline(0, color=SOFT, linewidth=1.2)
        for axes in figure.axes[2:]:
            axes.set_xlabel("depth (layer / number of layers)" if relative else "layer")
        if not relative:
            layer_axis(figure.axes[0], analyses[0][1]["layers"])
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(analyses)))
    return figure


def _axes(analysis: Analysis, title: str, unit: str) -> tuple[Figure, Axes]:
    figure = new_figure()
    axes = figure.subplots()
    described = f"{_short(analysis.get('model', ''))}, {analysis['layers']} layers"
    if analysis.get("tokens"):
        described += f", {analysis['tokens']:,} tokens"
    if analysis.get("standard_errors"):
        described += f"; bands: {BAND:.0f} standard errors"
    axes.set_title(title, pad=21)
    axes.text(0, 1.025, described, transform=axes.transAxes, fontsize=9, color=SOFT)
    axes.set_xlabel("layer")
    axes.set_ylabel(unit)
    layer_axis(axes, analysis["layers"])
    return figure, axes


def _line(
    axes: Axes,
    analysis: Analysis,
    group: str,
    errors: str,
    name: str,
    label: str,
    colour: str,
    marker: str,
    x: Sequence[float] | None = None,
) -> None:
    x = x or range(1, analysis["layers"] + 1)
    y = _numbers(analysis[group][name])
    size = 4 if analysis["layers"] <= 40 else 2.5
    axes.plot(x, y, color=colour, marker=marker, markersize=size, label=label, zorder=3)
    error = (analysis.get(errors) or {}).get(name)
    if error is not None:
        wide = [BAND * e for e in _numbers(error)]
        low, high = ([v + sign * w for v, w in zip(y, wide, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0, zorder=2)


def _regions(axes: Axes, analysis: Analysis) -> None:
    """Shade the regions and write their names above the data."""
    regions = {k: v for k, v in (analysis.get("regions") or {}).items() if v and k in REGION_COLOURS}
    if not regions:
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.1 * (high - low))
    layers = analysis["layers"]
    for name, (first, last) in regions.items():
        axes.axvspan(first - 0.5, last + 0.5, color=REGION_COLOURS[name], alpha=0.1, linewidth=0, zorder=0)
        # a narrow region has no room for its whole name
        text = name if (last - first + 1) / layers > 0.16 else f"{name[:4]}."
        axes.text(
            (first + last) / 2, 0.985, text, transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=8.5,
            color=SOFT, style="italic", zorder=4,
        )  # fmt: skip


def _boundary(axes: Axes, analysis: Analysis, *, reason: bool = False) -> None:
    """Mark the boundary layer, or, with ``reason``, write below the axis why there is none."""
    layer = analysis.get("boundary_layer")
    if layer is not None:
        axes.axvline(layer, color=INK, linewidth=1.4, linestyle="--", label=f"boundary: layer {layer}", zorder=2.5)
        return
    if not reason:
        return
    why = str(analysis.get("boundary_reason") or "no reason recorded").rstrip(".")
    text = "\n".join(textwrap.wrap(f"No boundary layer: {why}.", 100))
    axes.set_xlabel(f"layer\n{text}", linespacing=1.4)
    axes.xaxis.label.set_fontsize(8.5)


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = len(labels) if len(labels) <= 5 and sum(map(len, labels)) <= 70 else 3
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.4)


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if v is None else float(v) for v in values]


def _short(model: str, width: int = 34) -> str:
    """The end of a model's name or path, so that titles do not meet."""
    name = "/".join(Path(str(model)).parts[-2:])
    return name if len(name) <= width else "…" + name[-width + 1 :]
