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


class AnswerReward:
    """1 if the response's answer is right, else 0 (or the task's own score between them), as TRL calls it.

    ``problem`` is the dataset's column of problem numbers. Where the reference answer cannot be parsed, the reward is
    None, which leaves the response out. It logs the shares ``grading/unparsable`` and ``grading/timeout``.
    """

    __name__ = "answer"

    def __init__(self, problems: Sequence[Problem]):
        self._problems, self._grader = problems, Grader()
        self.close = self._grader.close

    def __call__(self, completions: Sequence[str], problem: Sequence[int], **columns: Any) -> list[float | None]:
        grades = self._grader.grade(list(completions), [self._problems[i] for i in problem])
        statuses = Counter(grade.status for grade in grades)
        for status in ("unparsable", "timeout") if "log_metric" in columns else ():
            columns["log_metric"](f"grading/{status}", statuses[status] / max(len(grades), 1))
        return [None if grade.status == "bad_gold" else grade.reward for grade in grades]


class OwnReward:
    """A user's function. It gets ``prompts``, ``completions`` (texts), ``completion_ids``, ``problem`` (numbers) and
    ``problems`` (the `Problem` of each response) by name, and returns a finite number or None per response.

    If it fails or returns anything else, `InputError` names the function, the response and the value.
    """

    def __init__(self, name: str, function: Callable[..., Any], problems: Sequence[Problem]):
        self.__name__ = function.__name__
        self._title, self._function, self._problems = f"reward {name}", function, problems

    def __call__(self, completions: Sequence[str], problem: Sequence[int], **columns: Any) -> list[float | None]:
        columns |= {"problem": problem, "problems": [self._problems[i] for i in problem]}
        try:
            values = self._function(completions=completions, **columns)
        except Exception as error:
            if out_of_memory(error) is not None:
                raise
            raise InputError(f"{self._title} failed with {type(error).__name__}: {error}") from error
        if not hasattr(values, "__len__") or isinstance(values, (str, dict)) or len(values) != len(completions):
            raise InputError(f"{self._title} must return one number per response ({len(completions)}), not {values!r}")
        for number, (value, completion) in enumerate(zip(values, completions, strict=True), start=1):
            if not _is_reward(value):
                raise InputError(
                    f"{self._title} must return a finite number or None per response, but returned {value!r} for "
                    f"response {number} of its batch: {str(completion)[:60]!r}"
                )
        return [None if value is None else float(value) for value in values]

    def close(self) -> None:
        """Nothing to end."""


def _is_reward(value: Any) -> bool:
    try:
        return value is None or math.isfinite(value)  # a TypeError for text and lists
    except (TypeError, ValueError, OverflowError):
        return False


def make_reward(name: str, problems: Sequence[Problem]) -> AnswerReward | OwnReward:
    """The recipe's reward: ``answer``, or ``module:function``, whose module may lie in the working directory.

    Raises `ConfigError` if the module cannot be imported, or holds no such function.
    """
    if name == "answer":
        return AnswerReward(problems)
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `python` does this, the command `bupo` does not
    try:
        return OwnReward(name, getattr(importlib.import_module(module), function), problems)
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(f"reward {name!r} cannot be imported: {type(error).__name__}: {error}") from error
