"""How closely each layer's lens agrees with the model's output, and the knee of that curve: a second candidate layer.

On a random sample of response tokens, every layer is compared with the full policy pi in two readings: raw, as internal
policies are defined, and through the final norm (the usual logit lens). The *recovered* information is
``R(l) = 1 - KL(pi || q^l) / KL(pi || uniform)``, where q^l is layer l read through the final norm: 1 at the output, 0
for a layer that is no better than uniform. Where R stays flat for many layers and then climbs, the layer at the turn is
the last one before the model commits itself to its output, which is what the boundary layer is in Section 4 of arXiv
2512.19673. Unlike raw entropies, R does not depend on the scale of the states. Only the boundary rule has been tried in
training.

Shape legend: L layers, N tokens, d width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bupo.errors import InputError
from bupo.lens.batching import TokenPair, pad, subsample
from bupo.lens.clustered import ClusterMeans, round_errors, round_list
from bupo.lens.online import StatsRequest
from bupo.lens.softmax_stats import lens_stats
from bupo.models.capture import capture_layers
from bupo.models.layout import eval_mode, find_layout, unwrap
from bupo.models.unembed import get_unembedding

LENSES = ("raw", "norm")
KINDS = ("entropy", "kl", "top1")
TITLES = ("the paper's rule on the FFN entropy change", "knee of the agreement with the final policy")
MOST_TOKENS, LEAST_TOKENS, SHARE = 512, 128, 16  # by default a sixteenth of all tokens, between these bounds
RESPONSES, TOKENS_PER_RESPONSE = 32, 4  # of more than 32 responses, so few that each has four sampled tokens on average
FASTER = 3.0  # a knee needs a climb after it that is this many times as steep as the curve before it,
LEAST_GAIN = 0.1  # and that gains at least this much in all
_LAYERS_AT_ONCE = 8
Progress = Callable[[str, int, int], None]


class Candidate(NamedTuple):
    """A layer (from 1) or None, and the reason in one sentence without a full stop."""

    layer: int | None
    reason: str


@torch.no_grad()
def choose_layer(
    model: nn.Module,
    responses: Sequence[TokenPair],
    analysis: Mapping[str, Any],
    *,
    tokens: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare every layer with the full policy on a sample of tokens, and recommend one layer or none.

    Costs two vocabulary products per layer and sampled token, and a forward pass of the sampled responses.

    Args:
        model, responses, analysis: what was analysed, and the result of `bupo.lens.analyze.analyze_rollouts`.
        tokens: number of tokens to sample (default: 1/16 of the analysed ones, clamped to 128..512).
        seed: random seed of the sample.
        progress: called with ("comparing layers", layers done, layers in all).

    Returns:
        The block ``layer_choice`` of ``analysis.json``. Its ``curves`` run over layers 1..L in both readings:
        ``entropy`` and ``kl`` (``KL(full policy || layer)``) in nats, ``top1`` (share of tokens with the same most
        likely next token) and, through the norm, ``recovered``. ``standard_errors`` are clustered by response, that
        of the knee is in layers.

    Raises:
        InputError: non-finite logits.
    """
    tokens = tokens or min(MOST_TOKENS, max(LEAST_TOKENS, int(analysis["tokens"]) // SHARE))
    lengths = [len(response.response_ids) for response in responses]
    drawn = subsample(lengths, tokens, seed, max_responses=max(RESPONSES, tokens // TOKENS_PER_RESPONSE))
    counts = [len(part) for part in drawn if part]
    with eval_mode(unwrap(model)):
        values, uniform_kl = _compare_layers(model, responses, drawn, progress)
    if not bool(torch.isfinite(values).all()):
        raise InputError("comparing the layers with the output gave non-finite numbers; load the model in float32")
    # R is a ratio of means: to first order, its error is that of the mean influence of each token (L, N)
    kl, scale = values[1, 1], uniform_kl.mean()
    recovered = 1 - kl.mean(1) / scale
    influence = ((1 - recovered)[:, None] * uniform_kl - kl) / scale
    knee, knee_error = find_knee(recovered.tolist()), None
    if knee.layer is not None:
        shift = knee_gradient(recovered, knee.layer) @ influence
        (knee_error,) = round_errors(ClusterMeans.of(shift[None], counts).statistics()[1])
    boundary = Candidate(analysis["boundary_layer"], analysis["boundary_reason"])
    curves, errors = _curves(values, recovered, influence, counts)
    return {
        "tokens": sum(counts),
        "responses": len(counts),
        "seed": seed,
        "recommendation": recommend(boundary, knee),
        "criteria": [
            {"name": "boundary", "title": TITLES[0], **boundary._asdict()},
            {"name": "knee", "title": TITLES[1], **knee._asdict(), "standard_error": knee_error},
        ],
        "curves": curves,
        "standard_errors": errors,
    }


def _compare_layers(
    model: nn.Module, responses: Sequence[TokenPair], drawn: list[list[int]], progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """The `KINDS` per lens, layer and drawn token, (2, 3, L, N) float64, and ``KL(pi || uniform)`` per token (N,)."""
    unembedding, norm = get_unembedding(model), _final_norm(model)
    captured = []
    for index in (i for i, part in enumerate(drawn) if part):
        batch = pad(responses, drawn, [index], unembedding.weight.device)
        captured.append(capture_layers(model, batch.ids, batch.mask, batch.positions, group=1))
    states = torch.cat([layers for layers, _ in captured], dim=1)
    final = torch.cat([state for _, state in captured])
    output = lens_stats(final[None], unembedding, StatsRequest(top_k=1))
    request = StatsRequest(reference=final, kl_from_reference=True, top_k=1)
    parts = []
    for group in states.split(_LAYERS_AT_ONCE):
        stats = lens_stats(torch.cat([group, norm(group)]), unembedding, request)
        same = (stats["top"] == output["top"]).squeeze(-1).double()
        kl = stats["kl_from_reference"].clamp(min=0)  # it is negative by rounding only
        parts.append(torch.stack(torch.stack([stats["entropy"], kl, same]).cpu().chunk(2, dim=1)))
        if progress is not None:
            progress("comparing layers", sum(part.shape[2] for part in parts), len(states))
    return torch.cat(parts, dim=2), math.log(len(unembedding.weight)) - output["entropy"][0].cpu()


def _curves(
    values: Tensor, recovered: Tensor, influence: Tensor, counts: list[int]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """The means and their standard errors by lens and kind, each a list over layers."""
    rows = torch.cat([values.flatten(0, 2), influence])
    means, errors = (part.split(len(recovered)) for part in ClusterMeans.of(rows, counts).statistics())
    names = [*product(LENSES, KINDS), ("norm", "recovered")]
    curves: tuple[dict, dict] = ({lens: {} for lens in LENSES}, {lens: {} for lens in LENSES})
    for (lens, kind), mean, error in zip(names, (*means[:-1], recovered), errors, strict=True):
        curves[0][lens][kind], curves[1][lens][kind] = round_list(mean), round_errors(error)
    return curves


def _final_norm(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The final norm on float32 states (..., N, d), computed as the model does: in its dtype, on its device."""
    norm = find_layout(model).final_norm
    weight = next(norm.parameters(), None)

    def apply(states: Tensor) -> Tensor:
        there = states.to(unwrap(model).dtype) if weight is None else states.to(weight.device, weight.dtype)
        return norm(there).to(states.device, torch.float32)

    return apply


def find_knee(recovered: Sequence[float]) -> Candidate:
    """Where R(1) .. R(L) turns from flat to climbing: the best fit of two lines that meet at a layer.

    The layer is a knee if the second line climbs, at least `FASTER` times as steeply as the first runs up or down, and
    by at least `LEAST_GAIN` in all. A curve that climbs from the first layer on, or faster at first, has no knee.
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
