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
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bupo.errors import ConfigError, InputError, TrainingStopped, out_of_memory
from bupo.models.load import model_revision
from bupo.recipe import Recipe
from bupo.run_folder import RUN_FILE, claim, describe_run, read_run, write_json
from bupo.train.build import build
from bupo.train.callbacks import LogWriter, StopOnSignal
from bupo.train.checkpoint import last_checkpoint, rotate
from bupo.train.diagnostics import Diagnostics, Draw
from bupo.train.lora import merge_adapters
from bupo.train.rewards import AnswerReward, OwnReward
from bupo.train.trainer import BuPOTrainer

LOG_FILE = "log.jsonl"
_FREE_TO_CHANGE = ("save_every", "keep_checkpoints", "report_to", "flow_every", "inside_every")  # of a resumed run
Say = Callable[[str], None]


@dataclass(frozen=True)
class _Run:
    """What a run works with."""

    recipe: Recipe
    folder: Path
    trainer: BuPOTrainer
    tokenizer: Any
    reward: AnswerReward | OwnReward
    checkpoint: Path | None  # to resume from
    say: Say

    @property
    def main(self) -> bool:
        return self.trainer.accelerator.is_main_process


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = print,
    draw: Draw | None = None,
) -> dict[str, Any]:
    """Train as the recipe says, and return a summary.

    Args:
        recipe: from `bupo.train.build.check_recipe`.
        resume: continue from the last complete checkpoint in ``output``. A finished run is left as it is.
        overwrite: replace the run in ``output``.
        say: receives one line per rollout batch, and whatever else a person should know.
        draw: draws the entropy flows that ``flow_every`` asks for; without it only their JSON is saved.

    Returns:
        ``{"output", "model" (None if interrupted), "interrupted", "rollouts", "updates", "seconds", "internal_layer",
        "internal_temperature", "phase_end", "reward_first", "reward_last"}``. ``phase_end`` says when and why the
        guard ended the internal phase (None if it did not); the rewards are means over the first and the last tenth
        of the rollout batches.

    Raises:
        InputError, ConfigError: anything a user can fix, before the first file is written.
        TrainingStopped: a value was not finite, memory ran out, or no layer was found; checkpoints stay.
    """
    started = time.monotonic()
    if overwrite and resume:
        raise ConfigError("--overwrite and --resume exclude each other")
    folder = claim(output, overwrite=overwrite, resume=resume)
    checkpoint = _checkpoint_of(folder, recipe) if resume else None
    finished = checkpoint is not None and _updates_of(checkpoint) >= recipe.updates(recipe.rollouts)
    earlier = read_run(folder) if finished else {}
    if "result" in earlier and (folder / "model").is_dir():
        say(f"the run in {folder} is finished; nothing to do")
        return earlier["result"]
    run = _set_up(recipe, folder, checkpoint, say, draw)
    with closing(run.reward):
        record = earlier if "result" in earlier else _record(run)
        if run.main:
            _tidy(run, overwrite)
            write_json(folder / RUN_FILE, record)
        stopped = _load_finished(run) if finished else _train(run)
        if not stopped:
            save_final(run)
        if "result" not in record:
            record["result"] = _summary(run, stopped, started)
            if run.main:
                write_json(folder / RUN_FILE, record)
    return record["result"]


def _set_up(recipe: Recipe, folder: Path, checkpoint: Path | None, say: Say, draw: Draw | None) -> _Run:
    """Load and check everything; if something is wrong, the folder is left as it was."""
    existed = folder.is_dir()
    try:
        trainer, tokenizer, reward = build(recipe, folder, say)
        diagnostics = Diagnostics(recipe, trainer, tokenizer, folder, say, draw)
        trainer.on_rollout.append(diagnostics)
        trainer.add_callback(diagnostics)
    except BaseException:
        _remove_if_empty(folder / "checkpoints", folder if not existed else None)
        raise
    return _Run(recipe, folder, trainer, tokenizer, reward, checkpoint, say)


def _record(run: _Run) -> dict[str, Any]:
    revision, config = model_revision(run.trainer.model), run.recipe.model_dump(mode="json")
    more = {"seed": run.recipe.seed, "model_revision": revision, "resumed": run.checkpoint is not None}
    return describe_run("train", config, **more)


def _load_finished(run: _Run) -> bool:
    """Load what a run that was killed after its last checkpoint has trained; returns False, as it was not stopped."""
    assert run.checkpoint is not None
    run.trainer._load_from_checkpoint(str(run.checkpoint))
    run.trainer.checkpointer.restore(run.checkpoint)
    return False


def _train(run: _Run) -> bool:
    """Run the updates; returns whether a signal stopped them."""
    recipe, folder, trainer = run.recipe, run.folder, run.trainer
    stop = StopOnSignal(trainer, run.say)
    trainer.add_callback(LogWriter(folder / LOG_FILE, trainer, show=run.say, rollouts=recipe.rollouts))
    trainer.add_callback(stop)
    try:
        trainer.train(resume_from_checkpoint=None if run.checkpoint is None else str(run.checkpoint))
    except (RuntimeError, MemoryError) as error:
        memory = out_of_memory(error)
        if memory is None:
            raise
        where = f"out of {memory} memory in {trainer.position()}"
        raise TrainingStopped(f"{where}; {_memory_advice(trainer, recipe)}. Checkpoints stay") from error
    finally:
        stop.restore()
        choice = trainer.auto_layer
        if run.main and choice is not None and choice.analysis:
            write_json(folder / "auto_layer.json", choice.analysis)
    return stop.stopped


def _summary(run: _Run, stopped: bool, started: float) -> dict[str, Any]:
    trainer = run.trainer
    updates = trainer.state.global_step or _updates_of(run.checkpoint)
    log = run.folder / LOG_FILE
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    rewards = [row["reward"] for row in rows if row.get("reward") is not None]
    tenth = max(1, len(rewards) // 10)
    first, last = (round(sum(part) / len(part), 4) if part else None for part in (rewards[:tenth], rewards[-tenth:]))
    return {
        "output": str(run.folder),
        "model": None if stopped else str(run.folder / "model"),
        "interrupted": stopped,
        "rollouts": updates // run.recipe.updates(1),
        "updates": updates,
        "seconds": round(time.monotonic() - started, 1),
        "internal_layer": next(iter(trainer.schedule.layers), None),
        "internal_temperature": trainer.args.internal_temperature,
        "phase_end": trainer.phase_end,
        "reward_first": first,
        "reward_last": last,
    }


# -- resuming, saving, cleaning up -------------------------------------------------------------------------------------


def _checkpoint_of(folder: Path, recipe: Recipe) -> Path:
    """The checkpoint to resume from, after checking that the run had the same recipe."""
    checkpoint = last_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise InputError(
            f"{folder / 'checkpoints'} holds no complete checkpoint to resume from; start without --resume"
        )
    before = read_run(folder)["config"]
    problems = [
        f"{name} was {before.get(name)!r} and is now {value!r}; a resumed run keeps its recipe"
        for name, value in recipe.model_dump(mode="json").items()
        if before.get(name) != value and name not in _FREE_TO_CHANGE
    ]
    if problems:
        raise ConfigError(problems)
    return checkpoint


def _updates_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint is not None else 0


def save_final(run: _Run) -> None:
    """Write ``model/`` (and ``adapter/``), each whole or not at all."""
    model: Any = run.trainer.accelerator.unwrap_model(run.trainer.model)
    adapters = hasattr(model, "peft_config")
    _save_trained(run, run.folder / ("adapter" if adapters else "model"))
    if adapters and run.main:
        temporary = run.folder / ".model.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        merged = merge_adapters(model, run.folder / "adapter", run.recipe, sharded=run.trainer.is_fsdp_enabled)
        merged.save_pretrained(temporary)
        run.tokenizer.save_pretrained(temporary)
        _replace(temporary, run.folder / "model")
    run.trainer.accelerator.wait_for_everyone()


def _save_trained(run: _Run, target: Path) -> None:
    """Save the parameters that were trained; every process calls this."""
    trainer, temporary = run.trainer, target.parent / f".{target.name}.partial"
    if run.main:
        shutil.rmtree(temporary, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_fsdp_enabled:  # whole, although checkpoints are sharded
        state = trainer.accelerator.get_state_dict(trainer.model)
        if run.main:
            trainer._save(str(temporary), state_dict=state)
    else:
        trainer.save_model(str(temporary))
    if run.main:
        run.tokenizer.save_pretrained(temporary)
        (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing here reads
        _replace(temporary, target)


def _replace(temporary: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def _tidy(run: _Run, overwrite: bool) -> None:
    """Remove a run that is replaced, or what a killed run left: half-written files and checkpoints to rotate."""
    files = (RUN_FILE, LOG_FILE, "auto_layer.json")  # without the first, what is left cannot be resumed
    if overwrite:
        for name in files:
            (run.folder / name).unlink(missing_ok=True)
        for name in ("checkpoints", "model", "adapter", "flow", "inside", "tensorboard"):
            shutil.rmtree(run.folder / name, ignore_errors=True)
        (run.folder / "checkpoints").mkdir(parents=True)
    for path in (path for name in files for path in run.folder.glob(f".{name}.*")):
        path.unlink(missing_ok=True)
    if run.checkpoint is not None and run.recipe.keep_checkpoints:
        rotate(run.folder / "checkpoints", run.recipe.keep_checkpoints)


def _remove_if_empty(*folders: Path | None) -> None:
    for folder in folders:
        if folder is not None and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _memory_advice(trainer: BuPOTrainer, recipe: Recipe) -> str:
    """Which settings of this run to change so that it needs less memory."""
    lower = [f"micro_batch ({recipe.micro_batch})"] if recipe.micro_batch > 1 else []
    lower.append(f"max_completion_length ({recipe.max_completion_length})")
    if trainer.use_vllm and trainer.args.vllm_mode == "colocate":
        lower.append(f"vllm_gpu_memory_utilization ({trainer.args.vllm_gpu_memory_utilization})")
    more = [] if trainer.args.gradient_checkpointing else ["set gradient_checkpointing to true"]
    more += [] if recipe.lora is not None else ["use lora"]
    return ", or ".join([f"lower {' or '.join(lower)}", *more])
