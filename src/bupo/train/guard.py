"""The phase guard ends the internal phase when it no longer serves the full policy, and undoes it when it has hurt it.

A fixed ``s_inter`` is brittle (arXiv 2512.19673, Qwen3-4B: 30 steps gain 3.4 points, 50 lose 13, 70 destroy the model).
Once per rollout batch the guard looks at what the phase does to the *full* policy. The most informative signal is the
**transfer** of the last batch's updates: the correlation, over responses, between the advantage and the change of the
response's log-probability under the full policy. A GRPO update makes it clearly positive; an internal update does so
only as far as the internal policy's gradient serves the full policy too.

The rules compare windows of `WINDOW` rollout batches. The first decision comes after one window and one batch:

============  =============================================================================================  ========
signal        the phase ends when                                                                            weights
============  =============================================================================================  ========
reward        the window's mean is below the best window's by two standard errors of the difference           restored
perplexity    the mean surprisal rose by half and by 0.1 nats per token over the first window                 restored
divergence    KL(full || internal) rose by half and by 0.1 nats per token over its lowest window              restored
transfer      its mean is not above zero by two standard errors, ``1 / sqrt(responses)`` each                 kept
============  =============================================================================================  ========

Restored weights are those that sampled the last rollout batch of the best window of rewards, if that window is an
earlier one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

WINDOW = 4
_RISE = 0.1  # nats per token; smaller changes are not worth a decision

Action = Literal["continue", "switch", "restore"]


@dataclass(frozen=True)
class Signals:
    """What was measured on one rollout batch of the internal phase, before its updates.

    ``reward_error`` is the standard error of the mean reward over questions. ``transfer`` belongs to the batch before
    (None where unknown) and was measured on ``transfer_responses`` responses.
    """

    reward: float
    reward_error: float
    perplexity: float
    divergence: float
    transfer: float | None = None
    transfer_responses: int = 0


@dataclass(frozen=True)
class Decision:
    """What to do, why, and whether the weights that sampled this batch are the best so far and worth keeping."""

    action: Action
    reason: str = ""
    keep: bool = False


class PhaseGuard:
    """Decides after every rollout batch of an internal phase, from the signals so far and nothing else."""

    def __init__(self) -> None:
        self.history: list[Signals] = []

    def observe(self, signals: Signals) -> Decision:
        """Take the signals of the next rollout batch and decide."""
        self.history.append(signals)
        number = len(self.history)
        if number < WINDOW:
            return Decision("continue")
        rewards = [self._mean("reward", end) for end in range(WINDOW, number + 1)]
        keep = rewards[-1] >= max(rewards)
        if number == WINDOW:
            return Decision("continue", keep=keep)
        if harm := self._harm(rewards):
            return Decision("switch" if keep else "restore", harm, keep)
        useless = self._useless()
        return Decision("switch" if useless else "continue", useless, keep)

    def _mean(self, name: str, end: int | None = None) -> float:
        """Mean of a signal over the window that ends before index ``end`` (default: the last window)."""
        end = len(self.history) if end is None else end
        return sum(getattr(s, name) for s in self.history[end - WINDOW : end]) / WINDOW

    def _harm(self, rewards: list[float]) -> str:
        """Why the full policy is worse than it was; empty if it is not."""
        end = WINDOW + max(range(len(rewards)), key=lambda i: rewards[i])
        last, best, first = self.history[-WINDOW:], self.history[end - WINDOW : end], self.history[:WINDOW]
        error = math.sqrt(sum(s.reward_error**2 for s in (*last, *best))) / WINDOW
        if max(rewards) - rewards[-1] > 2 * error:
            return f"reward fell from {max(rewards):.3f} to {rewards[-1]:.3f} (standard error {error:.3f})"
        then, now = (sum(math.log(s.perplexity) for s in part) / WINDOW for part in (first, last))
        if _rose(then, now):
            return (
                f"the full policy's perplexity on its responses rose from {math.exp(then):.3f} to {math.exp(now):.3f}"
            )
        lowest = min(self._mean("divergence", end) for end in range(WINDOW, len(self.history) + 1))
        if _rose(lowest, divergence := self._mean("divergence")):
            return f"KL(full || internal) rose from {lowest:.2f} to {divergence:.2f} nats per token"
        return ""

    def _useless(self) -> str:
        """Why the phase does not serve the full policy; empty if it does, or if that is not known yet."""
        last = self.history[-WINDOW:]
        known = [s.transfer for s in last if s.transfer is not None]
        if len(known) < WINDOW:
            return ""
        transfer, error = sum(known) / WINDOW, 1 / math.sqrt(sum(s.transfer_responses for s in last))
        if transfer > 2 * error:
            return ""
        return (
            "the internal updates do not serve the full policy: correlation of advantage and change of its "
            f"log-probability {transfer:+.3f} (standard error {error:.3f})"
        )

    def state_dict(self) -> dict[str, Any]:
        """The signals so far (JSON-able)."""
        return {"history": [asdict(s) for s in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the signals of `state_dict`."""
        self.history = [Signals(**s) for s in state["history"]]


def _rose(before: float, now: float) -> bool:
    return now > before * 1.5 and now > before + _RISE
