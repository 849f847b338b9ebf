"""Entropies of all internal policies on a model's responses, their changes, residual cosines [Eq. 11-13 and B.5].

`analyze_rollouts` returns the content of ``analysis.json``; the command line and the trainer call it.

Shape legend: L layers, N tokens, k top tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from bupo.errors import InputError
from bupo.lens.agreement import choose_layer
from bupo.lens.batching import (
    PaddedBatch,
    TokenPair,
    balance,
    batches,
    check_rollouts,
    pad,
    subsample,
)
from bupo.lens.boundary import find_boundary
from bupo.lens.clustered import ClusterMeans, round_errors, round_list
from bupo.lens.online import StatsRequest
from bupo.lens.softmax_stats import GROUP_SITES, Stats, first_group_stats, lens_stats, residual_group_stats
from bupo.lens.tokens import TokenStats
from bupo.models.capture import LayerStates, capture_stream
from bupo.models.layout import eval_mode, find_layout, unwrap
from bupo.models.processes import join_processes
from bupo.models.unembed import get_unembedding

__all__ = [
    "SITES",
    "AnalysisOptions",
    "Statistics",
    "TokenPair",
    "analyze_rollouts",
    "check_rollouts",
]

SITES = ("attn_in", "attn_out", "ffn_in", "ffn_out", "layer_in", "layer_out")
CHANGES = {"attn": ("attn_out", "attn_in"), "ffn": ("ffn_out", "ffn_in"), "layer": ("layer_out", "layer_in")}
COSINES = ("attn", "ffn")
MEANS = ("logprob", "rank", "varentropy", "kl")
_STATES_BYTES = 256 * 2**20  # for the states of the layers that are read together; each group costs one product


@dataclass(frozen=True)
class Statistics:
    """Names of the statistics to compute besides the entropies: ``logprob, rank, varentropy, kl, topK`` (as top5).

    Raises:
        InputError: an unknown name.
    """

    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in MEANS and not (name.startswith("top") and name[3:].isdecimal() and int(name[3:])):
                raise InputError(
                    f"unknown statistic {name!r}; choose from logprob, rank, varentropy, kl, topK (as top5)"
                )

    @property
    def tops(self) -> list[int]:
        """The K of every topK, ascending."""
        return sorted({int(name[3:]) for name in self.names if name.startswith("top")})

    def columns(self) -> list[str]:
        """The quantities whose means are reported."""
        masses = [f"top{k}_mass" for k in self.tops]
        return [name for name in MEANS if name in self.names] + (["top1_probability", *masses] if masses else [])

    def request(self, targets: Tensor, final: Tensor | None) -> StatsRequest:
        """What the reader must compute for tokens ``targets`` (N,) with final states (N, d)."""
        return StatsRequest(
            targets=targets if {"logprob", "rank"} & set(self.names) else None,
            rank="rank" in self.names,
            varentropy="varentropy" in self.names,
            reference=final,
            kl=final is not None,
            top_k=max(self.tops, default=0),
        )


@dataclass(frozen=True)
class AnalysisOptions:
    """Less common options of `analyze_rollouts`.

    Attributes:
        name: ``model`` in the result (default: the name the model was loaded by).
        layer_choice: add the block ``layer_choice`` (see `bupo.lens.agreement.choose_layer`).
        choice_tokens: number of tokens sampled for it (default: 1/16 of the analysed ones, clamped to 128..512).
        on_tokens: called with the statistics of single tokens, batch by batch (`bupo.lens.tokens.ParquetTokenWriter`);
            with ``share``, on each process for its own responses.
        progress: called with (stage, done, total): "reading states" in response tokens, "comparing layers" in layers.
    """

    name: str | None = None
    layer_choice: bool = False
    choice_tokens: int | None = None
    on_tokens: Callable[[TokenStats], None] | None = None
    progress: Callable[[str, int, int], None] | None = None


def analyze_rollouts(
    model: nn.Module,
    responses: Sequence[Any],
    *,
    statistics: Sequence[str] = (),
    max_tokens: int | None = None,
    batch_tokens: int = 2048,
    seed: int = 0,
    share: bool = False,
    options: AnalysisOptions | None = None,
) -> dict[str, Any]:
    """Measure every internal policy of ``model`` on its responses (arXiv 2512.19673).

    Args:
        model: a decoder-only causal LM; in evaluation mode during the call.
        responses: prompts and responses as token ids: objects with ``prompt_ids`` and ``response_ids``, mappings with
            these keys, or pairs. Means run over all response tokens; a token is read at the position that predicts it.
        statistics: report the means of these besides the entropies: ``logprob`` and ``rank`` of the generated token,
            ``varentropy``, ``kl`` (from the site to the full policy; doubles the forward passes), ``topK``
            (probabilities of the most likely token and of the K most likely).
        max_tokens: read only this many response tokens, drawn uniformly at random from all.
        batch_tokens: maximum number of padded tokens per forward pass.
        seed: random seed of the tokens drawn.
        share: distribute the responses over the processes of torchrun or `accelerate launch`; every process returns
            the result of one process. Without it, and always for a model sharded by FSDP2, every process makes the
            same forward passes, so all must pass the same responses.
        options: less common options.

    Returns:
        The content of ``analysis.json`` (schema 1): lists run over layers 1..L, entropies are in nats, all numbers have
        six decimals. A standard error is None where it is unknown (a single token). With ``max_tokens``, ``sampling``
        tells the number of tokens used and the number of all response tokens.

    Raises:
        InputError: unusable responses, a model whose residual stream or logits cannot be read, non-finite logits.
    """
    options = options or AnalysisOptions()
    pairs = check_rollouts(model, responses)
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, not {max_tokens}")
    reader = _Reader(model, pairs, Statistics(tuple(statistics)), options)
    sizes = [len(pair.response_ids) for pair in pairs]
    tokens = [list(range(n)) for n in sizes] if max_tokens is None else subsample(sizes, max_tokens, seed)
    inner = unwrap(model)
    with eval_mode(inner), torch.no_grad():
        means = reader.read(tokens, batch_tokens, share=share)
    name = options.name or getattr(inner.config, "_name_or_path", "") or type(inner).__name__
    result = {"schema": 1, "model": name, **_description(model), **_means(reader, means)}
    if max_tokens is not None:
        counts = {"tokens_used": means.tokens, "tokens_of_responses": sum(sizes)}
        result["sampling"] = {"max_tokens": max_tokens, **counts}
    if options.layer_choice:
        result["layer_choice"] = choose_layer(
            model, pairs, result, tokens=options.choice_tokens, seed=seed, progress=options.progress
        )
    return result


class _Reader:
    """Reads the states of batches and averages them."""

    def __init__(self, model: nn.Module, pairs: list[TokenPair], statistics: Statistics, options: AnalysisOptions):
        self._model, self._pairs, self._options = model, pairs, options
        self.statistics = statistics
        self.unembedding = get_unembedding(model)
        self.n_layers = find_layout(model).n_layers
        extra = [f"{column}:{site}" for column in statistics.columns() for site in SITES]
        self.rows = [*SITES, *(f"change_{c}" for c in CHANGES), *(f"cosine_{c}" for c in COSINES), *extra]

    def read(self, tokens: list[list[int]], batch_tokens: int, *, share: bool) -> ClusterMeans:
        """Means of the `rows`, L numbers each, and of the full policy's entropy over these tokens of the responses."""
        quantities = len(self.rows) * self.n_layers + 1
        counts = [len(part) for part in tokens]
        sharded = any(hasattr(p, "full_tensor") for p in self._model.parameters())
        state = join_processes() if share and not sharded else None
        mine = balance(counts, state.num_processes)[state.process_index] if state else range(len(counts))
        own, total = ClusterMeans(quantities), sum(counts[i] for i in mine)
        for indices in batches(self._pairs, batch_tokens, [i for i in mine if counts[i]]):
            batch = pad([self._pairs[i] for i in indices], [tokens[i] for i in indices], self.unembedding.weight.device)
            stats, values = self._read_batch(batch)
            for i, part in zip(indices, values.split(batch.counts, dim=-1), strict=True):
                own.add(part, response=i)
            if self._options.progress is not None:
                self._options.progress("reading states", own.tokens, total)
            if self._options.on_tokens is not None:
                read = [tokens[i] for i in indices]
                self._options.on_tokens(TokenStats.of_batch(indices, read, batch, SITES, stats))
        if state is None or state.num_processes == 1:
            return own
        return ClusterMeans.merged(quantities, gather_object([own.state()]))

    def _read_batch(self, batch: PaddedBatch) -> tuple[Stats, Tensor]:
        """Statistics per token by name, (6, L, N[, k]) in the order of `SITES`, and the values to average (K, N)."""
        final = None
        if "kl" in self.statistics.names:  # the full policy must be known before the layers are read
            final = capture_stream(self._model, batch.ids, batch.mask, batch.positions, None)
        request = self.statistics.request(batch.targets, final)
        first: Stats = {}
        groups: list[Stats] = []
        cosines: list[Tensor] = []

        def on_group(first_layer: int, before: Tensor, layers: list[LayerStates], after: Tensor) -> None:
            nonlocal first
            if not groups:
                first, stats = first_group_stats(before, layers, self.unembedding, request)
            else:
                stats = residual_group_stats(before, layers, self.unembedding, request)
            _check_finite(stats["entropy"], first_layer)
            groups.append({name: values.cpu() for name, values in stats.items()})
            cosines.extend(_residual_cosines(before, layers))

        width = self.unembedding.weight.shape[1]
        group = max(1, min(self.n_layers, _STATES_BYTES // (4 * 4 * max(len(batch.targets), 1) * width)))
        final = capture_stream(self._model, batch.ids, batch.mask, batch.positions, on_group, group=group)
        final_entropy = lens_stats(final[None], self.unembedding)["entropy"].cpu()
        stats = {}
        for name in first:
            per_layer = torch.cat([part[name] for part in groups])  # (L, 5, N)
            layer_out = per_layer[:, 4]
            layer_in = torch.cat([first[name].cpu(), layer_out[:-1]])
            stats[name] = torch.stack([*per_layer[:, :4].unbind(1), layer_in, layer_out])
        return stats, torch.cat([self._values(stats, torch.stack(cosines, dim=1)).flatten(0, 1), final_entropy])

    def _values(self, stats: Stats, cosines: Tensor) -> Tensor:
        """The `rows` (., L, N) of statistics (6, L, N[, k]) and cosines (2, L, N)."""
        entropy = dict(zip(SITES, stats["entropy"], strict=True))
        changes = torch.stack([entropy[out] - entropy[into] for out, into in CHANGES.values()])
        parts = [stats["entropy"], changes, cosines]
        for column in self.statistics.columns():
            if column == "top1_probability":
                parts.append(stats["top_probability"][..., 0])
            elif column.startswith("top"):
                k = int(column.removeprefix("top").removesuffix("_mass"))
                parts.append(stats["top_probability"][..., :k].sum(-1))
            else:
                parts.append(stats[column].double())
        return torch.cat(parts)


def _check_finite(entropy: Tensor, first_layer: int) -> None:
    """Raise `InputError` for entropies (G, 5, N) that are not all finite."""
    finite = torch.isfinite(entropy)
    if not bool(finite.all()):
        layer, site = (~finite).any(-1).nonzero()[0].tolist()
        raise InputError(
            f"non-finite logits at layer {first_layer + layer}, site {GROUP_SITES[site]}: the weights are "
            f"damaged or the dtype is too narrow for this model (try --dtype float32)"
        )


def _residual_cosines(before: Tensor, layers: list[LayerStates]) -> list[Tensor]:
    """``cos(A^l, H^{l-1})`` and ``cos(F^l, H^{l-1} + A^l)`` per layer, (2, N)."""
    stream, cosines = before, []
    for states in layers:
        middle = stream + states.attn_out
        pairs = ((states.attn_out, stream), (states.ffn_out, middle))
        cosines.append(torch.stack([torch.cosine_similarity(a, b, dim=-1) for a, b in pairs]).double().cpu())
        stream = middle + states.ffn_out
    return cosines


def _description(model: nn.Module) -> dict[str, Any]:
    """What was analysed, for the result file."""
    inner = unwrap(model)
    return {
        "architecture": type(inner).__name__,
        "layers": find_layout(model).n_layers,
        "vocabulary": len(find_layout(model).unembedding.weight),
        "tied_embeddings": bool(getattr(inner.config.get_text_config(), "tie_word_embeddings", False)),
    }


def _means(reader: _Reader, means: ClusterMeans) -> dict[str, Any]:
    """The means, their standard errors, and the regions that follow from them, for the result file."""
    mean, error = means.mean(), means.standard_error()
    mean_of = dict(zip(reader.rows, mean[:-1].view(-1, reader.n_layers), strict=True))
    error_of = dict(zip(reader.rows, error[:-1].view(-1, reader.n_layers), strict=True))
    boundary = find_boundary(mean_of["change_ffn"].tolist(), error_of["change_ffn"].tolist())
    unembedding, columns = reader.unembedding, reader.statistics.columns()
    result = {
        "tokens": means.tokens,
        "samples": means.responses,
        "dtype": str(unwrap(reader._model).dtype).removeprefix("torch."),
        "readout": {
            "products": unembedding.products,
            "accumulation": "float32",
            "sums": "float64",
            "logit_scale": unembedding.scale,
            "softcap": unembedding.softcap,
        },
        "standard_error_method": means.method,
        "final_entropy": round_list(mean[-1:])[0],
        "final_entropy_standard_error": round_errors(error[-1:])[0],
        "sites": {site: round_list(mean_of[site]) for site in SITES},
        "standard_errors": {site: round_errors(error_of[site]) for site in SITES},
        "entropy_change": {c: round_list(mean_of[f"change_{c}"]) for c in CHANGES},
        "entropy_change_standard_errors": {c: round_errors(error_of[f"change_{c}"]) for c in CHANGES},
        "residual_cosine": {c: round_list(mean_of[f"cosine_{c}"]) for c in COSINES},
        "residual_cosine_standard_errors": {c: round_errors(error_of[f"cosine_{c}"]) for c in COSINES},
        "regions": boundary.regions(),
        "boundary_layer": boundary.layer,
        "boundary_reason": boundary.reason,
    }
    if columns:
        result["statistics"] = {c: {s: round_list(mean_of[f"{c}:{s}"]) for s in SITES} for c in columns}
        errors = {c: {s: round_errors(error_of[f"{c}:{s}"]) for s in SITES} for c in columns}
        result["statistics_standard_errors"] = errors
    return result
