"""Loads problems (a prompt and its gold answer) from files, the Hugging Face hub and generators.

Nothing later depends on the source, except that reasoning-gym problems carry what their own scorer needs.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet

from bupo.data import generators
from bupo.data.answers import last_boxed
from bupo.errors import InputError, shown

Prompt = str | list[dict[str, str]]
BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
GENERATED_SIZE = 200  # problems drawn from a generator when no limit is set
SUFFIXES = (".jsonl", ".json", ".parquet")
ANSWER_COLUMNS = ("reward_model", "answer", "final_answer", "ground_truth", "solution")
_PROMPTS_ARE = "a prompt column (prompt, messages, problem, question)"
_ANSWERS_ARE = "an answer column (answer, final_answer, ground_truth, solution or reward_model.ground_truth)"


@dataclass(frozen=True)
class Problem:
    """One prompt with its gold answer."""

    id: str  # stable within a source, e.g. "math500/17"
    prompt: Prompt  # text, or chat messages [{"role", "content"}]
    answer: str  # gold answer; "" where the task has its own scorer
    source: str  # the dataset name that was loaded
    metadata: dict[str, Any] = field(default_factory=dict)  # JSON-serialisable


def load_problems(spec: str, *, split: str | None = None, limit: int | None = None, seed: int = 0) -> list[Problem]:
    """Load problems by name; raises `InputError` if they do not exist, lack columns, or are empty.

    Args:
        spec: ``arithmetic`` or ``arithmetic-hard``, ``reasoning_gym/NAME`` (followed by the task's options as
            ``/key=value``), a ``.jsonl``, ``.json`` or ``.parquet`` file, or a hub dataset ``org/name[:config]``.
        split: of the hub (default: ``test`` if it exists, else ``train``), or of generated problems (``train`` or
            ``test``, the default, which never overlap); ignored for files.
        limit: the first rows, or the number to generate (default `GENERATED_SIZE`) with ``seed``.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, not {limit}")
    if spec in generators.BUILT_IN or spec.startswith("reasoning_gym/"):
        rows = generators.generate(spec, split or "test", limit or GENERATED_SIZE, seed)
        return [Problem(**row, source=spec) for row in rows]
    path = Path(spec).expanduser()
    if path.suffix.lower() in SUFFIXES or path.exists():
        return load_file(path, limit=limit)
    name = spec.partition(":")[0].rsplit("/", 1)[-1].lower()
    return _problems(_hub_rows(spec, split, limit), name=name, source=spec)


def load_file(path: Path, *, name: str | None = None, limit: int | None = None) -> list[Problem]:
    """Load the problems of a local file; ids are ``name/row`` (default name: the file's stem)."""
    return _problems(read_rows(path)[:limit], name=name or path.stem, source=str(path))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a ``.jsonl``, ``.json`` (a list of objects) or ``.parquet`` file, or raise `InputError`.

    JSON is read with the standard library: Arrow's reader, which `datasets` uses, turns texts that look like dates into
    timestamps and long whole numbers into floats, and so would change gold answers.
    """
    if not path.is_file():
        raise InputError(f"{path} is a folder; name a file in it" if path.exists() else f"no such file: {path}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: files must end in {', '.join(SUFFIXES)}")
    where = ""
    try:
        if suffix == ".parquet":
            rows = pyarrow.parquet.read_table(path).to_pylist()
        elif suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        else:
            rows = []
            for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
                where = f" in line {number}"
                rows += [json.loads(line)] if line.strip() else []
            where = ""
    except (ValueError, OSError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        if isinstance(error, json.JSONDecodeError) and where:
            reason = f"{error.msg} at column {error.colno}"
        elif isinstance(error, RecursionError):
            reason = "nested too deeply"
        raise InputError(f"{path} cannot be read as {suffix[1:]}{where}: {reason}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} is empty, or not a list of objects, one per row")
    if suffix != ".parquet":
        _check_texts(rows, path)
    return rows


def _check_texts(rows: list[dict[str, Any]], path: Path) -> None:
    """Raise `InputError` for text that no tokenizer and no file takes: JSON may hold one half of a surrogate pair."""
    for index, row in enumerate(rows):
        for column, value in row.items():
            try:
                json.dumps({column: value}, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = f"{error.object[error.start]!a}, half of a character (an unpaired surrogate)"
                raise InputError(f"{path}: row {index}: {column!a} holds {half}; correct or remove the row") from error


def _problems(rows: Iterable[Mapping[str, Any]], *, name: str, source: str) -> list[Problem]:
    problems: dict[str, Problem] = {}
    for index, row in enumerate(rows):
        try:
            prompt, answer = _prompt(row), gold_answer(row)
        except InputError as error:
            raise InputError(f"{source}: row {index}: {error}") from error
        if prompt is None or answer is None:
            lacking = " and ".join([_PROMPTS_ARE] * (prompt is None) + [_ANSWERS_ARE] * (answer is None))
            raise InputError(f"{source}: row {index} lacks {lacking}; columns found: {', '.join(map(str, row))}")
        identity = row.get("id", row.get("unique_id"))
        problem = Problem(f"{name}/{index if identity is None else identity}", prompt, answer, source)
        if problem.id in problems:
            raise InputError(f"{source}: two rows have the id {problem.id}")
        problems[problem.id] = problem
    return list(problems.values())


def as_prompt(value: Any) -> Prompt | None:
    """A text or a list of messages as a prompt, or None; raises the errors of `plain_messages`."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(turn, Mapping) and "content" in turn for turn in value):
        return plain_messages(value)
    return None


def _prompt(row: Mapping[str, Any]) -> Prompt | None:
    """Return ``prompt`` or ``messages`` unchanged, or ask ``problem`` or ``question`` for a boxed answer."""
    for value in filter(None, map(row.get, ("prompt", "messages"))):
        if (prompt := as_prompt(value)) is not None:
            return prompt
    for value in filter(None, map(row.get, ("problem", "question"))):
        if isinstance(value, str):
            return [{"role": "system", "content": BOXED_INSTRUCTION}, {"role": "user", "content": value}]
    return None


def plain_messages(messages: Iterable[Any]) -> list[dict[str, str]]:
    """Messages with their text parts joined; `InputError` for what a chat template would show as Python text."""
    plain = []
    for number, turn in enumerate(messages, start=1):
        content = turn.get("content") if isinstance(turn, Mapping) else None
        parts = content if isinstance(content, list) and content else [content]
        texts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
        other = any(part.get("type", "text") != "text" for part in parts if isinstance(part, Mapping))
        if other or not all(isinstance(text, str) for text in texts):
            raise InputError(f"content of message {number} must be text or a list of text parts, not {shown(content)}")
        plain.append({"role": str(turn.get("role") or "user"), "content": "".join(texts)})
    if plain[-1:] and plain[-1]["role"] == "assistant":
        raise InputError("the last message is the assistant's, which the model would be shown; end with the user's")
    return plain


def gold_answer(row: Mapping[str, Any]) -> str | None:
    """The first answer in a row's `ANSWER_COLUMNS`; of a text, what follows ``####`` (GSM8K) or its last box."""
    nested = row.get("reward_model")
    row = {**row, "reward_model": nested.get("ground_truth") if isinstance(nested, Mapping) else None}
    for column in ANSWER_COLUMNS:
        value = row.get(column)
        if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
            value = ", ".join(value)  # OlympiadBench keeps its answers in lists, most of length one
        if value is None or isinstance(value, list | Mapping):
            continue
        text = str(value)
        if "####" in text:
            return text.rsplit("####", 1)[1].strip()
        boxed = last_boxed(text)
        if boxed is not None or column != "solution":
            return text if boxed is None else boxed
    return None


def _hub_rows(spec: str, split: str | None, limit: int | None) -> datasets.Dataset:
    name, _, config = spec.partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        known = f"{', '.join(generators.BUILT_IN)}, reasoning_gym/NAME, a {', '.join(SUFFIXES)} file"
        raise InputError(f"unknown dataset {spec!r}: use one of {known}, or a hub dataset org/name")
    try:
        splits = datasets.get_dataset_split_names(name, config or None)
        usual = [one for one in ("test", "train", *splits) if one in splits]
        data = datasets.load_dataset(name, config or None, split=split or usual[0])
        return data if limit is None else data.select(range(min(limit, len(data))))
    except Exception as error:  # the hub client raises many kinds: offline, missing, gated, wrong configuration
        reason = (str(error) or type(error).__name__).splitlines()[0]
        advice = "check the name and the connection, or download it and pass a local file"
        raise InputError(f"dataset {spec!r} cannot be loaded from the hub ({reason}); {advice}") from error
