"""Running sums over the vocabulary that yield a distribution's statistics without keeping its logits.

With logits z (to the base 2) and their running maximum m, the sums are ``sum 2^(z-m)``, ``sum (z-m) 2^(z-m)``, ...;
they are rescaled when m changes. Shape legend: S sites, N tokens, v vocabulary entries of a tile, k top tokens.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

LN2 = math.log(2)
_LEAST = -100.0  # terms below 2^-100 add nothing, and subnormal float32 numbers are slow to compute with


@dataclass(frozen=True)
class StatsRequest:
    """Which statistics of N tokens to compute besides the entropy and the log-sum-exp."""

    targets: Tensor | None = None  # the generated tokens (N,): yields `logprob`
    rank: bool = False  # also yield the `rank` of the targets in the vocabulary, from 1
    varentropy: bool = False  # variance of the surprisal -log p under p, nats^2
    reference: Tensor | None = None  # states (N, d) of a reference policy r, such as LN(H^L) of the full policy
    kl: bool = False  # KL(site || r)
    kl_from_reference: bool = False  # KL(r || site)
    top_k: int = 0  # yield the k most likely tokens `top` and their `top_probability`, each (..., N, k)

    def rows(self, rows: slice) -> Self:
        """The same request for a slice of the tokens."""
        targets, reference = (None if all_ is None else all_[rows] for all_ in (self.targets, self.reference))
        return replace(self, targets=targets, reference=reference)


class ReferenceStats:
    """The reference distribution of N tokens, folded in tile by tile before the sites are."""

    def __init__(self, tokens: int, device: torch.device):
        self._maximum = torch.full((tokens,), float("-inf"), device=device)
        self.total = torch.zeros(tokens, dtype=torch.float64, device=device)
        self.expected = torch.zeros_like(self.total)  # sum y 2^(y-m)

    def update(self, logits: Tensor) -> None:
        """Fold in one tile of logits y (N, v), to the base 2; it is kept until the next one."""
        maximum = torch.maximum(self._maximum, logits.amax(-1))
        self.logits, self.shares = logits, torch.exp2((logits - maximum[:, None]).clamp_(min=_LEAST))
        self.factor = (self._maximum - maximum).double().exp2()  # what earlier sums are multiplied by
        self.total = self.factor * self.total + self.shares.sum(-1)
        self.expected = self.factor * self.expected + torch.linalg.vecdot(self.shares, logits)
        self._maximum = maximum

    def log_sum_exp(self) -> Tensor:
        return LN2 * (self._maximum.double() + self.total.log2())


class OnlineSoftmaxStats:
    """The running sums of (S, N) distributions; ``chosen`` are the targets' logits (S, N), to the base 2."""

    def __init__(self, shape: tuple[int, int], device: torch.device, request: StatsRequest, chosen: Tensor | None):
        self._request, self._chosen = request, chosen
        self._maximum = torch.full(shape, float("-inf"), dtype=torch.float32, device=device)
        self._total = torch.zeros(shape, dtype=torch.float64, device=device)
        self._weighted = torch.zeros_like(self._total)
        self._squares = torch.zeros_like(self._total)
        self._cross = torch.zeros_like(self._total)  # sum y 2^(z-m), y the reference's logits
        self._cross_reference = torch.zeros_like(self._total)  # sum z 2^(y-m), m the reference's maximum
        self._above = torch.zeros(shape, dtype=torch.long, device=device)
        self._top: tuple[Tensor, Tensor] | None = None

    def update_(self, logits: Tensor, scratch: Tensor, start: int, reference: ReferenceStats | None) -> None:
        """Fold in one tile of logits (S, N, v), to the base 2, from vocabulary entry ``start`` on.

        It and ``scratch``, of the same shape, are overwritten. The ``reference`` has this tile folded in already.
        """
        request = self._request
        if request.rank and request.targets is not None:
            self._above += self._count_likelier(logits, scratch, start, request.targets)
        if request.top_k:
            self._keep_top(logits, start)
        if reference is not None and request.kl_from_reference:
            cross = torch.linalg.vecdot(reference.shares, logits)
            self._cross_reference = reference.factor * self._cross_reference + cross
        maximum = torch.maximum(self._maximum, logits.amax(-1))
        logits.sub_(maximum.unsqueeze(-1)).clamp_(min=_LEAST)
        torch.exp2(logits, out=scratch)
        total = scratch.sum(-1)
        # the sums so far are relative to the previous maximum
        shift = (self._maximum - maximum).double()
        factor, shift = shift.exp2(), shift.nan_to_num(neginf=0.0)
        if reference is not None and request.kl:
            self._cross = factor * self._cross + torch.linalg.vecdot(scratch, reference.logits)
        weighted = scratch.mul_(logits).sum(-1)
        if request.varentropy:
            squares = scratch.mul_(logits).sum(-1)
            before = self._squares + 2 * shift * self._weighted + shift.square() * self._total
            self._squares = factor * before + squares
        self._weighted = factor * (self._weighted + shift * self._total) + weighted
        self._total = factor * self._total + total
        self._maximum = maximum

    def _count_likelier(self, logits: Tensor, scratch: Tensor, start: int, targets: Tensor) -> Tensor:
        assert self._chosen is not None
        above = torch.gt(logits, self._chosen.unsqueeze(-1), out=scratch).sum(-1).long()
        # the target itself may be counted, because its own logit was summed in another order
        column = targets - start
        inside = (column >= 0) & (column < logits.shape[-1])
        own = column.clamp(0, logits.shape[-1] - 1).expand(logits.shape[:-1]).unsqueeze(-1)
        return above - (scratch.gather(-1, own).squeeze(-1).long() * inside)

    def _keep_top(self, logits: Tensor, start: int) -> None:
        k = self._request.top_k
        if k == 1:  # faster than topk
            values, tokens = logits.max(-1, keepdim=True)
        else:
            values, tokens = logits.topk(min(k, logits.shape[-1]), dim=-1)
        tokens = tokens + start
        if self._top is not None:
            values, tokens = torch.cat([self._top[0], values], -1), torch.cat([self._top[1], tokens], -1)
            values, order = values.topk(min(k, values.shape[-1]), dim=-1)
            tokens = tokens.gather(-1, order)
        self._top = (values, tokens)

    def statistics(self, reference: ReferenceStats | None = None) -> dict[str, Tensor]:
        """The requested statistics by name, in nats: (S, N) float64, but ``top`` and ``top_probability`` (S, N, k).

        ``entropy`` is NaN where a logit was not finite.
        """
        mean, request = self._weighted / self._total, self._request
        lse = LN2 * (self._maximum.double() + self._total.log2())
        stats = {"entropy": LN2 * (self._total.log2() - mean), "lse": lse}
        if self._chosen is not None:
            stats["logprob"] = LN2 * self._chosen.double() - lse
        if request.rank:
            stats["rank"] = 1.0 + self._above
        if request.varentropy:
            stats["varentropy"] = (LN2**2 * (self._squares / self._total - mean.square())).clamp(min=0.0)
        if reference is not None and request.kl:
            stats["kl"] = reference.log_sum_exp() - LN2 * self._cross / self._total - stats["entropy"]
        if reference is not None and request.kl_from_reference:
            expected = LN2 * (reference.expected - self._cross_reference) / reference.total
            stats["kl_from_reference"] = expected - reference.log_sum_exp() + lse
        if self._top is not None:
            stats["top"] = self._top[1]
            stats["top_probability"] = (LN2 * self._top[0].double() - lse.unsqueeze(-1)).exp()
        return stats
