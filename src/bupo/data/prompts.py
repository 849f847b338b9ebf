"""Prompts as the trainer takes them: texts that its tokenizer turns into the very ids that evaluation uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bupo.data.problems import Problem
from bupo.data.templates import prompt_ids, render_prompt
from bupo.errors import InputError


def training_text(problem: Problem, tokenizer: Any, template: str) -> tuple[str, int]:
    """The prompt's text and its length in tokens.

    The trainer tokenizes texts with the tokenizer's own special tokens. A chat template has written a beginning-of-text
    token already where the model wants one, so that the tokenizer's would double it: it is taken off the text.

    Raises:
        InputError: no text gives the ids that evaluation uses.
    """
    wanted = prompt_ids(problem.prompt, tokenizer, template)
    text = render_prompt(problem.prompt, tokenizer, template)
    for candidate in (text, text.removeprefix(tokenizer.bos_token or "")):
        if list(tokenizer(text=[candidate])["input_ids"][0]) == wanted:
            return candidate, len(wanted)
    raise InputError(
        f"problem {problem.id}: the tokenizer adds special tokens that template {template!r} does not have; "
        "use another template"
    )


def training_rows(
    problems: Sequence[Problem], tokenizer: Any, template: str, max_length: int
) -> tuple[list[dict[str, Any]], int]:
    """Rows ``{"prompt", "problem"}`` (text and problem number) of prompts that fit, and how many did not.

    Raises:
        InputError: none fits.
    """
    rows, shortest = [], None
    for number, problem in enumerate(problems):
        text, length = training_text(problem, tokenizer, template)
        shortest = length if shortest is None else min(shortest, length)
        if length <= max_length:
            rows.append({"prompt": text, "problem": number})
    if not rows:
        raise InputError(
            f"no prompt fits into max_prompt_length {max_length}: the shortest of {len(problems)} has {shortest} tokens"
        )
    return rows, len(problems) - len(rows)
