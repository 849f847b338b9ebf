"""An evaluation from problems to results: sample (or go on sampling), keep every response, grade, summarise.

Files in the output folder: ``run.json`` (what was asked, written first), ``responses.partial.jsonl`` (grows batch by
batch while sampling), ``responses.parquet`` (every graded response) and ``results.json`` (written last, so that a
folder with it is a finished run).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bupo import run_folder as rundir
from bupo.data.grading import Grader
from bupo.data.problems import Problem
from bupo.errors import ConfigError, InputError
from bupo.evaluate.engines import Engine, Sampling, derived_seed, missing
from bupo.evaluate.results import SCHEMA, task_results
from bupo.evaluate.store import Key, Partial, write_responses
from bupo.evaluate.tasks import find_task, task_problems

RESULTS, RESPONSES, PARTIAL = "results.json", "responses.parquet", "responses.partial.jsonl"
_FILES = (RESULTS, RESPONSES, PARTIAL, rundir.RUN_FILE)
Say = Callable[[str], None]
Track = Callable[[str, int, int], None]  # task, responses made, responses in all


@dataclass(frozen=True)
class EvalConfig:
    """Everything that decides which responses are drawn, and how they are summarised; kept in ``run.json``."""

    model: str
    tasks: tuple[str, ...]
    k: int | None = None  # of Avg@K; each task's own by default
    n: int | None = None  # samples a problem; k by default
    limit: int | None = None
    data_dir: str | None = None
    template: str | None = None
    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 64
    engine: str = "transformers"
    dtype: str = "auto"
    internal_layer: int | None = None
    internal_norm: bool = False
    revision: str | None = None
    fingerprint: str | None = None  # of a local model folder's weights

    def __post_init__(self) -> None:
        problems = []
        if not self.tasks:
            problems.append("name at least one task")
        names = [find_task(spec).name for spec in self.tasks]
        if len(set(names)) != len(names):
            problems.append(f"two tasks have the same name: {', '.join(names)}")
        for name, value in (("k", self.k), ("n", self.n), ("limit", self.limit), ("batch size", self.batch_size)):
            if value is not None and value < 1:
                problems.append(f"{name} must be at least 1, not {value}")
        if self.n is not None and self.k is not None and self.n < self.k:
            problems.append(f"Avg@{self.k} needs at least {self.k} samples a problem, not n={self.n}")
        if self.internal_norm and self.internal_layer is None:
            problems.append("the internal norm needs an internal layer")
        if problems:
            raise ConfigError(problems)

    def check_output(self, output: Path, *, overwrite: bool = False) -> None:
        """Refuse a folder that cannot be used before a model is loaded; see `open_folder`."""
        if not overwrite:
            open_folder(self, output, overwrite=False)


@dataclass(frozen=True)
class Plan:
    """One task, ready to be sampled."""

    name: str
    problems: list[Problem]
    prompts: list[list[int]]
    texts: list[str]
    k: int
    n: int
    sampling: Sampling


def load_plans(config: EvalConfig, tokenizer: Any, context: int | None) -> list[Plan]:
    """Problems and prompts of every task; everything a user got wrong about them is found here, before sampling."""
    from bupo.data.prompts import prompt_ids, render_prompt

    plans = []
    for task in map(find_task, config.tasks):
        name = task.name
        data_dir = Path(config.data_dir).expanduser() if config.data_dir else None
        problems = task_problems(task, data_dir=data_dir, limit=config.limit, seed=config.seed)
        template = config.template or task.template
        prompts = [prompt_ids(problem.prompt, tokenizer, template) for problem in problems]
        longest = max(map(len, prompts))
        new_tokens = config.max_new_tokens
        if new_tokens is None:
            new_tokens = task.max_new_tokens if context is None else min(task.max_new_tokens, context - longest)
        if new_tokens < 1 or (context is not None and longest + new_tokens > context):
            remedy = "choose another model" if longest >= (context or 0) else "lower --max-new-tokens"
            raise InputError(
                f"task {name}: the longest prompt has {longest} tokens, and with {max(new_tokens, 1)} new ones that is "
                f"more than the model's context of {context}; {remedy}"
            )
        n = config.n or config.k or task.k
        sampling = Sampling(new_tokens, config.temperature, config.top_p, derived_seed(config.seed, name))
        texts = [render_prompt(problem.prompt, tokenizer, template) for problem in problems]
        plans.append(Plan(name, problems, prompts, texts, config.k or min(task.k, n), n, sampling))
    return plans


def open_folder(config: EvalConfig, output: Path, *, overwrite: bool) -> bool:
    """Claim the output folder; return whether an unfinished run of the same configuration goes on.

    Raises:
        InputError: it holds a finished run, another command's, or one that was started with other settings.
    """
    if overwrite:
        rundir.claim(output, overwrite=True)
        for name in _FILES:
            (output / name).unlink(missing_ok=True)
        return False
    run_file = output / rundir.RUN_FILE
    if not run_file.exists() or (output / RESULTS).exists():
        rundir.claim(output)
        return False
    earlier = json.loads(run_file.read_text(encoding="utf-8"))
    if earlier.get("command") != "eval":
        rundir.claim(output)
    before, now = earlier.get("config", {}), _plain(config)
    different = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if different:
        changes = ", ".join(f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in different)
        raise InputError(
            f"{output} holds an unfinished evaluation with other settings ({changes}); give the same settings to go on "
            "with it, choose another folder, or pass --overwrite"
        )
    return True


def evaluate(
    config: EvalConfig,
    engine: Engine,
    tokenizer: Any,
    output: Path,
    *,
    overwrite: bool = False,
    describe: dict[str, Any] | None = None,
    say: Say = lambda text: None,
    track: Track = lambda task, done, total: None,
) -> dict[str, Any]:
    """Run an evaluation and return what `results.json` says; an unfinished one in ``output`` is continued.

    Args:
        describe: more for ``run.json`` and ``results.json`` (model revision, engine version).
        say: told what happens, a line at a time. track: told the progress of sampling.

    Raises:
        InputError: see `load_plans` and `open_folder`. Nothing is written before those checks have passed.
    """
    plans = load_plans(config, tokenizer, engine.context)
    resumed = open_folder(config, output, overwrite=overwrite)
    if not resumed:
        rundir.write_json(output / rundir.RUN_FILE, rundir.describe_run("eval", _plain(config), **(describe or {})))
    rows: list[dict[str, Any]] = []
    with Partial(output / PARTIAL) as partial:
        if resumed:
            say(f"going on with {output}: {len(partial.responses)} responses are there")
        for plan in plans:
            _sample(plan, engine, partial, track)
    with Grader() as grader:
        for plan in plans:
            say(f"grading {plan.name}")
            rows += _grade_rows(_rows(plan, engine, partial.responses), _problems_of_rows(plan), grader)
    results = _summary(config, plans, rows, describe or {})
    write_responses(output / RESPONSES, rows)
    rundir.write_json(output / RESULTS, results)
    partial.path.unlink()
    return results


def regrade(folder: Path, *, say: Say = lambda text: None) -> dict[str, Any]:
    """Grade the kept responses of a finished evaluation again and rewrite its results; nothing is sampled.

    Raises:
        InputError: the folder holds no finished evaluation.
    """
    import pyarrow.parquet

    for name in (RESPONSES, rundir.RUN_FILE):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no finished evaluation: {name} is missing")
    rows = pyarrow.parquet.read_table(folder / RESPONSES).to_pylist()
    run = json.loads((folder / rundir.RUN_FILE).read_text(encoding="utf-8"))
    results_file = folder / RESULTS
    before = json.loads(results_file.read_text(encoding="utf-8")) if results_file.is_file() else {}
    problems = [
        Problem(row["problem_id"], row["prompt"], row["answer"], row["source"], json.loads(row["metadata"]))
        for row in rows
    ]
    say(f"grading {len(rows)} responses again")
    with Grader() as grader:
        fresh = _grade_rows(rows, problems, grader)
    changed = sum(old["status"] != new["status"] for old, new in zip(rows, fresh, strict=True))
    say(f"{changed} of {len(rows)} verdicts changed")
    earlier = before.get("tasks", {})
    seed = int(run["config"].get("seed", 0))
    names = list(dict.fromkeys(row["task"] for row in rows))
    tasks = {}
    for name in names:
        own = [row for row in fresh if row["task"] == name]
        samples = len({row["sample"] for row in own})
        k = earlier.get(name, {}).get("avg_at_k", {}).get("k", samples)
        tasks[name] = {**earlier.get(name, {}), **task_results(own, k=k, seed=seed)}
    results = {**before, "schema": SCHEMA, "tasks": tasks}
    write_responses(folder / RESPONSES, fresh)
    rundir.write_json(results_file, results)
    return results


def _plain(config: EvalConfig) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config)))


def _sample(plan: Plan, engine: Engine, partial: Partial, track: Track) -> None:
    """Make the batches that are not all there."""
    have = {
        (index, sample)
        for index, problem in enumerate(plan.problems)
        for sample in range(plan.n)
        if (plan.name, problem.id, sample) in partial.responses
    }
    total = len(plan.problems) * plan.n
    track(plan.name, len(have), total)
    for batch in missing(engine.plan(len(plan.problems), plan.n, plan.sampling.seed), have):
        responses = engine.run(plan.prompts, batch, plan.sampling)
        partial.add([(plan.name, plan.problems[index].id, sample) for index, sample in batch.items], responses)
        have.update(batch.items)
        track(plan.name, len(have), total)


def _problems_of_rows(plan: Plan) -> list[Problem]:
    return [problem for problem in plan.problems for _ in range(plan.n)]


def _rows(plan: Plan, engine: Engine, responses: dict[Key, list[int]]) -> list[dict[str, Any]]:
    """Ungraded rows of a task, problem by problem."""
    rows = []
    for index, problem in enumerate(plan.problems):
        for sample in range(plan.n):
            response = responses[plan.name, problem.id, sample]
            rows.append(
                {
                    "task": plan.name,
                    "problem_id": problem.id,
                    "sample": sample,
                    "prompt": plan.texts[index],
                    "response": engine.decode(response),
                    "prompt_ids": plan.prompts[index],
                    "response_ids": response,
                    "length": len(response),
                    "finished": engine.is_finished(response),
                    "answer": problem.answer,
                    "source": problem.source,
                    "metadata": json.dumps(problem.metadata, ensure_ascii=False),
                }
            )
    return rows


def _grade_rows(rows: Sequence[dict[str, Any]], problems: Sequence[Problem], grader: Grader) -> list[dict[str, Any]]:
    grades = grader.grade([row["response"] for row in rows], problems)
    return [
        {**row, "reward": grade.reward, "status": grade.status, "extracted": grade.extracted}
        for row, grade in zip(rows, grades, strict=True)
    ]


def _summary(
    config: EvalConfig, plans: Sequence[Plan], rows: Sequence[dict[str, Any]], describe: dict[str, Any]
) -> dict[str, Any]:
    tasks = {}
    for plan in plans:
        tasks[plan.name] = {
            **task_results([row for row in rows if row["task"] == plan.name], k=plan.k, seed=config.seed),
            "max_new_tokens": plan.sampling.max_new_tokens,
        }
    return {
        "schema": SCHEMA,
        "model": config.model,
        "engine": config.engine,
        "versions": rundir.versions(),
        "seed": config.seed,
        "sampling": {
            "temperature": config.temperature,
            "top_p": config.top_p,
            "template": config.template or "auto",
            "dtype": config.dtype,
            "internal_layer": config.internal_layer,
            "internal_norm": config.internal_norm,
        },
        **describe,
        "tasks": tasks,
    }
