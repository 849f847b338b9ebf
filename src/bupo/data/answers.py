"""Reads answers as text: finds them in responses, and compares those that need no mathematics.

This module loads no library, so the process that trains or evaluates can use it; mathematics is compared in
`bupo.data.grading_worker`.
"""

from __future__ import annotations

import re
from fractions import Fraction

_RATIONAL = re.compile(
    r"(-?)(?:\\[dt]?frac\{([0-9]{1,18})\}\{(?!0+\})([0-9]{1,18})\}"
    r"|([0-9]{0,9}\.[0-9]{1,9}|[0-9]{1,18}(?:/(?!0+$)[0-9]{1,18})?))"
)
_WRAPPER = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf|textit|textrm|textnormal|operatorname)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[a-z]+(?:[ '-]+[a-z]+)*")
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
    """Return the answer in a response: the content of its last box, or None.

    If the prompt asked for ``<answer>`` tags (reasoning-gym), the answer without a box is the content of the last tag,
    or else the last line.
    """
    boxed = last_boxed(response)
    if boxed is not None or not tagged:
        return boxed
    _, tag, rest = response.rpartition("<answer>")
    if tag:
        return rest.split("</answer>", 1)[0].strip()
    return response.rstrip().rsplit("\n", 1)[-1].strip() or None


def rational(text: str) -> tuple[Fraction, bool] | None:
    """Return the value of an integer, fraction or decimal and whether it has no decimal point; None for other text."""
    match = _RATIONAL.fullmatch(text.strip().strip("$").replace(" ", ""))
    if not match:
        return None
    sign, top, bottom, plain = match.groups()
    return Fraction(sign + (plain or f"{top}/{bottom}")), "." not in match.group()


def equal_at_sight(gold: str, answer: str) -> bool | None:
    """Compare the same texts, and numbers; None for others, and for unequal decimals, which math-verify rounds."""
    if gold.strip() == answer.strip():
        return True
    first, second = rational(gold), rational(answer)
    if first is None or second is None:
        return None
    return first[0] == second[0] or (False if first[1] and second[1] else None)


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
