"""Reads responses files: sampled responses with their token ids, for analysis."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bupo.data.problems import Prompt, plain_messages, read_rows
from bupo.data.prompts import prompt_ids as tokenize_prompt
from bupo.errors import InputError


@dataclass(frozen=True)
class Rollout:
    """One response to one prompt as token ids and, if the file has it, as text."""

    prompt_ids: list[int]
    response_ids: list[int]  # including the end-of-sequence token that ended it
    prompt: Prompt | None = None
    response: str | None = None
    problem_id: str | None = None
    sample: int | None = None
    reward: float | None = None


def read_responses(
    path: str | Path, tokenizer: Any = None, template: str = "auto", max_length: int | None = None
) -> list[Rollout]:
    """Read a ``.jsonl``, ``.json`` or ``.parquet`` responses file; `InputError` names the row.

    A row has ``prompt_ids`` and ``response_ids``, or ``prompt`` and ``response``, which are tokenized here. More than
    ``max_length`` tokens are an error: truncating would change the result.
    """
    rollouts = []
    for index, row in enumerate(read_rows(Path(path))):
        try:
            rollouts.append(_rollout(row, tokenizer, template, max_length))
        except InputError as error:
            raise InputError(f"{path}: row {index}: {error}") from error
    return rollouts


def _rollout(row: dict[str, Any], tokenizer: Any, template: str, max_length: int | None) -> Rollout:
    values: dict[str, Any] = {name: row.get(name) for name in Rollout.__dataclass_fields__}
    if values["prompt_ids"] is None or values["response_ids"] is None:
        if values["prompt"] is None or values["response"] is None:
            columns = ", ".join(map(str, row))
            raise InputError(f"needs prompt_ids and response_ids, or prompt and response; columns found: {columns}")
        if tokenizer is None:
            raise InputError("text without token ids, and there is no tokenizer")
        if isinstance(values["prompt"], list):
            values["prompt"] = plain_messages(values["prompt"])
        values["prompt_ids"] = tokenize_prompt(values["prompt"], tokenizer, template)
        values["response_ids"] = list(tokenizer(values["response"], add_special_tokens=False)["input_ids"])
    for name in ("prompt_ids", "response_ids"):
        ids = values[name]
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise InputError(f"{name} must be a list of token ids (integers from 0)")
        if not ids:
            raise InputError(f"the {name.removesuffix('_ids')} is empty; remove the row")
    prompt, response = len(values["prompt_ids"]), len(values["response_ids"])
    if max_length is not None and prompt + response > max_length:
        raise InputError(f"{prompt} prompt and {response} response tokens exceed the model's context of {max_length}")
    for name, kind in (("reward", float), ("sample", int), ("problem_id", str)):
        try:
            values[name] = None if values[name] is None else kind(values[name])
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} must be a number, not {values[name]!r}") from error
    return Rollout(**values)
