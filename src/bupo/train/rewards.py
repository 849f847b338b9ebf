"""Rewards of a rollout batch: the same grading that evaluation uses, or a function of the user's own."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from bupo.data.grading import Grader
from bupo.data.problems import Problem
from bupo.errors import ConfigError


class AnswerReward:
    """1 if the response's answer is right, else 0 (or the task's own score between them).

    A reward function as TRL calls it: ``problem`` is the dataset's column of problem numbers, one a response. Where the
    gold answer itself cannot be read the reward is None, which leaves the response out. The shares of unreadable
    answers and of timeouts are logged as ``grading/unparsable`` and ``grading/timeout``.
    """

    __name__ = "answer"

    def __init__(self, problems: Sequence[Problem], grader: Grader | None = None):
        self._problems = problems
        self._grader = grader if grader is not None else Grader()

    def __call__(
        self,
        completions: Sequence[str],
        problem: Sequence[int],
        log_metric: Callable[[str, float], None] | None = None,
        **_: Any,
    ) -> list[float | None]:
        grades = self._grader.grade(list(completions), [self._problems[i] for i in problem])
        if log_metric is not None:
            seen = Counter(grade.status for grade in grades)
            for status in ("unparsable", "timeout"):
                log_metric(f"grading/{status}", seen[status] / max(len(grades), 1))
        return [None if grade.status == "bad_gold" else grade.reward for grade in grades]

    def close(self) -> None:
        """End the grading processes."""
        self._grader.close()


def make_reward(name: str, problems: Sequence[Problem]) -> Callable[..., list[float | None]]:
    """The recipe's reward: ``answer``, or ``module:function`` with TRL's signature.

    A function gets ``prompts``, ``completions`` (texts), ``completion_ids``, ``problem`` (numbers) and ``problems``
    (the `Problem` of each response) by name and returns a number, or None, for each.

    Raises:
        ConfigError: the module or function does not exist.
    """
    if name == "answer":
        return AnswerReward(problems)
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"reward {name!r} cannot be imported: {error}") from error

    def reward(problem: Sequence[int], **given: Any) -> list[float | None]:
        return function(problem=problem, problems=[problems[i] for i in problem], **given)

    reward.__name__ = function_name
    return reward
