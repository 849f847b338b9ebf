"""Checkpoints at the boundaries of rollout batches, and exact resuming: a resumed run equals the uninterrupted one.

``bupo_state.json`` holds the micro-batch counter, the schedule with its resolved layer and the settings that must not
change; ``bupo_state-N.pt`` holds the state of process N's monitor and critic. The JSON file is written last and
atomically, so a checkpoint without it is incomplete and never used.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler

from bupo.errors import ConfigError, InputError
from bupo.run_folder import write_json
from bupo.train.schedule import Schedule

STATE_FILE = "bupo_state.json"
PARTS_FILE = "bupo_state-{}.pt"  # one per process
_NAME = re.compile(r"checkpoint-(\d+)")
# settings of BuPOConfig that a resumed run must not change
_FIXED = [
    *("internal_norm", "internal_temperature", "estimator", "critic_learning_rate", "critic_clip", "gae_gamma"),
    *("gae_lambda", "frozen_layers", "upper_learning_rate_scale", "upper_learning_rate_above", "steps_per_generation"),
    *("num_iterations", "gradient_accumulation_steps", "generation_batch_size", "num_generations", "seed"),
]


class Checkpointer:
    """Saves and restores what `BuPOTrainer` needs beside TRL's own checkpoints."""

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def _parts(self) -> dict[str, Any]:
        """The objects that own state, by name."""
        parts = {"monitor": self._trainer.monitor, "critic": self._trainer.critic}
        return {name: part for name, part in parts.items() if part is not None}

    def _settings(self) -> dict[str, Any]:
        """What must be the same before and after a resume."""
        trainer = self._trainer
        dataset = trainer.train_dataset
        return {
            "guarded": trainer.args.guarded,
            "phases": trainer.schedule.phases,
            **{name: getattr(trainer.args, name) for name in _FIXED},
            "processes": trainer.accelerator.num_processes,
            "dataset_size": len(dataset) if hasattr(dataset, "__len__") else None,
        }

    def save(self, folder: Path, save_rest: Callable[[], None]) -> None:
        """Write a checkpoint whose other files ``save_rest`` writes; every process calls this."""
        trainer, args = self._trainer, self._trainer.args
        if args.should_save:
            remove_checkpoint(folder)  # what an earlier attempt left there
        trainer.accelerator.wait_for_everyone()
        if trainer.accelerator.is_fsdp2:
            fill_optimizer_state(getattr(trainer.optimizer, "optimizer", trainer.optimizer))
        keep, args.save_total_limit = args.save_total_limit, None  # older ones go when this one is complete
        try:
            save_rest()
        finally:
            args.save_total_limit = keep
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        torch.save(parts, folder / PARTS_FILE.format(trainer.accelerator.process_index))
        trainer.accelerator.wait_for_everyone()
        if args.should_save:
            position = {
                "micro_batch": trainer._step,
                "rollout": trainer.rollout,
                "between_rollouts": trainer.between_rollouts,
                "phase_end": trainer.phase_end,
            }
            write_state(folder, {**position, **self._settings()})
            if keep:
                best = trainer.state.best_model_checkpoint
                rotate(folder.parent, keep, protected=[best] if best else [])

    def restore(self, checkpoint: str | Path) -> None:
        """Take over the state of a complete checkpoint, all but weights, optimizer and scheduler.

        Raises:
            InputError: the checkpoint is incomplete, or was saved within a rollout batch.
            ConfigError: it belongs to other settings.
        """
        trainer, state = self._trainer, read_state(checkpoint)
        saved = Schedule.of(state.get("phases", []))
        pairs = zip(trainer.schedule.internal, saved.internal, strict=False)
        for layer in [then.layer for now, then in pairs if now.layer == "auto" and isinstance(then.layer, int)]:
            trainer.schedule = trainer.schedule.with_layer(layer)  # the layer that `auto` found before
        if trainer.args.guarded and state.get("phase_end"):
            trainer.schedule = saved  # the guard's decision stands
        check_resumable(checkpoint, state, self._settings())
        trainer.phase_end = state["phase_end"]
        ranks = (0, trainer.accelerator.process_index)  # what all processes share is in the first one's file
        files = [torch.load(Path(checkpoint) / PARTS_FILE.format(rank), map_location="cpu") for rank in ranks]
        for name, part in self._parts().items():
            part.load_state_dict({**files[0][name], **files[1][name]})
        trainer._step = int(state["micro_batch"])


# -- folders ---------------------------------------------------------------------------------------------------------


def remove_checkpoint(checkpoint: str | Path) -> None:
    """Remove a checkpoint, its mark of completeness first."""
    (Path(checkpoint) / STATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def write_state(checkpoint: str | Path, state: dict[str, Any]) -> None:
    """Mark a checkpoint as complete, after everything else in it has reached the disk."""
    for path in Path(checkpoint).rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    write_json(Path(checkpoint) / STATE_FILE, {"schema": 1, **state})


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """The content of ``bupo_state.json``.

    Raises:
        InputError: the folder or its state file is missing or damaged.
    """
    try:
        return json.loads((Path(checkpoint) / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"checkpoint {checkpoint} cannot be resumed: {STATE_FILE} is missing or damaged (bupo train did not write "
            "it, or did not finish); choose another checkpoint"
        ) from error


def check_resumable(checkpoint: str | Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to continue with other settings, or from the middle of a rollout batch; ``saved`` may hold more keys."""
    if not saved.get("between_rollouts", False):
        raise InputError(
            f"checkpoint {checkpoint} was saved in the middle of a rollout batch, whose samples are lost; resume from "
            "an earlier checkpoint"
        )
    changed = [
        f"{key} was {saved.get(key)!r} and is now {now!r}" for key, now in current.items() if saved.get(key) != now
    ]
    if changed:
        raise ConfigError([f"checkpoint {checkpoint} belongs to other settings: {line}" for line in changed])


def rotate(folder: str | Path, keep: int, protected: Collection[str] = ()) -> None:
    """Remove all but the newest ``keep`` complete checkpoints, and incomplete ones older than the newest complete one.

    The newest is the one with the most updates, not the last written: a removal that was killed half-way makes a folder
    look new.

    Args:
        protected: paths that stay in any case.
    """
    checkpoints = _checkpoints(folder)
    complete = [(number, path) for number, path in checkpoints if (path / STATE_FILE).is_file()]
    stay = {path for _, path in complete[-keep:]} | {Path(path) for path in protected}
    for number, path in checkpoints:
        if complete and number < complete[-1][0] and path not in stay:
            remove_checkpoint(path)


def last_checkpoint(folder: str | Path) -> Path | None:
    """The complete checkpoint with the most updates in ``folder``, or None."""
    complete = [path for _, path in _checkpoints(folder) if (path / STATE_FILE).is_file()]
    return complete[-1] if complete else None


def _checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """Checkpoints in order of their number of updates, complete or not."""
    names = ((_NAME.fullmatch(path.name), path) for path in Path(folder).glob("checkpoint-*"))
    return sorted((int(name.group(1)), path) for name, path in names if name)


# -- exact resuming --------------------------------------------------------------------------------------------------


def fill_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Give parameters without optimizer state (the layers above an internal policy) a state of zeros.

    FSDP2's checkpoints hold the state of every parameter or cannot be loaded. AdamW and SGD begin their first update
    with zeros anyway, so nothing else changes.

    Raises:
        ConfigError: the optimizer's state does not have the shape of its parameters.
    """
    some = next(((p, s) for p, s in optimizer.state.items() if s), None)
    if some is None:
        return
    parameter, state = some
    if any(not isinstance(v, torch.Tensor) or v.shape not in ((), parameter.shape) for v in state.values()):
        raise ConfigError(
            f"under FSDP2 an internal phase needs AdamW or SGD: the state of {type(optimizer).__name__} cannot be "
            "saved for layers that were not trained yet"
        )
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not optimizer.state.get(p):
                optimizer.state[p] = {
                    name: torch.zeros_like(p.detach() if v.shape == parameter.shape else v) for name, v in state.items()
                }


class PassSampler(Sampler):
    """The trainer's sampler in the order of the current pass over the data.

    The wrapped sampler shuffles with a generator that moves on with every pass. A resumed run starts with a new
    generator and would otherwise see the order of the first pass again.
    """

    def __init__(self, sampler: Any, current_pass: Callable[[], int]):
        self._sampler, self._current_pass = sampler, current_pass

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        sampler = self._sampler
        if sampler.shuffle and sampler.seed is not None:
            sampler.generator.manual_seed(sampler.seed)
            for _ in range(self._current_pass()):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        return iter(sampler)
