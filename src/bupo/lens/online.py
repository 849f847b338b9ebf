"""Running sums over the vocabulary, from which a distribution's statistics follow without its logits being kept.

For logits z (to the base 2) and their running maximum m the sums are ``sum 2^(z-m)``, ``sum (z-m) 2^(z-m)`` and, where
asked for, ``sum (z-m)^2 2^(z-m)`` and ``sum y 2^(z-m)`` with the final policy's logits y. A larger maximum in a later
tile rescales what was summed so far.

Shape legend: S sites, N tokens, v vocabulary entries of a tile, k top tokens kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NAMES = ("logprob", "rank", "varentropy", "kl", "top")
_LN2 = math.log(2)
_LEAST = -100.0


@dataclass(frozen=True)
class Extras:
    """What is wanted beside the entropy, for N tokens.

    Attributes:
        targets: the realised tokens (N,); gives ``logprob`` in nats, and ``rank`` from 1 if that is set.
        rank: count the vocabulary entries that are likelier than the realised token.
        varentropy: variance of the surprisal ``-log p`` under p, nats^2.
        final: ``LN(H^L)`` (N, d) of the final policy pi; gives ``kl``, ``KL(site || pi)`` in nats.
        final_lse: its log-sum-exp (N,), nats.
        top: k; gives ``top`` (the k likeliest tokens) and ``top_probability``, each (..., N, k).
        tokens: N.
    """

    targets: Tensor | None = None
    rank: bool = False
    varentropy: bool = False
    final: Tensor | None = None
    final_lse: Tensor | None = None
    top: int = 0
    tokens: int = 0

    def part(self, rows: slice) -> Extras:
        """The same for a slice of the tokens."""

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        return replace(
            self,
            targets=cut(self.targets),
            final=cut(self.final),
            final_lse=cut(self.final_lse),
            tokens=rows.stop - rows.start,
        )


class Running:
    """The sums of ``shape = (S, N)`` distributions, folded in tile by tile.

    Args:
        chosen: logits (S, N), base 2, of the realised tokens, where ``extras.targets`` is given.
        vocabulary: V.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        device: torch.device | str,
        extras: Extras | None = None,
        chosen: Tensor | None = None,
        vocabulary: int = 0,
    ):
        self.extras = extras or Extras()
        self._chosen = chosen
        self.maximum = torch.full(shape, float("-inf"), dtype=torch.float32, device=device)
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        self.weighted = torch.zeros_like(self.total)
        self._squares = torch.zeros_like(self.total) if self.extras.varentropy else None
        self._cross = torch.zeros_like(self.total) if self.extras.final is not None else None
        self._above = torch.zeros(shape, dtype=torch.long, device=device) if self.extras.rank else None
        self._top: tuple[Tensor, Tensor] | None = None
        self._kept = min(self.extras.top, vocabulary)

    def update_(self, logits: Tensor, scratch: Tensor, start: int = 0, reference: Tensor | None = None) -> None:
        """Fold in one tile.

        Args:
            logits: (S, N, v) to the base 2, overwritten. scratch: a buffer of the same shape.
            start: the vocabulary entry of the tile's first column.
            reference: the final policy's logits (N, v), base 2.
        """
        if self._above is not None:
            self._above += self._likelier(logits, scratch, start)
        if self._kept:
            self._keep_top(logits, start)
        maximum = torch.maximum(self.maximum, logits.amax(-1))
        # shares below 2^-100 add nothing, and numbers below float32's normal range cost many times as much
        logits.sub_(maximum.unsqueeze(-1)).clamp_(min=_LEAST)
        torch.exp2(logits, out=scratch)
        total = scratch.sum(-1)
        cross = None if reference is None else torch.linalg.vecdot(scratch, reference)
        weighted = scratch.mul_(logits).sum(-1)
        # what was summed so far was relative to the old maximum
        shift = (self.maximum - maximum).double()
        factor, shift = shift.exp2(), shift.nan_to_num(neginf=0.0)
        if self._squares is not None:
            squares = scratch.mul_(logits).sum(-1)
            before = self._squares + 2 * shift * self.weighted + shift.square() * self.total
            self._squares = factor * before + squares
        if self._cross is not None and cross is not None:
            self._cross = factor * self._cross + cross
        self.weighted = factor * (self.weighted + shift * self.total) + weighted
        self.total = factor * self.total + total
        self.maximum = maximum

    def _likelier(self, logits: Tensor, scratch: Tensor, start: int) -> Tensor:
        assert self._chosen is not None
        assert self.extras.targets is not None
        above = torch.gt(logits, self._chosen.unsqueeze(-1), out=scratch).sum(-1).long()
        # the token itself, whose product was summed in another order and may come out a little higher
        column = self.extras.targets - start
        inside = (column >= 0) & (column < logits.shape[-1])
        own = column.clamp(0, logits.shape[-1] - 1).expand(logits.shape[:-1]).unsqueeze(-1)
        return above - (scratch.gather(-1, own).squeeze(-1).long() * inside)

    def _keep_top(self, logits: Tensor, start: int) -> None:
        values, tokens = logits.topk(min(self._kept, logits.shape[-1]), dim=-1)
        tokens = tokens + start
        if self._top is not None:
            values, tokens = torch.cat([self._top[0], values], -1), torch.cat([self._top[1], tokens], -1)
            values, order = values.topk(min(self._kept, values.shape[-1]), dim=-1)
            tokens = tokens.gather(-1, order)
        self._top = (values, tokens)

    def entropy(self) -> Tensor:
        """Shannon entropies in nats, float64, (S, N); NaN where a logit was not finite."""
        return _LN2 * (self.total.log2() - self.weighted / self.total)

    def log_sum_exp(self) -> Tensor:
        """(S, N), nats."""
        return _LN2 * (self.maximum.double() + self.total.log2())

    def statistics(self) -> dict[str, Tensor]:
        """Everything asked for, by name: (S, N) float64, but ``top`` and ``top_probability`` (S, N, k)."""
        found = {"entropy": self.entropy(), "lse": self.log_sum_exp()}
        mean = self.weighted / self.total
        if self._chosen is not None:
            found["logprob"] = _LN2 * self._chosen.double() - found["lse"]
        if self._above is not None:
            found["rank"] = 1.0 + self._above
        if self._squares is not None:
            found["varentropy"] = (_LN2**2 * (self._squares / self.total - mean.square())).clamp(min=0.0)
        if self._cross is not None:
            assert self.extras.final_lse is not None
            found["kl"] = self.extras.final_lse - _LN2 * self._cross / self.total - found["entropy"]
        if self._top is not None:
            found["top"] = self._top[1]
            found["top_probability"] = (_LN2 * self._top[0].double() - found["lse"].unsqueeze(-1)).exp()
        return found
