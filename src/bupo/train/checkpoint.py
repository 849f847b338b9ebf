"""Checkpoints at the boundaries of rollout batches, and exact resuming: a resumed run equals the uninterrupted one.

``bupo_state-N.pt`` holds the state of process N's monitor and critic; ``bupo_state.json`` the rest. The JSON file is
written last and atomically, so a checkpoint without it is incomplete and never used.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import TrainerCallback
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from bupo.errors import ConfigError, InputError
from bupo.models.layout import unwrap
from bupo.run_folder import write_json
from bupo.train.schedule import Schedule

STATE_FILE = "bupo_state.json"
PARTS_FILE = "bupo_state-{}.pt"  # one per process
_FIXED = [  # settings of BuPOConfig that a resumed run must not change
    *("internal_lens", "internal_lens_tokens", "internal_lens_refit", "internal_temperature", "estimator", "seed"),
    *("critic_learning_rate", "critic_clip", "gae_gamma", "gae_lambda", "trained_layers", "frozen_layers", "guarded"),
    *("upper_learning_rate_scale", "upper_learning_rate_above", "num_iterations", "gradient_accumulation_steps"),
    *("steps_per_generation", "generation_batch_size", "num_generations"),
]


class Checkpointer(TrainerCallback):
    """Delays saves to the end of a rollout batch, and saves and restores what TRL's checkpoints lack."""

    def __init__(self, trainer: Any):
        self._trainer, self._due = trainer, False
        self._parts = {"monitor": trainer.monitor, "lens": trainer.lens}
        self._parts |= {"critic": trainer.critic} if trainer.critic else {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        due = self._due or control.should_save
        control.should_save = due and (self._trainer.between_rollouts or state.global_step >= state.max_steps)
        self._due = due and not control.should_save
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            load_renamed(self._trainer.model, Path(state.best_model_checkpoint))

    def _settings(self) -> dict[str, Any]:
        """What must be the same before and after a resume."""
        trainer, dataset = self._trainer, self._trainer.train_dataset
        return {
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
        save_rest()
        args.save_total_limit = keep
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        torch.save(parts, folder / PARTS_FILE.format(trainer.accelerator.process_index))
        trainer.accelerator.wait_for_everyone()
        if args.should_save:
            position = {name: getattr(trainer, name) for name in ("rollout", "between_rollouts", "phase_end")}
            write_state(folder, {"micro_batch": trainer._step, **position, **self._settings()})
            if keep:
                rotate(folder.parent, keep, trainer.state.best_model_checkpoint)

    def restore(self, checkpoint: str | Path) -> None:
        """Take over the state of a complete checkpoint, all but optimizer, scheduler and the weights that TRL loads.

        Raises `InputError` if it is incomplete, was saved within a rollout batch, or belongs to other settings.
        """
        trainer, folder = self._trainer, Path(checkpoint)
        try:
            state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"checkpoint {folder} cannot be resumed: {STATE_FILE} is missing or damaged (bupo train did not write "
                "it, or did not finish); choose another checkpoint"
            ) from error
        if not state.get("between_rollouts"):
            what = "was saved in the middle of a rollout batch, whose samples are lost"
            raise InputError(f"checkpoint {folder} {what}; resume from an earlier checkpoint")
        saved = Schedule.of(state.get("phases", []))
        pairs = zip(trainer.schedule.internal, saved.internal, strict=False)
        for layer in [then.layer for now, then in pairs if now.layer == "auto" and isinstance(then.layer, int)]:
            trainer.schedule = trainer.schedule.with_layer(layer)  # the layer that `auto` found before
        if trainer.args.guarded and state.get("phase_end"):
            trainer.schedule = saved  # the guard's decision stands
        now = self._settings().items()
        if changed := [f"{key} was {state.get(key)!r} and is now {v!r}" for key, v in now if state.get(key) != v]:
            raise ConfigError([f"checkpoint {folder} belongs to other settings: {line}" for line in changed])
        load_renamed(trainer.model, folder)
        trainer.phase_end = state["phase_end"]
        ranks = (0, trainer.accelerator.process_index)  # what all processes share is in the first one's file
        files = [torch.load(folder / PARTS_FILE.format(rank), map_location="cpu") for rank in ranks]
        for name, part in self._parts.items():
            part.load_state_dict({**files[0][name], **files[1][name]})
        trainer._step = int(state["micro_batch"])
        if (sampler := trainer.sampler) is not None and sampler.shuffle:  # its generator moves on with every pass
            for _ in range(trainer._step // trainer.micro_batches_per_epoch):
                torch.randperm(sampler.num_samples, generator=sampler.generator)


def load_renamed(model: Any, folder: Path) -> None:
    """Load weights that a checkpoint holds under other names than the model, which transformers' trainer leaves out.

    It saves a mixture of experts expert by expert, and vision-language models under older names, but looks for the
    names in memory, and only logs what it misses. Whole checkpoints only: those of engines have the names in memory.
    """
    index, single = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    elif single.is_file():
        with safe_open(single, framework="pt") as file:
            names = set(file.keys())
    else:  # adapters, or shards of an engine
        return
    inner = unwrap(model)
    if names <= inner.state_dict().keys():
        return
    options: dict[str, Any] = {"config": inner.config, "dtype": inner.dtype, "output_loading_info": True}
    loaded, report = type(inner).from_pretrained(folder, **options)
    if missing := report["missing_keys"]:
        raise InputError(f"checkpoint {folder} lacks weights of this model: {', '.join(sorted(missing)[:3])}")
    inner.load_state_dict(loaded.state_dict())


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint, its mark of completeness first."""
    (checkpoint / STATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def write_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Mark a checkpoint as complete, after everything else in it has reached the disk."""
    for path in checkpoint.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    write_json(checkpoint / STATE_FILE, {"schema": 1, **state})


def rotate(folder: Path, keep: int, best: str | None = None) -> None:
    """Remove complete checkpoints but the ``keep`` with the most updates and the best, and older incomplete ones."""
    complete = [path for path in _checkpoints(folder) if (path / STATE_FILE).is_file()]
    stay = {str(path) for path in complete[-keep:]} | {best}
    for path in _checkpoints(folder):
        if complete and updates_of(path) < updates_of(complete[-1]) and str(path) not in stay:
            remove_checkpoint(path)


def last_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the most updates in ``folder``, or None."""
    return next((path for path in reversed(_checkpoints(folder)) if (path / STATE_FILE).is_file()), None)


def updates_of(checkpoint: Path) -> int:
    """The number of updates before a checkpoint, from its name."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in order of their number of updates, complete or not."""
    found = (path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))
    return sorted(found, key=updates_of)


def fill_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Give parameters without optimizer state a state of zeros, without which FSDP2's checkpoints cannot be loaded.

    AdamW and SGD begin with zeros anyway. Raises `ConfigError` for other optimizers' states.
    """
    parameter, state = next(((p, s) for p, s in optimizer.state.items() if s), (None, {}))
    if parameter is None:
        return
    if any(not isinstance(v, torch.Tensor) or v.shape not in ((), parameter.shape) for v in state.values()):
        raise ConfigError(
            f"under FSDP2 an internal phase needs AdamW or SGD: the state of {type(optimizer).__name__} cannot be "
            "saved for layers that were not trained yet"
        )
    shaped = {name for name, value in state.items() if value.shape == parameter.shape}
    for p in (p for group in optimizer.param_groups for p in group["params"] if not optimizer.state.get(p)):
        optimizer.state[p] = {n: torch.zeros_like(p.detach() if n in shaped else v) for n, v in state.items()}
