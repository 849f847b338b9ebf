"""Works on finished evaluations: grades their responses again, and merges shards."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bupo import run_folder
from bupo.data.grading import Grader
from bupo.data.problems import Problem
from bupo.errors import InputError
from bupo.evaluate.config import EvalConfig
from bupo.evaluate.responses import read_graded, write_responses
from bupo.evaluate.results import SCHEMA, task_results

RESULTS, RESPONSES = "results.json", "responses.parquet"
Log = Callable[[str], None]
Row = dict[str, Any]


def merge_shards(config: EvalConfig, output: Path, log: Log = lambda text: None) -> dict[str, Any] | None:
    """Merge the shards below ``output`` into one finished evaluation; None if a shard is still missing.

    Raises:
        InputError: the shards were made with different settings.
    """
    _, count = config.shard_numbers
    folders = [config.folder(output, number) for number in range(1, count + 1)]
    missing = [folder.name for folder in folders if not (folder / RESULTS).exists()]
    if missing:
        log(f"{config.folder(output).name} is finished; {output} is merged when {', '.join(missing)} are too")
        return None
    runs = [_read(folder / run_folder.RUN_FILE) for folder in folders]
    for folder, run in zip(folders, runs, strict=True):
        del run["config"]["shard"]
        if run["config"] != runs[0]["config"]:
            raise InputError(f"{folder} was evaluated with other settings than {folders[0]}; evaluate it again")
    rows = [row for folder in folders for row in read_graded(folder / RESPONSES)]
    first: dict[str, Any] = _read(folders[0] / RESULTS)
    results = {**first, "tasks": _merged_tasks(rows, first["tasks"], config.seed)}
    order = {name: index for index, name in enumerate(first["tasks"])}
    write_responses(output / RESPONSES, sorted(rows, key=lambda row: order[row["task"]]))  # stable: shard after shard
    run_folder.write_json(output / run_folder.RUN_FILE, runs[0])
    run_folder.write_json(output / RESULTS, results)
    return results


def regrade(folder: Path, *, log: Log = lambda text: None) -> dict[str, Any]:
    """Grade the responses of a finished evaluation again, and rewrite its results; nothing is sampled.

    Raises:
        InputError: the folder holds no finished evaluation.
    """
    for name in (RESPONSES, run_folder.RUN_FILE):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no finished evaluation: {name} is missing")
    rows = read_graded(folder / RESPONSES)
    run = _read(folder / run_folder.RUN_FILE)
    before: dict[str, Any] = _read(folder / RESULTS) if (folder / RESULTS).is_file() else {}
    problems = [
        Problem(row["problem_id"], row["prompt"], row["answer"], row["source"], json.loads(row["metadata"]))
        for row in rows
    ]
    log(f"grading {len(rows)} responses again")
    with Grader() as grader:
        graded = grade_rows(rows, problems, grader)
    changed = sum(old["status"] != new["status"] for old, new in zip(rows, graded, strict=True))
    log(f"{changed} of {len(rows)} grades changed")
    tasks = _merged_tasks(graded, before.get("tasks", {}), int(run["config"].get("seed", 0)))
    results = {**before, "schema": SCHEMA, "tasks": tasks}
    write_responses(folder / RESPONSES, graded)
    run_folder.write_json(folder / RESULTS, results)
    return results


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _merged_tasks(rows: Sequence[Row], before: dict[str, Any], seed: int) -> dict[str, Any]:
    """Summarise rows of several tasks; the K of Avg@K and the length limit are those of the earlier results."""
    tasks = {}
    for name in dict.fromkeys(row["task"] for row in rows):
        members = [row for row in rows if row["task"] == name]
        earlier = before.get(name, {})
        k = earlier.get("avg_at_k", {}).get("k", len({row["sample"] for row in members}))
        kept = {key: earlier[key] for key in ("max_new_tokens",) if key in earlier}
        tasks[name] = {**task_results(members, k=k, seed=seed), **kept}
    return tasks


def grade_rows(rows: Sequence[Row], problems: Sequence[Problem], grader: Grader) -> list[Row]:
    """Add reward, status and extracted answer to rows."""
    grades = grader.grade([row["response"] for row in rows], problems)
    return [
        {**row, "reward": grade.reward, "status": grade.status, "extracted": grade.extracted}
        for row, grade in zip(rows, grades, strict=True)
    ]
