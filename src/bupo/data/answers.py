"""Reads answers as text: finds them in responses, and compares those that need no mathematics.

This module loads no library, so the process that trains or evaluates can use it; mathematics is compared in
`bupo.data.grading_worker`.
"""

from __future__ import annotations

import re
from fractions import Fraction

_RATIONAL = re.compile(
    r"(-?)(?:([0-9]{1,18})|([0-9]{0,9}\.[0-9]{1,9})|\\[dt]?frac\{([0-9]{1,18})\}\{([0-9]{1,18})\}"
    r"|([0-9]{1,18})/([0-9]{1,18}))"
)
_WRAPPER = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf|textit|textrm|textnormal|operatorname)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[a-z]+(?:[ '-]+[a-z]+)*")
_BASE = re.compile(r"-?[0-9A-Z.]+_\{*([0-9]+|[a-z]+)\}*")


def last_boxed(text: str) -> str | None:
    """Return the content of the last ``\\boxed{...}`` or ``\\fbox{...}``; None if there is none or it is not closed."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    position = start + (6 if text.startswith("\\boxed", start) else 5)
    while position < len(text) and text[position].isspace():
        position += 1
    if position >= len(text):
        return None
    if text[position] != "{":  # "\boxed 5": one token, as TeX reads it
        token = re.match(r"\\[A-Za-z]+|[^\s$\\]+", text[position : position + 200])
        return token.group() if token else None
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text[position:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[position + 1 : position + match.start()]
    return None


def extract_answer(response: str, *, tagged: bool = False) -> str | None:
    """Return the answer in a response: the content of its last box, or None.

    Args:
        tagged: whether the prompt asked for ``<answer>`` tags (reasoning-gym). Without a box, the answer is then the
            content of the last tag, or else the last line.
    """
    boxed = last_boxed(response)
    if boxed is not None or not tagged:
        return boxed
    start = response.rfind("<answer>")
    if start >= 0:
        return response[start + len("<answer>") :].split("</answer>", 1)[0].strip()
    return response.rstrip().rsplit("\n", 1)[-1].strip() or None


def rational(text: str) -> tuple[Fraction, bool] | None:
    """Return the value of an integer, fraction or decimal and whether it has no decimal point; None for other text."""
    match = _RATIONAL.fullmatch(text.strip().strip("$").replace(" ", ""))
    if not match:
        return None
    sign, whole, point, top, bottom, slash_top, slash_bottom = match.groups()
    denominator = int(bottom or slash_bottom or 1)
    if denominator == 0:
        return None
    value = Fraction(point) if point else Fraction(int(whole or top or slash_top), denominator)
    return (-value if sign else value), not point


def equal_at_sight(gold: str, answer: str) -> bool | None:
    """Compare two answers where that needs no mathematics; None where it does.

    The same text is equal, and so are equal numbers. Unequal numbers are unequal, except that decimals are left to
    math-verify, which rounds.
    """
    if gold.strip() == answer.strip():
        return True
    first, second = rational(gold), rational(answer)
    if first is None or second is None:
        return None
    equal = first[0] == second[0]
    return equal if equal or (first[1] and second[1]) else None


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
    if not _WORDS.fullmatch(text):
        return False
    letters = len(text.replace(" ", ""))
    return text in ("yes", "no") or letters >= 4 or (letters >= 2 and bool(_WRAPPER.fullmatch(answer.strip())))


def in_different_bases(gold: str, answer: str) -> bool:
    """Whether both numbers name their base and the bases differ; math-verify ignores bases."""
    bases = [_BASE.fullmatch(re.sub(r"\s|\\text|\\mathrm", "", text)) for text in (gold, answer)]
    return all(bases) and bases[0].group(1) != bases[1].group(1)  # type: ignore[union-attr]
