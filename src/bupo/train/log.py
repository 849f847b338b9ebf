"""Writes the log of a run: one row per log call, and a line on the screen per rollout batch."""

import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from bupo.run_folder import write_text

LOG_FILE = "log.jsonl"
# names in log.jsonl of what every reader needs, and the trainer's names where they differ
COLUMNS = ("reward", "entropy", "internal_entropy", "mean_length", "loss")
_THEIRS = {"internal_entropy": "internal/entropy", "mean_length": "completions/mean_length"}


class LogWriter(TrainerCallback):
    """Appends one JSON object per log call to ``log.jsonl`` and shows one line per rollout batch.

    Rows hold ``step`` (updates so far), ``rollout`` (from 1), ``phase``, ``layer`` (of the internal policy), `COLUMNS`
    (nats per token, tokens), ``seconds`` since this process began to train, ``sampling_seconds`` of sampling and
    rewards since the last row, and other metrics under the trainer's name; those of evaluations hold ``eval_*`` names.
    A resumed run drops the rows after its checkpoint.
    """

    def __init__(self, path: Path, trainer: Any, show: Callable[[str], None], rollouts: int):
        self.path, self._trainer, self._show, self._rollouts = path, trainer, show, rollouts

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.monotonic()
        if state.is_world_process_zero:
            drop_rows_after(self.path, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        row = self._row(state.global_step, logs)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, allow_nan=False) + "\n")
        if "rollout" in row and "rollout" not in logs:  # a later update of a rollout batch
            return
        ended = self._trainer.phase_end
        if ended is not None and row.get("rollout") == ended["rollouts"] + 1:
            back = "; the best weights were restored" if ended["action"] == "restore" else ""
            self._show(f"internal phase ended after {ended['rollouts']} rollout batches: {ended['reason']}{back}")
        self._show(self._line(row))

    def _row(self, step: int, logs: dict[str, Any]) -> dict[str, Any]:
        metrics = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in logs.items()}
        metrics = {name: value for name, value in metrics.items() if name not in ("rollout", "phase")}
        seconds = round(time.monotonic() - self._started, 2)
        if any(name.startswith("eval_") for name in metrics):
            return {"step": step, "seconds": seconds, **metrics}
        trainer = self._trainer
        sampling, trainer.sampling_seconds = trainer.sampling_seconds, 0.0
        return {
            "step": step,
            "rollout": (trainer._step - 1) // trainer.args.generate_every + 1,  # of the last micro-batch
            "phase": trainer.phase.name,
            "layer": trainer.phase.layer,
            **{name: metrics.pop(_THEIRS.get(name, name), None) for name in COLUMNS},
            "seconds": seconds,
            "sampling_seconds": round(sampling, 3),
            **metrics,
        }

    def _line(self, row: dict[str, Any]) -> str:
        if "rollout" not in row:
            return f"evaluation after update {row['step']}: {_number(row, 'eval_reward', 'reward')}"
        phase = f"{row['phase']} l={row['layer']}" if row["layer"] else row["phase"]
        parts = [f"rollout {row['rollout']}/{self._rollouts}", f"{phase:<14}"]
        parts += [_number(row, "reward", "reward"), _number(row, "entropy", "entropy")]
        parts += [] if row["internal_entropy"] is None else [_number(row, "internal_entropy", "internal")]
        return "  ".join([*parts, _number(row, "mean_length", "length", 1), f"{row['seconds']:.0f} s"])


def _number(row: dict[str, Any], name: str, shown: str, digits: int = 3) -> str:
    return f"{shown} -" if row.get(name) is None else f"{shown} {row[name]:.{digits}f}"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log of this process; none if it has not been written."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def drop_rows_after(path: Path, step: int) -> None:
    """Drop the rows of a log after update ``step``, and a torn last line (of a run that was killed while writing)."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            if step > 0 and json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_text(path, "".join(kept))
