"""What training did inside, over training: one figure of four panels from a run's ``inside/``.

Figure 5 of arXiv 2512.19673.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bupo.errors import InputError
from bupo.report.style import SOFT, looks, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Reading = Mapping[str, Any]
BAND = 2.0  # standard errors to each side
NEEDED = ("rollouts_done", "layer", "layers", "perplexity", "entropy", "cosine_of_layer", "divergence")


def read_inside_folder(folder: Path) -> list[dict[str, Any]]:
    """The readings of a training run, in order; none where it made none.

    Raises:
        InputError: a file is no reading of schema 1.
    """
    found = []
    for path in sorted(folder.glob("after-*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} cannot be read as JSON: {error}") from None
        if not isinstance(content, dict) or content.get("schema") != 1 or any(name not in content for name in NEEDED):
            raise InputError(f"{path} is no reading of schema 1; `bupo train` writes it with inside_every")
        found.append(content)
    return sorted(found, key=lambda reading: reading["rollouts_done"])


def inside_training_figure(runs: Sequence[tuple[str, Sequence[Reading], float | None]]) -> Figure:
    """Cosine to the top layers, entropy, perplexity and divergence over rollout batches.

    Bands are two standard errors of the change since the start, paired by token; readings without it have none.

    Args:
        runs: name, readings (`read_inside_folder`) and the last rollout batch of the internal phase (None: no switch).
    """
    from matplotlib.ticker import MaxNLocator

    look = looks([name for name, _, _ in runs])
    layers = {(readings[0]["layer"], readings[0]["layers"]) for _, readings, _ in runs}
    which = f"layer {next(iter(layers))[0]}" if len(layers) == 1 else "its layer"
    with styled():
        figure = new_figure(8.4, 6.2)
        (cosine, entropy), (perplexity, divergence) = figure.subplots(2, 2, sharex=True)
        for name, readings, switch in runs:
            colour, marker = look[name]
            x = [reading["rollouts_done"] for reading in readings]
            style: dict[str, Any] = {"color": colour, "marker": marker, "label": name}
            _band(cosine, x, [_top(r) for r in readings], **style)
            _band(entropy, x, [_at(r, "entropy", r["layer"] - 1) for r in readings], **style)
            _band(perplexity, x, [_perplexity(r) for r in readings], **style)
            _band(divergence, x, [_at(r, "divergence", -1) for r in readings], **style)
            if len(readings[0]["divergence"]["mean"]) > 1:
                _band(divergence, x, [_at(r, "divergence", 0) for r in readings], color=colour, linestyle=":")
                where = {"transform": divergence.transAxes, "ha": "right", "va": "top"}
                divergence.text(0.99, 0.98, "dotted: to the next layer", fontsize=8.5, color=SOFT, **where)
            for axes in (cosine, entropy, perplexity, divergence):
                if switch is not None:
                    axes.axvline(switch, color=colour, linewidth=1.2, linestyle=(0, (4, 3)))
        low, high = divergence.get_ylim()
        divergence.set_ylim(min(low, 0.0), high + 0.12 * (high - low))  # room for the note
        cosine.set_title(f"Cosine of {which}'s states to the top quarter's")
        entropy.set_title(f"Entropy of {which}'s policy (nats)")
        perplexity.set_title("Perplexity of the full policy")
        divergence.set_title(f"KL({which} || output), nats")
        for axes in (perplexity, divergence):
            axes.set_xlabel("rollout batches trained on")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        figure.legend(*cosine.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(runs)))
    return figure


Point = tuple[float, float]  # a value, and the standard error of its change since the start


def _at(reading: Reading, name: str, place: int) -> Point:
    change = reading.get("change")
    return reading[name]["mean"][place], 0.0 if change is None else change[name]["standard_error"][place]


def _perplexity(reading: Reading) -> Point:
    value, change = reading["perplexity"]["value"], reading.get("change")
    if change is None:
        return value, 0.0
    ratio = change["perplexity_ratio"]
    return value, value * ratio["standard_error"] / ratio["value"]


def _top(reading: Reading) -> Point:
    """Mean over the top quarter's layers above l; their errors are of the same tokens, so they are averaged too."""
    first = min(max(reading["layer"], reading["layers"] - max(1, reading["layers"] // 4)), reading["layers"] - 1)
    points = [_at(reading, "cosine_of_layer", place) for place in range(first, reading["layers"])]
    return sum(mean for mean, _ in points) / len(points), sum(error for _, error in points) / len(points)


def _band(axes: Axes, x: Sequence[float], points: Sequence[Point], **style: Any) -> None:
    axes.plot(x, [mean for mean, _ in points], **style)
    if any(error for _, error in points):
        low, high = ([mean + side * BAND * error for mean, error in points] for side in (-1, 1))
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
