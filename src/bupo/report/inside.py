"""What training did inside a model: one figure of four panels from ``compare.json`` (Figure 5 of arXiv 2512.19673)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bupo.errors import InputError
from bupo.report.style import SOFT, layer_axis, looks, new_figure, save, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Comparison = Mapping[str, Any]
BAND = 2.0  # standard errors to each side


def check_comparison(found: Any, where: str = "the comparison") -> None:
    """Raise `InputError` if this is no comparison of schema 1."""
    if not isinstance(found, Mapping) or found.get("schema") != 1 or found.get("kind") != "comparison":
        raise InputError(f"{where} is no comparison of schema 1; write it with `bupo compare`")
    models = found.get("models")
    if not isinstance(models, Sequence) or not models or not all(isinstance(m, Mapping) for m in models):
        raise InputError(f"{where} holds no models; write it again with `bupo compare`")
    for model in models:
        for name in ("perplexity", "entropy", "cosine_of_layer", "divergence"):
            if not isinstance(model.get(name), Mapping):
                raise InputError(f"{where}: model {model.get('name')!r} has no {name}; write it again")


def write_inside_figure(found: Comparison, folder: str | Path) -> list[Path]:
    """Write ``inside.png`` and ``inside.svg``.

    Raises:
        InputError: not a comparison of schema 1.
    """
    check_comparison(found)
    return save(inside_figure(found), Path(folder), "inside")


def inside_figure(found: Comparison) -> Figure:
    """Cosine (its change against the first), entropy, perplexity and divergence; bands are two standard errors."""
    layer, layers, models = found["layer"], found["layers"], found["models"]
    with styled():
        figure = new_figure(height=6.4)
        (cosine, entropy), (perplexity, divergence) = figure.subplots(2, 2)
        look = looks([m["name"] for m in models])
        changes = any("change" in m for m in models)  # of hundredths, which the cosines themselves would not show
        near = f"cos(state {layer}, each layer's)"
        for model in models:
            colour, marker = look[model["name"]]
            changed = model.get("change", model) if changes else model
            if not changes or "change" in model:
                _line(cosine, range(1, layers + 1), changed["cosine_of_layer"], colour, marker)
            _line(entropy, range(1, layers + 1), model["entropy"], colour, marker, model["name"])
            later = [*range(layer + 1, layers + 1), layers + 1]
            _line(divergence, later, model["divergence"], colour, marker)
        for axes, title in (
            (cosine, f"Change of {near}" if changes else near),
            (entropy, "Entropy of the layer policies (nats)"),
        ):
            axes.set_title(title)
            layer_axis(axes, layers)
            axes.axvline(layer, color=SOFT, linewidth=1, linestyle=(0, (4, 2)))
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
            figure.legend(*entropy.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(models), 4))
    return figure


def _line(axes: Axes, x: Any, values: Mapping[str, Any], colour: str, marker: str, label: str | None = None) -> None:
    at, mean, error = list(x), values["mean"], values["standard_error"]
    axes.plot(at, mean, color=colour, marker=marker, label=label)
    low = [m - BAND * e for m, e in zip(mean, error, strict=True)]
    high = [m + BAND * e for m, e in zip(mean, error, strict=True)]
    axes.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)


def _later_axis(axes: Axes, layer: int, layers: int) -> None:
    """The layers after the chosen one, and the output, which has the final norm, at the end."""
    later = list(range(layer + 1, layers + 1))
    step = max(1, -(-len(later) // 7))
    shown = [m for m in later if (layers - m) % step == 0 and layers - m >= step * 0.7] if step > 1 else later
    axes.set_xticks([*shown, layers + 1], [*map(str, shown), "output"])
    axes.set_xlim(layer + 0.5, layers + 1.5)


def _perplexities(axes: Axes, models: Sequence[Mapping[str, Any]], look: Mapping[str, tuple[str, str]]) -> None:
    axes.set_title("Perplexity of the full policy")
    for place, model in enumerate(models):
        colour, marker = look[model["name"]]
        found = model["perplexity"]
        axes.errorbar(
            [place], [found["value"]], yerr=[BAND * found["standard_error"]], color=colour, marker=marker,
            markersize=6, capsize=3, linestyle="none",
        )  # fmt: skip
    short = [m["name"] if len(m["name"]) <= 14 else m["name"][:13] + "…" for m in models]
    axes.set_xticks(range(len(models)), short, rotation=0 if len(models) <= 3 else 30)
    axes.set_xlim(-0.6, len(models) - 0.4)
    axes.grid(axis="x", visible=False)
