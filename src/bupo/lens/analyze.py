"""Entropies of all internal policies on a model's responses, their changes, residual cosines [Eq. 11-13 and B.5].

`analyze_rollouts` returns the content of ``analysis.json``; the command line and the trainer call it.

Shape legend: L layers, N tokens, k top tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from bupo.errors import InputError
from bupo.lens.agreement import Progress, choose_layer
from bupo.lens.batching import PaddedBatch, TokenPair, balance, batches, check_rollouts, pad, subsample
from bupo.lens.boundary import find_boundary
from bupo.lens.clustered import ClusterMeans, round_errors, round_list
from bupo.lens.online import StatsRequest
from bupo.lens.softmax_stats import GROUP_SITES, SITES, Stats, lens_stats, residual_group_stats
from bupo.models.capture import LayerStates, capture_stream
from bupo.models.layout import eval_mode, find_layout, unwrap
from bupo.models.load import join_processes
from bupo.models.unembed import get_unembedding

__all__ = ["SITES", "AnalysisOptions", "Statistics", "TokenPair", "analyze_rollouts", "check_rollouts"]

CHANGES = {"attn": ("attn_out", "attn_in"), "ffn": ("ffn_out", "ffn_in"), "layer": ("layer_out", "layer_in")}
COSINES = ("attn", "ffn")
MEANS = ("logprob", "rank", "varentropy", "kl")
_STATES_BYTES = 256 * 2**20  # for the states of the layers that are read together; each group costs one product


class Statistics:
    """The statistics to compute besides the entropies: ``logprob, rank, varentropy, kl, topK`` (as top5).

    Attributes:
        tops: the K of every topK, ascending.
        columns: names of the means that are reported.

    Raises:
        InputError: an unknown name.
    """

    def __init__(self, names: Sequence[str] = ()):
        for name in names:
            if name not in MEANS and not (name.startswith("top") and name[3:].isdecimal() and int(name[3:])):
                raise InputError(
                    f"unknown statistic {name!r}; choose from logprob, rank, varentropy, kl, topK (as top5)"
                )
        self.tops = sorted({int(name[3:]) for name in names if name not in MEANS})
        self.columns = [name for name in MEANS if name in names]
        self.columns += ["top1_probability", *(f"top{k}_mass" for k in self.tops)] if self.tops else []

    def request(self, targets: Tensor, final: Tensor | None) -> StatsRequest:
        """What to compute for the tokens ``targets`` (N,), given the final states (N, d) if ``kl`` is requested."""
        return StatsRequest(
            targets=targets if {"logprob", "rank"} & set(self.columns) else None,
            rank="rank" in self.columns,
            varentropy="varentropy" in self.columns,
            reference=final,
            kl=final is not None,
            top_k=max(self.tops, default=0),
        )

    def values(self, stats: Stats) -> list[Tensor]:
        """The statistics (6, L, N[, k]) whose means are the `columns`, each (6, L, N)."""
        values = [stats[name].double() for name in self.columns if name in MEANS]
        if self.tops:
            probability = stats["top_probability"]
            values += [probability[..., 0], *(probability[..., :k].sum(-1) for k in self.tops)]
        return values


@dataclass(frozen=True)
class AnalysisOptions:
    """Less common options of `analyze_rollouts`.

    Attributes:
        name: ``model`` in the result (default: the name the model was loaded by).
        layer_choice: add the block ``layer_choice`` (see `bupo.lens.agreement.choose_layer`).
        choice_tokens: number of tokens sampled for it (default: 1/16 of the analysed ones, clamped to 128..512).
        on_tokens: called with each batch and its statistics (6, L, N[, k]), sites in the order of `SITES`, such as
            `bupo.lens.tokens.ParquetTokenWriter`; with ``share``, on each process for its own responses.
        progress: called with (stage, done, total): "reading states" in response tokens, "comparing layers" in layers.
    """

    name: str | None = None
    layer_choice: bool = False
    choice_tokens: int | None = None
    on_tokens: Callable[[PaddedBatch, Stats], None] | None = None
    progress: Progress | None = None


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
    reader = _Reader(model, Statistics(statistics))
    sizes = [len(pair.response_ids) for pair in pairs]
    tokens = [list(range(n)) for n in sizes] if max_tokens is None else subsample(sizes, max_tokens, seed)
    inner = unwrap(model)
    with eval_mode(inner), torch.no_grad():
        means = _average(reader, pairs, tokens, batch_tokens, options, share=share)
    name = options.name or getattr(inner.config, "_name_or_path", "") or type(inner).__name__
    result = {"schema": 1, "model": name, **reader.result(means)}
    if max_tokens is not None:
        counts = {"tokens_used": means.tokens, "tokens_of_responses": sum(sizes)}
        result["sampling"] = {"max_tokens": max_tokens, **counts}
    if options.layer_choice:
        choice_tokens, progress = options.choice_tokens, options.progress
        block = choose_layer(model, pairs, result, tokens=choice_tokens, seed=seed, progress=progress)
        result["layer_choice"] = block
    return result


def _average(
    reader: _Reader,
    pairs: list[TokenPair],
    tokens: list[list[int]],
    batch_tokens: int,
    options: AnalysisOptions,
    *,
    share: bool,
) -> ClusterMeans:
    """The means over these tokens of the responses."""
    counts = [len(part) for part in tokens]
    sharded = any(hasattr(parameter, "full_tensor") for parameter in reader.model.parameters())
    state = join_processes() if share and not sharded else None
    mine = balance(counts, state.num_processes)[state.process_index] if state else range(len(counts))
    means, total = ClusterMeans(), sum(counts[i] for i in mine)
    for indices in batches(pairs, batch_tokens, [i for i in mine if counts[i]]):
        batch = pad(pairs, tokens, indices, reader.unembedding.weight.device)
        stats, values = reader.read(batch)
        for i, part in zip(indices, values.split(batch.counts, dim=-1), strict=True):
            means.add(part, i)
        if options.progress is not None:
            options.progress("reading states", means.tokens, total)
        if options.on_tokens is not None:
            options.on_tokens(batch, stats)
    if state is None or state.num_processes == 1:
        return means
    return ClusterMeans(gather_object([means.rows]))


class _Reader:
    """Reads batches of one model."""

    def __init__(self, model: nn.Module, statistics: Statistics):
        self.model, self._statistics = model, statistics
        self.unembedding = get_unembedding(model)
        self._n_layers = find_layout(model).n_layers

    def read(self, batch: PaddedBatch) -> tuple[Stats, Tensor]:
        """Statistics per token by name, (6, L, N[, k]) in the order of `SITES`, and the values to average (K, N)."""
        arguments = (self.model, batch.ids, batch.mask, batch.positions)
        # for KL divergences, the full policy must be known before the layers are read
        reference = capture_stream(*arguments, None) if "kl" in self._statistics.columns else None
        request = self._statistics.request(batch.targets, reference)
        first: Stats = {}
        groups: list[Stats] = []
        cosines: list[Tensor] = []

        def on_group(first_layer: int, before: Tensor, layers: list[LayerStates], after: Tensor) -> None:
            states = (before, layers, self.unembedding)
            of_before, stats = residual_group_stats(*states, request, with_before=first_layer == 1)
            first.update(of_before)
            if not bool((finite := torch.isfinite(stats["entropy"])).all()):
                layer, site = (~finite).any(-1).nonzero()[0].tolist()
                raise InputError(
                    f"non-finite logits at layer {first_layer + layer}, site {GROUP_SITES[site]}: the weights are "
                    f"damaged or the dtype is too narrow for this model (try --dtype float32)"
                )
            groups.append({name: values.cpu() for name, values in stats.items()})
            cosines.extend(_residual_cosines(before, layers))

        bytes_per_layer = 4 * 4 * len(batch.targets) * self.unembedding.weight.shape[1]
        group = max(1, min(self._n_layers, _STATES_BYTES // bytes_per_layer))
        final = capture_stream(*arguments, on_group, group=group)
        final_entropy = lens_stats(final[None], self.unembedding)["entropy"].cpu()
        stats = {}
        for name in first:
            per_layer = torch.cat([part[name] for part in groups])  # (L, 5, N)
            layer_in = torch.cat([first[name].cpu(), per_layer[:-1, 4]])
            stats[name] = torch.stack([*per_layer[:, :4].unbind(1), layer_in, per_layer[:, 4]])
        entropy = dict(zip(SITES, stats["entropy"], strict=True))
        changes = torch.stack([entropy[out] - entropy[into] for out, into in CHANGES.values()])
        values = [stats["entropy"], changes, torch.stack(cosines, dim=1), *self._statistics.values(stats)]
        return stats, torch.cat([torch.cat(values).flatten(0, 1), final_entropy])

    def result(self, means: ClusterMeans) -> dict[str, Any]:
        """The content of the result file that follows from the means."""
        columns = self._statistics.columns
        names = [*SITES, *(f"change_{c}" for c in CHANGES), *(f"cosine_{c}" for c in COSINES)]
        names += [f"{column}:{site}" for column in columns for site in SITES]
        mean, error = means.statistics()
        rows = zip(*(part[:-1].view(-1, self._n_layers) for part in (mean, error)), strict=True)
        row_of = dict(zip(names, rows, strict=True))
        boundary = find_boundary(*(row.tolist() for row in row_of["change_ffn"]))
        inner, unembedding = unwrap(self.model), self.unembedding

        def lists(key: str, errors: str, prefix: str, kinds: Iterable[str]) -> dict[str, dict[str, Any]]:
            return {
                key: {kind: round_list(row_of[prefix + kind][0]) for kind in kinds},
                errors: {kind: round_errors(row_of[prefix + kind][1]) for kind in kinds},
            }

        result: dict[str, Any] = {
            "architecture": type(inner).__name__,
            "layers": self._n_layers,
            "vocabulary": len(unembedding.weight),
            "tied_embeddings": bool(getattr(inner.config.get_text_config(), "tie_word_embeddings", False)),
            "tokens": means.tokens,
            "samples": len(means.rows),
            "dtype": str(inner.dtype).removeprefix("torch."),
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
            **lists("sites", "standard_errors", "", SITES),
            **lists("entropy_change", "entropy_change_standard_errors", "change_", CHANGES),
            **lists("residual_cosine", "residual_cosine_standard_errors", "cosine_", COSINES),
            "regions": boundary.regions(),
            "boundary_layer": boundary.layer,
            "boundary_reason": boundary.reason,
        }
        for column in columns:
            for key, by_site in lists("statistics", "statistics_standard_errors", f"{column}:", SITES).items():
                result.setdefault(key, {})[column] = by_site
        return result


def _residual_cosines(before: Tensor, layers: list[LayerStates]) -> list[Tensor]:
    """``cos(A^l, H^{l-1})`` and ``cos(F^l, H^{l-1} + A^l)`` per layer, (2, N)."""
    stream, cosines = before, []
    for states in layers:
        middle = stream + states.attn_out
        pairs = ((states.attn_out, stream), (states.ffn_out, middle))
        cosines.append(torch.stack([torch.cosine_similarity(a, b, dim=-1) for a, b in pairs]).double().cpu())
        stream = middle + states.ffn_out
    return cosines
