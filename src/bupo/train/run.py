"""A whole training run: recipe -> trainer -> final model -> summary.

The output folder holds ``run.json``, ``log.jsonl``, ``checkpoints/``, ``model/`` (with LoRA merged, and ``adapter/``
beside it), and where asked for ``flow/``, ``inside/`` and ``auto_layer.json``, the analysis that chose the layer.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from bupo.errors import ConfigError, InputError, TrainingStopped, not_finite, out_of_memory
from bupo.models.load import model_revision
from bupo.recipe import Recipe
from bupo.run_folder import RUN_FILE, claim, describe_run, read_run, write_json, write_text
from bupo.train.build import as_config_error, build, closing_rewards
from bupo.train.checkpoint import last_checkpoint, rotate, updates_of
from bupo.train.diagnostics import Draw
from bupo.train.lora import merge_adapters
from bupo.train.trainer import BuPOTrainer

LOG_FILE = "log.jsonl"
# names in log.jsonl of what every reader needs, and the trainer's names where they differ
COLUMNS = ("reward", "entropy", "internal_entropy", "mean_length", "loss")
_THEIRS = {"internal_entropy": "internal/entropy", "mean_length": "completions/mean_length"}
_FREE_TO_CHANGE = ("save_every", "keep_checkpoints", "report_to", "flow_every", "inside_every")  # of a resumed run
Say = Callable[[str], None]  # receives one line per rollout batch, and whatever else a person should know


def train(
    recipe: Recipe, output: str | Path, *, resume: bool = False, overwrite: bool = False, say: Say = print,
    draw: Draw | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train as a recipe of `check_recipe` says, and return a summary, which ``run.json`` holds as ``result``.

    ``resume`` continues from the last complete checkpoint in ``output``, and leaves a finished run as it is. Without
    ``draw``, entropy flows are saved as JSON only. Raises `InputError` for anything a user can fix, before the first
    file is written, and `TrainingStopped` if a value is not finite, memory runs out or no layer is found.
    """
    started = time.monotonic()
    if overwrite and resume:
        raise ConfigError("--overwrite and --resume exclude each other")
    folder = claim(output, overwrite=overwrite, resume=resume)
    checkpoint = _checkpoint_of(folder, recipe) if resume else None
    finished = checkpoint is not None and updates_of(checkpoint) >= recipe.updates(recipe.rollouts)
    record = read_run(folder) if finished else {}
    if "result" in record and (folder / "model").is_dir():
        say(f"the run in {folder} is finished; nothing to do")
        return record["result"]
    trainer = build(recipe, folder, say, draw)
    with closing_rewards(trainer.reward_funcs):
        if "result" not in record:
            more = {"seed": recipe.seed, "model_revision": model_revision(trainer.model)}
            record = describe_run("train", recipe.model_dump(mode="json"), resumed=checkpoint is not None, **more)
        if trainer.accelerator.is_main_process:
            _tidy(folder, recipe.keep_checkpoints if checkpoint is not None else None, overwrite)
            write_json(folder / RUN_FILE, record)
        if checkpoint is not None and finished:  # it was killed after its last checkpoint
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.checkpointer.restore(checkpoint)
        try:
            stopped = not finished and _train(trainer, recipe, folder, checkpoint, say)
        except InputError:
            if trainer.accelerator.is_main_process and checkpoint is None and not trainer.state.global_step:
                _tidy(folder, None, overwrite=True)
                with suppress(OSError):
                    folder.rmdir()
            raise
        if not stopped:
            save_final(trainer, recipe, folder)
        if "result" not in record:
            seconds = round(time.monotonic() - started, 1)
            record["result"] = {**_summary(trainer, recipe, folder, stopped), "seconds": seconds}
            if trainer.accelerator.is_main_process:
                write_json(folder / RUN_FILE, record)
    return record["result"]


def _train(trainer: BuPOTrainer, recipe: Recipe, folder: Path, checkpoint: Path | None, say: Say) -> bool:
    """Run the updates; returns whether a signal stopped them. What the first one refuses is the recipe's fault."""
    trainer.add_callback(LogWriter(folder / LOG_FILE, trainer, show=say, rollouts=recipe.rollouts))
    try:
        with as_config_error(lambda: not trainer.state.global_step), StopOnSignal(trainer, say) as stop:
            trainer.add_callback(stop)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (RuntimeError, MemoryError, ConfigError) as error:
        if reason := not_finite(error):
            raise TrainingStopped(f"{trainer.position()}: {reason}") from error
        if isinstance(error, ConfigError) or (memory := out_of_memory(error)) is None:
            raise
        raise TrainingStopped(
            f"out of {memory} memory in {trainer.position()}; lower micro_batch or max_completion_length, set "
            "gradient_checkpointing to true, or use lora. Checkpoints stay"
        ) from error
    finally:
        choice = trainer.auto_layer
        if trainer.accelerator.is_main_process and choice is not None and choice.analysis:
            write_json(folder / "auto_layer.json", choice.analysis)
    return stop.stopped


def _summary(trainer: BuPOTrainer, recipe: Recipe, folder: Path, stopped: bool) -> dict[str, Any]:
    """What became of the run; rewards are means over the first and the last tenth of the rollout batches."""
    updates, log = trainer.state.global_step or recipe.updates(recipe.rollouts), folder / LOG_FILE
    rows = map(json.loads, log.read_text(encoding="utf-8").splitlines() if log.exists() else ())
    rewards = [row["reward"] for row in rows if row.get("reward") is not None]
    tenth = max(1, len(rewards) // 10)
    first, last = (round(sum(part) / len(part), 4) if part else None for part in (rewards[:tenth], rewards[-tenth:]))
    return {
        "output": str(folder),
        "model": None if stopped else str(folder / "model"),
        "interrupted": stopped,
        "rollouts": updates // recipe.updates(1),
        "updates": updates,
        "internal_layer": next(iter(trainer.schedule.layers), None),
        "internal_temperature": trainer.args.internal_temperature,
        "phase_end": trainer.phase_end,  # when and why the guard ended the internal phase
        "reward_first": first,
        "reward_last": last,
    }


def _checkpoint_of(folder: Path, recipe: Recipe) -> Path:
    """The checkpoint to resume from, after checking that the run had the same recipe."""
    if (checkpoint := last_checkpoint(place := folder / "checkpoints")) is None:
        raise InputError(f"{place} holds no complete checkpoint to resume from; start again with --overwrite")
    before = read_run(folder)["config"]
    if problems := [
        f"{name} was {before.get(name)!r} and is now {value!r}; a resumed run keeps its recipe"
        for name, value in recipe.model_dump(mode="json").items()
        if before.get(name) != value and name not in _FREE_TO_CHANGE
    ]:
        raise ConfigError(problems)
    return checkpoint


def save_final(trainer: BuPOTrainer, recipe: Recipe, folder: Path) -> None:
    """Write ``model/`` (and ``adapter/``), each whole or not at all; every process calls this."""
    main, model = trainer.accelerator.is_main_process, trainer.accelerator.unwrap_model(trainer.model)
    adapters = hasattr(model, "peft_config")
    with _replacing(folder / ("adapter" if adapters else "model"), trainer) as temporary:
        if trainer.is_fsdp_enabled:  # whole, although checkpoints are sharded
            state = trainer.accelerator.get_state_dict(trainer.model)
            if main:
                trainer._save(temporary, state_dict=state)
        else:
            trainer.save_model(temporary)
    if adapters and main:
        with _replacing(folder / "model", trainer) as temporary:
            merged = merge_adapters(model, folder / "adapter", recipe, sharded=trainer.is_fsdp_enabled)
            merged.save_pretrained(temporary)
    trainer.accelerator.wait_for_everyone()


@contextmanager
def _replacing(target: Path, trainer: BuPOTrainer) -> Iterator[str]:
    """Yield a temporary folder that becomes ``target``, with the tokenizer, when the block ends."""
    temporary = target.parent / f".{target.name}.partial"
    if trainer.accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    yield str(temporary)
    if trainer.accelerator.is_main_process:
        trainer.processing_class.save_pretrained(temporary)
        (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing here reads
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)


def _tidy(folder: Path, keep: int | None, overwrite: bool) -> None:
    """Remove a run that is replaced, or what a killed run left: half-written files and checkpoints to rotate."""
    files = (RUN_FILE, LOG_FILE, "auto_layer.json")  # without the first, what is left cannot be resumed
    if overwrite:
        for name in files:
            (folder / name).unlink(missing_ok=True)
        for name in ("checkpoints", "model", "adapter", "flow", "inside", "tensorboard"):
            shutil.rmtree(folder / name, ignore_errors=True)
    for path in (path for name in files for path in folder.glob(f".{name}.*")):
        path.unlink(missing_ok=True)
    if keep:
        rotate(folder / "checkpoints", keep)


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
