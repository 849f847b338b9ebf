"""Trainer callbacks for checkpoint timing, logging, console output and graceful shutdown."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from bupo.run_folder import write_text

# names in log.jsonl of what every reader needs, and the trainer's names for them
COLUMNS = {
    "reward": "reward",
    "entropy": "entropy",
    "internal_entropy": "internal/entropy",
    "mean_length": "completions/mean_length",
    "loss": "loss",
}


class StopOnSignal(TrainerCallback):
    """The first Ctrl-C (or SIGTERM) stops after the rollout batch and saves; a second one stops at once."""

    def __init__(self, trainer: Any, log: Callable[[str], None]):
        self._trainer, self._log = trainer, log
        self.requested = self.stopped = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._log("stopping after this rollout batch; press Ctrl-C again to stop at once (from the last checkpoint)")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if not self._trainer.between_rollouts or state.global_step >= state.max_steps:
            return control
        # whichever process received the signal, all must stop after the same update
        flag = torch.tensor(float(self.requested), device=self._trainer.accelerator.device)
        if self._trainer.accelerator.reduce(flag, reduction="sum") > 0:
            control.should_save = control.should_training_stop = self.stopped = True
        return control


class LogWriter(TrainerCallback):
    """Appends one JSON object per log call to ``log.jsonl`` and shows one line per rollout batch.

    Columns: ``step`` (updates so far), ``rollout`` (from 1), ``phase``, ``layer`` (of the internal policy or None),
    ``reward``, ``entropy`` (of the full policy), ``internal_entropy`` (both nats per token), ``mean_length`` (tokens),
    ``loss``, ``seconds`` (since this process began to train), and every other metric under the trainer's own name.
    Evaluations are rows with ``eval_*`` names. A resumed run drops the rows after its checkpoint.
    """

    def __init__(
        self, path: Path, trainer: Any, show: Callable[[str], None] | None = None, rollouts: int | None = None
    ):
        self.path, self._trainer, self._show, self._rollouts = path, trainer, show, rollouts
        self._started = time.monotonic()

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
        if self._show is None or ("rollout" in row and "rollout" not in logs):  # a later update of a rollout batch
            return
        ended = self._trainer.phase_end
        if ended is not None and row.get("rollout") == ended["rollouts"] + 1:
            back = "; the best weights were restored" if ended["action"] == "restore" else ""
            self._show(f"internal phase ended after {ended['rollouts']} rollout batches: {ended['reason']}{back}")
        self._show(self._line(row))

    def _row(self, step: int, logs: dict[str, Any]) -> dict[str, Any]:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in logs.items()}
        metrics = {name: value for name, value in finite.items() if name not in ("rollout", "phase")}
        seconds = round(time.monotonic() - self._started, 2)
        if any(name.startswith("eval_") for name in metrics):
            return {"step": step, "seconds": seconds, **metrics}
        trainer = self._trainer
        return {
            "step": step,
            "rollout": (trainer._step - 1) // trainer.args.generate_every + 1,  # of the last micro-batch
            "phase": trainer.phase.name,
            "layer": trainer.phase.layer,
            **{short: metrics.pop(name, None) for short, name in COLUMNS.items()},
            "seconds": seconds,
            **metrics,
        }

    def _line(self, row: dict[str, Any]) -> str:
        """One line for the console."""

        def number(name: str, digits: int = 3) -> str:
            return "-" if row.get(name) is None else f"{row[name]:.{digits}f}"

        if "rollout" not in row:
            return f"evaluation after update {row['step']}: reward {number('eval_reward')}"
        phase = f"{row['phase']} l={row['layer']}" if row["layer"] else row["phase"]
        parts = [
            f"rollout {row['rollout']}" + (f"/{self._rollouts}" if self._rollouts else ""),
            f"{phase:<14}",
            f"reward {number('reward')}",
            f"entropy {number('entropy')}",
            *([f"internal {number('internal_entropy')}"] if row["internal_entropy"] is not None else []),
            f"length {number('mean_length', 1)}",
            f"{row['seconds']:.0f} s",
        ]
        return "  ".join(parts)


def drop_rows_after(path: Path, step: int) -> None:
    """Drop the rows of a log after update ``step``, and a torn last line (of a run that was killed while writing)."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if step > 0 and json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_text(path, "".join(kept))
