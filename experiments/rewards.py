"""The reward of two control arms: a first phase paid at random, so that it carries nothing about the problems.

In a grid: ``reward: experiments.rewards:random_for_8``.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

from bupo.grading import Grader

UPDATES_PER_ROLLOUT = 4  # of recipes/small.yaml
SHARE = 0.35  # right answers of the shipped model, so that random rewards vary about as much as true ones
_grader = cache(Grader)


def random_for_8(completions: list[str], trainer_state: Any, **columns: Any) -> list[float | None]:
    """0 or 1 at random for the responses of the first 8 rollout batches, then whether the answer is right."""
    step = trainer_state.global_step
    if step >= 8 * UPDATES_PER_ROLLOUT:
        return _grader()(completions, **columns)
    draws = random.Random(f"{step}/{'/'.join(completions)}")
    return [float(draws.random() < SHARE) for _ in completions]
