"""From a model and its responses to ``analysis.json``: entropies of every internal policy, averaged over tokens.

Joins ``model`` (states), ``policy`` (readings) and nothing else; the command line and the trainer both call it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bupo.errors import InputError
from bupo.model.anatomy import dissect, unwrap
from bupo.model.early_exit import unembedding as raw_unembedding
from bupo.model.states import read_stream
from bupo.policy.boundary import find_boundary
from bupo.policy.readout import GROUP_SITES, LayerStates, Unembedding, entropy, group_entropies
from bupo.policy.statistics import ClusterMeans, round_list

SITES = ("attn_in", "attn_out", "ffn_in", "ffn_out", "layer_in", "layer_out")
CHANGES = {"attn": ("attn_out", "attn_in"), "ffn": ("ffn_out", "ffn_in"), "layer": ("layer_out", "layer_in")}
COSINES = ("attn", "ffn")


class TokenPair(Protocol):
    """A prompt and its response as token ids."""

    @property
    def prompt_ids(self) -> Sequence[int]: ...
    @property
    def response_ids(self) -> Sequence[int]: ...


def context_length(model: nn.Module) -> int | None:
    """The most tokens the model's position encoding was made for, or None if the configuration does not say."""
    config = unwrap(model).config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def check_rollouts(model: nn.Module, rollouts: Sequence[TokenPair]) -> None:
    """Raise :class:`InputError` for responses that cannot be analysed, naming the first one."""
    if not rollouts:
        raise InputError("there are no responses to analyse")
    limit = context_length(model)
    vocabulary = unwrap(model).get_input_embeddings().weight.shape[0]
    for number, rollout in enumerate(rollouts, start=1):
        length = len(rollout.prompt_ids) + len(rollout.response_ids)
        if not len(rollout.response_ids):
            raise InputError(f"response {number} is empty; every row needs at least one response token")
        if not len(rollout.prompt_ids):
            raise InputError(f"prompt {number} is empty; the first response token is predicted from its last token")
        if limit is not None and length > limit:
            raise InputError(
                f"response {number} with its prompt has {length} tokens, more than the model's context of {limit}; "
                f"shorten or drop it"
            )
        highest = max(max(rollout.prompt_ids), max(rollout.response_ids))
        if highest >= vocabulary or min(min(rollout.prompt_ids), min(rollout.response_ids)) < 0:
            raise InputError(
                f"response {number} holds token id {highest}, outside this model's vocabulary of {vocabulary}: "
                f"were the ids made with another tokenizer?"
            )


def logit_rule(model: nn.Module) -> Unembedding:
    """``E_u`` and how the model turns products into logits, checked against the model's own logits on a probe.

    Raises:
        InputError: the model's logits are not ``softcap(scale * S E_u^T + bias)`` with the configuration's values.
    """
    inner = unwrap(model)
    config = inner.config.get_text_config()
    weight, bias = raw_unembedding(model)
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale = float(getattr(config, name))
            break
    else:
        if getattr(config, "logits_scaling", None):
            scale = 1.0 / float(config.logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    rule = Unembedding(weight.float(), None if bias is None else bias.float(), scale, softcap)
    anatomy = dissect(model)
    tokens = torch.arange(3, 9, device=weight.device)[None] % weight.shape[0]
    seen: list[Tensor] = []
    hook = anatomy.final_norm.register_forward_hook(lambda m, i, o: seen.append(o))
    was_training = inner.training
    inner.eval()
    try:
        with torch.no_grad():
            logits = inner(input_ids=tokens, use_cache=False).logits.float()
    finally:
        hook.remove()
        inner.train(was_training)
    if not seen or seen[-1].shape[-1] != weight.shape[1]:
        width = f"{seen[-1].shape[-1]} wide" if seen else "not made"
        raise InputError(
            f"{type(inner).__name__}: the final state is {width}, the unembedding reads {weight.shape[1]} numbers; the "
            f"model changes the stream between them, and its internal policies cannot be read"
        )
    expected = rule.finish_(seen[-1].float() @ rule.weight.T, 0, len(weight))
    unit = logits.abs().max().clamp(min=1e-6)
    deviation = ((logits - expected).abs().max() / unit).item()
    allowed = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 3e-2
    if not deviation <= allowed:
        if not bool(torch.isfinite(logits).all()):
            raise InputError("the model gives non-finite logits: damaged weights, or a dtype too narrow for it?")
        raise InputError(
            f"this model's logits are not its final state times the unembedding (relative deviation {deviation:.1e}, "
            f"allowed {allowed:.0e}); its internal policies cannot be read"
        )
    return rule


def batches(rollouts: Sequence[TokenPair], most_tokens: int) -> Iterator[list[int]]:
    """Indices of responses in batches of at most ``most_tokens`` padded tokens, longest first (little padding)."""
    lengths = [len(r.prompt_ids) + len(r.response_ids) - 1 for r in rollouts]
    batch: list[int] = []
    for index in sorted(range(len(rollouts)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > most_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _pad(rollouts: Sequence[TokenPair], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, attention mask, and the positions P-1 .. P+R-2 that predict response tokens, each (B, T)."""
    # the last response token is predicted, never read
    rows = [[*r.prompt_ids, *r.response_ids][:-1] for r in rollouts]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    keep = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (row, rollout) in enumerate(zip(rows, rollouts, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        keep[i, len(rollout.prompt_ids) - 1 : len(row)] = True
    return ids.to(device), mask.to(device), keep.to(device)


def _token_statistics(
    model: nn.Module, rollouts: Sequence[TokenPair], rule: Unembedding, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Per token: entropies (6, L, N) in the order of ``SITES``, cosines (2, L, N), final entropy (N,), float64."""
    entropies: list[Tensor] = []
    cosines: list[Tensor] = []

    def consume(first_layer: int, before: Tensor, layers: list[LayerStates], after: Tensor) -> None:
        if not entropies:
            entropies.append(entropy(before, rule)[None].cpu())
        found = group_entropies(before, layers, rule)
        if not bool(torch.isfinite(found).all()):
            bad = (~torch.isfinite(found)).any(-1).nonzero()[0].tolist()
            raise InputError(
                f"non-finite logits at layer {first_layer + bad[0]}, site {GROUP_SITES[bad[1]]}: the weights are "
                f"damaged or the dtype is too narrow for this model (try --dtype float32)"
            )
        entropies.append(found.cpu())
        stream = before
        for states in layers:
            middle = stream + states.attn_out
            cosines.append(
                torch.stack(
                    [
                        torch.cosine_similarity(states.attn_out, stream, dim=-1),
                        torch.cosine_similarity(states.ffn_out, middle, dim=-1),
                    ]
                )
                .double()
                .cpu()
            )
            stream = middle + states.ffn_out

    ids, mask, keep = _pad(rollouts, rule.weight.device)
    final = read_stream(model, ids, mask, keep, consume, group=group)
    start, *rest = entropies
    per_layer = torch.cat(rest)  # (L, 5, N)
    layer_out = per_layer[:, 4]
    layer_in = torch.cat([start, layer_out[:-1]])
    sites = torch.stack([*per_layer[:, :4].unbind(1), layer_in, layer_out])
    return sites, torch.stack(cosines, dim=1), entropy(final, rule).cpu()


def analyze_rollouts(
    model: nn.Module,
    rollouts: Sequence[TokenPair],
    *,
    batch_tokens: int = 2048,
    group: int = 4,
    name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure every internal policy of ``model`` on its responses (Eq. 7, 11-13 and B.5 of arXiv 2512.19673).

    Args:
        model: a decoder-only causal LM; put into evaluation mode for the time of the call.
        rollouts: prompts and responses as token ids; averages run over all response tokens, each read at the position
            that predicts it (P-1 .. P+R-2).
        batch_tokens: most padded tokens in one forward.
        group: layers read together; memory grows with it, work falls by ``1 / (4 group)`` of a product.
        name: written as ``model`` into the result.
        progress: called with (response tokens finished, response tokens in all).

    Returns:
        The content of ``analysis.json`` (schema 1): lists run over layers 1..L, entropies in nats, six decimals.

    Raises:
        InputError: unusable responses, a model whose stream or logits cannot be read, non-finite logits.
    """
    check_rollouts(model, rollouts)
    inner = unwrap(model)
    rule = logit_rule(model)
    layers = dissect(model).n_layers
    width = len(SITES) + len(CHANGES) + len(COSINES)
    means = ClusterMeans(width * layers + 1)
    total = sum(len(r.response_ids) for r in rollouts)
    was_training = inner.training
    inner.eval()
    try:
        for batch in batches(rollouts, batch_tokens):
            chosen = [rollouts[i] for i in batch]
            sites, cosines, final = _token_statistics(model, chosen, rule, group)
            at = dict(zip(SITES, sites, strict=True))
            changes = torch.stack([at[out] - at[into] for out, into in CHANGES.values()])
            values = torch.cat([torch.cat([sites, changes, cosines]).flatten(0, 1), final[None]])
            for part in values.split([len(r.response_ids) for r in chosen], dim=-1):
                means.add(part)
                if progress is not None:
                    progress(means.tokens, total)
    finally:
        inner.train(was_training)
    title = name or getattr(inner.config, "_name_or_path", "") or type(inner).__name__
    return _result(means, layers, title, inner, rule)


def _result(means: ClusterMeans, layers: int, name: str, inner: Any, rule: Unembedding) -> dict[str, Any]:
    mean, error = means.mean(), means.standard_error()
    names = [*SITES, *(f"change_{c}" for c in CHANGES), *(f"cosine_{c}" for c in COSINES)]
    mean_of = dict(zip(names, mean[:-1].view(len(names), layers), strict=True))
    error_of = dict(zip(names, error[:-1].view(len(names), layers), strict=True))
    boundary = find_boundary(mean_of["change_ffn"].tolist(), error_of["change_ffn"].tolist())
    return {
        "schema": 1,
        "model": name,
        "architecture": type(inner).__name__,
        "layers": layers,
        "vocabulary": len(rule.weight),
        "tied_embeddings": bool(getattr(inner.config.get_text_config(), "tie_word_embeddings", False)),
        "tokens": means.tokens,
        "samples": len(means.counts),
        "dtype": str(inner.dtype).removeprefix("torch."),
        "readout": {"products": "float32", "sums": "float64", "logit_scale": rule.scale, "softcap": rule.softcap},
        "standard_error_method": means.method,
        "final_entropy": round(float(mean[-1]), 6),
        "final_entropy_standard_error": round(float(error[-1]), 6),
        "sites": {site: round_list(mean_of[site]) for site in SITES},
        "standard_errors": {site: round_list(error_of[site]) for site in SITES},
        "entropy_change": {c: round_list(mean_of[f"change_{c}"]) for c in CHANGES},
        "entropy_change_standard_errors": {c: round_list(error_of[f"change_{c}"]) for c in CHANGES},
        "residual_cosine": {c: round_list(mean_of[f"cosine_{c}"]) for c in COSINES},
        "residual_cosine_standard_errors": {c: round_list(error_of[f"cosine_{c}"]) for c in COSINES},
        "regions": boundary.regions(),
        "boundary_layer": boundary.layer,
        "boundary_reason": boundary.reason,
    }
