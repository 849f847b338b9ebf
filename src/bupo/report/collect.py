"""Finds out what the folders passed to ``bupo report`` hold, and reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from bupo.errors import InputError
from bupo.report.conclusion import compare_evaluations
from bupo.report.logs import TrainingRun, read_log
from bupo.report.results import (
    Analysis,
    Comparison,
    Evaluation,
    ExploredTokens,
    ResultFile,
    load_readings,
    read_json,
)
from bupo.report.style import role

LOG, RUN = "log.jsonl", "run.json"
# file name -> type, key that identifies the type under another file name, and field of `ReportData`
KINDS: dict[str, tuple[type[ResultFile], str, str]] = {
    "analysis.json": (Analysis, "sites", "analyses"),
    "results.json": (Evaluation, "tasks", "evaluations"),
    "tokens.json": (ExploredTokens, "samples", "tokens"),
    "compare.json": (Comparison, "models", "comparisons"),
}
_ORDER: dict[str | None, int] = {"start": -1, "grpo": 1, "bupo": 2}  # others between, in the order given
SAMPLES = 3  # number of problems whose responses are shown


@dataclass
class ReportData:
    """Everything a page shows; results come with their names."""

    analyses: list[tuple[str, Analysis]] = field(default_factory=list)
    runs: list[tuple[str, TrainingRun]] = field(default_factory=list)
    evaluations: list[tuple[str, Evaluation]] = field(default_factory=list)
    comparisons: list[tuple[str, Comparison]] = field(default_factory=list)
    tokens: list[tuple[str, ExploredTokens]] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)  # see `bupo.report.conclusion`
    notes: list[str] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)  # problem_id, prompt, answer, responses
    records: list[dict[str, Any] | str] = field(default_factory=list)  # contents of run.json, or sentences


def collect(arguments: Sequence[str]) -> ReportData:
    """Read folders (or files) of analyses, training runs, evaluations and comparisons, and compare the evaluations.

    Args:
        arguments: ``PATH`` or ``NAME=PATH``; the name defaults to the folder's.

    Raises:
        InputError: a path does not exist, holds no result, or holds an unreadable one.
    """
    sources = [_split(argument) for argument in arguments]
    paths = [path for _, path in sources]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise InputError(f"{twice} was given twice; name each folder once")
    data = ReportData()
    shown: dict[tuple[str, str], dict[str, Any]] = {}
    for name, path in zip(_names(sources), paths, strict=True):
        _read(name, path, data, shown)
    for kind in ("analyses", "runs", "evaluations", "tokens", "comparisons"):
        names = [name for name, _ in getattr(data, kind)]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"two {kind} are named {repeated}; give each its own name (NAME=PATH)")
    for items in (data.evaluations, data.runs):
        items.sort(key=lambda item: _ORDER.get(role(item[0]), 0))
    data.differences, data.notes = compare_evaluations(data.evaluations)
    data.samples = list(shown.values())
    return data


def _split(argument: str) -> tuple[str | None, Path]:
    name, equals, rest = argument.partition("=")
    if equals and name and rest and not Path(argument).exists():
        return name, Path(rest)
    return None, Path(argument)


def _names(sources: Sequence[tuple[str | None, Path]]) -> list[str]:
    """The chosen name (a training run and its evaluation may share one), or the folder's with enough parents."""
    folders = [path.absolute() if path.is_dir() else path.absolute().parent for _, path in sources]
    chosen = {name for name, _ in sources if name}
    for depth in range(1, 6):
        names = [name or "/".join(folder.parts[-depth:]) for (name, _), folder in zip(sources, folders, strict=True)]
        own = [name for name, (given, _) in zip(names, sources, strict=True) if not given]
        if len(set(own)) == len(own) and not chosen & set(own):
            return names
    return [given or f"{name} ({n})" for n, (name, (given, _)) in enumerate(zip(names, sources, strict=True), 1)]


def _read(name: str, path: Path, data: ReportData, shown: dict[tuple[str, str], dict[str, Any]]) -> None:
    if not path.exists():
        raise InputError(f"{path} does not exist")
    folder, known = path if path.is_dir() else path.parent, [*KINDS, LOG]
    files = [path] if path.is_file() else [path / file for file in known if (path / file).is_file()]
    if not files:
        below = sorted(p.name for p in path.iterdir() if any((p / file).is_file() for file in known))
        hint = f"; its folders {', '.join(below[:6])} do: name those" if below else ""
        raise InputError(f"{path} contains none of {', '.join(known)}{hint}")
    if (folder / RUN).is_file():
        data.records.append({**read_json(folder / RUN), "name": name})
    else:
        data.records.append(f"{name}: there is no {RUN} in its folder, so how it was made is not known.")
    for file in files:
        if file.suffix == ".jsonl":
            data.runs.append((name, TrainingRun(read_log(file), load_readings(folder / "inside"))))
            continue
        content = read_json(file)
        kind = KINDS.get(file.name) or next((kind for kind in KINDS.values() if kind[1] in content), None)
        if kind is None:
            raise InputError(f"{file} is not an analysis, an evaluation, a comparison or a training log")
        getattr(data, kind[2]).append((name, kind[0].parse(content, str(file))))
        if kind[0] is Evaluation and path.is_dir():
            _read_samples(name, folder / "responses.parquet", shown)


def _read_samples(name: str, path: Path, shown: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Add a model's first response to each of the first problems on file."""
    if not path.is_file():
        return
    columns = ["task", "problem_id", "prompt", "response", "answer", "status", "sample"]
    try:
        rows = pyarrow.parquet.read_table(path, columns=columns, filters=[("sample", "=", 0)]).to_pylist()
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    for row in rows:
        key = (row["task"], row["problem_id"])
        if key not in shown and len(shown) < SAMPLES:
            shown[key] = {k: row[k] for k in ("problem_id", "prompt", "answer")} | {"responses": []}
        if key in shown:
            shown[key]["responses"].append({"model": name, "response": row["response"], "status": row["status"]})
