"""What happens beside the updates: when to save, what is written to ``log.jsonl``, what is shown, how to stop."""

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

PHASES = {1.0: "internal", 2.0: "full"}
# names in log.jsonl of what every reader needs, and the trainer's names for them
COLUMNS = {
    "reward": "reward",
    "entropy": "entropy",
    "internal_entropy": "internal/entropy",
    "mean_length": "completions/mean_length",
    "loss": "loss",
}


class SaveBetweenRollouts(TrainerCallback):
    """Move every save to the end of the rollout batch: in its middle, samples would be lost with the checkpoint."""

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
    """The first Ctrl-C (or SIGTERM) lets the rollout batch end, saves and stops; a second one stops at once."""

    def __init__(self, trainer: Any, say: Callable[[str], None]):
        self._trainer, self._say = trainer, say
        self.asked = False
        self.stopped = False
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Put back the handlers that were there before training."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked:
            self.restore()
            raise KeyboardInterrupt
        self.asked = True
        self._say("stopping after this rollout batch; press Ctrl-C again to stop at once (from the last checkpoint)")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self._trainer.between_rollouts and self._anywhere() and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = self.stopped = True
        return control

    def _anywhere(self) -> bool:
        """Whether any process was asked to stop: all must do so after the same update."""
        accelerator = self._trainer.accelerator
        if accelerator.num_processes == 1:
            return self.asked
        flag = torch.tensor(float(self.asked), device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum") > 0)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()


class LogWriter(TrainerCallback):
    """Appends one JSON object a log call to ``log.jsonl`` and shows one line a rollout batch.

    A row has ``step`` (updates so far), ``rollout`` (from 1), ``phase`` (``internal``, ``joint`` or ``full``),
    ``layer``, ``reward``, ``entropy`` (full policy, nats a token), ``internal_entropy``, ``mean_length`` (tokens),
    ``loss``, ``seconds`` (since this process began to train), and every other metric under the trainer's own name.
    Evaluations are rows with ``eval_*`` names. A resumed run drops the rows after its checkpoint.
    """

    def __init__(
        self, path: Path, trainer: Any, show: Callable[[str], None] | None = None, rollouts: int | None = None
    ):
        self.path, self._trainer, self._show, self._rollouts = path, trainer, show, rollouts
        self._started = time.monotonic()
        self.last: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.monotonic()
        if state.is_world_process_zero:
            keep_until(self.path, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        row = self.row(state.global_step, logs)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, allow_nan=False) + "\n")
            stream.flush()
        if "reward" in row:
            self.last = row
        if self._show is not None:
            ended = self._trainer.phase_end
            if ended is not None and row.get("rollout") == ended["rollouts"] + 1:
                back = "; went back to the best weights" if ended["action"] == "restore" else ""
                self._show(f"internal phase ended after {ended['rollouts']} rollout batches: {ended['reason']}{back}")
            self._show(self.line(row))

    def row(self, step: int, logs: dict[str, Any]) -> dict[str, Any]:
        """The row of one log call."""
        clean = {name: _finite(value) for name, value in logs.items()}
        seconds = round(time.monotonic() - self._started, 2)
        if any(name.startswith("eval_") for name in clean):
            return {"step": step, "seconds": seconds, **clean}
        rollout = clean.pop("rollout", None)
        number = clean.pop("phase", None)
        row: dict[str, Any] = {"step": step, "rollout": None if rollout is None else int(rollout)}
        row["phase"] = PHASES.get(number) if number is not None else None
        row["layer"] = None
        if rollout is not None:
            stage = self._trainer.schedule.at(int(rollout) - 1)
            row["phase"], row["layer"] = stage.phase, stage.layer
        row |= {short: clean.pop(name, None) for short, name in COLUMNS.items()}
        return {**row, "seconds": seconds, **clean}

    def line(self, row: dict[str, Any]) -> str:
        """One line for a person."""
        if "rollout" not in row:
            reward = row.get("eval_reward")
            return f"evaluation after update {row['step']}: reward {_number(reward)}"
        of = f"/{self._rollouts}" if self._rollouts else ""
        phase = f"{row['phase']} l={row['layer']}" if row["layer"] else f"{row['phase']}"
        parts = [
            f"rollout {row['rollout']}{of}",
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


def keep_until(path: Path, step: int) -> None:
    """Drop rows after update ``step`` and a torn last line (a run killed while writing)."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("step", 0) <= step and step > 0:
            kept.append(line)
    from bupo.run_folder import write_text

    write_text(path, "".join(line + "\n" for line in kept))
