"""A resumed run is the uninterrupted one: the order of the prompts, and what a checkpoint must hold besides."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from bupo.errors import ConfigError
from bupo.train.checkpoints import begin, check_resumable, read_state, rotate, write_state
from bupo.train.critic import DEFAULTS as CRITIC_SETTINGS
from bupo.train.schedule import Schedule, Stage

if TYPE_CHECKING:
    from trl import GRPOTrainer as _Parent
else:
    _Parent = object


class ResumesBetweenRollouts(_Parent):
    """What `BuPOTrainer` does to checkpoints: the micro-batch counter, the schedule and the pass over the data."""

    if TYPE_CHECKING:  # of BuPOTrainer
        args: Any
        schedule: Schedule
        guard: Any
        train_dataset: Any

        @property
        def between_rollouts(self) -> bool: ...
        @property
        def micro_batches_per_epoch(self) -> int | None: ...
        def _watch_state(self) -> dict[str, Any]: ...

        critic: Any

        def _save_critic(self, folder: Path) -> None: ...
        def _load_critic(self, folder: Path) -> None: ...
        def _save_watch_tensors(self, folder: Path) -> None: ...
        def _load_watch(self, folder: Path, state: Mapping[str, Any]) -> None: ...

    def _pass(self) -> int:
        """Which pass over the data the next micro-batch belongs to, from 0."""
        return self._step // self.micro_batches_per_epoch if self.micro_batches_per_epoch else 0

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        return PassSampler(super()._get_train_sampler(dataset), self._pass)

    def _resume_settings(self) -> dict[str, Any]:
        """What must be the same before and after a resume."""
        return {
            "guarded": self.guard is not None,
            "stages": [list(astuple(stage)) for stage in self.schedule.stages],
            "internal_norm": self.args.internal_norm,
            "estimator": self.args.estimator,
            "critic": [getattr(self.args, name) for name in CRITIC_SETTINGS] if self.critic is not None else None,
            "frozen_layers": self.args.frozen_layers,
            "upper_learning_rate_scale": self.args.upper_learning_rate_scale,
            "upper_learning_rate_above": self.args.upper_learning_rate_above,
            "steps_per_generation": self.args.steps_per_generation,
            "num_iterations": self.num_iterations,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "generation_batch_size": self.args.generation_batch_size,
            "num_generations": self.num_generations,
            "processes": self.accelerator.num_processes,
            "seed": self.args.seed,
            "dataset_size": len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None,
        }

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        runs = Path(self._get_output_dir(trial=trial))
        folder = runs / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            begin(folder)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_fsdp2:
            optimizer: Any = self.optimizer
            fill_optimizer_state(getattr(optimizer, "optimizer", optimizer))
        keep, self.args.save_total_limit = self.args.save_total_limit, None  # older ones go when this one is complete
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = keep
        self._save_watch_tensors(folder)
        self.accelerator.wait_for_everyone()  # every process writes files of its own
        if self.args.should_save:
            state = {
                "micro_batch": self._step,
                "rollout": self._step // self.args.generate_every,
                "between_rollouts": self.between_rollouts,
            }
            self._save_critic(folder)
            write_state(folder, {**state, **self._watch_state(), **self._resume_settings()})
            if keep:
                best = self.state.best_model_checkpoint
                rotate(runs, keep, protected=[best] if best else [])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = read_state(os.fspath(checkpoint))
        saved = Schedule(tuple(Stage(*stage) for stage in state.get("stages", []) or [[]]))
        self.schedule = self.schedule.filled_from(saved)  # decided on the first rollout batch, which is past
        if self.guard is not None and state.get("phase_end"):  # the guard's decision stands
            self.schedule = saved
        check_resumable(checkpoint, state, self._resume_settings())
        super()._load_optimizer_and_scheduler(checkpoint)
        self._load_watch(Path(checkpoint), state)
        self._load_critic(Path(checkpoint))
        self._step = int(state["micro_batch"])


def fill_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Give parameters without optimizer state (those above an internal policy) the state before a first update: zeros.

    FSDP2's checkpoints hold every parameter's state or cannot be loaded. For AdamW and SGD zeros are what the first
    update would begin with, so that nothing else changes.

    Raises:
        ConfigError: the optimizer's state is not shaped as its parameters.
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
    """The trainer's sampler, in the order of the pass over the data that training is in.

    The wrapped sampler shuffles with a generator of its own that moves on with every pass, and a resumed run starts
    with a new one: without this it would see the order of the first pass again.
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
