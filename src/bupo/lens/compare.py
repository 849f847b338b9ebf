"""Several states of a model (before, during, after training) on the same response tokens [Fig. 5].

Cosines between the states of the chosen layer and of the others (5a), entropies of the layers (5b), the full policy's
perplexity (5c), KL divergences from the chosen layer's policy to later ones (5d); changes are paired by token.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bupo.errors import InputError
from bupo.lens.batching import ClusterMeans, batches, check_rollouts, pad, rounded, subsample_evenly
from bupo.lens.online import StatsRequest
from bupo.lens.softmax_stats import lens_stats
from bupo.models.capture import capture_layers
from bupo.models.internal_policy import check_layer
from bupo.models.layout import eval_mode, find_layout, unwrap
from bupo.models.unembed import get_unembedding

_BATCH_TOKENS = 2048  # padded, per forward pass


@dataclass(frozen=True)
class LayerMeasurements:
    """One model's values per token."""

    values: Tensor  # (K, N) float64, response by response: log-prob, L entropies, L-l+1 divergences, L*L cosines
    layers: int
    layer: int  # the chosen layer l, from 1
    vocabulary: int
    counts: list[int]  # number of tokens read per response
    sizes: list[int]  # and in all per response
    states: Tensor | None = None  # unit vectors (L, N, d) in float16


def measure_layers(
    model: nn.Module,
    responses: Sequence[Any],
    layer: int,
    *,
    tokens: int = 1024,
    seed: int = 0,
    keep_states: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LayerMeasurements:
    """Measure one model, whose ``layer`` was trained, on ``tokens`` tokens of the responses.

    The draw depends only on ``seed`` and the lengths, so that several models are measured on the same tokens. With
    ``keep_states``, their comparison has the drift of every layer. Errors are those of
    `bupo.lens.analyze.analyze_rollouts`; ``progress`` is called with (tokens read, tokens in all).
    """
    pairs = check_rollouts(model, responses)
    unembedding, layers = get_unembedding(model), find_layout(model).n_layers
    check_layer(layers, layer)
    sizes = [len(pair.response_ids) for pair in pairs]
    drawn = subsample_evenly(sizes, tokens, seed)
    counts = [len(part) for part in drawn]
    measured: dict[int, Tensor] = {}
    kept: dict[int, Tensor] = {}
    with eval_mode(unwrap(model)), torch.no_grad():
        for indices in batches(pairs, _BATCH_TOKENS, range(len(pairs))):
            batch = pad(pairs, drawn, indices, unembedding.weight.device)
            states, final = capture_layers(model, *batch.inputs)
            request = StatsRequest(targets=batch.targets, reference=states[layer - 1], kl_from_reference=True)
            stats = lens_stats(torch.cat([states, final[None]]), unembedding, request)
            logprob, entropy, kl = (stats[name] for name in ("logprob", "entropy", "kl_from_reference"))
            values = torch.cat([logprob[-1:], entropy[:-1], kl[layer:], _cosines(states)]).cpu()
            measured |= dict(zip(indices, values.split(batch.counts, dim=-1), strict=True))
            if keep_states:
                units = nn.functional.normalize(states, dim=-1).half().cpu()
                kept |= dict(zip(indices, units.split(batch.counts, dim=1), strict=True))
            if progress is not None:
                progress(sum(counts[i] for i in measured), sum(counts))
    joined = torch.cat([measured[i] for i in range(len(pairs))], dim=-1)
    if not bool(torch.isfinite(joined).all()):
        raise InputError("the model returns non-finite logits; check its weights, or load it in a wider dtype")
    unit_states = torch.cat([kept[i] for i in range(len(pairs))], dim=1) if keep_states else None
    return LayerMeasurements(joined, layers, layer, len(unembedding.weight), counts, sizes, unit_states)


def _cosines(states: Tensor) -> Tensor:
    """``cos(H^m, H^n)`` of all pairs of layers (L * L, N) from states (L, N, d), in float64."""
    parts = []
    for part in states.split(64, dim=1):
        unit = nn.functional.normalize(part.double(), dim=-1)
        parts.append(torch.einsum("mnd,knd->mkn", unit, unit).flatten(0, 1))
    return torch.cat(parts, dim=-1)


def compare_models(measurements: Sequence[tuple[str, LayerMeasurements]]) -> dict[str, Any]:
    """The content of ``compare.json`` (schema 1): named models, at the same layer and tokens, against the first one.

    Where the states were kept, ``drift`` is how far each layer's turned from the first model's: 1 - cosine.
    """
    first_name, first = measurements[0]
    models: list[dict[str, Any]] = []
    for name, one in measurements:
        if (one.layers, one.layer) != (first.layers, first.layer):
            raise InputError(
                f"{first_name} has {first.layers} layers and {name} has {one.layers}; only states of one model "
                "(before, during and after training) can be compared layer by layer"
            )
        if one.vocabulary != first.vocabulary:
            raise InputError(
                f"the vocabularies differ: {first_name} has {first.vocabulary} tokens and {name} has {one.vocabulary}; "
                "the same token ids do not mean the same text for both"
            )
        item = {"name": name, **_summary(first, one.values, "perplexity")}
        if models:
            item["change"] = _summary(first, one.values - first.values, "perplexity_ratio")
        if first.states is not None and one.states is not None:
            layers = zip(first.states.unbind(), one.states.unbind(), strict=True)
            cosines = torch.stack([torch.cosine_similarity(a.double(), b.double(), dim=-1) for a, b in layers])
            item["drift"] = _column(*ClusterMeans.of((1 - cosines).clamp(min=0), one.counts, one.sizes).statistics())
        models.append(item)
    return {
        "schema": 1,
        "kind": "comparison",
        "layer": first.layer,
        "layers": first.layers,
        "tokens": sum(first.counts),
        "tokens_of_responses": sum(first.sizes),
        "samples": len(first.counts),
        "standard_error_method": ClusterMeans.of(first.values[:1], first.counts).method,
        "models": models,
    }


def _summary(about: LayerMeasurements, values: Tensor, perplexity: str) -> dict[str, Any]:
    """Means and standard errors by name; of the cosines, only those of the chosen layer have errors.

    ``perplexity`` names ``exp(-mean log-prob)``, a ratio of perplexities for a difference of values.
    """
    layers, row = about.layers, about.layer - 1
    groups = (1, layers, layers - row, layers**2)
    means, errors = (part.split(groups) for part in ClusterMeans.of(values, about.counts, about.sizes).statistics())
    matrix, of_matrix = (part[-1].view(layers, layers) for part in (means, errors))
    value, (error,) = math.exp(-rounded(means[0])[0]), rounded(errors[0])  # the error of the logarithm
    return {
        "entropy": _column(means[1], errors[1]),
        "divergence": _column(means[2], errors[2]),
        "cosine_of_layer": _column(matrix[row], of_matrix[row]),
        "cosine": rounded(matrix, 4),
        perplexity: {"value": round(value, 6), "standard_error": None if error is None else round(value * error, 6)},
    }


def _column(mean: Tensor, error: Tensor) -> dict[str, list]:
    return {"mean": rounded(mean), "standard_error": rounded(error)}
