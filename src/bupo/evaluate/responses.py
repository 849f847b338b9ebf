"""The files that keep responses: a log that grows while sampling, and one Parquet file afterwards."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from bupo import run_folder
from bupo.errors import InputError

Key = tuple[str, str, int]  # task, problem id, sample

_TEXTS = ("task", "problem_id", "prompt", "response", "answer", "source", "metadata", "status", "extracted")
_SCHEMA = pa.schema(
    [(name, pa.string()) for name in _TEXTS]
    + [(name, pa.list_(pa.int32())) for name in ("prompt_ids", "response_ids")]
    + [("sample", pa.int32()), ("length", pa.int32()), ("finished", pa.bool_()), ("reward", pa.float64())]
)


class ResponseLog:
    """The responses so far, one line of JSON each, written to disk after every batch.

    A run that was killed is continued from this file; a last line that the kill cut off is dropped.
    """

    def __init__(self, path: Path):
        self.path = path
        self.responses: dict[Key, list[int]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a+b")
        self._stream.seek(0)
        content = self._stream.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._stream.truncate(len(whole))
        for line in whole.splitlines():
            task, problem, sample, response = json.loads(line)
            self.responses[task, problem, sample] = response

    def __enter__(self) -> ResponseLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def add(self, keys: Sequence[Key], responses: Sequence[list[int]]) -> None:
        """Keep the responses of a batch, except those that are there already."""
        for key, response in zip(keys, responses, strict=True):
            if key not in self.responses:
                self.responses[key] = response
                self._stream.write(json.dumps([*key, response]).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())


def write_responses(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write graded responses, all or nothing."""
    content = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), content, compression="zstd")
    run_folder.write_bytes(path, content.getvalue())


def read_graded(path: Path) -> list[dict[str, Any]]:
    """Read what `write_responses` wrote.

    Raises:
        InputError: the file is damaged.
    """
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
