"""Problems: what is asked and what the answer is, from files, the hub, generators and reasoning-gym.

Every source becomes a list of `Problem`; nothing later in the pipeline knows where one came from, except that
reasoning-gym problems carry the entry which their own scorer needs (``metadata["reasoning_gym"]``).
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bupo.errors import InputError
from bupo.schema import load_yaml

Prompt = str | list[dict[str, str]]

BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
TAGGED_INSTRUCTION = "Please reason step by step, and put your final answer within <answer> </answer> tags."

GENERATED_SIZE = 200  # problems drawn from a generator when no limit is given
_TEST_SEED_OFFSET = 1_000_003  # generated test problems never share a seed with generated training problems

_PROMPT_COLUMNS = ("prompt", "messages")  # used as they are
_QUESTION_COLUMNS = ("problem", "question")  # become a chat that asks for a boxed answer
_ANSWER_COLUMNS = ("answer", "final_answer", "ground_truth", "solution")
SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Problem:
    """One question with its gold answer."""

    id: str  # stable within a source, e.g. "math500/17"
    prompt: Prompt  # text, or chat messages [{"role", "content"}]
    answer: str  # gold answer; "" where the task scores by its own rule
    source: str  # the dataset spec it came from
    metadata: dict[str, Any] = field(default_factory=dict)  # JSON-able


def load_problems(spec: str, *, split: str | None = None, limit: int | None = None, seed: int = 0) -> list[Problem]:
    """Load problems by name.

    Args:
        spec: ``arithmetic`` or ``arithmetic-hard`` (built in), ``reasoning_gym/NAME`` (options of the task follow as
            ``/key=value``), a local ``.jsonl``, ``.json`` or ``.parquet`` file, or a hub dataset ``org/name``
            (``org/name:config`` for a configuration).
        split: hub split (default: ``test`` if there is one, else ``train``); for generated problems ``train`` or
            ``test`` (default), which never overlap. Local files have one split, so it does not apply to them.
        limit: at most so many problems: the first of a file or hub split, or the number to generate
            (default `GENERATED_SIZE`).
        seed: of generated problems; files are never shuffled.

    Raises:
        InputError: no such file, dataset or task, missing columns, or nothing in it.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, not {limit}")
    if spec in ("arithmetic", "arithmetic-hard"):
        return _arithmetic(spec, split or "test", limit or GENERATED_SIZE, seed)
    if spec.startswith("reasoning_gym/"):
        return _reasoning_gym(spec, split or "test", limit or GENERATED_SIZE, seed)
    path = Path(spec).expanduser()
    if path.suffix.lower() in SUFFIXES or path.exists():
        return load_file(path, limit=limit)
    return _hub(spec, split, limit)


def load_file(path: Path, *, name: str | None = None, limit: int | None = None) -> list[Problem]:
    """Problems of a local file; ids are ``name/row`` (default name: the file's stem)."""
    rows = read_rows(path)
    return problems_from_rows(rows[:limit], name=name or path.stem, source=str(path))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``.jsonl``, ``.json`` (a list of objects) or ``.parquet`` file as dictionaries.

    Raises:
        InputError: missing, a folder, of another kind, damaged, or empty.
    """
    if not path.exists():
        raise InputError(f"no such file: {path}")
    if not path.is_file():
        raise InputError(f"{path} is a folder; name a {', '.join(SUFFIXES)} file")
    suffix = path.suffix.lower()
    rows: list[dict[str, Any]]
    try:
        if suffix == ".parquet":
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(path).to_pylist()
        elif suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        elif suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
        else:
            raise InputError(f"{path}: files must end in {', '.join(SUFFIXES)}")
    except (ValueError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as {suffix[1:]}: {str(error).splitlines()[0]}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} must hold a list of objects, one per row")
    if not rows:
        raise InputError(f"{path} is empty: no rows")
    return rows


def problems_from_rows(rows: Iterable[Mapping[str, Any]], *, name: str, source: str) -> list[Problem]:
    """Turn rows with any of the usual column names into problems.

    A prompt is ``prompt`` or ``messages`` (used as it is), or ``problem`` or ``question`` (asked as a chat with the
    instruction to box the answer). An answer is ``answer``, ``final_answer``, ``ground_truth``,
    ``reward_model.ground_truth`` or ``solution`` (its last ``\\boxed{}``, or what follows ``####``); a list of answers
    is joined by commas.
    """
    problems: list[Problem] = []
    for index, row in enumerate(rows):
        prompt = _prompt(row)
        answer = _answer(row)
        if prompt is None or answer is None:
            missing = " and ".join(
                text
                for text, value in (
                    (f"a prompt column ({', '.join(_PROMPT_COLUMNS + _QUESTION_COLUMNS)})", prompt),
                    (f"an answer column ({', '.join(_ANSWER_COLUMNS)} or reward_model.ground_truth)", answer),
                )
                if value is None
            )
            raise InputError(f"{source}: row {index} lacks {missing}; columns found: {', '.join(map(str, row))}")
        identity = row.get("id", row.get("unique_id"))
        identity = index if identity is None else identity
        problems.append(Problem(id=f"{name}/{identity}", prompt=prompt, answer=answer, source=source))
    if not problems:
        raise InputError(f"{source} is empty: no rows")
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise InputError(f"{source}: two rows have the id {problem.id}")
        seen.add(problem.id)
    return problems


def last_boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{...}`` (or ``\\fbox{...}``), braces matched; None if absent or never closed."""
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
    depth, cursor = 0, position
    for found in re.finditer(r"\\.|[{}]", text[position:], re.DOTALL):
        mark = found.group()
        depth += {"{": 1, "}": -1}.get(mark, 0)
        if depth == 0:
            cursor = position + found.start()
            return text[position + 1 : cursor]
    return None


def _prompt(row: Mapping[str, Any]) -> Prompt | None:
    for column in _PROMPT_COLUMNS:
        value = row.get(column)
        if isinstance(value, str) and value:
            return value
        if isinstance(value, list) and value and all(isinstance(m, Mapping) and "content" in m for m in value):
            return [{"role": str(m.get("role", "user")), "content": str(m["content"])} for m in value]
    for column in _QUESTION_COLUMNS:
        value = row.get(column)
        if isinstance(value, str) and value:
            return [{"role": "system", "content": BOXED_INSTRUCTION}, {"role": "user", "content": value}]
    return None


def _answer(row: Mapping[str, Any]) -> str | None:
    nested = row.get("reward_model")
    if isinstance(nested, Mapping) and nested.get("ground_truth") is not None:
        return str(nested["ground_truth"])
    for column in _ANSWER_COLUMNS:
        value = row.get(column)
        if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
            value = ", ".join(value)  # OlympiadBench keeps its answer in a list, mostly of one
        if value is None or isinstance(value, list | Mapping):
            continue
        text = str(value)
        if "####" in text:
            return text.rsplit("####", 1)[1].strip()
        if column == "solution" or "\\boxed" in text:
            boxed = last_boxed(text)
            if boxed is not None:
                return boxed
            if column == "solution":
                continue
        return text
    return None


def _generated_seed(seed: int, split: str) -> int:
    if split not in ("train", "test"):
        raise InputError(f"generated problems have the splits train and test, not {split!r}")
    return seed + (_TEST_SEED_OFFSET if split == "test" else 0)


def _arithmetic(spec: str, split: str, limit: int, seed: int) -> list[Problem]:
    from bupo.data import arithmetic

    _generated_seed(seed, split)  # only checks the split: the generator keeps its splits apart itself
    level = "hard" if spec.endswith("-hard") else "standard"
    rows = arithmetic.problems(limit, seed=seed, split=split, level=level)
    return [Problem(id=r["id"], prompt=r["prompt"], answer=str(r["answer"]), source=spec) for r in rows]


def _reasoning_gym(spec: str, split: str, limit: int, seed: int) -> list[Problem]:
    import reasoning_gym

    name, *changes = spec.split("/")[1:]
    known = sorted(set(reasoning_gym.factory.DATASETS) - {"composite"})
    if name not in known:
        import difflib

        near = difflib.get_close_matches(name, known, n=3) or known[:3]
        raise InputError(f"reasoning_gym has no task {name!r}; did you mean {', '.join(near)}? ({len(known)} tasks)")
    options = _task_options(name, changes)
    state = random.getstate()  # some tasks draw from the global generator
    try:
        random.seed(_generated_seed(seed, split))
        try:
            data = reasoning_gym.create_dataset(name, size=limit, seed=_generated_seed(seed, split), **options)
        except (AssertionError, ValueError, TypeError) as error:  # the task's own checks
            raise InputError(f"{spec}: the task refuses these options ({' '.join(str(error).split())})") from error
        entries = [data[index] for index in range(limit)]
    finally:
        random.setstate(state)
    return [
        Problem(
            id=f"{spec}/{split}-{seed}-{index}",
            prompt=[
                {"role": "system", "content": TAGGED_INSTRUCTION},
                {"role": "user", "content": str(entry["question"])},
            ],
            answer="" if entry["answer"] is None else str(entry["answer"]),
            source=spec,
            metadata={"reasoning_gym": {"task": name, "entry": pack(entry)}},
        )
        for index, entry in enumerate(entries)
    ]


def _task_options(name: str, changes: Sequence[str]) -> dict[str, Any]:
    """``key=value`` parts of a spec as options of a reasoning-gym task."""
    from reasoning_gym.factory import DATASETS

    known = {f.name for f in dataclasses.fields(DATASETS[name][1])} - {"size", "seed"}
    options = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or key not in known:
            valid = ", ".join(sorted(known))
            raise InputError(f"reasoning_gym/{name} has no option {change!r}; write /key=value with one of {valid}")
        options[key] = load_yaml(value, f"option {key}")
    return options


def _hub(spec: str, split: str | None, limit: int | None) -> list[Problem]:
    """A dataset of the hub, through `datasets` (its cache works offline)."""
    name, _, config = spec.partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(
            f"unknown dataset {spec!r}: give a built-in name (arithmetic, arithmetic-hard), reasoning_gym/NAME, "
            f"a {', '.join(SUFFIXES)} file, or a hub dataset org/name"
        )
    import datasets

    try:
        names = datasets.get_dataset_split_names(name, config or None)
        chosen = split or ("test" if "test" in names else "train" if "train" in names else names[0])
        if chosen not in names:
            raise InputError(f"{name} has the splits {', '.join(map(str, names))}, not {chosen!r}")
        data = datasets.load_dataset(name, config or None, split=chosen)
    except InputError:
        raise
    except Exception as error:  # the hub client raises many kinds: offline, missing, gated, wrong configuration
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"dataset {spec!r} cannot be loaded from the hub ({reason}); check the name and the connection, "
            "or download it and pass a local file"
        ) from error
    rows = data.select(range(min(limit, len(data)))) if limit is not None else data
    return problems_from_rows(rows, name=name.rsplit("/", 1)[-1].lower(), source=spec)


def pack(value: Any) -> Any:
    """JSON-able form of a nested value that keeps tuples and non-string keys (scorers look at them)."""
    if isinstance(value, tuple):
        return {"__tuple__": [pack(item) for item in value]}
    if isinstance(value, list):
        return [pack(item) for item in value]
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value) and not {"__tuple__", "__items__"} & set(value):
            return {key: pack(item) for key, item in value.items()}
        return {"__items__": [[pack(key), pack(item)] for key, item in value.items()]}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return str(value)


def unpack(value: Any) -> Any:
    """Undo `pack`."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if isinstance(value, dict):
        if "__tuple__" in value:
            return tuple(unpack(item) for item in value["__tuple__"])
        if "__items__" in value:
            return {unpack(key): unpack(item) for key, item in value["__items__"]}
        return {key: unpack(item) for key, item in value.items()}
    return value
