"""The order of the prompts, the same in a resumed run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler


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
