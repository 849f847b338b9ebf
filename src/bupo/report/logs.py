"""A training run: its log, and the series drawn from it with one value per rollout batch."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from bupo.errors import InputError, shown
from bupo.report.results import SampledResponse, TrainingReading
from bupo.run_folder import read_json

# What a training log calls each series, in order of preference: bupo's name, then the trainer's, then TRL's.
SERIES: dict[str, tuple[str, ...]] = {
    "reward": ("reward", "rewards/mean"),
    "entropy": ("entropy",),
    "internal_entropy": ("internal_entropy", "internal/entropy"),
    "length": ("mean_length", "completions/mean_length"),
    "clip": ("clip_ratio/region_mean", "internal/clip_ratio/region_mean", "clip_ratio"),
}

GROUPS = 4  # shown of a rollout batch

Groups = list[list[SampledResponse]]  # of a rollout batch
_RESPONSES = TypeAdapter(list[SampledResponse])


@dataclass(frozen=True)
class TrainingRun:
    """The rows of a run's ``log.jsonl``, and the readings and groups of responses beside it, in order of training."""

    log: Sequence[Mapping[str, Any]]
    readings: Sequence[TrainingReading] = ()
    cut: bool = False  # whether the last line was incomplete
    batches: Sequence[Groups] = ()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read ``log.jsonl``, and the readings beside it; `InputError` names what is not such a file.

        An incomplete last line (the run is still writing, or was killed) is left out.
        """
        rows: list[dict[str, Any]] = []
        cut = False
        lines = path.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except (ValueError, RecursionError):
                cut = number == len(lines)
                row = {} if cut else None
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number} is not a JSON object; name the log of a training run")
            for name in ("step", "rollout"):
                if row.get(name) is not None and (type(row[name]) not in (int, float) or not abs(row[name]) < 2**53):
                    raise InputError(f"{path}, line {number}: {name} must be a number, not {shown(row[name])}")
            rows += [row] if row else []
        if not any("step" in row and _value(row, "reward") is not None for row in rows):
            raise InputError(f"{path} has no row with a step and a reward; name the log of a training run")
        return cls(rows, load_readings(path.parent), cut, load_groups(path.parent))

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Return the rollout batches that have ``name`` (a key of `SERIES`), and its mean in each."""
        groups: dict[float, list[float]] = defaultdict(list)
        for row in self.log:
            if (value := _value(row, name)) is not None:
                groups[_rollout(row)].append(value)
        x = sorted(groups)
        return x, [sum(groups[at]) / len(groups[at]) for at in x]

    @property
    def switch(self) -> float | None:
        """The last rollout batch before training switches to the full policy alone; None if it never switches."""
        internal = [_rollout(row) for row in self.log if row.get("phase") not in (None, "full")]
        full = [_rollout(row) for row in self.log if row.get("phase") == "full"]
        return max(internal) if internal and full and max(full) > max(internal) else None

    @property
    def layers(self) -> str:
        """The layers that the internal phase trained."""
        return ", ".join(dict.fromkeys(str(row["layer"]) for row in self.log if row.get("layer") is not None))

    def ends(self, name: str) -> tuple[float, float] | None:
        """Means over the first and the last fifth of rollout batches (nothing is picked by value); None without any."""
        _, y = self.series(name)
        n = max(1, round(0.2 * len(y)))
        return (sum(y[:n]) / n, sum(y[-n:]) / n) if y else None


def load_readings(folder: Path) -> list[TrainingReading]:
    """The readings in a folder's ``inside``, in order of training."""
    readings = [TrainingReading.parse(read_json(p), p) for p in (folder / "inside").glob("after-*.json")]
    return sorted(readings, key=lambda reading: reading.done)


def load_groups(folder: Path) -> list[Groups]:
    """Groups of the first, the middle and the last rollout batch in a folder's ``rollouts``."""
    files = sorted((folder / "rollouts").glob("rollout-*.jsonl"), key=lambda path: (len(path.name), path.name))
    batches = []
    for path in [files[i] for i in sorted({0, len(files) // 2, len(files) - 1})] if files else []:
        try:
            rows = _RESPONSES.validate_json(f"[{','.join(path.read_text(encoding='utf-8').splitlines())}]")
        except ValueError as error:
            found = error.errors() if isinstance(error, ValidationError) else []
            reason = ": ".join(map(str, (*found[0]["loc"], found[0]["msg"]) if found else (error,)))
            raise InputError(f"{path} does not hold responses that bupo train wrote: {reason}") from None
        groups = [list(group) for _, group in groupby(rows, key=lambda row: row.group)]
        batches += [groups[:GROUPS]] if groups else []
    return batches


def _rollout(row: Mapping[str, Any]) -> float:
    return float(row["rollout"] if row.get("rollout") is not None else row.get("step", 0))


def _value(row: Mapping[str, Any], name: str) -> float | None:
    values = (row.get(key) for key in SERIES[name])
    return next((float(v) for v in values if isinstance(v, int | float) and abs(v) < math.inf), None)
