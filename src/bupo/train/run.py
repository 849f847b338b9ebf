"""A whole training run from a recipe: data, model, trainer, log, checkpoints, the final model.

The output folder holds ``run.json`` (what was asked and with what), ``log.jsonl``, ``checkpoints/``, ``model/`` (the
final model with its tokenizer; with LoRA merged, and ``adapter/`` beside it), with ``flow_every`` the entropy flows in
``flow/``, with ``inside_every`` the readings in ``inside/`` (`bupo.train.layer_drift`), and, for
``internal_layer: auto``, the analysis it rests on in ``auto_layer.json``.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bupo.errors import ConfigError, InputError, TrainingStopped
from bupo.models.load import model_revision
from bupo.recipe import Recipe
from bupo.run_folder import RUN_FILE, claim, describe_run, write_json
from bupo.train.build import build
from bupo.train.callbacks import LogWriter, StopOnSignal
from bupo.train.checkpoint import last_checkpoint, read_state, rotate, saved_recipe
from bupo.train.diagnostics import Draw, add_diagnostics
from bupo.train.layer_drift import FOLDER as INSIDE
from bupo.train.layer_drift import LayerDrift
from bupo.train.lora import merged
from bupo.train.rewards import AnswerReward
from bupo.train.trainer import BuPOTrainer

LOG_FILE = "log.jsonl"
_FREE_TO_CHANGE = ("save_every", "keep_checkpoints", "report_to", "flow_every", "inside_every")  # of a resumed run


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    draw: Draw | None = None,
) -> dict[str, Any]:
    """Train as the recipe says, and return a summary.

    Args:
        resume: go on from the last complete checkpoint in ``output``.
        overwrite: replace a run that ``output`` holds.
        say: is given one line a rollout batch, and whatever else a person should know.
        draw: draws the entropy flow that ``flow_every`` asks for, see `bupo.train.diagnostics`; without it only its
            JSON is saved.

    Returns:
        ``{"output", "model" (None if interrupted), "interrupted", "rollouts", "updates", "seconds", "internal_layer",
        "internal_temperature", "phase_end", "reward_first", "reward_last"}``; ``phase_end`` says when and why the
        guard ended the internal phase (None if it did not); rewards are means over the first and the last tenth of the
        rollout batches.

    Raises:
        InputError, ConfigError: anything a user can fix, before the first file is written.
        TrainingStopped: not finite, out of memory, or no layer found; checkpoints stay.
    """
    started = time.monotonic()
    if overwrite and resume:
        raise ConfigError("--overwrite and --resume exclude each other")
    folder = claim(output, overwrite=overwrite, resume=resume)
    checkpoint = _checkpoint(folder, recipe) if resume else None
    there = folder.is_dir()
    reward: Any = None
    try:
        trainer, tokenizer, reward = build(recipe, folder, say)
        if recipe.inside_every:
            readings = LayerDrift(recipe, trainer, tokenizer, folder, say)
            trainer.on_rollout.append(readings)
            trainer.add_callback(readings)
    except BaseException:
        if isinstance(reward, AnswerReward):
            reward.close()
        _remove_if_empty(folder / "checkpoints", folder if not there else None)
        raise
    try:
        return _run(recipe, folder, trainer, tokenizer, checkpoint, overwrite, say, started, draw)
    finally:
        if isinstance(reward, AnswerReward):
            reward.close()


def _run(
    recipe: Recipe,
    folder: Path,
    trainer: BuPOTrainer,
    tokenizer: Any,
    checkpoint: Path | None,
    overwrite: bool,
    say: Callable[[str], None],
    started: float,
    draw: Draw | None,
) -> dict[str, Any]:
    main = trainer.accelerator.is_main_process
    run = describe_run(
        "train",
        recipe.to_dict(),
        seed=recipe.seed,
        model_revision=model_revision(trainer.model),
        resumed=bool(checkpoint),
    )
    if main:
        if overwrite:
            _remove_old(folder)
        _tidy(folder, recipe.keep_checkpoints if checkpoint else None)
        write_json(folder / RUN_FILE, run)
    log = LogWriter(folder / LOG_FILE, trainer, show=say, rollouts=recipe.rollouts)
    stop = StopOnSignal(trainer, say)
    trackers = bool(recipe.report_to)
    add_diagnostics(trainer, folder, trackers=trackers, flow_every=recipe.flow_every, log=say, draw=draw)
    trainer.add_callback(log)
    trainer.add_callback(stop)
    try:
        done = checkpoint is not None and _updates(checkpoint) >= trainer.args.max_steps
        if done:
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.checkpointer.restore(str(checkpoint))
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error) is None:
            raise
        raise TrainingStopped(_memory_advice(error, trainer, recipe)) from error
    finally:
        stop.restore()
        choice = getattr(trainer, "auto_layer", None)
        if main and choice is not None and choice.analysis:
            write_json(folder / "auto_layer.json", choice.analysis)
    model = None
    if not stop.stopped:
        model = save_final(trainer, tokenizer, folder)
    summary = {
        "output": str(folder),
        "model": None if model is None else str(model),
        "interrupted": stop.stopped,
        "rollouts": trainer._step // trainer.args.generate_every if not done else recipe.rollouts,
        "updates": _updates(checkpoint) if done and checkpoint else trainer.state.global_step,
        "seconds": round(time.monotonic() - started, 1),
        "internal_layer": next(iter(trainer.schedule.layers), None),
        "internal_temperature": recipe.internal_temperature,
        "phase_end": trainer.phase_end,
        **_rewards(folder / LOG_FILE),
    }
    if main:
        write_json(folder / RUN_FILE, {**run, "result": summary})
    return summary


# -- resuming, saving, ending ----------------------------------------------------------------------------------------


def _checkpoint(folder: Path, recipe: Recipe) -> Path:
    """The checkpoint to resume from, after checking that the run was asked for the same."""
    found = last_checkpoint(folder / "checkpoints")
    if found is None:
        raise InputError(
            f"there is no complete checkpoint in {folder / 'checkpoints'} to resume from; start without --resume"
        )
    before = saved_recipe(folder)
    now = json.loads(json.dumps(recipe.to_dict()))
    problems = [
        f"{name} was {before.get(name)!r} and is now {value!r}; a resumed run keeps its recipe"
        for name, value in now.items()
        if before.get(name) != value and name not in _FREE_TO_CHANGE
    ]
    if problems:
        raise ConfigError(problems)
    return found


def _updates(checkpoint: Path) -> int:
    read_state(checkpoint)
    return int(checkpoint.name.rsplit("-", 1)[1])


def save_final(trainer: BuPOTrainer, tokenizer: Any, folder: Path) -> Path:
    """Write ``model/`` (and ``adapter/``) whole or not at all."""
    wrapped = trainer.accelerator.unwrap_model(trainer.model)
    adapters = hasattr(wrapped, "peft_config")
    _save_whole(trainer, tokenizer, folder / ("adapter" if adapters else "model"))
    if adapters and trainer.accelerator.is_main_process:
        temporary = folder / ".model.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        merged(wrapped, folder / "adapter").save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _replace(temporary, folder / "model")
    trainer.accelerator.wait_for_everyone()
    return folder / "model"


def _save_whole(trainer: BuPOTrainer, tokenizer: Any, target: Path) -> None:
    temporary = target.parent / f".{target.name}.partial"
    main = trainer.accelerator.is_main_process
    if main:
        shutil.rmtree(temporary, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_fsdp_enabled:  # whole, although checkpoints are sharded
        whole = trainer.accelerator.get_state_dict(trainer.model)
        if main:
            trainer._save(str(temporary), state_dict=whole)
    else:
        trainer.save_model(str(temporary))
    if main:
        tokenizer.save_pretrained(temporary)
        (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing here reads
        _replace(temporary, target)


def _replace(temporary: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)


def _remove_old(folder: Path) -> None:
    for name in (RUN_FILE, LOG_FILE, "auto_layer.json"):  # without the first, what is left cannot be resumed
        (folder / name).unlink(missing_ok=True)
    for name in ("checkpoints", "model", "adapter", "flow", INSIDE, "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "checkpoints").mkdir(parents=True)


def _tidy(folder: Path, keep: int | None) -> None:
    """Remove what a run killed before its time may have left: files half written, checkpoints not rotated."""
    for name in (LOG_FILE, RUN_FILE, "auto_layer.json"):
        for path in folder.glob(f".{name}.*"):
            path.unlink(missing_ok=True)
    if keep:
        rotate(folder / "checkpoints", keep)


def _remove_if_empty(*folders: Path | None) -> None:
    for folder in folders:
        if folder is not None and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def out_of_memory(error: BaseException) -> str | None:
    """``accelerator`` or ``host``: whose memory was exhausted; None if it was something else."""
    text = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text:
        return "accelerator"
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "cannot allocate memory" in text:
        return "host"
    return None


def _memory_advice(error: BaseException, trainer: BuPOTrainer, recipe: Recipe) -> str:
    """What ran out, where, and what of this run's settings to change."""
    advice = [f"max_completion_length ({recipe.max_completion_length})"]
    if recipe.micro_batch > 1:
        advice.insert(0, f"micro_batch ({recipe.micro_batch})")
    if trainer.use_vllm and trainer.args.vllm_mode == "colocate":
        advice.append(f"trl.vllm_gpu_memory_utilization ({trainer.args.vllm_gpu_memory_utilization})")
    other = [] if recipe.gradient_checkpointing else ["set gradient_checkpointing to true"]
    other += [] if recipe.lora is not None else ["use lora"]
    parts = ", or ".join([f"lower {' or '.join(advice)}", *other])
    return f"out of {out_of_memory(error)} memory in {trainer.position()}; {parts}. Checkpoints stay"


def _rewards(path: Path) -> dict[str, float | None]:
    rewards = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            value = json.loads(line).get("reward")
            if value is not None:
                rewards.append(value)
    some = max(1, len(rewards) // 10)
    means = [round(sum(part) / len(part), 4) if part else None for part in (rewards[:some], rewards[-some:])]
    return {"reward_first": means[0], "reward_last": means[1]}
