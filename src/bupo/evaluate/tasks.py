"""The benchmarks, with the paper's protocol as defaults (arXiv 2512.19673).

A new benchmark is a new entry. Its scorer follows from its problems: reasoning-gym's own for ``reasoning_gym/NAME``,
math-verify on the last ``\\boxed{}`` for everything else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from bupo.data.problems import SUFFIXES, Problem, load_file, load_problems
from bupo.errors import InputError

DEFAULT_K = 16
DEFAULT_NEW_TOKENS = 7168  # the paper's response length for Qwen models


@dataclass(frozen=True)
class Task:
    """A benchmark: where its problems come from, and the defaults of its measurement."""

    name: str
    hub: str | None = None  # hub dataset
    files: tuple[str, ...] = ()  # usual file names in a data folder, without suffix
    k: int = DEFAULT_K  # K of Avg@K
    template: str = "auto"
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    spec: str | None = None  # what `load_problems` takes, if that is not the name itself


_BENCHMARKS = (
    Task("math500", "HuggingFaceH4/MATH-500", ("math500", "math_500", "MATH-500")),
    Task("amc23", "math-ai/amc23", ("amc23", "amc2023", "amc_2023")),
    Task("aime24", "math-ai/aime24", ("aime24", "aime2024", "aime_2024"), k=32),
    Task("aime25", "math-ai/aime25", ("aime25", "aime2025", "aime_2025"), k=32),
    Task("minerva", "math-ai/minervamath", ("minerva", "minerva_math", "minervamath")),
    Task("olympiadbench", "math-ai/olympiadbench", ("olympiadbench", "olympiad_bench")),
    Task("arithmetic", max_new_tokens=256),
    Task("arithmetic-hard", max_new_tokens=256),
)
TASKS = {task.name: task for task in _BENCHMARKS}


def find_task(spec: str) -> Task:
    """Return the benchmark of a name, or a task for any other dataset that `load_problems` takes.

    The task of a file has the file's name without folder and suffix.
    """
    if spec in TASKS:
        return TASKS[spec]
    path = Path(spec).expanduser()
    return Task(path.stem if path.suffix.lower() in SUFFIXES else spec, spec=spec)


def task_problems(
    task: Task, *, data_dir: Path | None = None, limit: int | None = None, seed: int = 0
) -> list[Problem]:
    """Load the problems of a task, with ids that start with its name.

    A benchmark is looked for in ``data_dir`` first (``math500.parquet``, ``.jsonl`` or ``.json``, and under its other
    usual names), then on the hub.

    Raises:
        InputError: the problems are not there, cannot be downloaded, or lack columns.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise InputError(f"data folder {data_dir} does not exist")
    if task.hub is None:
        return load_problems(task.spec or task.name, limit=limit, seed=seed)
    for stem, suffix in product(task.files if data_dir else (), (".parquet", ".jsonl", ".json")):
        assert data_dir is not None
        if (path := data_dir / f"{stem}{suffix}").is_file():
            return load_file(path, name=task.name, limit=limit)
    try:
        problems = load_problems(task.hub, split="test", limit=limit)
    except InputError as error:
        where = f" (and it is not in {data_dir})" if data_dir is not None else ""
        raise InputError(
            f"task {task.name}: {error}{where}; a file {task.files[0]}.parquet or .jsonl in --data-dir is used as well"
        ) from error
    return [replace(problem, id=f"{task.name}/{problem.id.split('/', 1)[1]}") for problem in problems]
