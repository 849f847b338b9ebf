"""The benchmarks: one small entry each, with the paper's protocol as its defaults (arXiv 2512.19673).

A new benchmark is a new entry. Its scorer follows from its problems: reasoning-gym's own for ``reasoning_gym/NAME``,
math-verify on the last ``\\boxed{}`` for everything else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bupo.data.problems import SUFFIXES, Problem, load_file, load_problems
from bupo.errors import InputError

DEFAULT_K = 16
DEFAULT_NEW_TOKENS = 7168  # the paper's response length for Qwen models


@dataclass(frozen=True)
class Task:
    """A benchmark: where its problems are and how it is measured unless told otherwise."""

    name: str
    spec: str | None = None  # what `load_problems` takes, where that is not the name itself
    hub: str | None = None  # hub dataset, "org/name" or "org/name:config"
    split: str | None = None
    files: tuple[str, ...] = ()  # usual file names in a data folder, without suffix
    k: int = DEFAULT_K  # of Avg@K
    template: str = "auto"
    max_new_tokens: int = DEFAULT_NEW_TOKENS


TASKS = {
    task.name: task
    for task in (
        Task("math500", hub="HuggingFaceH4/MATH-500", split="test", files=("math500", "math_500", "MATH-500"), k=16),
        Task("amc23", hub="math-ai/amc23", split="test", files=("amc23", "amc2023", "amc_2023"), k=16),
        Task("aime24", hub="math-ai/aime24", split="test", files=("aime24", "aime2024", "aime_2024"), k=32),
        Task("aime25", hub="math-ai/aime25", split="test", files=("aime25", "aime2025", "aime_2025"), k=32),
        Task(
            "minerva", hub="math-ai/minervamath", split="test", files=("minerva", "minerva_math", "minervamath"), k=16
        ),
        Task(
            "olympiadbench", hub="math-ai/olympiadbench", split="test", files=("olympiadbench", "olympiad_bench"), k=16
        ),
        Task("arithmetic", k=16, max_new_tokens=256),
        Task("arithmetic-hard", k=16, max_new_tokens=256),
    )
}


def find_task(spec: str) -> Task:
    """The entry of a name, or an entry made for any other dataset spec (`load_problems` says what those are).

    A file's task is called by the file's name without folder and suffix.
    """
    if spec in TASKS:
        return TASKS[spec]
    path = Path(spec).expanduser()
    return Task(path.stem, spec=spec) if path.suffix.lower() in SUFFIXES else Task(spec)


def task_problems(
    task: Task, *, data_dir: Path | None = None, limit: int | None = None, seed: int = 0
) -> list[Problem]:
    """Problems of a task, with ids that start with its name.

    A named benchmark is looked for in ``data_dir`` first (``math500.parquet``, ``.jsonl`` or ``.json``, also under its
    other usual names), then on the hub.

    Raises:
        InputError: not there, not reachable, or without the needed columns.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise InputError(f"data folder {data_dir} does not exist")
    if task.hub is None:
        return load_problems(task.spec or task.name, limit=limit, seed=seed)
    if data_dir is not None:
        for stem in task.files:
            for suffix in (".parquet", ".jsonl", ".json"):
                if (path := data_dir / f"{stem}{suffix}").is_file():
                    return load_file(path, name=task.name, limit=limit)
    try:
        found = load_problems(task.hub, split=task.split, limit=limit)
        return [replace(problem, id=f"{task.name}/{problem.id.split('/', 1)[1]}") for problem in found]
    except InputError as error:
        where = f" (not in {data_dir} either)" if data_dir is not None else ""
        raise InputError(
            f"task {task.name}: {error}{where}; a file {task.files[0]}.parquet or .jsonl in --data-dir is used as well"
        ) from error
