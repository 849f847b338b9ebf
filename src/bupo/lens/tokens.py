"""Statistics of single tokens and their two writers: the explorer's ``tokens.json`` and a parquet table."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from bupo.lens.batching import PaddedBatch, TokenPair, check_rollouts, pad
from bupo.lens.online import StatsRequest
from bupo.lens.softmax_stats import Stats, lens_stats
from bupo.models.capture import capture_layers
from bupo.models.layout import eval_mode, unwrap
from bupo.models.unembed import Unembedding, get_unembedding

TOP_K = 5  # most likely tokens that the explorer shows per layer


@dataclass(frozen=True)
class TokenStats:
    """Statistics of N response tokens at S sites of L layers.

    Attributes:
        response: the response's number, from 1, (N,).
        position: the token's position in its response, from 1, (N,).
        token: its id (N,).
        sites: names of the S sites.
        stats: by name (S, L, N); ``top`` and ``top_probability`` (S, L, N, k); see `bupo.lens.online.StatsRequest`.
    """

    response: Tensor
    position: Tensor
    token: Tensor
    sites: Sequence[str]
    stats: Stats

    @classmethod
    def of_batch(
        cls,
        indices: Sequence[int],
        tokens: Sequence[Sequence[int]],
        batch: PaddedBatch,
        sites: Sequence[str],
        stats: Stats,
    ) -> TokenStats:
        """The statistics of a batch of responses; ``indices`` of the responses and of their ``tokens`` from 0."""
        response = torch.tensor([index + 1 for index, part in zip(indices, tokens, strict=True) for _ in part])
        position = torch.tensor([token + 1 for part in tokens for token in part])
        return cls(response, position, batch.targets.cpu(), sites, {name: v.cpu() for name, v in stats.items()})


class ParquetTokenWriter:
    """Writes batches of token statistics as a parquet table with one row per response token, layer and site.

    Columns: ``response``, ``position``, ``token``, ``layer``, ``site``, ``entropy``, and the requested ones of
    ``logprob``, ``rank``, ``varentropy``, ``kl``, ``top`` (ids) and ``top_probability``.

    Args:
        near: where the table will be; it has a temporary name beside that path until `close`.
    """

    def __init__(self, near: Path):
        self._folder = next(p for p in (near, *near.absolute().parents) if p.is_dir())
        self._temporary: str | None = None
        self._writer: pq.ParquetWriter | None = None

    def __call__(self, tokens: TokenStats) -> None:
        """Append a batch."""
        table = _parquet_table(tokens)
        if self._writer is None:
            handle, self._temporary = tempfile.mkstemp(dir=self._folder, prefix=".per_token.")
            os.close(handle)
            self._writer = pq.ParquetWriter(self._temporary, table.schema, compression="zstd")
        self._writer.write_table(table)

    def close(self, path: Path) -> None:
        """Finish the table and give it its name."""
        assert self._writer is not None
        assert self._temporary is not None
        self._writer.close()
        os.chmod(self._temporary, 0o644)
        os.replace(self._temporary, path)
        self._temporary = None

    def __del__(self) -> None:  # an analysis that failed leaves nothing behind
        if self._temporary is not None:
            Path(self._temporary).unlink(missing_ok=True)


def _parquet_table(tokens: TokenStats) -> pa.Table:
    stats, names = tokens.stats, tokens.sites
    shape = sites, layers, n = stats["entropy"].shape
    site_index = torch.arange(sites).repeat_interleave(layers * n)
    columns = {
        "response": _column(tokens.response.expand(shape), pa.int32()),
        "position": _column(tokens.position.expand(shape), pa.int32()),
        "token": _column(tokens.token.expand(shape), pa.int32()),
        "layer": _column(torch.arange(1, layers + 1)[:, None].expand(shape), pa.int16()),
        "site": pa.DictionaryArray.from_arrays(pa.array(site_index.numpy(), pa.int8()), list(names)),
    }
    for name in ("entropy", "logprob", "rank", "varentropy", "kl"):
        if name in stats:
            columns[name] = _column(stats[name], pa.int32() if name == "rank" else pa.float32())
    for name, dtype in (("top", pa.int32()), ("top_probability", pa.float32())):
        if name in stats:
            columns[name] = pa.FixedSizeListArray.from_arrays(_column(stats[name], dtype), stats[name].shape[-1])
    return pa.table(columns)


def _column(values: Tensor, dtype: pa.DataType) -> pa.Array:
    return pa.array(values.reshape(-1).numpy()).cast(dtype, safe=False)


def explore_rollouts(
    model: nn.Module,
    responses: Sequence[Any],
    decode: Callable[[list[int]], str],
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Compute statistics of the layer policies at every response token, one response at a time.

    Args:
        model: a decoder-only causal LM.
        responses: a few responses, as for `bupo.lens.analyze.analyze_rollouts`; each costs L vocabulary products per
            token.
        decode: turns token ids into text.
        progress: called with ("reading single tokens", responses done, responses in all).

    Returns:
        The content of ``tokens.json`` (schema 1): per sample the tokens as text and, as L rows of T numbers,
        ``entropy`` (nats), ``logprob`` and ``rank`` (from 1) of the generated token, ``kl`` to the full policy (nats),
        and ``top``, the most likely tokens as (text, probability) pairs.

    Raises:
        InputError: see `bupo.lens.analyze.analyze_rollouts`.
    """
    pairs = check_rollouts(model, responses)
    unembedding = get_unembedding(model)
    samples = []
    with eval_mode(unwrap(model)), torch.no_grad():
        for index, pair in enumerate(pairs):
            samples.append(_explorer_sample(pair, _layer_stats(model, index, pair, unembedding), decode))
            if progress is not None:
                progress("reading single tokens", index + 1, len(pairs))
    return {"schema": 1, "samples": samples}


def _layer_stats(model: nn.Module, index: int, pair: TokenPair, unembedding: Unembedding) -> TokenStats:
    """Statistics of the layer policies at every token of one response."""
    every = [range(len(pair.response_ids))]
    batch = pad([pair], every, unembedding.weight.device)
    states, final = capture_layers(model, batch.ids, batch.mask, batch.positions)
    request = StatsRequest(targets=batch.targets, rank=True, reference=final, kl=True, top_k=TOP_K)
    stats = {name: values[None] for name, values in lens_stats(states, unembedding, request).items()}
    return TokenStats.of_batch([index], every, batch, ["layer_out"], stats)


def _explorer_sample(pair: TokenPair, tokens: TokenStats, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    stats = {name: values[0] for name, values in tokens.stats.items()}
    text = {token: decode([token]) for token in {*tokens.token.tolist(), *stats["top"].flatten().tolist()}}

    def rows(values: Tensor) -> list[list[float]]:
        return [[round(v, 4) for v in row] for row in values.tolist()]

    def cell(ids: list[int], probabilities: list[float]) -> list[list[Any]]:
        return [[text[token], round(p, 4)] for token, p in zip(ids, probabilities, strict=True)]

    layers = zip(stats["top"].tolist(), stats["top_probability"].tolist(), strict=True)
    return {
        "problem_id": getattr(pair, "problem_id", None),
        "prompt": decode(list(pair.prompt_ids)),
        "tokens": [text[token] for token in tokens.token.tolist()],
        "layers": len(stats["entropy"]),
        "entropy": rows(stats["entropy"]),
        "logprob": rows(stats["logprob"]),
        "kl": rows(stats["kl"]),
        "rank": stats["rank"].long().tolist(),
        "top": [[cell(i, p) for i, p in zip(ids, ps, strict=True)] for ids, ps in layers],
    }
