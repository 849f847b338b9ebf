"""The configuration of an evaluation: everything that decides which responses are drawn and how they are summarised."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bupo.errors import ConfigError
from bupo.evaluate.tasks import find_task


@dataclass(frozen=True)
class EvalConfig:
    """Settings of an evaluation; ``run.json`` keeps them.

    Raises:
        ConfigError: lists every invalid setting.
    """

    model: str
    tasks: tuple[str, ...]
    k: int | None = None  # K of Avg@K; each task's own by default
    n: int | None = None  # samples per problem; k by default
    limit: int | None = None  # problems per task
    data_dir: str | None = None
    template: str | None = None  # each task's own by default
    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 64
    engine: str = "transformers"
    dtype: str = "auto"
    internal_layer: int | None = None
    internal_norm: bool = False
    revision: str | None = None
    fingerprint: str | None = None  # of a local model folder's weights
    shard: str | None = None  # "i/n": only the i-th of n equal parts of each task's problems

    def __post_init__(self) -> None:
        problems = []
        if not self.tasks:
            problems.append("name at least one task")
        names = [find_task(spec).name for spec in self.tasks]
        if len(set(names)) != len(names):
            problems.append(f"two tasks have the same name: {', '.join(names)}")
        for name, value in (("k", self.k), ("n", self.n), ("limit", self.limit), ("batch size", self.batch_size)):
            if value is not None and value < 1:
                problems.append(f"{name} must be at least 1, not {value}")
        if self.n is not None and self.k is not None and self.n < self.k:
            problems.append(f"Avg@{self.k} needs at least {self.k} samples per problem, not n={self.n}")
        if self.internal_norm and self.internal_layer is None:
            problems.append("the internal norm needs an internal layer")
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard or "1/1")
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            problems.append(f"a shard has the form i/n with i from 1 to n, such as 2/4, not {self.shard!r}")
        if problems:
            raise ConfigError(problems)

    @property
    def shard_numbers(self) -> tuple[int, int]:
        """The number of this shard (from 1), and the number of shards."""
        number, count = (self.shard or "1/1").split("/")
        return int(number), int(count)

    def folder(self, output: Path, number: int | None = None) -> Path:
        """The folder that this evaluation writes: ``output``, or the folder of shard ``number`` below it."""
        own, count = self.shard_numbers
        return output if self.shard is None else output / f"shard-{number or own}-of-{count}"

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON types. No shard is left out, as folders of earlier versions know none."""
        settings = json.loads(json.dumps(asdict(self)))
        return {key: value for key, value in settings.items() if key != "shard" or value is not None}


def fingerprint(folder: Path) -> str | None:
    """Identify the weights in a model folder; None if it holds none.

    Hashes the configuration and 64 blocks spread over each weights file, which takes milliseconds at any size.
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
