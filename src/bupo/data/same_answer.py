"""Decides whether an answer is the same as the gold answer: words as words, mathematics by math-verify.

Only `bupo.data.grading_worker` imports this module, because parsing an answer can hang or exhaust the process.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from bupo.data.answers import in_different_bases, is_words, plain_text, strip_answer

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


def check_gold(gold: str) -> tuple[float, str]:
    """Return status ``usable`` for a gold answer of words, or mathematics that can be parsed; else ``bad_gold``."""
    usable = gold.strip() and len(gold) <= MAX_MATH_CHARS and (is_words(gold) or parse_math(gold))
    return 0.0, "usable" if usable else "bad_gold"


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
    score = float(gym_task(task).score_answer(answer=answer, entry=entry))
    return score, "correct" if score >= CORRECT_SCORE else "wrong"
