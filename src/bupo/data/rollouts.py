"""Reads responses files: sampled responses with their token ids, for analysis."""

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bupo.data.problems import Prompt, as_prompt, read_rows
from bupo.data.prompts import prompt_ids as tokenize_prompt
from bupo.errors import InputError, shown


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
    prompt, response = None, _response(values["response"])
    if values["prompt_ids"] is None or values["response_ids"] is None:
        prompt = as_prompt(values["prompt"])
        if values["prompt"] is None or values["response"] is None:
            columns = ", ".join(map(str, row))
            raise InputError(f"needs prompt_ids and response_ids, or prompt and response; columns found: {columns}")
        if prompt is None:
            raise InputError(f"prompt must be text or a list of messages with content, not {shown(values['prompt'])}")
        if response is None:
            raise InputError(f"response must be text, not {shown(values['response'])}")
        if tokenizer is None:
            raise InputError("text without token ids, and there is no tokenizer")
        values["prompt_ids"] = tokenize_prompt(prompt, tokenizer, template)
        values["response_ids"] = list(tokenizer(response, add_special_tokens=False)["input_ids"])
    else:
        with suppress(InputError):  # the prompt is only shown
            prompt = as_prompt(values["prompt"])
    for name in ("prompt_ids", "response_ids"):
        ids = values[name]
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise InputError(f"{name} must be a list of token ids (integers from 0), not {shown(ids)}")
        if not ids:
            raise InputError(f"the {name.removesuffix('_ids')} is empty; remove the row")
    lengths = len(values["prompt_ids"]), len(values["response_ids"])
    if max_length is not None and sum(lengths) > max_length:
        counts = "{} prompt and {} response tokens".format(*lengths)
        raise InputError(f"{counts} exceed the model's context of {max_length}")
    identity = None if values["problem_id"] is None else str(values["problem_id"])
    numbers = {name: _number(name, values[name]) for name in ("sample", "reward")}
    sample = numbers["sample"] if numbers["sample"] is None else int(numbers["sample"])
    if sample != numbers["sample"]:
        raise InputError(f"sample must be a whole number, not {shown(values['sample'])}")
    texts = {"prompt": prompt, "response": response, "problem_id": identity}
    return Rollout(**{**values, **texts, "sample": sample, "reward": numbers["reward"]})


def _response(value: Any) -> str | None:
    """A response as text: a text, or the content of the one message that a list holds; None for any other value."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    return value if isinstance(value, str) else None


def _number(name: str, value: Any) -> float | None:
    """A finite number, also one written as text; None for none."""
    with suppress(TypeError, ValueError, OverflowError):
        if value is None or math.isfinite(number := float(value)):
            return None if value is None else number
    raise InputError(f"{name} must be a finite number, not {shown(value)}")
