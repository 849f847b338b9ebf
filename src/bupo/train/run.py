"""A whole training run: recipe -> trainer -> final model -> summary.

The output folder holds ``run.json``, ``log.jsonl``, ``checkpoints/``, ``rollouts/`` (some groups of responses), and
``model/`` (with LoRA merged, and ``adapter/`` beside it); where asked for, ``flow/``, ``inside/`` and
``auto_layer.json``, the analysis that chose the layer.
"""

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from transformers import TrainerCallback

from bupo.errors import BupoError, ConfigError, InputError, TrainingStopped, not_finite, out_of_memory
from bupo.models.load import model_revision
from bupo.recipe import Recipe
from bupo.run_folder import RUN_FILE, claim, describe_run, read_run, write_json
from bupo.train.build import as_config_error, build, closing_rewards
from bupo.train.card import upload, write_card
from bupo.train.check import REMEDY, Check
from bupo.train.checkpoint import last_checkpoint, rotate, updates_of
from bupo.train.diagnostics import Draw
from bupo.train.log import LOG_FILE, LogWriter, read_log
from bupo.train.lora import merge_adapters
from bupo.train.trainer import BuPOTrainer

_FREE_TO_CHANGE = ("save_every", "keep_checkpoints", "report_to", "flow_every", "inside_every")  # of a resumed run
Say = Callable[[str], None]  # receives one line per rollout batch, and whatever else a person should know


def train(
    recipe: Recipe, output: str | Path, *, resume: bool = False, overwrite: bool = False, check: bool = True,
    say: Say = print, draw: Draw | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train as a recipe of `check_recipe` says, and return a summary, which ``run.json`` holds as ``result``.

    ``resume`` continues from the last complete checkpoint in ``output``, and leaves a finished run as it is. ``check``
    tries a new run with `Check` before its first update. Without ``draw``, entropy flows are saved as JSON only. Raises
    `InputError` for anything a user can fix, before the first file is written, and `TrainingStopped` if a value is not
    finite, memory runs out or no layer is found.
    """
    started = time.monotonic()
    if overwrite and resume:
        raise ConfigError("--overwrite and --resume exclude each other")
    folder = claim(output, overwrite=overwrite, resume=resume)
    checkpoint = _checkpoint_of(folder, recipe) if resume else None
    finished = checkpoint is not None and updates_of(checkpoint) >= recipe.updates(recipe.rollouts)
    record, begun = read_run(folder) if finished else {}, False
    if "result" in record and (folder / "model").is_dir():
        say(f"the run in {folder} is finished; nothing to do")
        return record["result"]
    trainer = build(recipe, folder, say, draw)

    def begin(problems: Sequence[str] = (), warnings: Sequence[str] = (), **found: Any) -> None:
        nonlocal begun
        if problems:
            raise ConfigError([*problems])
        for warning in warnings:
            say(f"warning: {warning}")
        begun = True
        if trainer.accelerator.is_main_process:  # a run that --overwrite replaces has stayed until here
            _tidy(folder, recipe.keep_checkpoints if checkpoint is not None else None, overwrite)
            write_json(folder / RUN_FILE, record)

    with closing_rewards(trainer.reward_funcs):
        if "result" not in record:
            more = {"seed": recipe.seed, "model_revision": model_revision(trainer.model)}
            record = describe_run("train", recipe.model_dump(mode="json"), resumed=checkpoint is not None, **more)
        try:
            Check(trainer, recipe, begin) if check and not resume else begin()
            if checkpoint is not None and finished:  # it was killed after its last checkpoint
                trainer._load_from_checkpoint(str(checkpoint))
                trainer.checkpointer.restore(checkpoint)
            stopped = not finished and _train(trainer, recipe, folder, checkpoint, say)
        except BupoError as error:
            if trainer.accelerator.is_main_process and checkpoint is None and not trainer.state.global_step:
                _leave(folder, begun and isinstance(error, InputError))
            raise
        if not stopped:
            save_final(trainer, recipe, folder)
        if "result" not in record:
            seconds = round(time.monotonic() - started, 1)
            record["result"] = {**_summary(trainer, recipe, folder, stopped), "seconds": seconds}
            if trainer.accelerator.is_main_process:
                write_json(folder / RUN_FILE, record)
                if not stopped:
                    write_card(folder / "model", recipe, record, read_log(folder / LOG_FILE))
                if not stopped and trainer.args.push_to_hub:
                    upload(trainer, folder / "model")
    return record["result"]


class _Tried(BupoError):
    """Ends a run that was only to be tried."""


def try_out(recipe: Recipe, say: Say = print) -> dict[str, Any]:
    """What `Check` finds about a run of a recipe of `check_recipe`, which then does not begin; no file is left."""
    notes: list[str] = []
    tried: dict[str, Any] = {}

    def end(**found: Any) -> None:
        tried.update(found, notes=notes + found["notes"])
        raise _Tried

    with TemporaryDirectory(prefix="bupo-check-") as place:
        trainer = build(recipe, Path(place), notes.append)
        with closing_rewards(trainer.reward_funcs), suppress(_Tried):
            Check(trainer, recipe, end)
            _train(trainer, recipe, Path(place), None, say)
    return tried


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
        raise TrainingStopped(f"out of {memory} memory in {trainer.position()}; {REMEDY}. Checkpoints stay") from error
    finally:
        choice = trainer.auto_layer
        if trainer.accelerator.is_main_process and choice is not None and choice.analysis:
            write_json(folder / "auto_layer.json", choice.analysis)
    return stop.stopped


def _summary(trainer: BuPOTrainer, recipe: Recipe, folder: Path, stopped: bool) -> dict[str, Any]:
    """What became of the run; rewards are means over the first and the last tenth of the rollout batches."""
    updates = trainer.state.global_step or recipe.updates(recipe.rollouts)
    rewards = [row["reward"] for row in read_log(folder / LOG_FILE) if row.get("reward") is not None]
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
            trainer.save_model(temporary, _internal_call=True)  # which does not upload
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


def _leave(folder: Path, begun: bool) -> None:
    """Leave the folder of a refused run as it was: remove what it wrote, if it has ``begun``."""
    if begun:
        _tidy(folder, None, overwrite=True)
    for path in (folder / "checkpoints" / "completions", folder / "checkpoints", folder):
        with suppress(OSError):  # not empty, or not there
            path.rmdir()


def _tidy(folder: Path, keep: int | None, overwrite: bool) -> None:
    """Remove a run that is replaced, or what a killed run left: half-written files and checkpoints to rotate."""
    files = (RUN_FILE, LOG_FILE, "auto_layer.json")  # without the first, what is left cannot be resumed
    if overwrite:
        for name in files:
            (folder / name).unlink(missing_ok=True)
        asked = (folder / "checkpoints" / "completions").is_dir()  # by TRL, for log_completions
        for name in ("checkpoints", "model", "adapter", "flow", "inside", "rollouts", "tensorboard"):
            shutil.rmtree(folder / name, ignore_errors=True)
        if asked:
            (folder / "checkpoints" / "completions").mkdir(parents=True)
    for path in (path for name in (*files, "rollout-*") for path in folder.rglob(f".{name}.*")):
        path.unlink(missing_ok=True)
    if keep:
        rotate(folder / "checkpoints", keep)


class StopOnSignal(TrainerCallback):
    """The first Ctrl-C (or SIGTERM) stops after the rollout batch and saves; a second one stops at once."""

    def __init__(self, trainer: Any, log: Callable[[str], None]):
        self._trainer, self._log = trainer, log
        self.requested = self.stopped = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
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
