"""Choosing a layer where the paper's boundary rule has no answer, and how sure the choice is. Pure functions of curves.

The second criterion is the *knee* of a layer's agreement with the final policy. With
``R(l) = 1 - KL(pi || q^l) / KL(pi || uniform)``, q^l being the layer's reading through the final norm at its fitted
temperature R is 0 where a layer says no more about the next token than that it is a token,
and 1 at the output. Where R stays low for many layers and then climbs, the layer at the turn is the last one before the
model commits itself to its output: what the boundary layer is in the paper's picture (Section 4 of arXiv 2512.19673).
Unlike raw entropies, R does not depend on the scale of the states. Only the boundary rule has been tried in training.

Shape legend: D bootstrap draws, L layers, N tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FASTER = 3.0  # a knee needs a climb above it that is so many times as steep as what is below it,
LEAST_GAIN = 0.1  # and of at least this much in all
NONE = "none"


@dataclass(frozen=True)
class Answer:
    """What a criterion says: a layer (from 1) or None, and why in one sentence without a full stop."""

    layer: int | None
    reason: str


@dataclass(frozen=True)
class Recommendation(Answer):
    """An answer and the criterion it comes from: ``boundary``, ``knee`` or None."""

    criterion: str | None


def find_knee(recovered: Sequence[float]) -> Answer:
    """Where R(1) .. R(L) turns from flat to climbing: the best fit of two lines that meet at a layer.

    The layer is an answer if the second line climbs, at least `FASTER` times as steeply as the first runs up or down,
    and by at least `LEAST_GAIN` in all; a curve that climbs from the first layer on, or faster at first, has no knee.
    """
    curve = torch.tensor(list(recovered), dtype=torch.float64)[None]
    layers = curve.shape[1]
    if layers < 4:
        return Answer(None, f"{layers} layers are too few to tell a flat part from a climb")
    place, below, above = (value.item() for value in _broken_lines(curve))
    layer = int(place)
    slopes = f"{100 * below:+.1f} points a layer up to layer {layer}, {100 * above:+.1f} from there on"
    if _is_knee(torch.tensor(place), torch.tensor(below), torch.tensor(above), layers):
        return Answer(layer, f"agreement with the final policy is flat, then climbs: {slopes}")
    why = "never turns from flat to climbing" if above > 0 else "does not climb towards the output"
    return Answer(None, f"agreement with the final policy {why}: at best {slopes}")


def knee_layers(curves: Tensor) -> list[int | None]:
    """The layer of `find_knee` for every one of D curves (D, L)."""
    if curves.shape[1] < 4:
        return [None] * len(curves)
    place, below, above = _broken_lines(curves.double())
    found = _is_knee(place, below, above, curves.shape[1])
    return [int(layer) if there else None for layer, there in zip(place.tolist(), found.tolist(), strict=True)]


def _broken_lines(curves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The layer where the two lines meet, and their slopes, each (D,): least squares over every place 2 .. L-1."""
    count = curves.shape[1]
    x = torch.arange(1, count + 1, dtype=torch.float64)
    places = range(2, count)
    designs = torch.stack(
        [torch.stack([torch.ones_like(x), (x - k).clamp(max=0), (x - k).clamp(min=0)], dim=1) for k in places]
    )  # (L-2, L, 3)
    fits = torch.linalg.pinv(designs) @ curves.T  # (L-2, 3, D)
    errors = (designs @ fits - curves.T).square().sum(1)  # (L-2, D)
    best = errors.argmin(0)
    slopes = fits[best, :, torch.arange(len(curves))]  # (D, 3)
    return best.double() + places[0], slopes[:, 1], slopes[:, 2]


def _is_knee(place: Tensor, below: Tensor, above: Tensor, layers: int) -> Tensor:
    return (above > 0) & (above >= FASTER * below.abs()) & (above * (layers - place) >= LEAST_GAIN)


def recommend(boundary: Answer, knee: Answer) -> Recommendation:
    """The boundary layer where the paper's rule has one, else the knee, else none."""
    if boundary.layer is not None:
        return Recommendation(boundary.layer, f"the paper's rule has an answer: {boundary.reason}", "boundary")
    if knee.layer is not None:
        return Recommendation(
            knee.layer,
            f"the paper's rule has no answer, and layer {knee.layer} is the last before the model commits itself to "
            f"its output: {knee.reason} (not tried in training, unlike the paper's rule)",
            "knee",
        )
    return Recommendation(None, f"the paper's rule has no answer, and {knee.reason}", None)


def bootstrap_weights(counts: Sequence[int], draws: int, seed: int) -> Tensor:
    """How often each token is drawn, (D, N) float64: responses are resampled, then the tokens within each of them.

    Tokens of one response are correlated, so responses are the first stage; with a single response only the second is
    left. Drawing in both stages counts the spread between tokens twice: shares err on the side of caution.

    Args:
        counts: tokens of each response; the N tokens stand in this order.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(list(counts))
    starts = sizes.cumsum(0) - sizes
    weights = torch.zeros(draws, int(sizes.sum()), dtype=torch.float64)
    for row in weights:
        chosen = torch.randint(len(sizes), (len(sizes),), generator=generator)
        size = sizes[chosen].repeat_interleave(sizes[chosen])
        start = starts[chosen].repeat_interleave(sizes[chosen])
        picks = start + (torch.rand(len(size), generator=generator, dtype=torch.float64) * size).long()
        row += torch.bincount(picks, minlength=len(row))
    return weights


def shares(found: Sequence[int | None], answer: int | None) -> tuple[float, dict[str, float]]:
    """The share of draws that give the answer, and those of all other answers by name, most frequent first."""
    total = max(1, len(found))
    counts = Counter(NONE if layer is None else str(layer) for layer in found)
    own = counts.pop(NONE if answer is None else str(answer), 0)
    return own / total, {name: count / total for name, count in counts.most_common()}
