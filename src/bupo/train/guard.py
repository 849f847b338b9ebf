"""Measures what an internal phase does to the full policy, and ends or undoes a phase that no longer serves it.

Measured once per rollout batch on some of its responses, with the weights that sampled them:

- ``entropy`` of the full policy, in nats per token, and its ``perplexity`` on these responses, ``exp(mean(-log pi))``;
- ``internal/divergence``: ``mean(log pi - log pi^l)``, an unbiased estimate of KL(full || internal), in nats per token;
- ``repetition``: the share of a response's 4-grams that occurred in it before;
- ``internal/transfer`` of the last batch's updates: the correlation, over responses, between the advantage and the
  change of the response's log-probability under the full policy, which a GRPO update makes clearly positive.

With ``internal_steps: auto`` the phase guard compares windows of `WINDOW` rollout batches (arXiv 2512.19673: 30 fixed
steps gain 3.4 points, 50 lose 13). It ends the phase, and restores the weights that sampled the last batch of the best
reward window, when

- the mean reward is below the best window's by two standard errors of the difference;
- the mean surprisal rose by half and by 0.1 nats per token over the first window;
- KL(full || internal) rose by half and by 0.1 nats per token over its lowest window;
- the mean transfer is not above zero by two standard errors, ``1 / sqrt(responses)`` each; here the weights stay.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from accelerate.utils import broadcast_object_list, send_to_device
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from bupo.models.layout import find_layout
from bupo.train.advantages import sums, total_rewards
from bupo.train.diagnostics import spread_rows
from bupo.train.images import choose_rows
from bupo.train.schedule import FULL

WINDOW = 4


class Signals(NamedTuple):
    """What was measured on one rollout batch of the internal phase, before its updates."""

    reward: float
    reward_error: float  # standard error of the mean over questions
    perplexity: float
    divergence: float
    transfer: float | None = None  # of the batch before; None where unknown
    transfer_responses: int = 0  # that it was measured on


class Decision(NamedTuple):
    """What to do about the phase, and why."""

    action: Literal["continue", "switch", "restore"]
    reason: str = ""
    keep: bool = False  # the weights that sampled this batch, which are the best so far


def decide(history: Sequence[Signals]) -> Decision:
    """The guard's decision after the last of these rollout batches, from their signals and nothing else."""
    windows = [history[start : start + WINDOW] for start in range(len(history) - WINDOW + 1)]
    rewards = [_mean(signals.reward for signals in window) for window in windows]
    keep = bool(windows) and rewards[-1] >= max(rewards)
    if len(windows) < 2:
        return Decision("continue", keep=keep)
    if harm := _harm(windows, rewards):
        return Decision("switch" if keep else "restore", harm, keep)
    known = [signals for signals in windows[-1] if signals.transfer is not None]
    transfer = _mean(signals.transfer or 0.0 for signals in known)
    error = 1 / math.sqrt(sum(signals.transfer_responses for signals in known) or 1)
    if len(known) < WINDOW or transfer > 2 * error:
        return Decision("continue", keep=keep)
    reason = "the internal updates do not serve the full policy: correlation of advantage and change of its"
    return Decision("switch", f"{reason} log-probability {transfer:+.3f} (standard error {error:.3f})", keep)


def _harm(windows: list[Sequence[Signals]], rewards: list[float]) -> str:
    """Why the full policy is worse than it was; empty if it is not."""
    first, best, last = windows[0], windows[rewards.index(max(rewards))], windows[-1]
    error = math.sqrt(sum(signals.reward_error**2 for signals in (*last, *best))) / WINDOW
    if max(rewards) - rewards[-1] > 2 * error:
        return f"reward fell from {max(rewards):.3f} to {rewards[-1]:.3f} (standard error {error:.3f})"
    before, now = (_mean(math.log(signals.perplexity) for signals in window) for window in (first, last))
    if _rose(before, now):
        return f"the full policy's perplexity on its responses rose from {math.exp(before):.3f} to {math.exp(now):.3f}"
    divergences = [_mean(signals.divergence for signals in window) for window in windows]
    if _rose(min(divergences), divergences[-1]):
        return f"KL(full || internal) rose from {min(divergences):.2f} to {divergences[-1]:.2f} nats per token"
    return ""


def _mean(window: Iterable[float]) -> float:
    return sum(window) / WINDOW


def _rose(before: float, now: float) -> bool:
    return now > before * 1.5 and now > before + 0.1  # smaller changes are not worth a decision


class PhaseMonitor:
    """Measures each rollout batch of an internal phase; with ``internal_steps: auto`` it keeps what the guard needs."""

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self.history: list[Signals] = []  # of the guarded phase
        self.samples: dict[str, Any] = {}  # of the last rollout batch, with the full policy's log-probabilities then
        self.best_weights: dict[str, Tensor] = {}  # in host memory, of the parameters that the phase trains

    def before_updates(self, batch: dict[str, Any]) -> Decision:
        """Measure and log the current phase's rollout batch; where there is a guard, return its decision."""
        trainer, metrics = self._trainer, self._trainer._metrics["train"]
        transfer, measured = self._transfer(), self._measure(batch)
        measured |= {} if transfer is None else {"internal/transfer": transfer[0]}
        for name, value in measured.items():
            if name != "entropy" or trainer.phase.weight == 1.0:  # the joint loss logs entropy on every response
                metrics[name].append(value)
        if not trainer.args.guarded:
            return Decision("continue")
        perplexity, divergence = measured["perplexity"], measured["internal/divergence"]
        self.history.append(Signals(*self._reward_and_error(), perplexity, divergence, *(transfer or ())))
        decision = broadcast_object_list([decide(self.history)], from_process=0)[0]  # the same on every process
        if decision.keep:
            self.best_weights = {name: _local(p).to("cpu", copy=True) for name, p in self._trained().items()}
        return decision

    def _transfer(self) -> tuple[float, int] | None:
        """The transfer of the last batch's updates and the responses it was measured on; None where it is not known."""
        if not self.samples:
            return None
        now, _ = self._trainer.score(self.samples, FULL)
        x = ((now - self.samples["logps"]) * self.samples["mask"]).sum(dim=1).double()
        y = self.samples["advantages"].double()
        n, sx, sy, sxx, syy, sxy = sums(self._trainer.accelerator, torch.ones_like(x), x, y, x * x, y * y, x * y)
        spread = (n * sxx - sx * sx) * (n * syy - sy * sy)
        known = n >= 3 and spread > 0  # not if all advantages are equal
        return ((n * sxy - sx * sy) / spread**0.5, int(n)) if known else None

    def _measure(self, batch: dict[str, Any]) -> dict[str, float]:
        """The full policy, and its distance from the internal one, on some responses, which are kept."""
        trainer, size, device = self._trainer, len(batch["prompt_ids"]), batch["prompt_ids"].device
        n = trainer.args.probe_samples or max(trainer.args.per_device_train_batch_size, size // 8)
        rows = spread_rows(size, n).to(device)
        some = choose_rows(batch, rows.tolist())
        full, entropies = trainer.score(some, FULL, compute_entropy=True)
        internal, _ = trainer.score(some, trainer.phase)
        mask, advantages = some["completion_mask"] * some.get("tool_mask", 1), batch["advantages"][rows]
        if advantages.dim() == 2:  # of a critic, one per token
            advantages = (advantages * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        self.samples = {**some, "mask": mask, "logps": full, "advantages": advantages}
        kept = zip(some["completion_ids"], mask.bool(), strict=True)
        counts = repeated_ngrams(row[keep].tolist() for row, keep in kept)
        totals = [(values * mask).sum() for values in (entropies, -full, full - internal)]
        totals += [mask.sum(), *torch.tensor(counts, device=device)]
        entropy, surprisal, divergence, tokens, repeated, ngrams = sums(trainer.accelerator, *totals)
        tokens = max(tokens, 1.0)
        return {
            "entropy": entropy / tokens,
            "perplexity": math.exp(min(surprisal / tokens, 700.0)),
            "internal/divergence": divergence / tokens,
            "repetition": repeated / max(ngrams, 1.0),
        }

    def _reward_and_error(self) -> tuple[float, float]:
        rewards = total_rewards(self._trainer.rewards, self._trainer.reward_weights)
        questions = rewards.view(-1, self._trainer.args.num_generations).nanmean(dim=1)
        questions = questions[~questions.isnan()]
        error = questions.std().item() / len(questions) ** 0.5 if len(questions) > 1 else math.nan  # shows no harm
        return questions.mean().nan_to_num().item(), error

    def _trained(self) -> dict[str, Tensor]:
        """The parameters that an internal phase can change, by name."""
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what the last forward gathered are copies
        joint = any(phase.weight < 1.0 for phase in trainer.schedule.internal)
        above = () if joint else find_layout(model).layers[max(trainer.schedule.layers) :]
        unused = {id(p) for layer in above for p in layer.parameters()}
        return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in unused}

    def restore_best_weights(self) -> None:
        """Put the best weights back, with fresh optimizer state (its moments belong to the discarded updates)."""
        trainer = self._trainer
        optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        for name, parameter in self._trained().items():
            _local(parameter).copy_(self.best_weights[name])
            optimizer.state.pop(parameter, None)
        trainer._last_loaded_step = -1  # an engine with a copy of the weights must load them again

    def leave_phase(self) -> None:
        self.samples, self.best_weights = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Each process's own responses; the best weights once, or under FSDP2 each process's shards."""
        accelerator = self._trainer.accelerator
        weights = {"best_weights": self.best_weights} if accelerator.is_fsdp2 or accelerator.is_main_process else {}
        return {"samples": self.samples, "history": [tuple(signals) for signals in self.history], **weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.samples = send_to_device(state["samples"], self._trainer.accelerator.device)
        self.best_weights = dict(state["best_weights"])
        self.history = [Signals(*signals) for signals in state["history"]]


def repeated_ngrams(responses: Iterable[Sequence[int]]) -> tuple[int, int]:
    """How many 4-grams of tokens occurred in the same response before, and how many there are in all."""
    ngrams = [[tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)] for tokens in responses]
    return sum(len(one) - len(set(one)) for one in ngrams), sum(map(len, ngrams))


def _local(parameter: Tensor) -> Tensor:
    """The part of a parameter that this process holds (all of it except under FSDP2), in the same memory."""
    return cast(Any, parameter).to_local().detach() if hasattr(parameter, "to_local") else parameter.detach()
