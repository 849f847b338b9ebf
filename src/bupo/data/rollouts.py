"""Responses files: sampled responses with their token ids, read for analysis and regrading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bupo.data.problems import Prompt, read_rows
from bupo.data.prompts import prompt_ids as tokenize_prompt
from bupo.errors import InputError


@dataclass(frozen=True)
class Rollout:
    """One response to one prompt, in tokens and (where the file has it) in text."""

    prompt_ids: list[int]  # (P,)
    response_ids: list[int]  # (R,), including the end-of-sequence token that ended it
    prompt: Prompt | None = None
    response: str | None = None
    problem_id: str | None = None
    sample: int | None = None
    reward: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # the row's other columns


def read_responses(
    path: str | Path, tokenizer: Any = None, template: str = "auto", max_length: int | None = None
) -> list[Rollout]:
    """Read a ``.jsonl``, ``.json`` or ``.parquet`` responses file.

    A row has ``prompt_ids`` and ``response_ids``, or ``prompt`` and ``response``, which are tokenized here (no
    special token is added to a response).

    Args:
        max_length: the model's context; a longer prompt + response is an error, as cutting it would change the result.

    Raises:
        InputError: no such file, missing columns, an empty response, a row longer than ``max_length``.
    """
    path = Path(path)
    rollouts = []
    for index, row in enumerate(read_rows(path)):
        rollout = _rollout(path, index, row, tokenizer, template)
        total = len(rollout.prompt_ids) + len(rollout.response_ids)
        if not rollout.prompt_ids or not rollout.response_ids:
            what = "prompt" if not rollout.prompt_ids else "response"
            raise InputError(f"{path}: row {index} has an empty {what}; remove the row")
        if max_length is not None and total > max_length:
            raise InputError(
                f"{path}: row {index} has {len(rollout.prompt_ids)} prompt and {len(rollout.response_ids)} response "
                f"tokens, more than the model's context of {max_length}; remove or shorten it"
            )
        rollouts.append(rollout)
    return rollouts


_KNOWN = {"prompt_ids", "response_ids", "prompt", "response", "problem_id", "sample", "reward"}


def _rollout(path: Path, index: int, row: dict[str, Any], tokenizer: Any, template: str) -> Rollout:
    has_ids = row.get("prompt_ids") is not None and row.get("response_ids") is not None
    has_text = row.get("prompt") is not None and row.get("response") is not None
    if not has_ids and not has_text:
        raise InputError(
            f"{path}: row {index} needs prompt_ids and response_ids, or prompt and response; "
            f"columns found: {', '.join(map(str, row))}"
        )
    if has_ids:
        prompt_tokens = _integers(path, index, "prompt_ids", row["prompt_ids"])
        response_tokens = _integers(path, index, "response_ids", row["response_ids"])
    else:
        if tokenizer is None:
            raise InputError(f"{path}: row {index} has text but no token ids, and no tokenizer was given")
        prompt_tokens = tokenize_prompt(row["prompt"], tokenizer, template)
        response_tokens = list(tokenizer(row["response"], add_special_tokens=False)["input_ids"])
    reward, sample, identity = row.get("reward"), row.get("sample"), row.get("problem_id")
    return Rollout(
        prompt_ids=prompt_tokens,
        response_ids=response_tokens,
        prompt=row.get("prompt"),
        response=row.get("response"),
        problem_id=None if identity is None else str(identity),
        sample=None if sample is None else int(sample),
        reward=None if reward is None else float(reward),
        extra={key: value for key, value in row.items() if key not in _KNOWN},
    )


def _integers(path: Path, index: int, column: str, values: Any) -> list[int]:
    if isinstance(values, Sequence) and not isinstance(values, str) and all(type(v) is int and v >= 0 for v in values):
        return list(values)
    raise InputError(f"{path}: row {index}: {column} must be a list of token ids (integers from 0)")
