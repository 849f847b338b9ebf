"""Reading some of the tokens: the question is about means, so a random part of them can be enough.

Tokens are drawn at random within every response, the same share of each, in rounds; after a round the standard errors
say whether the asked tolerance is met and, if not, how large a share would meet it. Two errors matter
(:class:`bupo.lens.clustered.ClusterMeans`): the *clustered* one, of the mean as that of the model's responses at
large, and the *sampling* one, of the mean as that of these responses. More tokens shrink the second only; the first
has a floor, because responses differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FIRST = 1024  # tokens of the first round
_MARGIN = 1.1  # a share is estimated from estimates


class TokenDraw:
    """Random orders of every response's tokens, of which a growing share is taken.

    Args:
        lengths: response tokens of each response.
        seed: the order of response i depends on the seed, i and its length only.
    """

    def __init__(self, lengths: Sequence[int], seed: int = 0):
        self.lengths = list(lengths)
        self._orders = [
            torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + i))
            for i, n in enumerate(self.lengths)
        ]
        self._taken = [0] * len(self.lengths)

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def taken(self) -> int:
        return sum(self._taken)

    def first_share(self) -> float:
        """The share of the first round."""
        return min(1.0, FIRST / self.total)

    def take(self, share: float) -> list[list[int]]:
        """For each response the new tokens, ascending, that bring its share to ``share`` (two tokens at least)."""
        found = []
        for i, (order, n) in enumerate(zip(self._orders, self.lengths, strict=True)):
            until = n if share >= 1.0 else min(n, max(2, math.ceil(share * n)))
            found.append(sorted(order[self._taken[i] : until].tolist()))
            self._taken[i] = max(self._taken[i], until)
        return found


@dataclass(frozen=True)
class Progress:
    """Whether enough has been read.

    Attributes:
        done: stop.
        reached: every clustered standard error is at most the tolerance.
        share: the share of the tokens to go on to, where not done.
        worst_clustered, worst_sampling: the largest standard errors, nats.
        responses_needed: about how many responses the tolerance would take, where these are too few; else None.
    """

    done: bool
    reached: bool
    share: float
    worst_clustered: float
    worst_sampling: float
    responses_needed: int | None = None


def judge(clustered: Tensor, sampling: Tensor, share: float, tolerance: float, responses: int) -> Progress:
    """Whether to stop, and how much to read otherwise.

    A site is settled when its clustered standard error is at most ``tolerance``. Where responses differ so much that
    reading all of their tokens would not bring every site there, the tolerance cannot be met, and a site whose sampling
    error is at most ``tolerance`` is settled too.

    Args:
        clustered, sampling: standard errors of the sites (K,), nats.
        share: of the tokens, drawn so far.
    """
    between = (clustered.square() - sampling.square()).clamp(min=0)  # what would be left with all tokens read
    room = tolerance**2 - between
    settled = clustered <= tolerance
    reached = bool(settled.all())
    needed = None
    if bool((room <= 0).any()):
        # for all sites: one that could just be met would have nearly every token read, and the tolerance still missed
        room = torch.full_like(room, tolerance**2)
        settled = settled | (sampling <= tolerance)
        needed = math.ceil(responses * between.max().item() / tolerance**2)
    worst = clustered.max().item(), sampling.max().item()
    if bool(settled.all()) or share >= 1.0:
        return Progress(True, reached, share, *worst, needed)
    # sampling^2 = a (1 - f) / f for a share f of the tokens
    scale = sampling.square() * share / (1 - share)
    f = (scale / (scale + room))[~settled].max().item()
    f = min(f * _MARGIN, 4 * share)
    f = max(f, share * 1.05)
    return Progress(False, False, 1.0 if f > 0.9 else f, *worst, needed)
