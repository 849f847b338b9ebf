"""Layers to train: the boundary layer of arXiv 2512.19673 (Section 4), else the knee of the agreement with the output.

The FFN entropy change ``H(F^l) - H(LN(H^{l-1} + A^l))`` is positive in the first layers (exploration), about zero in
the middle (integration) and negative in the last ones (convergence); the *boundary layer* is the last positive one
before the shift. The *recovered* information is ``R(l) = 1 - KL(pi || q^l) / KL(pi || uniform)``, where pi is the full
policy and q^l layer l through a lens. Where R turns from flat to climbing, the model commits itself to its output.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bupo.lens.batching import ClusterMeans, TokenPair, rounded, subsample
from bupo.lens.maps import PLAIN
from bupo.lens.readings import Progress, Readings, read_layers
from bupo.models.internal_policy import LayerMap

TITLES = ("the paper's rule on the FFN entropy change", "knee of the agreement with the final policy")
MOST_TOKENS, LEAST_TOKENS, SHARE = 512, 128, 16  # by default a sixteenth of all tokens, between these bounds
RESPONSES, TOKENS_PER_RESPONSE = 32, 4  # of more than 32 responses, so few that each has four sampled tokens on average
FASTER = 3.0  # a knee needs a climb after it that is this many times as steep as the curve before it,
LEAST_GAIN = 0.1  # and that gains at least this much in all
# "About zero" means within this share of the largest positive change, or within two standard errors of zero. The
# positive changes set the scale: in Llama models they are weak everywhere and still make up the exploration region.
ABOUT_ZERO = 0.15
MISFITS = 0.15  # at most this share of the layers may have another sign than their region's
NO_REGIONS: dict[str, list[int] | None] = {"exploration": None, "integration": None, "convergence": None}


class Candidate(NamedTuple):
    """A layer (from 1) or None, and the reason in one sentence without a full stop."""

    layer: int | None
    reason: str


def choose_layer(
    model: nn.Module,
    responses: Sequence[TokenPair],
    analysis: Mapping[str, Any],
    *,
    lenses: Mapping[str, LayerMap] = PLAIN,
    tokens: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare every layer with the full policy on a sample of tokens, and recommend one layer or none.

    ``analysis`` is the result of `bupo.lens.analyze.analyze_rollouts` for the model and the responses; of its tokens,
    by default 1/16 are sampled, clamped to 128..512. Returns the block ``layer_choice`` of ``analysis.json``, with the
    curves ``entropy`` and its ``change`` from layer to layer, ``kl`` (``KL(full policy || layer)``) in nats, ``top1``
    (share of tokens with the same most likely next token) and ``recovered`` through each of the ``lenses``. The knee
    is that of the last lens with a final norm; its standard error is in layers.
    """
    tokens = tokens or min(MOST_TOKENS, max(LEAST_TOKENS, int(analysis["tokens"]) // SHARE))
    lengths = [len(response.response_ids) for response in responses]
    drawn = subsample(lengths, tokens, seed, max_responses=max(RESPONSES, tokens // TOKENS_PER_RESPONSE))
    readings = read_layers(model, responses, drawn, list(lenses.values()), progress)
    boundary = Candidate(analysis["boundary_layer"], analysis["boundary_reason"])
    curves, errors = readings.curves(list(lenses))
    knees = {name: _knee(readings, i) for i, (name, lens) in enumerate(lenses.items()) if lens.norm}
    name, (knee, error) = list(knees.items())[-1] if knees else ("", (Candidate(None, "no lens has a norm"), None))
    return {
        "tokens": sum(readings.counts),
        "responses": len(readings.counts),
        "seed": seed,
        "recommendation": recommend(boundary, knee),
        "criteria": [
            {"name": "boundary", "title": TITLES[0], **boundary._asdict()},
            {"name": "knee", "title": f"{TITLES[1]}, lens {name}", **knee._asdict(), "standard_error": error},
        ],
        "knees": {lens: {**found._asdict(), "standard_error": e} for lens, (found, e) in knees.items()},
        "curves": curves,
        "standard_errors": errors,
    }


def _knee(readings: Readings, lens: int) -> tuple[Candidate, float | None]:
    """The knee of the information that a lens recovers, and its standard error in layers."""
    recovered, influence = readings.recovered(lens)
    knee = find_knee(recovered.tolist())
    if knee.layer is None:
        return knee, None
    shift = knee_gradient(recovered, knee.layer) @ influence
    return knee, rounded(ClusterMeans.of(shift[None], readings.counts).statistics()[1])[0]


def find_knee(recovered: Sequence[float]) -> Candidate:
    """Where R(1) .. R(L) turns from flat to climbing: the best fit of two lines that meet at a layer.

    The second must climb, at least `FASTER` times as steeply as the first runs up or down, and `LEAST_GAIN` in all.
    """
    curve = torch.tensor(list(recovered), dtype=torch.float64)
    n = len(curve)
    if n < 4:
        return Candidate(None, f"{n} layers are too few to tell a flat part from a climb")
    designs = torch.stack([_broken_line(n, place) for place in range(2, n)])  # (L-2, L, 3)
    fits = torch.linalg.pinv(designs) @ curve  # (L-2, 3)
    best = int((designs @ fits[..., None] - curve[:, None]).square().sum((1, 2)).argmin())
    layer, (_, below, above) = best + 2, fits[best].tolist()
    slopes = f"{100 * below:+.1f} points per layer up to layer {layer}, {100 * above:+.1f} from there on"
    if above > 0 and above >= FASTER * abs(below) and above * (n - layer) >= LEAST_GAIN:
        return Candidate(layer, f"agreement with the final policy is flat, then climbs: {slopes}")
    why = "never turns from flat to climbing" if above > 0 else "does not climb towards the output"
    return Candidate(None, f"agreement with the final policy {why}: at best {slopes}")


def knee_gradient(recovered: Tensor, layer: int) -> Tensor:
    """How much the knee at ``layer`` moves per change of each R(l), (L,): the place as a parameter of the same fit."""
    lines = _broken_line(len(recovered), layer)
    _, below, above = torch.linalg.lstsq(lines, recovered[:, None]).solution[:, 0]
    x = torch.arange(1, len(recovered) + 1)
    slopes = torch.where(x < layer, below, torch.where(x > layer, above, (below + above) / 2))
    return torch.linalg.pinv(torch.cat([lines, -slopes[:, None]], dim=1))[3]


def _broken_line(layers: int, place: int) -> Tensor:
    """The design (L, 3) of two lines that meet at ``place``: level there, slope before it, slope after it."""
    x = torch.arange(1, layers + 1, dtype=torch.float64) - place
    return torch.stack([torch.ones_like(x), x.clamp(max=0), x.clamp(min=0)], dim=1)


def recommend(boundary: Candidate, knee: Candidate) -> dict[str, Any]:
    """The boundary layer if the paper's rule has one, else the knee, else none: ``layer, criterion, reason``."""
    if boundary.layer is not None:
        reason, criterion = f"the paper's rule selects a layer: {boundary.reason}", "boundary"
        return {"layer": boundary.layer, "criterion": criterion, "reason": reason}
    if knee.layer is None:
        return {"layer": None, "criterion": None, "reason": f"the paper's rule selects no layer, and {knee.reason}"}
    reason = (
        f"the paper's rule selects no layer, and layer {knee.layer} is the last before the model commits itself to its "
        f"output: {knee.reason} (not tried in training, unlike the paper's rule)"
    )
    return {"layer": knee.layer, "criterion": "knee", "reason": reason}


def find_boundary(
    ffn_change: Sequence[float], standard_errors: Sequence[float] | None = None
) -> tuple[Candidate, dict[str, list[int] | None]]:
    """The boundary layer, and the three regions as inclusive ranges or None, from the FFN entropy change (nats).

    A layer fits *exploration* if its change is positive and *convergence* if it is negative, each by more than two
    standard errors (zero where not given or NaN), and *integration* if it is about zero. Of all splits into consecutive
    regions, the one with the fewest layers that do not fit is chosen; among equals, the one with the smallest squared
    deviations from the regions' means (zero for integration). The integration region may be empty (an abrupt model).
    """
    change, n, what = list(ffn_change), len(ffn_change), "FFN entropy change"
    noise = [0.0 if math.isnan(e) else 2 * e for e in standard_errors or [0.0] * n]
    zero = ABOUT_ZERO * max(0.0, *change)
    positive, negative = ([s * c > e for c, e in zip(change, noise, strict=True)] for s in (1, -1))
    small = [abs(c) <= max(e, zero) for c, e in zip(change, noise, strict=True)]
    if all(negative):
        reason = f"the {what} is negative in every layer (1 to {n}): there is no exploration region"
        return Candidate(None, f"{reason}, so the rule gives no boundary layer"), NO_REGIONS | {"convergence": [1, n]}
    if all(positive):
        reason = f"the {what} is positive in every layer (1 to {n}): it never shifts to integration or convergence"
        reason = f"{reason}, so the rule would only return the last layer, which is no boundary"
        return Candidate(None, reason), NO_REGIONS | {"exploration": [1, n]}
    for present, side, region in ((positive, "above", "exploration"), (negative, "below", "convergence")):
        if not any(present):
            reason = f"the {what} is {side} zero by two standard errors in no layer: no {region} region"
            return Candidate(None, reason), NO_REGIONS
    misfits, first, last = _best_split(change, positive, small, negative)
    allowed = int(MISFITS * n)
    if misfits > allowed:
        seen = "only the last layer is positive"
        if first:
            seen = f"{misfits} of {n} layers do not fit the best split (at most {allowed} may)"
        signs = zip(positive, negative, strict=True)
        kinds = ["positive" if plus else "negative" if minus else "about zero" for plus, minus in signs]
        reason = f"the signs of the {what} do not fall into positive, about zero, negative"
        return Candidate(None, f"{reason}: {seen}: {_in_words(kinds)}"), NO_REGIONS
    abrupt, after = last == first, first + 1
    shift = f"the abrupt convergence from {after} on" if abrupt else f"the shift to integration in layer {after}"
    reason = f"layer {first} is the last with a positive {what} ({change[first - 1]:+.3g} nats) before {shift}"
    integration = None if abrupt else [after, last]
    regions = {"exploration": [1, first], "integration": integration, "convergence": [last + 1, n]}
    return Candidate(first, f"{reason}; {misfits} of {n} layers do not fit their region"), regions


def _in_words(kinds: Sequence[str], most: int = 6) -> str:
    """Layers of the same kind together: ``1 to 3 negative, 4 positive``; of many groups, the first."""
    groups, first = [], 1
    for kind, group in groupby(kinds):
        last = first + len(list(group)) - 1
        groups.append(f"{first} {kind}" if last == first else f"{first} to {last} {kind}")
        first = last + 1
    return ", ".join(groups[:most]) + (", ..." if len(groups) > most else "")


def _best_split(change: list[float], *fits: list[bool]) -> tuple[int, int, int]:
    """Number of misfits and the last layers of exploration and integration; (L, 0, 0) if only layer L is positive."""
    n, positive = len(change), fits[0]
    rows: list[list[Any]] = [*([not fit for fit in region] for region in fits), change, [c * c for c in change]]
    # sums of the first 0, 1, 2, ... layers
    not_positive, not_small, not_negative, sums, squares = (list(accumulate(row, initial=0)) for row in rows)

    def spread(start: int, stop: int) -> float:  # squared deviations from the mean of change[start:stop]
        total = sums[stop] - sums[start]
        return max(0.0, squares[stop] - squares[start] - total * total / max(1, stop - start))

    splits = [(n, math.inf, 0, 0)]
    for first in (layer for layer in range(1, n) if positive[layer - 1]):
        for last in range(first, n):
            misfits = not_positive[first] + not_small[last] - not_small[first] + not_negative[n] - not_negative[last]
            deviations = spread(0, first) + squares[last] - squares[first] + spread(last, n)
            splits.append((misfits, deviations, first, last))
    misfits, _, first, last = min(splits)
    return misfits, first, last
