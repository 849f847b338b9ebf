"""Decides whether an answer is the same as the gold answer: words as words, mathematics by math-verify.

Only `bupo.data.grading_worker` imports this module, because parsing an answer can hang or exhaust the process.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from bupo.data.answers import in_different_bases, is_words, plain_text, strip_answer
from bupo.data.generators import unpack

CORRECT_SCORE = 0.99  # reasoning-gym scores from here on count as solved
MAX_MATH_CHARS = 1_000  # longer answers are not parsed; those of benchmarks are far shorter
MAX_TEXT_CHARS = 100_000
_CONFIG = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)


@lru_cache(maxsize=4096)
def parse_math(answer: str) -> tuple[Any, ...]:
    """Return the sympy objects that math-verify reads in ``\\boxed{answer}``; empty if it reads none.

    Only the box is read: no number is picked out of a sentence.
    """
    parts = parse(f"\\boxed{{{answer}}}", extraction_config=[_CONFIG], parsing_timeout=None)
    return tuple(part for part in parts if not isinstance(part, str))


def gold_is_usable(gold: str) -> bool:
    """Whether answers can be compared with this gold answer: it is words, or mathematics that can be parsed."""
    if not gold.strip() or len(gold) > MAX_MATH_CHARS:
        return False
    return is_words(gold) or bool(parse_math(gold))


def grade_math(gold: str, answer: str) -> tuple[float, str]:
    """Return reward and status of a boxed answer."""
    answer = strip_answer(answer) if len(answer) <= MAX_MATH_CHARS else ""
    if not answer:
        return 0.0, "unparsable"
    if plain_text(gold) == plain_text(answer):
        return 1.0, "correct"
    if is_words(gold) or in_different_bases(gold, answer):
        return 0.0, "wrong"
    parsed = parse_math(answer)
    if not parsed:
        return 0.0, "wrong" if is_words(answer) else "unparsable"
    equal = verify(list(parse_math(gold)), list(parsed), timeout_seconds=None)
    return (1.0, "correct") if equal else (0.0, "wrong")


@lru_cache(maxsize=64)
def gym_task(name: str) -> Any:
    """Build the reasoning-gym task whose scorer grades answers."""
    import reasoning_gym  # takes a second, and most runs grade mathematics only

    return reasoning_gym.create_dataset(name, size=1, seed=0)


def grade_reasoning_gym(task: str, entry: Any, answer: str) -> tuple[float, str]:
    """Return the task's own score and the status that follows from it."""
    if len(answer) > MAX_TEXT_CHARS or re.search(r"__\w+__", answer):  # some scorers evaluate expressions
        return 0.0, "unparsable"
    try:
        score = float(gym_task(task).score_answer(answer=answer, entry=unpack(entry)))
    except Exception:
        return 0.0, "unparsable"
    return score, "correct" if score >= CORRECT_SCORE else "wrong"
