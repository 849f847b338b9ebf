"""Finds answers in responses, and decides whether they equal the gold answer: as words, or by math-verify.

math-verify is loaded in `bupo.data.grading_worker` only, because parsing an answer can hang or exhaust the process.
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

MAX_MATH_CHARS = 1_000  # longer answers are not parsed; those of benchmarks are far shorter

_RATIONAL = re.compile(
    r"(-?)(?:\\[dt]?frac\{([0-9]{1,18})\}\{(?!0+\})([0-9]{1,18})\}"
    r"|([0-9]{0,9}\.[0-9]{1,9}|[0-9]{1,18}(?:/(?!0+$)[0-9]{1,18})?))"
)
_WRAPPER = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf|textit|textrm|textnormal|operatorname)\s*\{([^{}]*)\}")
_BASE = re.compile(r"-?[0-9A-Z.]+_\{*([0-9]+|[a-z]+)\}*")


def last_boxed(text: str) -> str | None:
    """Return the content of the last ``\\boxed{...}`` or ``\\fbox{...}``; None if there is none or it is not closed."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    text = text[start + (6 if text.startswith("\\boxed", start) else 5) :].lstrip()
    if not text.startswith("{"):  # "\boxed 5": one token, as TeX reads it
        token = re.match(r"\\[A-Za-z]+|[^\s$\\]+", text[:200])
        return token.group() if token else None
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[1 : match.start()]
    return None


def extract_answer(response: str, *, tagged: bool = False) -> str | None:
    """Return the content of the last box, or else, if the prompt asked for tags, that of the last tag or line."""
    boxed = last_boxed(response)
    if boxed is not None or not tagged:
        return boxed
    if "<answer>" in response:
        return response.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    return response.rstrip().rpartition("\n")[2].strip() or None


def rational(text: str) -> Fraction | None:
    """Return the value of an integer, fraction or decimal; None for other text."""
    match = _RATIONAL.fullmatch(text.strip().strip("$").replace(" ", ""))
    if not match:
        return None
    sign, top, bottom, plain = match.groups()
    return Fraction(sign + (plain or f"{top}/{bottom}"))


def equal_at_sight(gold: str, answer: str) -> bool | None:
    """Compare the same texts, and numbers; None for others, and for unequal decimals, which math-verify rounds."""
    if gold.strip() == answer.strip():
        return True
    first, second = rational(gold), rational(answer)
    decides = None not in (first, second) and (first == second or "." not in gold + answer)
    return first == second if decides else None


def strip_answer(answer: str) -> str:
    """Remove what only surrounds an answer: spaces, dollar signs, a pair of braces, a final full stop."""
    text = answer.strip()
    while True:
        inner = text.strip("$").strip()
        inner = inner[:-1].rstrip() if inner.endswith(".") else inner
        if inner.startswith("{") and last_boxed(f"\\boxed{inner}") == inner[1:-1]:
            inner = inner[1:-1].strip()
        if inner == text:
            return text
        text = inner


def plain_text(answer: str) -> str:
    """Return an answer as words: text commands unwrapped, single spaces, lower case."""
    text = strip_answer(answer)
    while (unwrapped := _WRAPPER.sub(r"\1", text)) != text:
        text = unwrapped
    text = re.sub(r"(?:\\[ ,;:!]|~|\s)+", " ", text).strip().lower()
    return text[1:-1].strip() if re.fullmatch(r"\([a-z]\)", text) else text


def is_words(answer: str) -> bool:
    """Tell a word or phrase (``\\text{east}``, ``Yes``, ``none of these``) from a formula such as ``xy``."""
    text = plain_text(answer)
    if not re.fullmatch(r"[a-z]+(?:[ '-]+[a-z]+)*", text):
        return False
    letters = len(text.replace(" ", ""))
    return text in ("yes", "no") or letters >= 4 or (letters >= 2 and bool(_WRAPPER.fullmatch(answer.strip())))


def in_different_bases(gold: str, answer: str) -> bool:
    """Whether both numbers name their base and the bases differ; math-verify ignores bases."""
    first, second = (_BASE.fullmatch(re.sub(r"\s|\\text|\\mathrm", "", text)) for text in (gold, answer))
    return first is not None and second is not None and first[1] != second[1]


@lru_cache(maxsize=4096)
def parse_math(answer: str) -> tuple[Any, ...]:
    """Return the sympy objects that math-verify reads; none of a sentence, in which it could find numbers."""
    from math_verify import LatexExtractionConfig, parse

    config = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    parts = parse(f"\\boxed{{{answer}}}", extraction_config=[config], parsing_timeout=None)
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
    from math_verify import verify

    equal = verify(list(parse_math(gold)), list(parsed), timeout_seconds=None)
    return (1.0, "correct") if equal else (0.0, "wrong")
