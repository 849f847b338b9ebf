"""Rewards of a rollout batch: the grading that evaluation uses, or a function of the user's own."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from bupo.data.grading import Grader
from bupo.data.problems import Problem
from bupo.errors import ConfigError, InputError, out_of_memory


class Reward:
    """A reward function as TRL calls it: ``problem`` is the dataset's column of problem numbers, one per response."""

    def __init__(self, name: str, problems: Sequence[Problem]):
        self.__name__, self.problems = name, problems

    def __call__(self, completions: Sequence[str], problem: Sequence[int], **columns: Any) -> list[float | None]:
        raise NotImplementedError

    def close(self) -> None:
        """End the processes that grade, if there are any."""


class AnswerReward(Reward):
    """1 if the response's answer is right, else 0 (or the task's own score between them).

    If the reference answer itself cannot be parsed, the reward is None, which leaves the response out. The shares of
    unparsable answers and of timeouts are logged as ``grading/unparsable`` and ``grading/timeout``.
    """

    def __init__(self, problems: Sequence[Problem], grader: Grader | None = None):
        super().__init__("answer", problems)
        self._grader = grader if grader is not None else Grader()

    def __call__(self, completions: Sequence[str], problem: Sequence[int], **columns: Any) -> list[float | None]:
        grades = self._grader.grade(list(completions), [self.problems[i] for i in problem])
        log_metric: Callable[[str, float], None] | None = columns.get("log_metric")
        if log_metric is not None:
            statuses = Counter(grade.status for grade in grades)
            for status in ("unparsable", "timeout"):
                log_metric(f"grading/{status}", statuses[status] / max(len(grades), 1))
        return [None if grade.status == "bad_gold" else grade.reward for grade in grades]

    def close(self) -> None:
        self._grader.close()


class OwnReward(Reward):
    """A user's function. It gets ``prompts``, ``completions`` (texts), ``completion_ids``, ``problem`` (numbers) and
    ``problems`` (the `Problem` of each response) by name, and returns a finite number or None per response.

    Raises:
        InputError: it fails or returns anything else; the message names the function, the response and the value.
    """

    def __init__(self, name: str, function: Callable[..., Any], problems: Sequence[Problem]):
        super().__init__(function.__name__, problems)
        self._title, self._function = f"reward {name}", function

    def __call__(self, completions: Sequence[str], problem: Sequence[int], **columns: Any) -> list[float | None]:
        problems = [self.problems[i] for i in problem]
        try:
            values = self._function(completions=completions, problem=problem, problems=problems, **columns)
        except Exception as error:
            if out_of_memory(error) is not None:
                raise
            raise InputError(f"{self._title} failed with {type(error).__name__}: {error}") from error
        if not hasattr(values, "__len__") or isinstance(values, (str, dict)):
            raise InputError(f"{self._title} must return a list of numbers, one per response, not {values!r}")
        if len(values) != len(completions):
            raise InputError(f"{self._title} returned {len(values)} values for {len(completions)} responses")
        return [self._checked(i, value, completions[i]) for i, value in enumerate(values)]

    def _checked(self, index: int, value: Any, completion: str) -> float | None:
        try:
            if value is None or (not isinstance(value, str) and math.isfinite(value)):
                return None if value is None else float(value)
        except (TypeError, ValueError, OverflowError):
            pass
        raise InputError(
            f"{self._title} must return a finite number or None per response, but returned {value!r} for response "
            f"{index + 1} of its batch: {str(completion)[:60]!r}"
        )


def make_reward(name: str, problems: Sequence[Problem]) -> Reward:
    """The recipe's reward: ``answer``, or ``module:function``, whose module may lie in the working directory.

    Raises:
        ConfigError: the module cannot be imported, or holds no such function.
    """
    if name == "answer":
        return AnswerReward(problems)
    module, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as `python` has it; the command `bupo` does not
    try:
        function = getattr(importlib.import_module(module), function_name)
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(f"reward {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ConfigError(f"reward {name!r} is not a function")
    return OwnReward(name, function, problems)
