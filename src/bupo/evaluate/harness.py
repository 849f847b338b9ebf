"""Benchmarks that lm-evaluation-harness already has (GPQA, MMLU-Pro, ARC, BBH, HumanEval, and hundreds more).

They are run by the harness with its own prompts and metrics; here the run is only started, described and kept.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bupo import run_folder as rundir
from bupo.errors import ConfigError, InputError

# Short names for the benchmarks beside mathematics; any other name is the harness's own.
SHORT_NAMES = {
    "gpqa": "gpqa_diamond_zeroshot",
    "mmlu-pro": "mmlu_pro",
    "arc": "arc_challenge",
    "bbh": "bbh",
    "humaneval": "humaneval",
}
RUNS_CODE = ("humaneval", "mbpp")
RESULTS = "harness.json"


def run_harness(
    model: str,
    tasks: Sequence[str],
    output: Path,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    seed: int = 0,
    chat: bool = True,
    task_folder: Path | None = None,
    unsafe_code: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run harness tasks and write ``harness.json`` and ``run.json``.

    Args:
        tasks: `SHORT_NAMES` or the harness's names.
        chat: ask through the tokenizer's chat template, where it has one.
        task_folder: a folder with further task files of the harness.
        unsafe_code: allow tasks that run code which the model wrote.

    Raises:
        InputError: the harness is not installed, does not know a task, or cannot load its data; a task runs the
            model's code without permission.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("lm-evaluation-harness is not installed; install bupo[harness]")
    if not tasks:
        raise ConfigError("name at least one harness task, such as gpqa or mmlu-pro")
    names = [SHORT_NAMES.get(name, name) for name in tasks]
    running = [name for name in names if name.startswith(RUNS_CODE)]
    if running and not unsafe_code:
        raise InputError(
            f"{', '.join(running)} runs code that the model wrote; pass --unsafe-code in a sandbox to allow it"
        )
    if task_folder is not None and not task_folder.is_dir():
        raise InputError(f"folder of harness tasks {task_folder} does not exist")
    rundir.claim(output, overwrite=overwrite)

    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from bupo.models.load import load_model, model_revision

    manager = TaskManager(include_path=None if task_folder is None else str(task_folder))
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise InputError(f"lm-evaluation-harness has no task {', '.join(unknown)}; `lm_eval ls tasks` lists them")
    loaded, tokenizer = load_model(
        model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code
    )
    wrapped = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = simple_evaluate(
            model=wrapped,
            tasks=names,
            limit=limit,
            task_manager=manager,
            apply_chat_template=bool(chat and tokenizer.chat_template),
            confirm_run_unsafe_code=unsafe_code,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            log_samples=False,
        )
    except (OSError, ConnectionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"the harness cannot run {', '.join(names)}: {reason}") from error
    results = {
        "schema": 1,
        "model": model,
        "revision": model_revision(loaded),
        "engine": "lm-evaluation-harness",
        "versions": {**rundir.versions(), "lm_eval": _version()},
        "seed": seed,
        "limit": limit,
        "tasks": {name: _numbers(values) for name, values in found["results"].items()},
        "samples": {name: counts["effective"] for name, counts in found.get("n-samples", {}).items()},
    }
    config = {"model": model, "tasks": names, "limit": limit, "dtype": dtype, "seed": seed, "chat": chat}
    rundir.write_json(output / rundir.RUN_FILE, rundir.describe_run("eval --harness", config))
    rundir.write_json(output / RESULTS, results)
    return results


def summary_lines(results: dict[str, Any]) -> list[str]:
    """One line a metric."""
    lines = []
    for task, values in results["tasks"].items():
        for metric, value in values.items():
            if "stderr" not in metric:
                error = values.get(metric.replace(",", "_stderr,", 1))
                lines.append(f"{task:<32} {metric:<28} {value:.4f}" + (f" +- {error:.4f}" if error is not None else ""))
    return lines


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value) for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)
    }


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("lm_eval")
