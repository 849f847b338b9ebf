"""The files of an evaluation: responses as they are sampled, then graded; grading again and merging shards."""

import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from bupo import run_folder
from bupo.data.grading import Grader
from bupo.data.problems import Problem, read_rows
from bupo.errors import InputError
from bupo.evaluate.config import EvalConfig
from bupo.evaluate.metrics import task_results

RESULTS, RESPONSES = "results.json", "responses.parquet"
Key = tuple[str, str, int]  # task, problem id, sample
Row = dict[str, Any]
Log = Callable[[str], None]

_TEXTS = ("task", "problem_id", "prompt", "response", "answer", "source", "metadata", "status", "extracted")
_SCHEMA = pa.schema(
    [(name, pa.string()) for name in _TEXTS]
    + [(name, pa.list_(pa.int32())) for name in ("prompt_ids", "response_ids")]
    + [("sample", pa.int32()), ("length", pa.int32()), ("finished", pa.bool_()), ("reward", pa.float64())]
)


class ResponseLog:
    """The responses so far, one line of JSON each, on disk after every batch; a line that a kill cut off is dropped."""

    def __init__(self, path: Path):
        self.path = path
        self.responses: dict[Key, list[int]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as stream:
            stream.seek(0)
            content = stream.read()
            stream.truncate(content.rfind(b"\n") + 1)
        for line in content.split(b"\n")[:-1]:
            task, problem, sample, response = json.loads(line)
            self.responses[task, problem, sample] = response

    def add(self, keys: Sequence[Key], responses: Sequence[list[int]]) -> None:
        """Keep the responses of a batch, except those that are there already."""
        with self.path.open("ab") as stream:
            for key, response in zip(keys, responses, strict=True):
                if key not in self.responses:
                    self.responses[key] = response
                    stream.write(json.dumps([*key, response]).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())


def write_responses(path: Path, rows: list[Row]) -> None:
    """Write graded responses, all or nothing."""
    content = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), content, compression="zstd")
    run_folder.write_bytes(path, content.getvalue())


def grade(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with reward, status and extracted answer."""
    problems = [
        Problem(row["problem_id"], row["prompt"], row["answer"], row["source"], json.loads(row["metadata"]))
        for row in rows
    ]
    with Grader() as grader:
        grades = grader.grade([row["response"] for row in rows], problems)
    return [{**row, **asdict(one)} for row, one in zip(rows, grades, strict=True)]


def finish(folder: Path, results: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    """Write graded rows, and ``results`` with their figures; of its tasks, K of Avg@K and the length limit are kept."""
    tasks = {}
    for name, before in results["tasks"].items():
        members = [row for row in rows if row["task"] == name]
        k = before.get("avg_at_k", {}).get("k", len({row["sample"] for row in members}))
        figures = task_results(members, k=k, seed=results["seed"])
        tasks[name] = {**figures, "max_new_tokens": before["max_new_tokens"]}
    results = {**results, "tasks": tasks}
    write_responses(folder / RESPONSES, rows)
    run_folder.write_json(folder / RESULTS, results)
    return results


def regrade(folder: Path, *, log: Log = lambda text: None) -> dict[str, Any]:
    """Grade the responses of a finished evaluation again, and rewrite its results; nothing is sampled."""
    for name in (RESPONSES, RESULTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no finished evaluation: {name} is missing")
    rows = read_rows(folder / RESPONSES)
    log(f"grading {len(rows)} responses again")
    graded = grade(rows)
    changed = sum(old["status"] != new["status"] for old, new in zip(rows, graded, strict=True))
    log(f"{changed} of {len(rows)} grades changed")
    return finish(folder, run_folder.read_json(folder / RESULTS), graded)


def merge_shards(config: EvalConfig, output: Path, log: Log) -> dict[str, Any] | None:
    """Merge the shards below ``output`` into one finished evaluation; None if a shard is still missing."""
    _, count = config.part
    folders = [config.folder(output, number) for number in range(1, count + 1)]
    missing = [folder.name for folder in folders if not (folder / RESULTS).exists()]
    if missing:
        log(f"{config.folder(output).name} is finished; {output} is merged when {', '.join(missing)} are too")
        return None
    runs = [run_folder.read_json(folder / run_folder.RUN_FILE) for folder in folders]
    for folder, run in zip(folders, runs, strict=True):
        del run["config"]["shard"]
        if run["config"] != runs[0]["config"]:
            raise InputError(f"{folder} was evaluated with other settings than {folders[0]}; evaluate it again")
    results = run_folder.read_json(folders[0] / RESULTS)
    tasks = list(results["tasks"])
    rows = [row for folder in folders for row in read_rows(folder / RESPONSES)]
    rows.sort(key=lambda row: tasks.index(row["task"]))  # stable: shard after shard
    run_folder.write_json(output / run_folder.RUN_FILE, runs[0])
    return finish(output, results, rows)
