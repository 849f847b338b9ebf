"""A whole training run: recipe -> trainer -> final model -> summary.

The output folder holds ``run.json`` (command, recipe, versions, result), ``log.jsonl``, ``checkpoints/``, ``model/``
(the final model with its tokenizer; with LoRA merged, and ``adapter/`` beside it), with ``flow_every`` entropy flows in
``flow/``, with ``inside_every`` measurements in ``inside/``, and for ``internal_layer: auto`` the analysis that chose
the layer in ``auto_layer.json``.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from bupo.errors import ConfigError, InputError, TrainingStopped, out_of_memory
from bupo.models.load import model_revision
from bupo.recipe import Recipe
from bupo.run_folder import RUN_FILE, claim, describe_run, read_run, write_json
from bupo.train.build import build
from bupo.train.callbacks import LogWriter, StopOnSignal
from bupo.train.checkpoint import last_checkpoint, rotate, updates_of
from bupo.train.diagnostics import Diagnostics, Draw
from bupo.train.lora import merge_adapters
from bupo.train.trainer import BuPOTrainer

LOG_FILE = "log.jsonl"
_FREE_TO_CHANGE = ("save_every", "keep_checkpoints", "report_to", "flow_every", "inside_every")  # of a resumed run
_LESS_MEMORY = "lower micro_batch or max_completion_length, set gradient_checkpointing to true, or use lora"
Say = Callable[[str], None]


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = print,
    draw: Draw | None = None,
) -> dict[str, Any]:
    """Train as a recipe of `check_recipe` says, and return a summary, which ``run.json`` holds as ``result``.

    Args:
        resume: continue from the last complete checkpoint in ``output``. A finished run is left as it is.
        overwrite: replace the run in ``output``.
        say: receives one line per rollout batch, and whatever else a person should know.
        draw: draws the entropy flows that ``flow_every`` asks for; without it only their JSON is saved.

    Raises:
        InputError, ConfigError: anything a user can fix, before the first file is written.
        TrainingStopped: a value was not finite, memory ran out, or no layer was found; checkpoints stay.
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
    trainer, reward = _set_up(recipe, folder, say, draw)
    with closing(reward):
        if "result" not in record:
            more = {"model_revision": model_revision(trainer.model), "resumed": checkpoint is not None}
            record = describe_run("train", recipe.model_dump(mode="json"), seed=recipe.seed, **more)
        if trainer.accelerator.is_main_process:
            _tidy(folder, recipe.keep_checkpoints if checkpoint is not None else None, overwrite)
            write_json(folder / RUN_FILE, record)
        if checkpoint is not None and finished:  # it was killed after its last checkpoint
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.checkpointer.restore(checkpoint)
        stopped = not finished and _train(trainer, recipe, folder, checkpoint, say)
        if not stopped:
            save_final(trainer, recipe, folder)
        if "result" not in record:
            updates = trainer.state.global_step or (0 if checkpoint is None else updates_of(checkpoint))
            record["result"] = _summary(trainer, recipe, folder, updates, stopped)
            record["result"]["seconds"] = round(time.monotonic() - started, 1)
            if trainer.accelerator.is_main_process:
                write_json(folder / RUN_FILE, record)
    return record["result"]


def _set_up(recipe: Recipe, folder: Path, say: Say, draw: Draw | None) -> tuple[BuPOTrainer, Any]:
    """Load and check everything; if something is wrong, the folder is left as it was."""
    made = [folder / "checkpoints", *([] if folder.is_dir() else [folder])]
    try:
        trainer, tokenizer, reward = build(recipe, folder, say)
        diagnostics = Diagnostics(recipe, trainer, tokenizer, folder, say, draw)
        trainer.on_rollout.append(diagnostics)
        trainer.add_callback(diagnostics)
    except BaseException:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise
    return trainer, reward


def _train(trainer: BuPOTrainer, recipe: Recipe, folder: Path, checkpoint: Path | None, say: Say) -> bool:
    """Run the updates; returns whether a signal stopped them."""
    trainer.add_callback(LogWriter(folder / LOG_FILE, trainer, show=say, rollouts=recipe.rollouts))
    try:
        with StopOnSignal(trainer, say) as stop:
            trainer.add_callback(stop)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (RuntimeError, MemoryError) as error:
        if (memory := out_of_memory(error)) is None:
            raise
        where = f"out of {memory} memory in {trainer.position()}"
        raise TrainingStopped(f"{where}; {_LESS_MEMORY}. Checkpoints stay") from error
    finally:
        choice = trainer.auto_layer
        if trainer.accelerator.is_main_process and choice is not None and choice.analysis:
            write_json(folder / "auto_layer.json", choice.analysis)
    return stop.stopped


def _summary(trainer: BuPOTrainer, recipe: Recipe, folder: Path, updates: int, stopped: bool) -> dict[str, Any]:
    """What became of the run; rewards are means over the first and the last tenth of the rollout batches."""
    log = folder / LOG_FILE
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
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


# -- resuming, saving, cleaning up -------------------------------------------------------------------------------------


def _checkpoint_of(folder: Path, recipe: Recipe) -> Path:
    """The checkpoint to resume from, after checking that the run had the same recipe."""
    checkpoint = last_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        place = folder / "checkpoints"
        raise InputError(f"{place} holds no complete checkpoint to resume from; start without --resume")
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
        (folder / "checkpoints").mkdir(parents=True)
    for path in (path for name in files for path in folder.glob(f".{name}.*")):
        path.unlink(missing_ok=True)
    if keep:
        rotate(folder / "checkpoints", keep)
