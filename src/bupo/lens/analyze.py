"""From a model and its responses to ``analysis.json``: entropies of every internal policy, averaged over tokens.

Joins ``model`` (states), ``policy`` (readings) and nothing else; the command line and the trainer both call it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from bupo.errors import InputError
from bupo.lens.batching import Batch, TokenPair, batches, check_rollouts, context_length, pad, shares
from bupo.lens.boundary import find_boundary
from bupo.lens.clustered import ClusterMeans, round_list
from bupo.lens.old_sampling import Progress, TokenDraw, judge
from bupo.lens.online import Extras
from bupo.lens.softmax_stats import GROUP_SITES, read_first_group, read_group, read_states
from bupo.models.capture import LayerStates, capture_stream
from bupo.models.layout import eval_mode, find_layout, unwrap
from bupo.models.processes import join_processes
from bupo.models.unembed import Unembedding, get_unembedding

__all__ = ["SITES", "TokenPair", "analyze_rollouts", "batches", "check_rollouts", "context_length", "get_unembedding"]

SITES = ("attn_in", "attn_out", "ffn_in", "ffn_out", "layer_in", "layer_out")
CHANGES = {"attn": ("attn_out", "attn_in"), "ffn": ("ffn_out", "ffn_in"), "layer": ("layer_out", "layer_in")}
COSINES = ("attn", "ffn")
STATISTICS = ("logprob", "rank", "varentropy", "kl", "top5")
_STATES_BYTES = 256 * 2**20  # of states held for the layers that are read together

TokenSink = Callable[[list[int], list[list[int]], Batch, dict[str, Tensor]], None]


@dataclass(frozen=True)
class Wanted:
    """Statistics asked for beside the entropies."""

    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in STATISTICS[:-1] and not (name.startswith("top") and name[3:].isdecimal() and int(name[3:])):
                raise InputError(
                    f"unknown statistic {name!r}; choose from logprob, rank, varentropy, kl, topK (as top5)"
                )

    @property
    def top(self) -> int:
        return max((int(name[3:]) for name in self.names if name.startswith("top")), default=0)

    def columns(self) -> list[str]:
        """The quantities whose means are taken."""
        found = [name for name in STATISTICS[:-1] if name in self.names]
        return [*found, "top1_probability", f"top{self.top}_mass"] if self.top else found

    def extras(self, targets: Tensor, final: Tensor | None, lse: Tensor | None) -> Extras:
        chosen = targets if {"logprob", "rank"} & set(self.names) else None
        return Extras(
            targets=chosen,
            rank="rank" in self.names,
            varentropy="varentropy" in self.names,
            final=final if "kl" in self.names else None,
            final_lse=lse,
            top=self.top,
            tokens=len(targets),
        )


def layers_together(tokens: int, width: int, n_layers: int) -> int:
    """How many layers' states fit into what we allow them: reading them together saves a product a group."""
    return max(1, min(n_layers, _STATES_BYTES // (4 * 4 * max(tokens, 1) * width)))


def _read_batch(
    model: nn.Module, batch: Batch, rule: Unembedding, wanted: Wanted, group: int | None
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Per token: statistics by name (6, L, N[, k]) in the order of ``SITES``, cosines (2, L, N), final entropy (N,)."""
    layout = find_layout(model)
    tokens = len(batch.targets)
    group = group or layers_together(tokens, rule.weight.shape[1], layout.n_layers)
    final_state: Tensor | None = None
    lse: Tensor | None = None
    if "kl" in wanted.names:  # the final policy must be known before the layers are read: the forward is run twice
        final_state = capture_stream(model, batch.ids, batch.mask, batch.keep, None)
        lse = read_states(final_state[None], rule)["lse"][0]
    extras = wanted.extras(batch.targets, final_state, lse)
    found: list[dict[str, Tensor]] = []
    cosines: list[Tensor] = []

    def consume(first_layer: int, before: Tensor, layers: list[LayerStates], after: Tensor) -> None:
        if not found:
            first, read = read_first_group(before, layers, rule, extras)
            found.append({name: values[None] for name, values in first.items()})
        else:
            read = read_group(before, layers, rule, extras)
        finite = torch.isfinite(read["entropy"])
        if not bool(finite.all()):
            bad = (~finite).any(-1).nonzero()[0].tolist()
            raise InputError(
                f"non-finite logits at layer {first_layer + bad[0]}, site {GROUP_SITES[bad[1]]}: the weights are "
                f"damaged or the dtype is too narrow for this model (try --dtype float32)"
            )
        found.append({name: values.cpu() for name, values in read.items()})
        stream = before
        for states in layers:
            middle = stream + states.attn_out
            cosines.append(_cosines(states, stream, middle))
            stream = middle + states.ffn_out

    final = capture_stream(model, batch.ids, batch.mask, batch.keep, consume, group=group)
    start, *rest = found
    sites = {}
    for name in start:
        per_layer = torch.cat([part[name] for part in rest])  # (L, 5, N)
        layer_out = per_layer[:, 4]
        layer_in = torch.cat([start[name][0].cpu(), layer_out[:-1]])
        sites[name] = torch.stack([*per_layer[:, :4].unbind(1), layer_in, layer_out])
    return sites, torch.stack(cosines, dim=1), read_states(final[None], rule)["entropy"][0].cpu()


def _cosines(states: LayerStates, stream: Tensor, middle: Tensor) -> Tensor:
    """Residual cosine similarities (2, N) of a layer (B.5)."""
    pairs = ((states.attn_out, stream), (states.ffn_out, middle))
    return torch.stack([torch.cosine_similarity(a, b, dim=-1) for a, b in pairs]).double().cpu()


def analyze_rollouts(
    model: nn.Module,
    rollouts: Sequence[TokenPair],
    *,
    batch_tokens: int = 2048,
    group: int | None = None,
    statistics: Sequence[str] = (),
    tolerance: float | None = None,
    seed: int = 0,
    name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    sink: TokenSink | None = None,
    share: bool = False,
) -> dict[str, Any]:
    """Measure every internal policy of ``model`` on its responses (Eq. 7, 11-13 and B.5 of arXiv 2512.19673).

    Args:
        model: a decoder-only causal LM; put into evaluation mode for the time of the call.
        rollouts: prompts and responses as token ids; averages run over all response tokens, each read at the position
            that predicts it (P-1 .. P+R-2).
        batch_tokens: most padded tokens in one forward; products run on the tokens read, never on padding.
        group: layers read together (default: as many as fit into 256 MiB); work falls by ``1 / (4 group)``.
        statistics: means of these beside the entropies: ``logprob`` and ``rank`` of the realised token,
            ``varentropy``, ``kl`` (site to final policy; runs the forward twice), ``topK`` (probability of the most
            likely token and of the K most likely).
        tolerance: read a growing random part of the tokens until every site's standard error is at most so many nats
            (:mod:`bupo.lens.old_sampling`); None reads all.
        seed: of the tokens drawn.
        name: written as ``model`` into the result.
        progress: called with (response tokens finished, response tokens in all).
        sink: given each batch's responses, their tokens read, the batch, and statistics a token.
        share: deal the responses out to the processes that accelerate's launcher started; every process returns the
            same result, that of one process.

    Returns:
        The content of ``analysis.json`` (schema 1): lists run over layers 1..L, entropies in nats, six decimals.

    Raises:
        InputError: unusable responses, a model whose stream or logits cannot be read, non-finite logits.
    """
    check_rollouts(model, rollouts)
    if tolerance is not None and not tolerance > 0:
        raise InputError(f"the tolerance is a standard error in nats, above 0, not {tolerance}")
    wanted = Wanted(tuple(statistics))
    inner = unwrap(model)
    run = _Run(model, rollouts, wanted, batch_tokens, group, progress, sink, share)
    with eval_mode(inner), torch.no_grad():
        settled = run.read(tolerance, seed)
    title = name or getattr(inner.config, "_name_or_path", "") or type(inner).__name__
    return _result(run, title, inner, tolerance, settled)


class _Run:
    """One analysis: which tokens are read when, and the means so far."""

    def __init__(
        self,
        model: nn.Module,
        rollouts: Sequence[TokenPair],
        wanted: Wanted,
        batch_tokens: int,
        group: int | None,
        progress: Callable[[int, int], None] | None,
        sink: TokenSink | None,
        share: bool,
    ):
        self.model, self.rollouts, self.wanted = model, rollouts, wanted
        self._batch_tokens, self._group, self._progress, self._sink = batch_tokens, group, progress, sink
        self.rule = get_unembedding(model)
        self.layers = find_layout(model).n_layers
        self.lengths = [len(r.response_ids) for r in rollouts]
        self.quantities = (len(SITES) * (1 + len(wanted.columns())) + len(CHANGES) + len(COSINES)) * self.layers + 1
        self.state = join_processes() if share else None
        processes = self.state.num_processes if self.state else 1
        self._mine = shares(self.lengths, processes)[self.state.process_index if self.state else 0]
        self._own = ClusterMeans(self.quantities)
        self.means = self._own  # of all processes

    def read(self, tolerance: float | None, seed: int) -> Progress | None:
        """Read all tokens, or rounds of them until the tolerance is met."""
        if tolerance is None:
            self._round([list(range(n)) for n in self.lengths])
            return None
        draw = TokenDraw(self.lengths, seed)
        share = draw.first_share()
        while True:
            self._round(draw.take(share))
            sites = slice(0, len(SITES) * self.layers)
            errors = self.means.standard_error()[sites], self.means.sampling_error()[sites]
            found = judge(*errors, draw.taken / draw.total, tolerance, len(self.lengths))
            if found.done:
                return found
            share = found.share

    def _round(self, tokens: list[list[int]]) -> None:
        for chosen in batches(self.rollouts, self._batch_tokens, [i for i in self._mine if tokens[i]]):
            self._batch(chosen, [tokens[i] for i in chosen])
        self.means = self._own
        if self.state is not None and self.state.num_processes > 1:
            self.means = ClusterMeans.merged(self.quantities, gather_object([self._own.state()]))

    def _batch(self, chosen: list[int], tokens: list[list[int]]) -> None:
        batch = pad([self.rollouts[i] for i in chosen], tokens, self.rule.weight.device)
        found, cosines, final = _read_batch(self.model, batch, self.rule, self.wanted, self._group)
        entropies = found["entropy"]
        at = dict(zip(SITES, entropies, strict=True))
        changes = torch.stack([at[out] - at[into] for out, into in CHANGES.values()])
        parts = [entropies, changes, cosines]
        if self.wanted.top:
            found["top1_probability"] = found["top_probability"][..., 0]
            found[f"top{self.wanted.top}_mass"] = found["top_probability"].sum(-1)
        parts += [found[name].double() for name in self.wanted.columns()]
        values = torch.cat([torch.cat(parts).flatten(0, 1), final[None]])
        for i, part in zip(chosen, values.split(batch.counts, dim=-1), strict=True):
            self._own.add(part, response=i, size=self.lengths[i])
            if self._progress is not None:
                self._progress(self._own.tokens, sum(self.lengths[i] for i in self._mine))
        if self._sink is not None:
            self._sink(chosen, tokens, batch, found)


def _result(run: _Run, name: str, inner: Any, tolerance: float | None, settled: Progress | None) -> dict[str, Any]:
    means, rule = run.means, run.rule
    mean, error = means.mean(), means.standard_error()
    extra = [f"{column}:{site}" for column in run.wanted.columns() for site in SITES]
    names = [*SITES, *(f"change_{c}" for c in CHANGES), *(f"cosine_{c}" for c in COSINES), *extra]
    mean_of = dict(zip(names, mean[:-1].view(len(names), run.layers), strict=True))
    error_of = dict(zip(names, error[:-1].view(len(names), run.layers), strict=True))
    boundary = find_boundary(mean_of["change_ffn"].tolist(), error_of["change_ffn"].tolist())
    result = {
        "schema": 1,
        "model": name,
        "architecture": type(inner).__name__,
        "layers": run.layers,
        "vocabulary": len(rule.weight),
        "tied_embeddings": bool(getattr(inner.config.get_text_config(), "tie_word_embeddings", False)),
        "tokens": means.tokens,
        "samples": means.responses,
        "dtype": str(inner.dtype).removeprefix("torch."),
        "readout": {
            "products": rule.products,
            "accumulation": "float32",
            "sums": "float64",
            "logit_scale": rule.scale,
            "softcap": rule.softcap,
        },
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
    if run.wanted.names:
        for key, of in (("statistics", mean_of), ("statistics_standard_errors", error_of)):
            result[key] = {
                column: {site: round_list(of[f"{column}:{site}"]) for site in SITES} for column in run.wanted.columns()
            }
    if tolerance is not None and settled is not None:
        result["sampling"] = {
            "tolerance": tolerance,
            "reached": settled.reached,
            "tokens_used": means.tokens,
            "tokens_of_responses": sum(run.lengths),
            "largest_standard_error": round(settled.worst_clustered, 6),
            "largest_sampling_error": round(settled.worst_sampling, 6),
            "responses_needed": settled.responses_needed,
        }
    return result
