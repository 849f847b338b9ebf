"""Measures what an internal phase does to the full policy, and keeps the weights that the phase guard may go back to.

Measured once per rollout batch on some of its responses, with the weights that sampled them:

- ``entropy`` of the full policy, in nats per token;
- ``perplexity`` of the full policy on its own responses, ``exp(mean(-log pi))``;
- ``internal/divergence``: ``mean(log pi - log pi^l)`` over the same tokens, an unbiased estimate of
  KL(full || internal) in nats per token;
- ``repetition``: the share of a response's 4-grams that occurred in it before;
- ``internal/transfer``: the effect of the last batch's updates, see `bupo.train.guard`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from bupo.models.layout import find_layout
from bupo.train.advantages import total_rewards
from bupo.train.auto_layer import spread_rows
from bupo.train.guard import Decision, PhaseGuard, Signals
from bupo.train.schedule import FULL

_KEYS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")


class PhaseMonitor:
    """Owns the responses it measured, the best weights, and the guard if ``internal_steps`` is ``auto``."""

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self.guard = PhaseGuard() if trainer.args.guarded else None
        self.samples: dict[str, Tensor] = {}  # of the last rollout batch, with the full policy's log-probabilities then
        self.best_weights: dict[str, Tensor] = {}  # in host memory, of the parameters that the phase trains

    def transfer(self) -> tuple[float, int] | None:
        """The transfer of the last rollout batch's updates, and the number of responses it was measured on.

        None where it is not known: no batch before, or all advantages equal.
        """
        if not self.samples:
            return None
        now, _ = self._trainer.score(self.samples, FULL)
        x = ((now - self.samples["logps"]) * self.samples["mask"]).sum(dim=1).double()
        y = self.samples["advantages"].double()
        sums = torch.stack([torch.ones_like(x).sum(), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])
        n, sx, sy, sxx, syy, sxy = self._trainer.accelerator.reduce(sums, reduction="sum").tolist()
        spread = (n * sxx - sx * sx) * (n * syy - sy * sy)
        if n < 3 or spread <= 0:
            return None
        return (n * sxy - sx * sy) / spread**0.5, int(n)

    def before_updates(self, batch: dict[str, Any], transfer: tuple[float, int] | None) -> Decision:
        """Measure and log the current phase's rollout batch, and let the guard decide if there is one."""
        trainer = self._trainer
        measured = self._measure(batch)
        metrics = trainer._metrics["train"]
        for name, value in measured.items():
            if name != "entropy" or trainer.phase.weight == 1.0:  # the joint loss logs entropy on every response
                metrics["internal/divergence" if name == "divergence" else name].append(value)
        if transfer is not None:
            metrics["internal/transfer"].append(transfer[0])
        if self.guard is None:
            return Decision("continue")
        reward, error = self._reward_and_error()
        signals = Signals(reward, error, measured["perplexity"], measured["divergence"], *(transfer or ()))
        decision = self.guard.observe(signals)
        decision = broadcast_object_list([decision], from_process=0)[0]  # never a different one on another process
        if decision.keep:
            self.best_weights = {name: _local(p).to("cpu", copy=True) for name, p in self._trained().items()}
        return decision

    def _measure(self, batch: dict[str, Any]) -> dict[str, float]:
        """The full policy, and its distance from the internal one, on some responses, which are kept."""
        trainer = self._trainer
        size = len(batch["prompt_ids"])
        n = trainer.args.probe_samples or max(trainer.args.per_device_train_batch_size, size // 8)
        rows = spread_rows(size, n).to(batch["prompt_ids"].device)
        some = {key: batch[key][rows] for key in _KEYS if key in batch}
        full, entropies = trainer.score(some, FULL, compute_entropy=True)
        internal, _ = trainer.score(some, trainer.phase)
        mask = some["completion_mask"] * some.get("tool_mask", 1)
        advantages = batch["advantages"][rows]
        if advantages.dim() == 2:  # of a critic, one per token
            advantages = (advantages * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        self.samples = {**some, "mask": mask, "logps": full, "advantages": advantages}
        kept = zip(some["completion_ids"], mask.bool(), strict=True)
        repeated, ngrams = repeated_ngrams(row[keep].tolist() for row, keep in kept)
        sums = [(values * mask).sum().double() for values in (entropies, -full, full - internal)]
        counts = [
            mask.sum().double(),
            *(torch.tensor(float(x), device=full.device).double() for x in (repeated, ngrams)),
        ]
        sums = trainer.accelerator.reduce(torch.stack([*sums, *counts]), reduction="sum").tolist()
        entropy, surprisal, divergence, tokens, repeated, ngrams = sums
        tokens = max(tokens, 1.0)
        return {
            "entropy": entropy / tokens,
            "perplexity": math.exp(min(surprisal / tokens, 700.0)),
            "divergence": divergence / tokens,
            "repetition": repeated / max(ngrams, 1.0),
        }

    def _reward_and_error(self) -> tuple[float, float]:
        """Mean reward of the batch and its standard error over questions."""
        rewards = total_rewards(self._trainer.rewards, self._trainer.reward_weights)
        questions = rewards.view(-1, self._trainer.args.num_generations).nanmean(dim=1)
        questions = questions[~questions.isnan()]
        if len(questions) == 0:
            return 0.0, 0.0
        error = questions.std().item() / len(questions) ** 0.5 if len(questions) > 1 else 0.0
        return questions.mean().item(), error

    # -- weights -----------------------------------------------------------------------------------------------------

    def _trained(self) -> dict[str, Tensor]:
        """The parameters that an internal phase can change, by name."""
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what the last forward gathered are copies
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if any(phase.weight < 1.0 for phase in trainer.schedule.internal):
            return trainable
        above = {id(p) for m in find_layout(model).layers[max(trainer.schedule.layers) :] for p in m.parameters()}
        return {name: p for name, p in trainable.items() if id(p) not in above}

    def restore_best_weights(self) -> None:
        """Put the best weights back, with fresh optimizer state (its moments belong to the discarded updates)."""
        trainer = self._trainer
        optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        for name, parameter in self._trained().items():
            _local(parameter).copy_(self.best_weights[name])
            optimizer.state.pop(parameter, None)
        trainer._last_loaded_step = -1  # an engine with a copy of the weights must load them again

    def leave_phase(self) -> None:
        """Free what only an internal phase needs."""
        self.samples, self.best_weights = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Each process's own responses; the best weights once, or under FSDP2 each process's shards."""
        accelerator = self._trainer.accelerator
        state: dict[str, Any] = {"samples": self.samples}
        if accelerator.is_fsdp2 or accelerator.is_main_process:
            state["best_weights"] = self.best_weights
        if self.guard is not None:
            state["guard"] = self.guard.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; the guard's part is left out if there is no guard."""
        self.samples = {name: t.to(self._trainer.accelerator.device) for name, t in state["samples"].items()}
        self.best_weights = dict(state["best_weights"])
        if self.guard is not None:
            self.guard.load_state_dict(state["guard"])


def repeated_ngrams(responses: Iterable[Sequence[int]], n: int = 4) -> tuple[int, int]:
    """How many n-grams of tokens occurred in the same response before, and how many n-grams there are in all."""
    repeated = total = 0
    for tokens in responses:
        ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        repeated += len(ngrams) - len(set(ngrams))
        total += len(ngrams)
    return repeated, total


def _local(parameter: Tensor) -> Tensor:
    """The part of a parameter that this process holds (all of it except under FSDP2). It shares memory with it."""
    return cast(Any, parameter).to_local().detach() if hasattr(parameter, "to_local") else parameter.detach()
