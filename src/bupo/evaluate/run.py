"""Runs an evaluation from problems to results: sample (or continue), keep every response, grade, summarise.

``run.json`` (the settings) is written first, and ``results.json`` last: a folder that has it is a finished run.
"""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bupo import run_folder
from bupo.data.problems import Problem
from bupo.data.prompts import prompts_of, render_prompt
from bupo.errors import InputError
from bupo.evaluate.config import EvalConfig, find_task, task_problems
from bupo.evaluate.engines import Engine, Sampling, derived_seed, response_limit
from bupo.evaluate.hf_engine import TransformersEngine
from bupo.evaluate.responses import RESPONSES, RESULTS, Log, ResponseLog, Row, finish, grade, merge_shards
from bupo.evaluate.vllm_engine import VLLM_REMEDY, VllmEngine
from bupo.lens.maps import named_lens
from bupo.models.load import load_model

PARTIAL = "responses.partial.jsonl"
_SAMPLING = ("temperature", "top_p", "dtype", "internal_layer", "internal_lens")  # settings that results.json names
OnProgress = Callable[[str, int, int], None]  # task, finished responses, all responses


@dataclass(frozen=True)
class TaskPlan:
    """One task, ready to be sampled."""

    name: str
    problems: list[Problem]
    prompts: list[list[int]]
    template: str
    k: int
    n: int
    sampling: Sampling


def choose_engine(name: str, *, internal_layer: int | None = None) -> str:
    """Return the engine that a name means here: ``auto`` is vLLM where it is installed and can be used."""
    if name not in ("auto", "transformers", "vllm"):
        raise InputError(f"unknown engine {name!r}; use one of auto, transformers, vllm")
    installed = importlib.util.find_spec("vllm") is not None
    if name == "auto":
        return "vllm" if installed and internal_layer is None else "transformers"
    if name == "vllm" and internal_layer is not None:
        raise InputError("--engine vllm cannot sample from an internal policy; use --engine transformers")
    if name == "vllm" and not installed:
        raise InputError(f"vLLM is not installed; {VLLM_REMEDY}")
    return name


def load_engine(config: EvalConfig, *, device: str | None = None, trust_remote_code: bool = False) -> Engine:
    """Load the model that the configuration names into its engine."""
    source: dict[str, Any] = {"revision": config.revision, "trust_remote_code": trust_remote_code}
    if config.engine == "vllm":
        return VllmEngine(config.model, config.dtype, **source)
    dtype, lens = "fitting" if config.dtype == "auto" else config.dtype, named_lens(config.internal_lens)
    model, tokenizer = load_model(config.model, dtype=dtype, device=device, **source)
    return TransformersEngine(model, tokenizer, config.batch_size, config.internal_layer, lens.check(model))


def evaluate(
    config: EvalConfig,
    load: Callable[[], Engine],
    output: Path,
    *,
    overwrite: bool = False,
    log: Log = lambda text: None,
    on_progress: OnProgress = lambda task, done, total: None,
) -> dict[str, Any]:
    """Run an evaluation and return the content of its ``results.json``; continue an unfinished one.

    A shard writes a folder below ``output``; the one that finishes last merges all of them into ``output``. ``load`` is
    called for the engine once the folder was checked, as loading takes long. `InputError`: nothing was written.
    """
    folder, settings = config.folder(output), {**asdict(config), "tasks": list(config.tasks)}
    if config.shard is None:
        del settings["shard"]  # earlier versions know none, and merged shards have none
    elif (output / run_folder.RUN_FILE).exists():
        run_folder.claim(output, overwrite=overwrite)
    resumed = not overwrite and _is_unfinished(folder, settings)
    if not resumed:
        run_folder.claim(folder, overwrite=overwrite)
    engine = load()
    facts = {**engine.facts, "revision": engine.facts["revision"] or config.fingerprint}
    plans = _plan_tasks(config, engine)
    if not resumed:
        for name in (RESULTS, RESPONSES, PARTIAL):
            (folder / name).unlink(missing_ok=True)
        run_folder.write_json(folder / run_folder.RUN_FILE, run_folder.describe_run("eval", settings, **facts))
    partial = ResponseLog(folder / PARTIAL)
    if resumed:
        log(f"continuing {folder}, which holds {len(partial.responses)} responses")
    for plan in plans:
        _sample(plan, engine, partial, on_progress)
    rows = [row for plan in plans for row in _rows(plan, engine, partial)]
    log(f"grading {len(rows)} responses")
    results = finish(folder, _head(config, plans, facts), grade(rows))
    partial.path.unlink()
    return results if config.shard is None else merge_shards(config, output, log) or results


def _is_unfinished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds an unfinished evaluation; raise `InputError` if its settings were others."""
    run_file = folder / run_folder.RUN_FILE
    run = run_folder.read_json(run_file) if run_file.exists() and not (folder / RESULTS).exists() else {}
    if run.get("command") != "eval":
        return False
    before = run["config"]
    different = sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key))
    if different:
        changes = ", ".join(f"{key}: {before.get(key)!r} then, {settings.get(key)!r} now" for key in different)
        remedy = "use the same settings to continue it, choose another folder, or pass --overwrite"
        raise InputError(f"{folder} holds an unfinished evaluation with other settings ({changes}); {remedy}")
    return True


def _plan_tasks(config: EvalConfig, engine: Engine) -> list[TaskPlan]:
    """Load the problems and prompts of every task; raise `InputError` if a task cannot be evaluated as asked."""
    data_dir = Path(config.data_dir).expanduser() if config.data_dir else None
    number, count = config.part
    plans = []
    for task in map(find_task, config.tasks):
        problems = task_problems(task, data_dir=data_dir, limit=config.limit, seed=config.seed)
        template = config.template or task.template
        prompts = prompts_of(problems, engine.tokenizer, template, engine.vocabulary)
        new_tokens = response_limit(prompts, engine.context, config.max_new_tokens, task.max_new_tokens)
        if count > len(problems):
            raise InputError(f"task {task.name} has {len(problems)} problems, too few for {count} shards")
        part = slice((number - 1) * len(problems) // count, number * len(problems) // count)
        names = (task.name,) if config.shard is None else (task.name, config.shard)
        sampling = Sampling(new_tokens, config.temperature, config.top_p, derived_seed(config.seed, *names))
        n = config.n or config.k or task.k
        k = config.k or min(task.k, n)
        plans.append(TaskPlan(task.name, problems[part], prompts[part], template, k, n, sampling))
    return plans


def _sample(plan: TaskPlan, engine: Engine, partial: ResponseLog, on_progress: OnProgress) -> None:
    """Draw the batches of which a response is missing."""
    total = len(plan.problems) * plan.n
    done = sum(task == plan.name for task, _, _ in partial.responses)
    on_progress(plan.name, done, total)
    for batch in engine.plan(len(plan.problems), plan.n, plan.sampling.seed):
        keys = [(plan.name, plan.problems[problem].id, sample) for problem, sample in batch.items]
        if missing := sum(key not in partial.responses for key in keys):
            partial.add(keys, engine.run(plan.prompts, batch, plan.sampling))
            done += missing
            on_progress(plan.name, done, total)


def _rows(plan: TaskPlan, engine: Engine, partial: ResponseLog) -> list[Row]:
    """Build the ungraded rows of a task, problem by problem."""
    return [
        {
            "task": plan.name,
            "problem_id": problem.id,
            "sample": sample,
            "prompt": text,
            "response": engine.tokenizer.decode(response, skip_special_tokens=True),
            "prompt_ids": prompt,
            "response_ids": response,
            "length": len(response),
            "finished": engine.is_finished(response),
            "answer": problem.answer,
            "source": problem.source,
            "metadata": json.dumps(problem.metadata, ensure_ascii=False),
        }
        for problem, prompt in zip(plan.problems, plan.prompts, strict=True)
        for text in [render_prompt(problem.prompt, engine.tokenizer, plan.template)]
        for sample in range(plan.n)
        for response in [partial.responses[plan.name, problem.id, sample]]
    ]


def _head(config: EvalConfig, plans: list[TaskPlan], facts: dict[str, Any]) -> dict[str, Any]:
    """All of ``results.json`` but the figures."""
    templates = ", ".join(dict.fromkeys(plan.template for plan in plans))
    sampling = {name: getattr(config, name) for name in _SAMPLING} | {"template": templates}
    tasks = {p.name: {"avg_at_k": {"k": p.k}, "max_new_tokens": p.sampling.max_new_tokens} for p in plans}
    about = {"schema": 1, "model": config.model, "engine": config.engine, "versions": run_folder.versions()}
    return {**about, "seed": config.seed, "sampling": sampling, **facts, "tasks": tasks}
