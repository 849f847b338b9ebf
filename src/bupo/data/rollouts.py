"""Reads responses files: sampled responses with their token ids, for analysis."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bupo.data.problems import Prompt, read_rows
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
    """Read a ``.jsonl``, ``.json`` or ``.parquet`` responses file.

    A row has ``prompt_ids`` and ``response_ids``, or ``prompt`` and ``response``, which are tokenized here (without
    special tokens after a response).

    Args:
        max_length: the model's context. A longer prompt with its response is an error, as truncating it would change
            the result.

    Raises:
        InputError: the file cannot be read, or a row lacks columns, is empty, too long, or of the wrong type.
    """
    rollouts = []
    for index, row in enumerate(read_rows(Path(path))):
        where = f"{path}: row {index}"
        rollout = _rollout(where, row, tokenizer, template)
        prompt, response = len(rollout.prompt_ids), len(rollout.response_ids)
        if not prompt or not response:
            raise InputError(f"{where} has an empty {'response' if prompt else 'prompt'}; remove the row")
        if max_length is not None and prompt + response > max_length:
            raise InputError(
                f"{where} has {prompt} prompt and {response} response tokens, more than the model's context of "
                f"{max_length}; remove or shorten it"
            )
        rollouts.append(rollout)
    return rollouts


def _rollout(where: str, row: dict[str, Any], tokenizer: Any, template: str) -> Rollout:
    values: dict[str, Any] = {
        name: row.get(name) for name in ("prompt_ids", "response_ids", "prompt", "response", "reward", "sample")
    }
    if values["prompt_ids"] is not None and values["response_ids"] is not None:
        for name in ("prompt_ids", "response_ids"):
            ids = values[name]
            if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
                raise InputError(f"{where}: {name} must be a list of token ids (integers from 0)")
    elif values["prompt"] is None or values["response"] is None:
        raise InputError(
            f"{where} needs prompt_ids and response_ids, or prompt and response; "
            f"columns found: {', '.join(map(str, row))}"
        )
    elif tokenizer is None:
        raise InputError(f"{where} has text but no token ids, and there is no tokenizer")
    else:
        values["prompt_ids"] = tokenize_prompt(values["prompt"], tokenizer, template)
        values["response_ids"] = list(tokenizer(values["response"], add_special_tokens=False)["input_ids"])
    for name, kind in (("reward", float), ("sample", int)):
        try:
            values[name] = None if values[name] is None else kind(values[name])
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}: {name} must be a number, not {values[name]!r}") from error
    identity = row.get("problem_id")
    return Rollout(**values, problem_id=None if identity is None else str(identity))
