"""Reads a training log and the series drawn from it, with one value per rollout batch."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bupo.errors import InputError
from bupo.report.results import TrainingReading

Row = Mapping[str, Any]

# Keys of each series in order of preference: bupo's, then the trainer's, then TRL's.
SERIES: dict[str, tuple[str, ...]] = {
    "reward": ("reward", "rewards/mean"),
    "entropy": ("entropy",),
    "internal_entropy": ("internal_entropy", "internal/entropy"),
    "length": ("mean_length", "completions/mean_length"),
    "clip": ("clip_ratio/region_mean", "internal/clip_ratio/region_mean", "clip_ratio"),
}


@dataclass
class TrainingRun:
    """The rows of a run's ``log.jsonl``, and the readings it made of its layers."""

    log: list[dict[str, Any]]
    readings: list[TrainingReading] = field(default_factory=list)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read ``log.jsonl``; an incomplete last line (the run is still writing, or was killed) is left out.

    Raises:
        InputError: another line is not a JSON object, or no row has a step and a reward.
    """
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            row = None if number == len(lines) else line
        if row is not None and not isinstance(row, dict):
            raise InputError(f"{path}, line {number} is not a JSON object; name the log of a training run")
        rows += [row] if row else []
    if not any("step" in row and _value(row, "reward") is not None for row in rows):
        raise InputError(f"{path} has no row with a step and a reward; name the log of a training run")
    return rows


def series(log: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """Return the rollout batches that have ``name`` (a key of `SERIES`), and its mean in each."""
    groups: dict[float, list[float]] = defaultdict(list)
    for row in log:
        if (value := _value(row, name)) is not None:
            groups[_rollout(row)].append(value)
    x = sorted(groups)
    return x, [sum(groups[at]) / len(groups[at]) for at in x]


def last_internal_rollout(log: Sequence[Row]) -> float | None:
    """The last rollout batch before training switches to the full policy alone; None if it never switches."""
    internal = [_rollout(row) for row in log if row.get("phase") not in (None, "full")]
    full = [_rollout(row) for row in log if row.get("phase") == "full"]
    return max(internal) if internal and full and max(full) > max(internal) else None


def summary(log: Sequence[Row], share: float = 0.2) -> dict[str, Any]:
    """The length of a run, and means over its first and last fifth of rollout batches (nothing is picked by value)."""
    result: dict[str, Any] = {"steps": max((row.get("step", 0) for row in log), default=0)}
    for name in ("reward", "entropy", "length"):
        x, y = series(log, name)
        if y:
            n = max(1, round(share * len(y)))
            result[name] = [sum(y[:n]) / n, sum(y[-n:]) / n]
            result["rollouts"] = max(result.get("rollouts", 0), len(x))
    seconds = [row["seconds"] for row in log if isinstance(row.get("seconds"), int | float)]
    return result | ({"seconds": max(seconds)} if seconds else {})


def _rollout(row: Row) -> float:
    rollout = row.get("rollout")
    return float(rollout if rollout is not None else row.get("step", 0))


def _value(row: Row, name: str) -> float | None:
    values = (row.get(key) for key in SERIES[name])
    return next((float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)), None)
