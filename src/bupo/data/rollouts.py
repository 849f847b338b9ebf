"""Reads responses files: sampled responses with their token ids, for analysis."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bupo.data.problems import Prompt, as_prompt, read_rows
from bupo.data.prompts import prompt_ids as tokenize_prompt
from bupo.errors import InputError, shown


@dataclass(frozen=True)
class Rollout:
    """One response to one prompt as token ids; with the texts if it was sampled here."""

    prompt_ids: list[int]
    response_ids: list[int]  # including the end-of-sequence token that ended it
    prompt: Prompt | None = None
    response: str | None = None
    problem_id: str | None = None
    sample: int | None = None


def read_responses(path: str | Path, tokenizer: Any = None, template: str = "auto") -> list[Rollout]:
    """Read a ``.jsonl``, ``.json`` or ``.parquet`` responses file; `InputError` names the row.

    A row has ``prompt_ids`` and ``response_ids``, or ``prompt`` and ``response``, which are tokenized here; its
    ``problem_id`` is kept, other columns are not read.
    """
    rollouts = []
    for index, row in enumerate(read_rows(Path(path))):
        try:
            rollouts.append(_rollout(row, tokenizer, template))
        except InputError as error:
            raise InputError(f"{path}: row {index}: {error}") from error
    return rollouts


def _rollout(row: dict[str, Any], tokenizer: Any, template: str) -> Rollout:
    ids: dict[str, Any] = {name: row.get(name) for name in ("prompt_ids", "response_ids")}
    if None in ids.values():
        if row.get("prompt") is None or row.get("response") is None:
            columns = ", ".join(map(str, row))
            raise InputError(f"needs prompt_ids and response_ids, or prompt and response; columns found: {columns}")
        if (prompt := as_prompt(row["prompt"])) is None:
            raise InputError(f"prompt must be text or a list of messages with content, not {shown(row['prompt'])}")
        if (response := _response(row["response"])) is None:
            raise InputError(f"response must be text, not {shown(row['response'])}")
        if tokenizer is None:
            raise InputError("text without token ids, and there is no tokenizer")
        ids["prompt_ids"] = tokenize_prompt(prompt, tokenizer, template)
        ids["response_ids"] = list(tokenizer(response, add_special_tokens=False)["input_ids"])
    for name, tokens in ids.items():
        if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
            raise InputError(f"{name} must be a list of token ids (integers from 0), not {shown(tokens)}")
        if not tokens:
            raise InputError(f"the {name.removesuffix('_ids')} is empty; remove the row")
    identity = row.get("problem_id")
    return Rollout(**ids, problem_id=None if identity is None else str(identity))


def _response(value: Any) -> str | None:
    """A response as text: a text, or the content of the one message that a list holds; None for any other value."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    return value if isinstance(value, str) else None
