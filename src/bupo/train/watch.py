"""Watching the internal phase: what it does to the full policy, and ending it when the guard says so.

The part of `BuPOTrainer` between the probe and the guard: it measures once a rollout batch (`probe`, and the transfer
of the last batch's updates), keeps the best weights in host memory, and carries out the guard's verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from bupo.models.layout import find_layout
from bupo.train.guard import PhaseGuard, Signals, Verdict
from bupo.train.probe import probe_means, probe_rows, probe_sums
from bupo.train.schedule import Schedule, Stage, alignment_problems

if TYPE_CHECKING:
    from trl import GRPOTrainer as _Parent
else:
    _Parent = object

TENSORS_FILE = "internal_phase_{}.safetensors"  # one for each process
_KEYS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")


class WatchesInternalPhase(_Parent):
    """What `BuPOTrainer` measures in an internal phase, and how the phase can end early."""

    if TYPE_CHECKING:  # of BuPOTrainer
        args: Any
        model: Any
        schedule: Schedule
        _rewards: Tensor

        @property
        def micro_batches_per_epoch(self) -> int | None: ...
        def _read(self, stage: Stage | None) -> Any: ...
        def _score(self, batch: dict[str, Any], *, compute_entropy: bool = False) -> tuple[Tensor, Any]: ...

    guard: PhaseGuard | None = None
    phase_end: dict[str, Any] | None = None  # when and why the guard ended the phase
    _probed: dict[str, Tensor] | None = None  # responses of the last rollout batch as the full policy saw them then
    _kept: dict[str, Tensor] | None = None  # the best weights, of the parameters that the phase trains

    # -- measuring -------------------------------------------------------------------------------------------------

    def _transfer(self) -> tuple[float, int] | None:
        """What the last rollout batch's updates did for the full policy, and over how many responses.

        The correlation of a response's advantage with the change of its log-probability under the full policy; None
        where nothing is known (no batch before, or no advantage differs).
        """
        if self._probed is None:
            return None
        before = self._probed
        now, _ = self._score(before)
        x = ((now - before["logps"]) * before["mask"]).sum(dim=1).double()
        y = before["advantages"].double()
        sums = torch.stack([torch.ones_like(x).sum(), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])
        n, sx, sy, sxx, syy, sxy = self.accelerator.reduce(sums, reduction="sum").tolist()
        spread = (n * sxx - sx * sx) * (n * syy - sy * sy)
        if n < 3 or spread <= 0:
            return None
        return (n * sxy - sx * sy) / spread**0.5, int(n)

    def _probe(self, batch: dict[str, Any], stage: Stage) -> dict[str, float]:
        """The full policy, and its distance from the internal one, on some responses of the batch; they are kept."""
        size = len(batch["prompt_ids"])
        wanted = self.args.probe_samples or max(self.args.per_device_train_batch_size, size // 8)
        rows = probe_rows(size, wanted).to(batch["prompt_ids"].device)
        some = {key: batch[key][rows] for key in _KEYS if key in batch}
        full, entropies = self._score(some, compute_entropy=True)
        with self._read(stage):
            internal, _ = self._score(some)
        mask = some["completion_mask"] * some.get("tool_mask", 1)
        advantages = batch["advantages"][rows]
        if advantages.dim() == 2:  # of a critic, one a token
            advantages = (advantages * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        self._probed = {**some, "mask": mask, "logps": full, "advantages": advantages}
        sums = probe_sums(full, internal, entropies, mask, some["completion_ids"])
        return probe_means(self.accelerator.reduce(sums, reduction="sum").tolist())

    def _watch(self, batch: dict[str, Any], stage: Stage, transfer: tuple[float, int] | None) -> Verdict:
        """Measure, log, and ask the guard if there is one."""
        found = self._probe(batch, stage)
        metrics = self._metrics["train"]
        for name, value in found.items():
            if name == "divergence":
                metrics["internal/divergence"].append(value)
            elif name != "entropy" or stage.weight == 1.0:  # the joint loss measures entropy on every response
                metrics[name].append(value)
        if transfer is not None:
            metrics["internal/transfer"].append(transfer[0])
        if self.guard is None:
            return Verdict("continue")
        reward, error = self._reward_and_error()
        signals = Signals(
            reward=reward,
            reward_error=error,
            length=metrics["completions/mean_length"][-1],
            perplexity=found["perplexity"],
            repetition=found["repetition"],
            divergence=found["divergence"],
            transfer=None if transfer is None else transfer[0],
            transfer_responses=0 if transfer is None else transfer[1],
        )
        verdict: list[Any] = [self.guard.observe(signals)]
        broadcast_object_list(verdict, from_process=0)  # the same numbers everywhere, but never a different verdict
        if verdict[0].keep:
            self._kept = {name: p.to("cpu", copy=True) for name, p in self._trained().items()}
        return verdict[0]

    def _reward_and_error(self) -> tuple[float, float]:
        """Mean reward of the batch and its standard error over questions."""
        weights = self.reward_weights.to(self._rewards.device)
        rewards = (self._rewards * weights).nansum(dim=1)
        rewards[self._rewards.isnan().all(dim=1)] = torch.nan
        questions = rewards.view(-1, self.args.num_generations).nanmean(dim=1)
        questions = questions[~questions.isnan()]
        if len(questions) == 0:
            return 0.0, 0.0
        error = questions.std().item() / len(questions) ** 0.5 if len(questions) > 1 else 0.0
        return questions.mean().item(), error

    def _trained(self) -> dict[str, Tensor]:
        """The parameters that an internal phase can change, by name; under FSDP2 this process's part of each."""
        return {name: _own(p) for name, p in self._trained_parameters().items()}

    def _trained_parameters(self) -> dict[str, Tensor]:
        model = self.accelerator.unwrap_model(self.model)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what is still gathered from the last forward are copies
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if any(stage.layer is not None and stage.weight < 1.0 for stage in self.schedule.stages):
            return trainable
        highest = max(layer for layer in self.schedule.layers if isinstance(layer, int))
        above = {id(p) for layer in find_layout(model).layers[highest:] for p in layer.parameters()}
        return {name: p for name, p in trainable.items() if id(p) not in above}

    # -- ending early ----------------------------------------------------------------------------------------------

    def _ended_at(self, rollout: int) -> Schedule | None:
        """The schedule whose internal phase ends before this rollout batch, or None if an update would straddle it."""
        stages: list[Stage] = []
        done = 0
        for stage in self.schedule.stages:
            length = rollout - done if stage.rollouts is None else min(stage.rollouts, rollout - done)
            if length > 0 and stage.layer is not None:
                stages.append(replace(stage, rollouts=length))
            done += length
        ended = Schedule((*stages, Stage()))
        args = (self.args.generate_every, self.args.gradient_accumulation_steps, self.micro_batches_per_epoch)
        return None if alignment_problems(ended, *args) else ended

    def _restore_kept(self) -> None:
        """Put the best weights back, with fresh optimizer state: its moments belong to the way that was left."""
        assert self._kept is not None
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        for name, parameter in self._trained_parameters().items():
            _own(parameter).copy_(self._kept[name])
            optimizer.state.pop(parameter, None)
        self._last_loaded_step = -1  # an engine that holds a copy of the weights must load them again

    def _leave_internal_phase(self) -> None:
        """Nothing of the phase is needed any more."""
        self._kept = self._probed = None

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _watch_state(self) -> dict[str, Any]:
        return {"guard": None if self.guard is None else self.guard.state(), "phase_end": self.phase_end}

    def _save_watch_tensors(self, folder: Path) -> None:
        """Each process its own responses; the kept weights once, or under FSDP2 each process its parts."""
        groups = {"probed": self._probed or {}}
        if self.accelerator.is_fsdp2 or self.accelerator.is_main_process:
            groups["kept"] = self._kept or {}
        tensors = {f"{group}/{name}": t.contiguous() for group, found in groups.items() for name, t in found.items()}
        if tensors:
            save_file(tensors, folder / TENSORS_FILE.format(self.accelerator.process_index))

    def _load_watch(self, folder: Path, state: Mapping[str, Any]) -> None:
        if state.get("guard") is not None:
            self.guard = PhaseGuard.from_state(state["guard"])
        self.phase_end = state.get("phase_end")
        rank = self.accelerator.process_index
        kept = _read(folder, rank if self.accelerator.is_fsdp2 else 0, "kept")
        probed = {name: t.to(self.accelerator.device) for name, t in _read(folder, rank, "probed").items()}
        self._kept, self._probed = kept or None, probed or None


def _own(parameter: Tensor) -> Tensor:
    """The part of a parameter that this process holds: all of it, but for FSDP2. Shares its memory."""
    return cast(Any, parameter).to_local().detach() if hasattr(parameter, "to_local") else parameter.detach()


def _read(folder: Path, rank: int, group: str) -> dict[str, Tensor]:
    path = folder / TENSORS_FILE.format(rank)
    tensors = load_file(path) if path.exists() else {}
    return {name.partition("/")[2]: t for name, t in tensors.items() if name.startswith(f"{group}/")}
