"""What is evaluated: the benchmarks, with the paper's protocol as defaults (arXiv 2512.19673), and the settings."""

import hashlib
import re
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from bupo.data.problems import SUFFIXES, Problem, load_file, load_problems
from bupo.errors import ConfigError, InputError


@dataclass(frozen=True)
class Task:
    """A benchmark: where its problems come from (which decides the scorer), and the defaults of its measurement."""

    name: str
    hub: str | None = None  # hub dataset
    files: tuple[str, ...] = ()  # usual file names in a data folder, without suffix
    k: int = 16  # K of Avg@K
    template: str = "auto"
    max_new_tokens: int = 7168  # the paper's response length for Qwen models
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
    """Return the benchmark of a name, or a task for any other dataset; a file's task has its name without suffix."""
    path = Path(spec).expanduser()
    return TASKS.get(spec) or Task(path.stem if path.suffix.lower() in SUFFIXES else spec, spec=spec)


def task_problems(task: Task, data_dir: Path | None = None, limit: int | None = None, seed: int = 0) -> list[Problem]:
    """Load the problems of a task, with ids that start with its name: from ``data_dir`` if it is there, or the hub."""
    if data_dir is not None and not data_dir.is_dir():
        raise InputError(f"data folder {data_dir} does not exist")
    if task.hub is None:
        return load_problems(task.spec or task.name, limit=limit, seed=seed)
    names = [stem + suffix for stem, suffix in product(task.files, (".parquet", ".jsonl", ".json"))]
    files = [data_dir / name for name in names if (data_dir / name).is_file()] if data_dir else []
    if files:
        return load_file(files[0], name=task.name, limit=limit)
    try:
        problems = load_problems(task.hub, split="test", limit=limit)
    except InputError as error:
        where = f" (and it is not in {data_dir})" if data_dir is not None else ""
        remedy = f"a file {task.files[0]}.parquet or .jsonl in --data-dir is used as well"
        raise InputError(f"task {task.name}: {error}{where}; {remedy}") from error
    return [replace(problem, id=f"{task.name}/{problem.id.split('/', 1)[1]}") for problem in problems]


@dataclass(frozen=True)
class EvalConfig:
    """What decides which responses are drawn and how they are summarised; `ConfigError` lists invalid settings."""

    model: str
    tasks: tuple[str, ...]
    k: int | None = None  # K of Avg@K; each task's own by default
    n: int | None = None  # samples per problem; k by default
    limit: int | None = None  # problems per task
    data_dir: str | None = None
    template: str | None = None  # each task's own by default
    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 64
    engine: str = "transformers"
    dtype: str = "auto"
    internal_layer: int | None = None
    internal_lens: str = "raw"
    revision: str | None = None
    fingerprint: str | None = None  # of a local model folder's weights
    shard: str | None = None  # "i/n": only the i-th of n equal parts of each task's problems

    def __post_init__(self) -> None:
        names, k, n = [find_task(spec).name for spec in self.tasks], self.k or 0, self.n or 0
        shard = re.fullmatch(r"(\d+)/(\d+)", self.shard or "1/1")
        checks = (
            (names, "name at least one task"),
            (len(set(names)) == len(names), f"two tasks have the same name: {', '.join(names)}"),
            (0 < self.top_p <= 1, f"top_p must lie in (0, 1], not {self.top_p}"),
            (self.temperature > 0 or self.top_p == 1, "top_p has no effect with temperature 0; leave it out"),
            (
                not self.data_dir or any(find_task(s).hub for s in self.tasks),
                "data_dir holds benchmarks; name one as a task",
            ),
            (not 0 < n < k, f"Avg@{k} needs at least {k} samples per problem, not n={n}"),
            (self.internal_layer or self.internal_lens == "raw", "--internal-lens needs --internal-layer"),
            (shard and 1 <= int(shard[1]) <= int(shard[2]), f"a shard is i/n with 1 <= i <= n, not {self.shard!r}"),
        )
        if problems := [text for right, text in checks if not right]:
            raise ConfigError(problems)

    @property
    def part(self) -> tuple[int, int]:
        """The number of this shard (from 1), and the number of shards."""
        number, count = (self.shard or "1/1").split("/")
        return int(number), int(count)

    def folder(self, output: Path, number: int | None = None) -> Path:
        """The folder that this evaluation writes: ``output``, or the folder of shard ``number`` below it."""
        own, count = self.part
        return output if self.shard is None else output / f"shard-{number or own}-of-{count}"


def fingerprint(folder: Path) -> str | None:
    """Hash the configuration and 64 blocks of each weights file of a model folder; None if it holds none."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as stream:
            for block in range(64):
                stream.seek(block * size // 64)
                digest.update(stream.read(4096))
    return digest.hexdigest()[:16] if files else None
