"""Entropies of all internal policies on a model's responses, their changes, residual cosines [Eq. 11-13 and B.5].

Shape legend: L layers, N tokens, k top tokens.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from bupo.errors import InputError
from bupo.lens import batching
from bupo.lens.batching import ClusterMeans, PaddedBatch, TokenPair, check_rollouts, rounded
from bupo.lens.layer_choice import choose_layer, find_boundary
from bupo.lens.maps import Lens, fit_on_half, named_lens
from bupo.lens.online import StatsRequest
from bupo.lens.readings import Progress
from bupo.lens.softmax_stats import GROUP_SITES, SITES, Stats, lens_stats, residual_group_stats
from bupo.models.capture import capture_stream
from bupo.models.layout import eval_mode, find_layout, unwrap
from bupo.models.unembed import get_unembedding

CHANGES = {"attn": ("attn_out", "attn_in"), "ffn": ("ffn_out", "ffn_in"), "layer": ("layer_out", "layer_in")}
COSINES = ("attn", "ffn")
MEANS = ("logprob", "rank", "varentropy", "kl")
_STATES_BYTES = 256 * 2**20  # for the states of the layers that are read together; each group costs one product


@dataclass(frozen=True)
class AnalysisOptions:
    """Less common options of `analyze_rollouts`."""

    name: str | None = None  # `model` in the result (default: the name the model was loaded by)
    layer_choice: bool = False  # add the block `layer_choice`, from a sample of tokens (`layer_choice.choose_layer`)
    choice_tokens: int | None = None  # the size of that sample
    # what it is read through: raw, norm, ridge (fitted on half of the responses, read on the others), a folder, a lens
    lenses: Sequence[str | Lens] = ("raw", "norm")
    # called with each batch and its statistics (6, L, N[, k]); with `share`, on each process for its own responses
    on_tokens: Callable[[PaddedBatch, Stats], None] | None = None
    progress: Progress | None = None  # (stage, done, total): "reading states" in tokens, "comparing layers" in layers


def statistic_columns(names: Sequence[str]) -> dict[str, int]:
    """The columns that report these statistics, each with the number of most likely tokens it sums over, or 0."""
    for name in names:
        if name not in MEANS and not re.fullmatch(r"top0*[1-9]\d*", name):
            raise InputError(f"unknown statistic {name!r}; choose from {', '.join(MEANS)}, topK (as top5)")
    tops = sorted({int(name[3:]) for name in names if name not in MEANS})
    columns = {name: 0 for name in MEANS if name in names} | ({"top1_probability": 1} if tops else {})
    return columns | {f"top{k}_mass": k for k in tops}


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
        model: a decoder-only causal LM.
        responses: objects with ``prompt_ids`` and ``response_ids``, mappings with these keys, or pairs of the two.
            Means run over all response tokens; a token is read at the position that predicts it.
        statistics: report the means of these besides the entropies: ``logprob`` and ``rank`` of the generated token,
            ``varentropy``, ``kl`` (from the site to the full policy; doubles the forward passes), ``topK``
            (probabilities of the most likely token and of the K most likely).
        max_tokens: read only this many response tokens, drawn uniformly at random from all.
        batch_tokens: maximum number of padded tokens per forward pass.
        share: distribute the responses over the processes of a launcher, each of which returns the result of one. A
            model sharded by FSDP2 is never shared out: all processes must pass the same responses.

    Returns the content of ``analysis.json`` (schema 1): lists run over layers 1..L, entropies are in nats; a standard
    error is None where it is unknown (a single token). Raises InputError for unusable responses, a model whose residual
    stream or logits cannot be read, and non-finite logits.
    """
    options = options or AnalysisOptions()
    pairs = check_rollouts(model, responses)
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, not {max_tokens}")
    analysis = _Analysis(model, statistic_columns(statistics), options)
    named = options.lenses if options.layer_choice else ()  # found first: a wrong one costs no pass over the responses
    lenses: dict[str, Any] = {
        lens if isinstance(lens, str) else lens.kind: named_lens(lens).check(model) for lens in named if lens != "ridge"
    }
    read = pairs
    if "ridge" in named:
        how = {"batch_tokens": batch_tokens, "seed": seed, "share": share, "progress": options.progress}
        lenses["ridge"], read = fit_on_half(model, pairs, **how)
    sizes = [len(pair.response_ids) for pair in pairs]
    tokens = [list(range(n)) for n in sizes] if max_tokens is None else batching.subsample(sizes, max_tokens, seed)
    with eval_mode(unwrap(model)), torch.no_grad():
        means = analysis.average(pairs, tokens, batch_tokens, share)
    result = analysis.result(means)
    if max_tokens is not None:
        counts = {"tokens_used": means.tokens, "tokens_of_responses": sum(sizes)}
        result["sampling"] = {"max_tokens": max_tokens, **counts}
    if options.layer_choice:
        sample: dict[str, Any] = {"tokens": options.choice_tokens, "seed": seed, "progress": options.progress}
        result["layer_choice"] = choose_layer(model, read, result, lenses=lenses, **sample)
    return result


class _Analysis:
    """Reads batches of one model, averages over their tokens, and lays out the result file."""

    def __init__(self, model: nn.Module, columns: dict[str, int], options: AnalysisOptions):
        self._model, self._columns, self._options = model, columns, options
        self._unembedding, self._n_layers = get_unembedding(model), find_layout(model).n_layers
        blocks: dict[str, Iterable[str]] = {"sites": SITES, "entropy_change": CHANGES, "residual_cosine": COSINES}
        blocks |= dict.fromkeys(columns, SITES)
        # what is averaged, each of L layers; the final entropy comes after them
        self._rows = [(block, kind) for block, kinds in blocks.items() for kind in kinds]

    def average(self, pairs: list[TokenPair], tokens: list[list[int]], batch_tokens: int, share: bool) -> ClusterMeans:
        counts = [len(part) for part in tokens]
        mine, processes = batching.own_part(self._model, counts, share)
        means, total = ClusterMeans(), sum(counts[i] for i in mine)
        for indices in batching.batches(pairs, batch_tokens, [i for i in mine if counts[i]]):
            batch = batching.pad(pairs, tokens, indices, self._unembedding.weight.device)
            stats, values = self._read(batch)
            for i, part in zip(indices, values.split(batch.counts, dim=-1), strict=True):
                means.add(part, i)
            if self._options.progress is not None:
                self._options.progress("reading states", means.tokens, total)
            if self._options.on_tokens is not None:
                self._options.on_tokens(batch, stats)
        if processes > 1:
            for rows in gather_object([means.rows]):
                means.rows |= rows
        return means

    def _read(self, batch: PaddedBatch) -> tuple[Stats, Tensor]:
        """Statistics per token by name, (6, L, N[, k]) in the order of `SITES`, and the values to average (K, N)."""
        # for KL divergences, the full policy must be known before the layers are read
        reference = capture_stream(self._model, *batch.inputs, None) if "kl" in self._columns else None
        request = StatsRequest(
            targets=batch.targets if {"logprob", "rank"} & set(self._columns) else None,
            rank="rank" in self._columns,
            varentropy="varentropy" in self._columns,
            reference=reference,
            kl=reference is not None,
            top_k=max(self._columns.values(), default=0),
        )
        first: Stats = {}
        groups: list[Stats] = []
        cosines: list[Tensor] = []

        def on_group(first_layer: int, before: Tensor, layers: list[Tensor], after: Tensor) -> None:
            wanted = (request if self._columns else None, first_layer == 1)
            of_before, stats = residual_group_stats(before, layers, self._unembedding, *wanted)
            first.update(of_before)
            if not bool((finite := torch.isfinite(stats["entropy"])).all()):
                index, site = (~finite).any(-1).nonzero()[0].tolist()
                raise InputError(
                    f"non-finite logits at layer {first_layer + index}, site {GROUP_SITES[site]}: the weights are "
                    f"damaged or the dtype is too narrow for this model (try --dtype float32)"
                )
            groups.append({name: values.cpu() for name, values in stats.items()})
            stream = before
            for _, attn_out, _, ffn_out in layers:
                middle = stream + attn_out
                # cos(A^l, H^{l-1}) and cos(F^l, H^{l-1} + A^l)
                vectors = ((attn_out, stream), (ffn_out, middle))
                cosines.append(torch.stack([torch.cosine_similarity(a, b, dim=-1) for a, b in vectors]).double().cpu())
                stream = middle + ffn_out

        bytes_per_layer = 4 * 4 * len(batch.targets) * self._unembedding.weight.shape[1]
        group = max(1, min(self._n_layers, _STATES_BYTES // bytes_per_layer))
        final = capture_stream(self._model, *batch.inputs, on_group, group=group)
        final_entropy = lens_stats(final[None], self._unembedding)["entropy"].cpu()
        stats = {}
        for name in first:
            per_layer = torch.cat([part[name] for part in groups])  # (L, 5, N)
            layer_in = torch.cat([first[name].cpu(), per_layer[:-1, 4]])
            stats[name] = torch.stack([*per_layer[:, :4].unbind(1), layer_in, per_layer[:, 4]])
        entropy = dict(zip(SITES, stats["entropy"], strict=True))
        changes = torch.stack([entropy[out] - entropy[into] for out, into in CHANGES.values()])
        values = [stats["entropy"], changes, torch.stack(cosines, dim=1)]
        for name, k in self._columns.items():
            values.append(stats["top_probability"][..., :k].sum(-1) if k else stats[name].double())
        return stats, torch.cat([torch.cat(values).flatten(0, 1), final_entropy])

    def result(self, means: ClusterMeans) -> dict[str, Any]:
        inner, unembedding = unwrap(self._model), self._unembedding
        mean, error = means.statistics()
        lists = (part[:-1].view(-1, self._n_layers) for part in (mean, error))
        row_of = dict(zip(self._rows, zip(*lists, strict=True), strict=True))
        boundary, regions = find_boundary(*(row.tolist() for row in row_of["entropy_change", "ffn"]))

        def block(name: str, place: int) -> dict[str, list]:  # 0: the means, 1: their standard errors
            return {kind: rounded(row[place]) for (of, kind), row in row_of.items() if of == name}

        rule = {"logit_scale": unembedding.scale, "softcap": unembedding.softcap}
        result: dict[str, Any] = {
            "schema": 1,
            "model": self._options.name or getattr(inner.config, "_name_or_path", "") or type(inner).__name__,
            "architecture": type(inner).__name__,
            "layers": self._n_layers,
            "vocabulary": len(unembedding.weight),
            "tied_embeddings": bool(getattr(inner.config.get_text_config(), "tie_word_embeddings", False)),
            "tokens": means.tokens,
            "samples": len(means.rows),
            "dtype": str(inner.dtype).removeprefix("torch."),
            "readout": {"products": unembedding.products, "accumulation": "float32", "sums": "float64", **rule},
            "standard_error_method": means.method,
            "final_entropy": rounded(mean)[-1],
            "final_entropy_standard_error": rounded(error)[-1],
            "sites": block("sites", 0),
            "standard_errors": block("sites", 1),
            "entropy_change": block("entropy_change", 0),
            "entropy_change_standard_errors": block("entropy_change", 1),
            "residual_cosine": block("residual_cosine", 0),
            "residual_cosine_standard_errors": block("residual_cosine", 1),
            "regions": regions,
            "boundary_layer": boundary.layer,
            "boundary_reason": boundary.reason,
        }
        if self._columns:
            result["statistics"] = {column: block(column, 0) for column in self._columns}
            result["statistics_standard_errors"] = {column: block(column, 1) for column in self._columns}
        return result
