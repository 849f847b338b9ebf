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


class SaveBetweenRollouts(TrainerCallback):
    """Delays every save to the end of the rollout batch, because a checkpoint within one would lose its samples."""

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._due = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        due = self._due or control.should_save
        ending = state.global_step >= state.max_steps
        control.should_save = due and (self._trainer.between_rollouts or ending)
        self._due = due and not control.should_save
        return control


class StopOnSignal(TrainerCallback):
    """The first Ctrl-C (or SIGTERM) stops after the rollout batch and saves; a second one stops at once."""

    def __init__(self, trainer: Any, log: Callable[[str], None]):
        self._trainer, self._log = trainer, log
        self.requested = False
        self.stopped = False
        self._handlers: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Put back the signal handlers from before training."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            self.restore()
            raise KeyboardInterrupt
        self.requested = True
        self._log("stopping after this rollout batch; press Ctrl-C again to stop at once (from the last checkpoint)")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self._trainer.between_rollouts and self._anywhere() and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = self.stopped = True
        return control

    def _anywhere(self) -> bool:
        """Whether any process received a signal; all processes must stop after the same update."""
        accelerator = self._trainer.accelerator
        if accelerator.num_processes == 1:
            return self.requested
        flag = torch.tensor(float(self.requested), device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum") > 0)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()


class LogWriter(TrainerCallback):
    """Appends one JSON object per log call to ``log.jsonl`` and shows one line per rollout batch.

    A row has ``step`` (updates so far), ``rollout`` (from 1), ``phase`` (``internal``, ``joint`` or ``full``),
    ``layer``, ``reward``, ``entropy`` (full policy, nats per token), ``internal_entropy``, ``mean_length`` (tokens),
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
        row = self.row(state.global_step, logs)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, allow_nan=False) + "\n")
            stream.flush()
        if self._show is None or ("rollout" in row and "rollout" not in logs):  # a later update of a rollout batch
            return
        ended = self._trainer.phase_end
        if ended is not None and row.get("rollout") == ended["rollouts"] + 1:
            back = "; the best weights were restored" if ended["action"] == "restore" else ""
            self._show(f"internal phase ended after {ended['rollouts']} rollout batches: {ended['reason']}{back}")
        self._show(self.line(row))

    def row(self, step: int, logs: dict[str, Any]) -> dict[str, Any]:
        """The row of one log call."""
        metrics = {name: _finite(value) for name, value in logs.items()}
        seconds = round(time.monotonic() - self._started, 2)
        if any(name.startswith("eval_") for name in metrics):
            return {"step": step, "seconds": seconds, **metrics}
        for name in ("rollout", "phase"):
            metrics.pop(name, None)
        phase = self._trainer.phase
        return {
            "step": step,
            "rollout": (self._trainer._step - 1) // self._trainer.args.generate_every + 1,  # of the last micro-batch
            "phase": phase.name,
            "layer": phase.layer,
            **{short: metrics.pop(name, None) for short, name in COLUMNS.items()},
            "seconds": seconds,
            **metrics,
        }

    def line(self, row: dict[str, Any]) -> str:
        """One line for the console."""
        if "rollout" not in row:
            return f"evaluation after update {row['step']}: reward {_number(row.get('eval_reward'))}"
        total = f"/{self._rollouts}" if self._rollouts else ""
        phase = f"{row['phase']} l={row['layer']}" if row["layer"] else f"{row['phase']}"
        parts = [
            f"rollout {row['rollout']}{total}",
            f"{phase:<14}",
            f"reward {_number(row['reward'])}",
            f"entropy {_number(row['entropy'])}",
        ]
        if row["internal_entropy"] is not None:
            parts.append(f"internal {_number(row['internal_entropy'])}")
        parts += [f"length {_number(row['mean_length'], 1)}", f"{row['seconds']:.0f} s"]
        return "  ".join(parts)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _finite(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def drop_rows_after(path: Path, step: int) -> None:
    """Drop the rows of a log after update ``step``, and a torn last line (of a run that was killed while writing)."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("step", 0) <= step and step > 0:
            kept.append(line + "\n")
    write_text(path, "".join(kept))
