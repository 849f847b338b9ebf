"""Several states of a model on the same responses: what training did inside (Figure 5 of arXiv 2512.19673).

For every model: the full policy's perplexity on the responses (5c), the entropy of each layer's policy (5b), the cosine
between the states of the chosen layer and those of all others (5a), and the divergence of the chosen layer's policy
from the later ones' (5d). Changes against the first model are paired by token; their standard errors are clustered by
response.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bupo.errors import InputError
from bupo.lens.batching import TokenPair, batches, check_rollouts, pad
from bupo.lens.clustered import ClusterMeans, round_list
from bupo.lens.old_inside import look_inside
from bupo.lens.old_sampling import TokenDraw
from bupo.models.capture import capture_layers
from bupo.models.internal_policy import check_layer
from bupo.models.layout import eval_mode, find_layout, unwrap
from bupo.models.unembed import get_unembedding


@dataclass(frozen=True)
class Reading:
    """One model's values a token, (K, N) with responses next to each other, and what they are."""

    values: Tensor
    layers: int
    layer: int

    def columns(self) -> list[tuple[str, int]]:
        """Names and lengths of the groups that the rows of ``values`` form."""
        later = self.layers - self.layer + 1
        return [("logprob", 1), ("entropy", self.layers), ("divergence", later), ("cosine", self.layers**2)]


def read_inside(
    model: nn.Module,
    rollouts: Sequence[TokenPair],
    layer: int,
    *,
    tokens: int = 1024,
    seed: int = 0,
    batch_tokens: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> Reading:
    """Read one model on (some tokens of) the responses.

    Args:
        layer: l, from 1: the layer whose policy was trained.
        tokens: about so many are drawn, the same share of every response; the draw depends on ``seed`` and the
            lengths only, so that several models are read at the same tokens.

    Raises:
        InputError: unusable responses, no such layer, a model that cannot be read.
    """
    check_rollouts(model, rollouts)
    inner, rule = unwrap(model), get_unembedding(model)
    layers = find_layout(model).n_layers
    check_layer(layers, layer)
    chosen = draw_tokens(rollouts, tokens, seed)
    found: dict[int, Tensor] = {}
    with eval_mode(inner), torch.no_grad():
        for batch in batches(rollouts, batch_tokens):
            part = pad([rollouts[i] for i in batch], [chosen[i] for i in batch], rule.weight.device)
            states, final = capture_layers(model, part.ids, part.mask, part.keep)
            inside = look_inside(states, final, part.targets, rule, layer)
            rows = torch.cat([inside.logprob[None], inside.entropy, inside.divergence, inside.cosine.flatten(0, 1)])
            found |= dict(zip(batch, rows.split(part.counts, dim=-1), strict=True))
            if progress is not None:
                progress(sum(len(chosen[i]) for i in found), sum(map(len, chosen)))
    values = torch.cat([found[i] for i in range(len(rollouts))], dim=-1)
    if not bool(torch.isfinite(values).all()):
        raise InputError("the model gives non-finite logits: damaged weights, or a dtype too narrow for it?")
    return Reading(values, layers, layer)


def draw_tokens(rollouts: Sequence[TokenPair], tokens: int, seed: int) -> list[list[int]]:
    """Which tokens of each response are read."""
    draw = TokenDraw([len(r.response_ids) for r in rollouts], seed)
    return draw.take(min(1.0, tokens / draw.total))


def compare(
    readings: Sequence[tuple[str, Reading]], rollouts: Sequence[TokenPair], *, tokens: int = 1024, seed: int = 0
) -> dict[str, Any]:
    """The content of ``compare.json`` (schema 1) from the readings of two models or more, the first being the baseline.

    Args:
        readings: names and what `read_inside` returned, all with these ``rollouts``, ``tokens`` and ``seed``.

    Raises:
        InputError: the models do not have the same number of layers.
    """
    first = readings[0][1]
    for name, reading in readings:
        if (reading.layers, reading.layer) != (first.layers, first.layer):
            raise InputError(
                f"{readings[0][0]} has {first.layers} layers and {name} has {reading.layers}: only states of one model "
                "(before, during and after training) can be compared layer by layer"
            )
    counts = [len(part) for part in draw_tokens(rollouts, tokens, seed)]
    sizes = [len(r.response_ids) for r in rollouts]
    baseline = first.values
    result: dict[str, Any] = {
        "schema": 1,
        "kind": "comparison",
        "layer": first.layer,
        "layers": first.layers,
        "tokens": sum(counts),
        "tokens_of_responses": sum(sizes),
        "samples": len(rollouts),
        "standard_error_method": "clustered by response" if len(rollouts) > 1 else "over tokens (a single response)",
        "models": [],
    }
    for number, (name, reading) in enumerate(readings):
        item = {"name": name, **_summary(reading, reading.values, counts, sizes)}
        item["perplexity"] = _perplexity(item.pop("logprob"))
        if number:
            change = _summary(reading, reading.values - baseline, counts, sizes)
            change["perplexity_ratio"] = _perplexity(change.pop("logprob"))
            item["change"] = change
        result["models"].append(item)
    return result


def _summary(reading: Reading, values: Tensor, counts: list[int], sizes: list[int]) -> dict[str, Any]:
    """Means and standard errors by name; of the cosines, the chosen layer's row has errors, the matrix is beside it."""
    means = ClusterMeans(len(values))
    for part, size in zip(values.split(counts, dim=-1), sizes, strict=True):
        means.add(part, size=size)
    widths = [width for _, width in reading.columns()]
    mean, error = means.mean().split(widths), means.standard_error().split(widths)
    found: dict[str, Any] = {}
    for (name, _), m, e in zip(reading.columns(), mean, error, strict=True):
        if name == "cosine":
            matrix, errors = m.view(reading.layers, -1), e.view(reading.layers, -1)
            found["cosine_of_layer"] = {
                "mean": round_list(matrix[reading.layer - 1]),
                "standard_error": round_list(errors[reading.layer - 1]),
            }
            found["cosine"] = [round_list(row, 4) for row in matrix]
        else:
            found[name] = {"mean": round_list(m), "standard_error": round_list(e)}
    return found


def _perplexity(logprob: dict[str, list[float]]) -> dict[str, float]:
    """``exp(-mean log-prob)`` with the standard error that follows from the logarithm's; of a difference, a ratio."""
    value = math.exp(-logprob["mean"][0])
    return {"value": round(value, 6), "standard_error": round(value * logprob["standard_error"][0], 6)}
