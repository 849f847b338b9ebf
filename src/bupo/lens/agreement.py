"""What helps to choose a layer, beside the paper's rule: the ``layer_choice`` block of ``analysis.json``.

On a random sample of response tokens every layer is compared with the final policy, as it is, through the final norm,
and at fitted temperatures; each criterion's answer stands beside how often a bootstrap repeats it. Joins ``model``
(states) and ``policy`` (readings, criteria).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bupo.errors import InputError
from bupo.lens.batching import TokenPair, pad
from bupo.lens.old_choice import Answer, bootstrap_weights
from bupo.lens.old_criteria import READINGS, answers, curves, token_values
from bupo.lens.old_temperature import Comparison, Final, compare, read_final
from bupo.lens.softmax_stats import entropy
from bupo.models.capture import LayerStates, capture_stream
from bupo.models.layout import eval_mode, find_layout, unwrap
from bupo.models.unembed import Unembedding, get_unembedding

DRAWS = 300
MOST_TOKENS, LEAST_TOKENS, PART = 512, 128, 16  # by default a sixteenth of all tokens, between these bounds
RESPONSES, TOKENS_A_RESPONSE = 32, 4  # of more responses, only so many that each gives four tokens on average
RULES = ("boundary", "recommended")


@dataclass(frozen=True)
class _Sample:
    """States of the chosen tokens: N of them, response by response; ``counts`` says how many of each."""

    counts: list[int]
    stream: Tensor  # H^0 .. H^L (L+1, N, d)
    final: Final
    ffn_change: Tensor  # Eq. 13, (L, N)


def sample_size(total: int) -> int:
    """The default number of tokens: a sixteenth, at least 128, at most 512; so the cost stays a small share."""
    return min(total, MOST_TOKENS, max(LEAST_TOKENS, total // PART))


@torch.no_grad()
def choose_layer(
    model: nn.Module,
    rollouts: Sequence[TokenPair],
    analysis: Mapping[str, Any],
    *,
    tokens: int | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Compare every layer with the final policy on a sample of tokens, and recommend one or none.

    Costs four vocabulary products and about ten looks at the logits a layer and sampled token, and one forward of the
    responses that have sampled tokens.

    Args:
        analysis: of the same model and responses (:func:`bupo.lens.analyze.analyze_rollouts`); its boundary stands.
        tokens: so many at random over all responses; by default :func:`sample_size` of the analysed ones' number.
        draws: bootstrap draws.
        seed: of the sample and of the bootstrap.
        progress: called with (layers finished, layers in all).

    Returns:
        ``{"tokens", "responses", "seed", "draws", "bootstrap", "recommendation", "criteria", "curves",
        "standard_errors"}``. ``recommendation`` has layer (None if none), criterion, reason, share (of the draws that
        repeat it) and other (the other answers' shares). ``criteria`` has the same for every criterion. ``curves`` has
        lists over layers 1..L for the readings ``raw`` (Eq. 5), ``norm`` (final norm applied), ``fitted`` and
        ``norm_fitted`` (at the fitted temperatures): entropy and kl (to the final policy) in nats, top1 (share of
        tokens whose most likely next token is the final policy's), temperature (None where no finite one is best),
        inverse_temperature, and recovered (`bupo.lens.old_choice`).

    Raises:
        InputError: non-finite logits.
    """
    inner, rule = unwrap(model), get_unembedding(model)
    with eval_mode(inner):
        taken = _take(model, rollouts, rule, tokens or sample_size(int(analysis["tokens"])), seed)
        readings = _read_layers(model, taken, rule, progress)
    values = token_values(readings, taken.final, taken.ffn_change, taken.counts, len(rule.weight))
    if not values.finite():
        raise InputError("the layers' comparison with the final policy is not finite; try --dtype float32")
    several = len(taken.counts) > 1
    boundary = Answer(analysis["boundary_layer"], analysis["boundary_reason"])
    change = (analysis["entropy_change"]["ffn"], analysis["entropy_change_standard_errors"]["ffn"])
    shown, errors = curves(values)
    return {
        "tokens": sum(taken.counts),
        "responses": len(taken.counts),
        "seed": seed,
        "draws": draws,
        "bootstrap": "responses, then tokens within them" if several else "tokens (of a single response)",
        **answers(values, boundary, change, bootstrap_weights(taken.counts, draws, seed)),
        "curves": shown,
        "standard_errors": errors,
    }


def chosen_layer(analysis: Mapping[str, Any], rule: str) -> tuple[int | None, str]:
    """The layer that a rule of `RULES` gives, or None, and why.

    Raises:
        InputError: ``recommended`` of an analysis without ``layer_choice``.
    """
    if rule == "boundary":
        return analysis["boundary_layer"], analysis["boundary_reason"]
    if not analysis.get("layer_choice"):
        raise InputError("this analysis has no layer_choice, so nothing is recommended; analyse without --no-choice")
    found = analysis["layer_choice"]["recommendation"]
    return found["layer"], found["reason"]


# -- tokens and their states -----------------------------------------------------------------------------------------


def pick_tokens(lengths: Sequence[int], tokens: int, seed: int) -> dict[int, list[int]]:
    """Which tokens of which responses, both in order: so many of all tokens, each equally likely.

    Of more than 32 responses, and more than ``tokens / 4``, only so many (drawn first) are looked at.
    """
    generator = torch.Generator().manual_seed(seed)
    most = max(RESPONSES, tokens // TOKENS_A_RESPONSE)
    responses = sorted(torch.randperm(len(lengths), generator=generator)[:most].tolist())
    places = [(response, token) for response in responses for token in range(lengths[response])]
    chosen = sorted(torch.randperm(len(places), generator=generator)[:tokens].tolist())
    found: dict[int, list[int]] = {}
    for response, token in (places[i] for i in chosen):
        found.setdefault(response, []).append(token)
    return found


def _take(model: nn.Module, rollouts: Sequence[TokenPair], rule: Unembedding, tokens: int, seed: int) -> _Sample:
    picked = pick_tokens([len(r.response_ids) for r in rollouts], tokens, seed)
    parts = [_response(model, rollouts[i], at, rule) for i, at in picked.items()]
    streams, finals, changes = zip(*parts, strict=True)
    return _Sample(
        [len(final) for final in finals],
        torch.cat(streams, dim=1),
        read_final(torch.cat(finals), rule),
        torch.cat(changes, dim=1),
    )


def _response(model: nn.Module, rollout: TokenPair, at: list[int], rule: Unembedding) -> tuple[Tensor, Tensor, Tensor]:
    """Stream (L+1, n, d), final states (n, d) and FFN entropy change (L, n) at some tokens of one response."""
    batch = pad([rollout], [at], rule.weight.device)
    stream: list[Tensor] = []
    changes: list[Tensor] = []

    def consume(first_layer: int, before: Tensor, layers: list[LayerStates], after: Tensor) -> None:
        stream.extend([after] if stream else [before, after])
        into, out = entropy(torch.cat([layers[0].ffn_in, layers[0].ffn_out]), rule).chunk(2)
        changes.append(out - into)

    final = capture_stream(model, batch.ids, batch.mask, batch.keep, consume, group=1)
    return torch.stack(stream), final, torch.stack(changes)


def _read_layers(
    model: nn.Module, taken: _Sample, rule: Unembedding, progress: Callable[[int, int], None] | None
) -> dict[str, list[Comparison]]:
    """Comparisons of layers 0..L for each of `READINGS`."""
    norm = _final_norm(model)
    found: dict[str, list[Comparison]] = {name: [] for name in READINGS}
    starts = {"fitted": 0.0, "norm_fitted": 0.0}
    for number, states in enumerate(taken.stream):
        for plain, fitted, read in (("raw", "fitted", states), ("norm", "norm_fitted", norm(states))):
            one, two = compare(read, taken.final, rule, start=starts[fitted])
            starts[fitted] = two.inverse_temperature
            found[plain].append(one)
            found[fitted].append(two)
        if progress is not None and number:
            progress(number, len(taken.stream) - 1)
    return found


def _final_norm(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """LN of Eq. 1 on float32 states, computed as the model computes it (its dtype, its device)."""
    norm = find_layout(model).final_norm
    weight = next(norm.parameters(), None)
    dtype = unwrap(model).dtype if weight is None else weight.dtype

    def apply(states: Tensor) -> Tensor:
        device = states.device if weight is None else weight.device
        return norm(states.to(device, dtype)[None])[0].to(states.device, torch.float32)

    return apply
