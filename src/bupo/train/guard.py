"""The phase guard: end the internal phase when it stops serving the full policy, and go back when it has hurt it.

With a fixed ``s_inter`` the method is brittle (arXiv 2512.19673, Qwen3-4B: 30 steps gain 3.4 points, 50 lose 13, 70
destroy the model). The guard watches, once a rollout batch, what the phase does to the *full* policy. Its best
witness is the **transfer** of the last batch's updates: the correlation, over responses, between the advantage and the
change of the response's log-probability under the full policy. A GRPO update makes it clearly positive; an internal
update does so only as far as the internal policy's gradient serves the full policy too.

Rules, over windows of `WINDOW` rollout batches, the first decision after one window and one batch:

============  ====================================================================================  ========
signal        ends the phase when                                                                   weights
============  ====================================================================================  ========
reward        the window's mean is below the best window's by two standard errors of the difference  restored
perplexity    mean surprisal rose by half and by 0.1 nats a token over the first window              restored
length        the mean halved or doubled against the first window                                    restored
repetition    the share of repeated 4-grams rose by 0.1 over the first window                        restored
divergence    KL(full || internal) rose by half and by 0.1 nats a token over its lowest window       restored
transfer      its mean is not above zero by two standard errors, ``1 / sqrt(responses)`` each        kept
============  ====================================================================================  ========

Restored weights are those that sampled the last rollout batch of the best window of rewards, if that is an earlier one.
No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

WINDOW = 4
_RISE = 0.1  # nats a token, or share: smaller changes are not worth a decision

Action = Literal["continue", "switch", "restore"]


@dataclass(frozen=True)
class Signals:
    """What was measured on one rollout batch of the internal phase, before its updates.

    ``reward_error`` is the standard error of the mean reward (over questions); ``transfer`` is that of the batch before
    (None where unknown), over ``transfer_responses`` responses.
    """

    reward: float
    reward_error: float
    length: float
    perplexity: float
    repetition: float
    divergence: float
    transfer: float | None = None
    transfer_responses: int = 0


@dataclass(frozen=True)
class Verdict:
    """What to do, why, and whether the weights that made this batch are the best seen and worth keeping."""

    action: Action
    reason: str = ""
    keep: bool = False


class PhaseGuard:
    """Decides after every rollout batch of an internal phase, from the signals seen so far and nothing else."""

    def __init__(self, history: list[Signals] | None = None):
        self.history = list(history or [])

    def observe(self, signals: Signals) -> Verdict:
        """Take the signals of the next rollout batch and decide."""
        self.history.append(signals)
        number = len(self.history)
        if number < WINDOW:
            return Verdict("continue")
        rewards = [self._mean("reward", end) for end in range(WINDOW, number + 1)]
        keep = rewards[-1] >= max(rewards)
        if number == WINDOW:
            return Verdict("continue", keep=keep)
        harm = self._harm(rewards)
        if harm:
            return Verdict("switch" if keep else "restore", harm, keep)
        useless = self._useless()
        return Verdict("switch" if useless else "continue", useless, keep)

    def _mean(self, name: str, end: int | None = None) -> float:
        """Mean of a signal over the window that ends before index ``end`` (default: the last one)."""
        end = len(self.history) if end is None else end
        return sum(getattr(s, name) for s in self.history[end - WINDOW : end]) / WINDOW

    def _harm(self, rewards: list[float]) -> str:
        """Why the full policy is worse than it was; empty if it is not."""
        end = WINDOW + max(range(len(rewards)), key=lambda i: rewards[i])
        last, best, first = self.history[-WINDOW:], self.history[end - WINDOW : end], self.history[:WINDOW]
        error = math.sqrt(sum(s.reward_error**2 for s in (*last, *best))) / WINDOW
        fall = max(rewards) - rewards[-1]
        if fall > 2 * error:
            return f"reward fell from {max(rewards):.3f} to {rewards[-1]:.3f} (standard error {error:.3f})"
        then, now = (sum(math.log(s.perplexity) for s in part) / WINDOW for part in (first, last))
        if _rose(then, now):
            return (
                f"the full policy's perplexity on its responses rose from {math.exp(then):.3f} to {math.exp(now):.3f}"
            )
        length, before = self._mean("length"), self._mean("length", WINDOW)
        if not before / 2 < length < before * 2:
            return f"mean response length went from {before:.0f} to {length:.0f} tokens"
        repetition, before = self._mean("repetition"), self._mean("repetition", WINDOW)
        if repetition > before + _RISE:
            return f"repeated 4-grams rose from {before:.1%} to {repetition:.1%}"
        lowest = min(self._mean("divergence", end) for end in range(WINDOW, len(self.history) + 1))
        divergence = self._mean("divergence")
        if _rose(lowest, divergence):
            return f"KL(full || internal) rose from {lowest:.2f} to {divergence:.2f} nats a token"
        return ""

    def _useless(self) -> str:
        """Why the phase does not serve the full policy (any more); empty if it does or if that is not known."""
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

    # -- saved in checkpoints --------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"history": [asdict(s) for s in self.history]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> PhaseGuard:
        """The guard that `state` came from."""
        return cls([Signals(**s) for s in state["history"]])


def _rose(before: float, now: float) -> bool:
    return now > before * 1.5 and now > before + _RISE
