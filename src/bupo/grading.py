"""Grades answers by themselves, or as a reward of TRL or verl; no training library is imported.

- `Grader` is a reward function of TRL, and `Grader.grade` grades responses to problems (docs/grading.md).
- `compute_score` is verl's reward hook.
- `boxed_string` is a reward function of TRL that compares the last box as text, as the authors of arXiv 2512.19673 do.
"""

import re
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

from bupo.data.answers import last_boxed
from bupo.data.grading import Grade, Grader, problems_of, text_of
from bupo.data.problems import Problem

__all__ = ["Grade", "Grader", "boxed_string", "compute_score", "same_string"]
_grader = cache(Grader)


def compute_score(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, **more: Any) -> float:
    """The reward of one response, as verl calls its ``custom_reward_function``.

    A reference answer that cannot be used gives 0, with a warning, as verl cannot leave a response out.
    """
    [reward] = _grader()([solution_str], ground_truth=[ground_truth])
    if reward is None:
        warnings.warn(f"the reference answer {ground_truth!r} cannot be used; its responses get 0", stacklevel=2)
    return reward or 0.0


def boxed_string(
    completions: Sequence[Any], problems: Sequence[Problem] | None = None, **columns: Any
) -> list[float | None]:
    """1 if the last box is the reference answer by `same_string`, else 0; None where there is no reference answer."""
    golds = [problem.answer for problem in problems or problems_of(columns, len(completions))]
    boxes = [last_boxed(text_of(completion)) for completion in completions]
    return [
        None if not gold.strip() else float(box is not None and same_string(box, gold))
        for box, gold in zip(boxes, golds, strict=True)
    ]


# what the comparison of the MATH benchmark (arXiv 2103.03874) rewrites, in this order
_REWRITES = [
    (r"\n|\\!", ""), (r"\\\\", r"\\"), (r"[td]frac", "frac"), (r"\\left|\\right|\^\{\\circ\}|\^\\circ|\\\$", ""),
    (r"\\text\{ .*", ""), (r"\\%", ""), (r"(^|[ {])\.", r"\g<1>0."), (r"^[^=]{0,2}=([^=]*)$", r"\1"),
    (r"\\sqrt([^{])", r"\\sqrt{\1}"), (" ", ""), (r"\\frac([^{])([^{])", r"\\frac{\1}{\2}"),
    (r"\\frac([^{])\{", r"\\frac{\1}{"), (r"^0\.5$", r"\\frac{1}{2}"),
    (r"^(0|-?[1-9]\d*)/(0|-?[1-9]\d*)$", r"\\frac{\1}{\2}"),
]  # fmt: skip


def same_string(answer: str, gold: str) -> bool:
    """Whether two answers are the same text after the rewriting of the MATH benchmark, which drops units and signs.

    Equal values in other forms, such as ``0.25`` and ``1/4``, differ; `Grader` compares values.
    """
    if max(answer.count(r"\text{ "), gold.count(r"\text{ ")) > 1:
        return answer == gold
    for pattern, new in _REWRITES:
        answer, gold = re.sub(pattern, new, answer), re.sub(pattern, new, gold)
    return answer == gold
