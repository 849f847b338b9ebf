"""Writes statistics of single tokens: ``tokens.json`` for the report's explorer, and a parquet table."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from bupo.lens.batching import PaddedBatch, check_rollouts, pad
from bupo.lens.online import StatsRequest
from bupo.lens.softmax_stats import SITES, Stats, lens_stats
from bupo.models.capture import capture_layers
from bupo.models.layout import eval_mode, unwrap
from bupo.models.unembed import get_unembedding

TOP_K = 5  # most likely tokens that the explorer shows per layer


class ParquetTokenWriter:
    """Writes batches of token statistics as a parquet table with one row per response token, layer and site.

    Columns: ``response`` and ``position`` (in it), from 1, ``token`` (id), ``layer``, ``site``, ``entropy``, and the
    requested ones of ``logprob``, ``rank``, ``varentropy``, ``kl``, ``top`` (ids) and ``top_probability``.

    Args:
        near: where the table will be; it lies in a temporary folder beside that path until `close`.
    """

    def __init__(self, near: Path):
        parent = next(p for p in (near, *near.absolute().parents) if p.is_dir())
        # an analysis that fails leaves nothing behind: the folder goes with the writer, at the latest at exit
        self._folder = tempfile.TemporaryDirectory(dir=parent, prefix=".per_token.", ignore_cleanup_errors=True)
        self._table = Path(self._folder.name) / "table"
        self._writer: pq.ParquetWriter | None = None

    def __call__(self, batch: PaddedBatch, stats: Stats) -> None:
        """Append the statistics (6, L, N[, k]) of a batch, sites in the order of `SITES`."""
        table = _parquet_table(batch, stats)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._table, table.schema, compression="zstd")
        self._writer.write_table(table)

    def close(self, path: Path) -> None:
        """Finish the table and give it its name."""
        assert self._writer is not None
        self._writer.close()
        os.replace(self._table, path)
        self._folder.cleanup()


def _parquet_table(batch: PaddedBatch, stats: Stats) -> pa.Table:
    shape = sites, layers, n = stats["entropy"].shape

    def column(values: Tensor, dtype: pa.DataType) -> pa.Array:
        return pa.array(values.reshape(-1).numpy()).cast(dtype, safe=False)

    site = pa.array(torch.arange(sites).repeat_interleave(layers * n).numpy(), pa.int8())
    columns = {
        "response": column(batch.places[:, 0].expand(shape), pa.int32()),
        "position": column(batch.places[:, 1].expand(shape), pa.int32()),
        "token": column(batch.targets.cpu().expand(shape), pa.int32()),
        "layer": column(torch.arange(1, layers + 1)[:, None].expand(shape), pa.int16()),
        "site": pa.DictionaryArray.from_arrays(site, list(SITES)),
    }
    for name in ("entropy", "logprob", "rank", "varentropy", "kl"):
        if name in stats:
            columns[name] = column(stats[name], pa.int32() if name == "rank" else pa.float32())
    for name, dtype in (("top", pa.int32()), ("top_probability", pa.float32())):
        if name in stats:
            columns[name] = pa.FixedSizeListArray.from_arrays(column(stats[name], dtype), stats[name].shape[-1])
    return pa.table(columns)


def explore_rollouts(
    model: nn.Module,
    responses: Sequence[Any],
    decode: Callable[[list[int]], str],
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Compute statistics of the layer policies at every response token, one response at a time.

    Args:
        model, responses: as for `bupo.lens.analyze.analyze_rollouts`; each token costs L vocabulary products.
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
    every = [range(len(pair.response_ids)) for pair in pairs]
    samples = []
    with eval_mode(unwrap(model)), torch.no_grad():
        for index, pair in enumerate(pairs):
            batch = pad(pairs, every, [index], unembedding.weight.device)
            states, final = capture_layers(model, batch.ids, batch.mask, batch.positions)
            request = StatsRequest(targets=batch.targets, rank=True, reference=final, kl=True, top_k=TOP_K)
            sample = {
                "problem_id": pair.problem_id,
                "prompt": decode(list(pair.prompt_ids)),
                "tokens": [decode([token]) for token in pair.response_ids],
                "layers": len(states),
            }
            samples.append(sample | _explorer_rows(lens_stats(states, unembedding, request), decode))
            if progress is not None:
                progress("reading single tokens", index + 1, len(pairs))
    return {"schema": 1, "samples": samples}


def _explorer_rows(stats: Stats, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """Statistics (L, T[, k]) of one response as lists, rounded."""
    text = {token: decode([token]) for token in set(stats["top"].flatten().tolist())}
    numbers = {
        name: [[round(v, 4) for v in row] for row in stats[name].tolist()] for name in ("entropy", "logprob", "kl")
    }
    top = [
        [[[text[i], round(p, 4)] for i, p in zip(*cell, strict=True)] for cell in zip(*layer, strict=True)]
        for layer in zip(stats["top"].tolist(), stats["top_probability"].tolist(), strict=True)
    ]
    return {**numbers, "rank": stats["rank"].long().tolist(), "top": top}
