"""Runs an evaluation from problems to results: sample (or continue), keep every response, grade, summarise.

The output folder holds ``run.json`` (the settings, written first), ``responses.partial.jsonl`` (grows while sampling),
``responses.parquet`` (every graded response) and ``results.json`` (written last, so a folder that has it is a finished
run).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bupo import run_folder
from bupo.data.grading import Grader
from bupo.data.problems import Problem
from bupo.data.prompts import prompt_ids, render_prompt
from bupo.errors import InputError
from bupo.evaluate.config import EvalConfig
from bupo.evaluate.engines import Engine, Sampling, derived_seed
from bupo.evaluate.finished import RESPONSES, RESULTS, Log, Row, grade_rows, merge_shards
from bupo.evaluate.responses import Key, ResponseLog, write_responses
from bupo.evaluate.results import SCHEMA, task_results
from bupo.evaluate.tasks import find_task, task_problems

PARTIAL = "responses.partial.jsonl"
_FILES = (RESULTS, RESPONSES, PARTIAL, run_folder.RUN_FILE)
OnProgress = Callable[[str, int, int], None]  # task, finished responses, all responses


@dataclass(frozen=True)
class TaskPlan:
    """One task, ready to be sampled."""

    name: str
    problems: list[Problem]
    prompts: list[list[int]]
    texts: list[str]
    template: str
    k: int
    n: int
    sampling: Sampling


def load_plans(config: EvalConfig, tokenizer: Any, context: int | None) -> list[TaskPlan]:
    """Load the problems and prompts of every task, and check them before anything is sampled.

    Args:
        context: most tokens of a prompt with its response.

    Raises:
        InputError: see `task_problems` and `render_prompt`; or a prompt does not fit into the context; or there are
            more shards than problems.
    """
    plans = []
    for task in map(find_task, config.tasks):
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
                f"task {task.name}: the longest prompt has {longest} tokens, and with {max(new_tokens, 1)} new ones "
                f"that is more than the model's context of {context}; {remedy}"
            )
        number, count = config.shard_numbers
        if count > len(problems):
            raise InputError(f"task {task.name} has {len(problems)} problems, too few for {count} shards")
        part = slice((number - 1) * len(problems) // count, number * len(problems) // count)
        names = (task.name,) if config.shard is None else (task.name, config.shard)
        n = config.n or config.k or task.k
        plans.append(
            TaskPlan(
                name=task.name,
                problems=problems[part],
                prompts=prompts[part],
                texts=[render_prompt(problem.prompt, tokenizer, template) for problem in problems[part]],
                template=template,
                k=config.k or min(task.k, n),
                n=n,
                sampling=Sampling(new_tokens, config.temperature, config.top_p, derived_seed(config.seed, *names)),
            )
        )
    return plans


def open_folder(config: EvalConfig, folder: Path, *, overwrite: bool) -> bool:
    """Prepare the output folder; return whether it holds an unfinished run with the same settings.

    Raises:
        InputError: it holds a finished run, another command's, or one that was started with other settings.
    """
    if overwrite:
        run_folder.claim(folder, overwrite=True)
        for name in _FILES:
            (folder / name).unlink(missing_ok=True)
        return False
    run_file = folder / run_folder.RUN_FILE
    if not run_file.exists() or (folder / RESULTS).exists():
        run_folder.claim(folder)
        return False
    earlier = json.loads(run_file.read_text(encoding="utf-8"))
    if earlier.get("command") != "eval":
        run_folder.claim(folder)
    before, now = earlier.get("config", {}), config.to_json()
    different = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if different:
        changes = ", ".join(f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in different)
        raise InputError(
            f"{folder} holds an unfinished evaluation with other settings ({changes}); use the same settings to "
            "continue it, choose another folder, or pass --overwrite"
        )
    return True


def check_output(config: EvalConfig, output: Path, *, overwrite: bool) -> None:
    """Refuse a folder that cannot be used before a model is loaded; see `open_folder`."""
    if config.shard is not None and (output / run_folder.RUN_FILE).exists():
        run_folder.claim(output, overwrite=overwrite)
    if not overwrite:
        open_folder(config, config.folder(output), overwrite=False)


def evaluate(
    config: EvalConfig,
    engine: Engine,
    tokenizer: Any,
    output: Path,
    *,
    overwrite: bool = False,
    describe: dict[str, Any] | None = None,
    log: Log = lambda text: None,
    on_progress: OnProgress = lambda task, done, total: None,
) -> dict[str, Any]:
    """Run an evaluation and return the content of its ``results.json``; continue an unfinished one.

    With ``config.shard`` it writes a folder below ``output``; the shard that finishes last merges all of them into
    ``output``.

    Args:
        describe: further entries for ``run.json`` and ``results.json`` (model revision, device).
        log: called with a line for each step.
        on_progress: called with the progress of sampling.

    Raises:
        InputError: see `load_plans` and `open_folder`. Nothing is written before those checks have passed.
    """
    folder, describe = config.folder(output), describe or {}
    plans = load_plans(config, tokenizer, engine.context)
    resumed = open_folder(config, folder, overwrite=overwrite)
    if not resumed:
        run = run_folder.describe_run("eval", config.to_json(), **describe)
        run_folder.write_json(folder / run_folder.RUN_FILE, run)
    rows: list[Row] = []
    with ResponseLog(folder / PARTIAL) as partial, Grader() as grader:
        if resumed:
            log(f"continuing {folder}, which holds {len(partial.responses)} responses")
        for plan in plans:
            _sample(plan, engine, partial, on_progress)
        for plan in plans:
            log(f"grading {plan.name}")
            problems = [problem for problem in plan.problems for _ in range(plan.n)]
            rows += grade_rows(_rows(plan, engine, partial.responses), problems, grader)
    results = _summarise(config, plans, rows, describe)
    write_responses(folder / RESPONSES, rows)
    run_folder.write_json(folder / RESULTS, results)
    partial.path.unlink()
    return results if config.shard is None else merge_shards(config, output, log) or results


def _sample(plan: TaskPlan, engine: Engine, partial: ResponseLog, on_progress: OnProgress) -> None:
    """Draw the batches of which a response is missing."""
    total = len(plan.problems) * plan.n
    batches = engine.plan(len(plan.problems), plan.n, plan.sampling.seed)
    keys = {item: (plan.name, plan.problems[item[0]].id, item[1]) for batch in batches for item in batch.items}
    done = sum(key in partial.responses for key in keys.values())
    on_progress(plan.name, done, total)
    for batch in batches:
        missing = sum(keys[item] not in partial.responses for item in batch.items)
        if missing:
            partial.add([keys[item] for item in batch.items], engine.run(plan.prompts, batch, plan.sampling))
            done += missing
            on_progress(plan.name, done, total)


def _rows(plan: TaskPlan, engine: Engine, responses: dict[Key, list[int]]) -> list[Row]:
    """Build the ungraded rows of a task, problem by problem."""
    return [
        {
            "task": plan.name,
            "problem_id": problem.id,
            "sample": sample,
            "prompt": text,
            "response": engine.decode(response := responses[plan.name, problem.id, sample]),
            "prompt_ids": prompt,
            "response_ids": response,
            "length": len(response),
            "finished": engine.is_finished(response),
            "answer": problem.answer,
            "source": problem.source,
            "metadata": json.dumps(problem.metadata, ensure_ascii=False),
        }
        for problem, prompt, text in zip(plan.problems, plan.prompts, plan.texts, strict=True)
        for sample in range(plan.n)
    ]


def _summarise(
    config: EvalConfig, plans: Sequence[TaskPlan], rows: Sequence[Row], describe: dict[str, Any]
) -> dict[str, Any]:
    tasks = {}
    for plan in plans:
        members = [row for row in rows if row["task"] == plan.name]
        result = task_results(members, k=plan.k, seed=config.seed)
        tasks[plan.name] = {**result, "max_new_tokens": plan.sampling.max_new_tokens}
    return {
        "schema": SCHEMA,
        "model": config.model,
        "engine": config.engine,
        "versions": run_folder.versions(),
        "seed": config.seed,
        "sampling": {
            "temperature": config.temperature,
            "top_p": config.top_p,
            "template": ", ".join(dict.fromkeys(plan.template for plan in plans)),
            "dtype": config.dtype,
            "internal_layer": config.internal_layer,
            "internal_norm": config.internal_norm,
        },
        **describe,
        "tasks": tasks,
    }
