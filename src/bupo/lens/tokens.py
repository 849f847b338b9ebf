"""Writes statistics of single tokens: ``tokens.json`` for the report's explorer, and a parquet table."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from bupo.lens.batching import PaddedBatch, check_rollouts, pad, rounded
from bupo.lens.layer_choice import Progress
from bupo.lens.online import StatsRequest
from bupo.lens.softmax_stats import SITES, Stats, lens_stats
from bupo.models.capture import capture_layers
from bupo.models.layout import eval_mode, unwrap
from bupo.models.unembed import get_unembedding

TOP_K = 5  # most likely tokens that the explorer shows per layer
PLACES = ("response", "position", "token", "layer", "site")
COLUMNS = (*PLACES, "entropy", "logprob", "rank", "varentropy", "kl", "top", "top_probability")
_WHOLE = {"layer": pa.int16(), "site": pa.int8()} | dict.fromkeys((*PLACES[:3], "rank", "top"), pa.int32())


class ParquetTokenWriter:
    """Writes batches of token statistics as a parquet table with one row per response token, layer and site.

    Its columns are those of `COLUMNS` that were requested; ``position`` is that of the token in the response, ``token``
    and ``top`` are ids. Until `close`, the table lies in a temporary folder beside the path ``near``.
    """

    def __init__(self, near: Path):
        parent = next(p for p in (near, *near.absolute().parents) if p.is_dir())
        # an analysis that fails leaves nothing behind: the folder goes with the writer, at the latest at exit
        self._folder = tempfile.TemporaryDirectory(dir=parent, prefix=".per_token.", ignore_cleanup_errors=True)
        self._table = Path(self._folder.name) / "table"
        self._writer: pq.ParquetWriter | None = None

    def __call__(self, batch: PaddedBatch, stats: Stats) -> None:
        """Append the statistics (6, L, N[, k]) of a batch, sites in the order of `SITES`."""
        table = _table(batch, stats)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._table, table.schema, compression="zstd")
        self._writer.write_table(table)

    def close(self, path: Path) -> None:
        """Finish the table and give it its name."""
        assert self._writer is not None
        self._writer.close()
        os.replace(self._table, path)
        self._folder.cleanup()


def _table(batch: PaddedBatch, stats: Stats) -> pa.Table:
    sites, layers, _ = shape = stats["entropy"].shape
    places = {
        "response": batch.places[:, 0],
        "position": batch.places[:, 1],
        "token": batch.targets.cpu(),
        "layer": torch.arange(1, layers + 1)[:, None],
        "site": torch.arange(sites)[:, None, None],
    }
    values, columns = stats | {name: place.expand(shape) for name, place in places.items()}, {}
    for name in (name for name in COLUMNS if name in values):
        column = pa.array(values[name].reshape(-1).numpy()).cast(_WHOLE.get(name, pa.float32()), safe=False)
        if name == "site":
            column = pa.DictionaryArray.from_arrays(column, list(SITES))
        elif name.startswith("top"):
            column = pa.FixedSizeListArray.from_arrays(column, values[name].shape[-1])
        columns[name] = column
    return pa.table(columns)


def explore_rollouts(
    model: nn.Module,
    responses: Sequence[Any],
    decode: Callable[[list[int]], str],
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compute statistics of the layer policies at every response token, with L vocabulary products per token.

    The model and the responses are those of `bupo.lens.analyze.analyze_rollouts`, which has the same errors; ``decode``
    turns token ids into text; ``progress`` counts responses. Returns the content of ``tokens.json`` (schema 1): per
    sample the tokens as text and, as L rows of T numbers, ``entropy``, ``logprob`` and ``rank`` (from 1) of the
    generated token, ``kl`` to the full policy, and ``top``, the most likely tokens as (text, probability) pairs.
    """
    pairs, unembedding = check_rollouts(model, responses), get_unembedding(model)
    every = [range(len(pair.response_ids)) for pair in pairs]
    samples = []
    with eval_mode(unwrap(model)), torch.no_grad():
        for index, pair in enumerate(pairs):
            batch = pad(pairs, every, [index], unembedding.weight.device)
            states, final = capture_layers(model, *batch.inputs)
            request = StatsRequest(targets=batch.targets, rank=True, reference=final, kl=True, top_k=TOP_K)
            stats = lens_stats(states, unembedding, request)
            text = {token: decode([token]) for token in set(stats["top"].flatten().tolist())}
            sample = {
                "problem_id": pair.problem_id,
                "prompt": decode(list(pair.prompt_ids)),
                "tokens": [decode([token]) for token in pair.response_ids],
                "layers": len(states),
                **{name: rounded(stats[name], 4) for name in ("entropy", "logprob", "kl")},
                "rank": stats["rank"].long().tolist(),
                "top": [
                    [[[text[i], p] for i, p in zip(*cell, strict=True)] for cell in zip(*layer, strict=True)]
                    for layer in zip(stats["top"].tolist(), rounded(stats["top_probability"], 4), strict=True)
                ],
            }
            samples.append(sample)
            if progress is not None:
                progress("reading single tokens", index + 1, len(pairs))
    return {"schema": 1, "samples": samples}
