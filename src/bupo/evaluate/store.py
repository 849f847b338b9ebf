"""The files that keep responses: a growing one while sampling, one parquet file afterwards."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Key = tuple[str, str, int]  # task, problem id, sample


class Partial:
    """Responses made so far, one line each, on disk as soon as their batch is done.

    Whatever was written when a run is killed is read by the next; a last line that the kill cut off is dropped.
    """

    def __init__(self, path: Path):
        self.path = path
        self.responses: dict[Key, list[int]] = {}
        if path.exists():
            self._read()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a", encoding="utf-8")

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def add(self, keys: Sequence[Key], responses: Sequence[list[int]]) -> None:
        """Keep a batch (of one that was kept in part and is now made again whole, only what is missing)."""
        for key, response in zip(keys, responses, strict=True):
            if key not in self.responses:
                self.responses[key] = response
                self._stream.write(json.dumps([*key, response]) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for line in whole.splitlines():
            task, problem, sample, response = json.loads(line)
            self.responses[task, problem, sample] = response
        if len(whole) != len(content):
            with self.path.open("r+b") as stream:
                stream.truncate(len(whole))


def write_responses(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write graded responses, all or nothing."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=_schema()), temporary, compression="zstd")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _schema() -> Any:
    import pyarrow

    texts = ("task", "problem_id", "prompt", "response", "answer", "source", "metadata", "status", "extracted")
    ids = pyarrow.list_(pyarrow.int32())
    return pyarrow.schema(
        [(name, pyarrow.string()) for name in texts]
        + [("prompt_ids", ids), ("response_ids", ids), ("sample", pyarrow.int32()), ("length", pyarrow.int32())]
        + [("finished", pyarrow.bool_()), ("reward", pyarrow.float64())]
    )


def fingerprint(folder: Path) -> str | None:
    """A short name for the weights in a model folder: another training run gives another name.

    Hashes the configuration and 64 blocks spread over each weights file, so that it costs milliseconds at any size.
    """
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as stream:
            for block in range(64):
                stream.seek(block * size // 64)
                digest.update(stream.read(4096))
    return digest.hexdigest()[:16]
