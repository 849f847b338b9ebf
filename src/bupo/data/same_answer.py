"""Decides whether an answer is the gold answer (docs/grading.md). Only the grading process loads this: it can hang."""

import re
from functools import lru_cache
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Expr, FiniteSet, Float, I, Interval, N, Rational, Set, Tuple, Union

from bupo.data.answers import MAX_MATH_CHARS, is_words, normal_form, plain_text

_NORMALIZATION = NormalizationConfig(malformed_operators=True, nits=True)  # units are removed by normal_form
_CONFIG = LatexExtractionConfig(False, boxed_match_priority=0, normalization_config=_NORMALIZATION)
_UNREADABLE = re.compile(r"^\^|(?<!frac )(?<![\d}_^])\d+(?:\s|~|\\[ ,;!])+\d")
_PERCENT = re.compile(r"\s*(?:\\?%|(?:\\text\s*\{)?\s*percent\s*\}?)$")
_BASE = re.compile(r"(-?[0-9A-F.]*[0-9][0-9A-F.]*)_\{*(\d+|[a-z]+)\}*")
_BASES = {name: str(base) for base, name in enumerate(("two", "three", "four", "five", "six", "seven", "eight"), 2)}
_EQUALS = re.compile(r"(?<![<>!:\\])=")
_NAME = re.compile(  # what an equation may give a value to
    r"(?:[a-zA-Z]|[A-Z]{2,3}|[A-Za-z ]{4,}|\\(?:angle|triangle) ?[A-Z]+|\\[a-z]+|\\(?:text|mathrm)\{[^{}]*\})"
    r"(?:_\{?\w+\}?)?'*(?:\([^()]*\))?|\|[A-Z]{2}\||\([a-z](?:, ?[a-z])+\)|\\frac\{d\w*\}\{d\w\}"
)
_OR = re.compile(r",?\s*(?:\\text\s*\{\s*or\s*\}|\bor\b|\\l?or\b|\\vee)\s*")


@lru_cache(maxsize=4096)
def parse_math(answer: str) -> tuple[Any, ...]:
    """Return the sympy objects that math-verify reads; none of a sentence, in which it could find numbers."""
    if _UNREADABLE.search(answer):
        return ()
    parts = parse(f"\\boxed{{{answer}}}", extraction_config=[_CONFIG], parsing_timeout=None)
    return tuple(part for part in parts if not isinstance(part, str))


def grade_math(gold: str, answer: str) -> tuple[float, str]:
    """Return reward and status of a boxed answer."""
    text = normal_form(answer) if len(answer) <= MAX_MATH_CHARS else ""
    if not text:
        return 0.0, "unparsable"
    if plain_text(gold) == plain_text(answer) or same(normal_form(gold), text):
        return 1.0, "correct"
    return 0.0, "wrong" if is_words(answer) or parse_math(text) else "unparsable"


def same(gold: str, answer: str) -> bool:
    """Compare two answers in normal form."""
    both = (gold, answer)
    squeezed = [re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", re.sub(r"\{(\w)\}", r"\1", text)) for text in both]
    if squeezed[0] == squeezed[1]:
        return True
    if is_words(gold) or any(re.search(r"\d\s*:\s*\d", text) for text in both):
        return False  # words, ratios and times are equal as text only
    numbers = [_BASE.fullmatch(text) for text in squeezed]
    if any(numbers):
        digits = [number[1] if number else text for number, text in zip(numbers, squeezed, strict=True)]
        bases = [number and _BASES.get(number[2], number[2]) for number in numbers]
        return digits[0] == digits[1] and (None in bases or bases[0] == bases[1])
    letters = [re.sub(r",|\band\b", " ", re.sub(r"\((.)\)", r"\1", plain_text(text))).split() for text in both]
    if all(len(some) > 1 and all(re.fullmatch("[a-z]", one) for one in some) for some in letters):
        return sorted(letters[0]) == sorted(letters[1])
    bare = [_PERCENT.sub("", text) for text in both]
    if bare != [*both] and same(*bare):
        return True
    if any(one.startswith("\\{") and re.fullmatch(r"\([^()]*,[^()]*\)", other) for one, other in (both, both[::-1])):
        return False  # a set is not a pair
    if bool(_EQUALS.search(gold)) != bool(_EQUALS.search(answer)):
        sides = [_values(text) for text in both]
        if all(sides):
            return all(same(one, other) for one in sides[0] for other in sides[1])
    first, second = parse_math(gold), parse_math(answer)
    if not first or not second:
        return False
    if any(_OR.search(text) and re.search(r"[<>]|\\[lg][et]", text) for text in both):
        return _as_set(gold) == _as_set(answer)
    if verify(list(first), list(second), timeout_seconds=None, allow_set_relation_comp=True):
        return _numbers_agree(first[0], second[0])
    imaginary = [one[0].subs({s: I for s in one[0].free_symbols if s.name == "i"}) for one in (first, second)]
    return imaginary != [first[0], second[0]] and _numbers_agree(imaginary[0], imaginary[1], otherwise=False)


def _values(text: str) -> list[str]:
    """Return the sides of an equation that are no names; none if there are several equations."""
    sides = [side.strip() for side in _EQUALS.split(text)]
    if len(sides) > 2 and re.search(r",|;|\bor\b|\band\b", text):
        return []
    names = [
        side
        for side in sides
        if _NAME.fullmatch(side) and len(re.findall(rf"(?<![\\\w]){re.escape(side)}(?!\w)", text)) < 2
    ]
    return [side for side in sides if side not in names] or sides[-1:]


def _as_set(text: str) -> Any:
    """Return the union of the intervals or inequalities that ``or`` joins."""
    parts = [parse_math(part)[0] for part in _OR.split(text)]
    return Union(*(part if isinstance(part, Set) else part.as_set() for part in parts))


def _numbers_agree(gold: Any, answer: Any, otherwise: bool = True) -> bool:
    """Compare values to 5 digits if there are decimals, else to 20; math-verify compares all to 6 places."""
    if isinstance(gold, FiniteSet | Interval | Tuple) and isinstance(answer, FiniteSet | Interval | Tuple):
        members = [[one for one in some.args if isinstance(one, Expr)] for some in (gold, answer)]
        alike = all(any(_numbers_agree(one, other, otherwise) for other in members[1]) for one in members[0])
        return alike or len(members[0]) != len(members[1])
    if not isinstance(gold, Expr) or not isinstance(answer, Expr):
        return otherwise
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    first, second = (N(one.subs({s: Rational(8 + k, 7) for k, s in enumerate(symbols)}), 40) for one in (gold, answer))
    if not (first.is_number and second.is_number and first.is_finite and second.is_finite):
        return otherwise
    tolerance = 1e-5 if gold.has(Float) or answer.has(Float) else 1e-20
    return bool(abs(first - second) <= tolerance * max(abs(first), abs(second)))
