"""Every token's readings at every site as a parquet table, written batch by batch."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from bupo.lens.analyze import SITES
from bupo.lens.batching import Batch


class TokenTable:
    """A sink of `bupo.lens.analyze.analyze_rollouts`: one row a response token, layer and site.

    Columns: ``response`` (its row in the input, from 1), ``position`` (of the token in the response, from 1), ``token``
    (its id), ``layer``, ``site``, ``entropy``, and ``logprob``, ``rank``, ``varentropy``, ``kl``, ``top`` (ids) and
    ``top_probability`` where asked for.

    Args:
        near: where the table will lie; it is written under a temporary name beside it until `close`.
    """

    def __init__(self, near: Path):
        self._folder = next(p for p in (near, *near.absolute().parents) if p.is_dir())
        self._temporary: str | None = None
        self._writer: pq.ParquetWriter | None = None

    def __call__(self, chosen: list[int], tokens: list[list[int]], batch: Batch, found: dict[str, Tensor]) -> None:
        layers, n = found["entropy"].shape[1:]
        shape = (len(SITES), layers, n)
        response = torch.tensor([i + 1 for i, part in zip(chosen, tokens, strict=True) for _ in part])
        position = torch.tensor([t + 1 for part in tokens for t in part])
        site = pa.DictionaryArray.from_arrays(
            pa.array(torch.arange(len(SITES)).repeat_interleave(layers * n).numpy(), pa.int8()), list(SITES)
        )
        columns = {
            "response": _column(response.expand(shape), pa.int32()),
            "position": _column(position.expand(shape), pa.int32()),
            "token": _column(batch.targets.cpu().expand(shape), pa.int32()),
            "layer": _column(torch.arange(1, layers + 1)[:, None].expand(shape), pa.int16()),
            "site": site,
        }
        for name in ("entropy", "logprob", "rank", "varentropy", "kl"):
            if name in found:
                columns[name] = _column(found[name], pa.int32() if name == "rank" else pa.float32())
        for name, kind in (("top", pa.int32()), ("top_probability", pa.float32())):
            if name in found:
                flat = _column(found[name], kind)
                columns[name] = pa.FixedSizeListArray.from_arrays(flat, found[name].shape[-1])
        table = pa.table(columns)
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


def _column(values: Tensor, kind: pa.DataType) -> pa.Array:
    return pa.array(values.reshape(-1).numpy()).cast(kind, safe=False)
