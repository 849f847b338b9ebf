"""Finding out what the folders given to ``bupo report`` hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bupo.errors import InputError
from bupo.report.explorer import check_tokens
from bupo.report.figures import check_analysis
from bupo.report.inside import check_comparison
from bupo.report.inside_training import read_inside_folder
from bupo.report.logs import read_log
from bupo.report.style import role
from bupo.report.verdict import paired_comparisons

ANALYSIS, RESULTS, LOG, TOKENS, RUN = "analysis.json", "results.json", "log.jsonl", "tokens.json", "run.json"
COMPARISON = "compare.json"
_ORDER: dict[str | None, int] = {"start": -1, "grpo": 1, "bupo": 2}  # others between, in the order given
SAMPLES = 3  # problems whose responses are shown


@dataclass
class Material:
    """Everything a page is made of; the fields are arguments of `bupo.report.html.write_report`."""

    analyses: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    what_was_run: list[dict[str, Any] | str] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[dict[str, Any]] = field(default_factory=list)
    inside: list[dict[str, Any]] = field(default_factory=list)


def collect(arguments: Sequence[str]) -> Material:
    """Read folders (or files) of analyses, training runs and evaluations, and compare the evaluations in pairs.

    Args:
        arguments: ``PATH`` or ``NAME=PATH``; without a name, the folder's is used.

    Raises:
        InputError: a path does not exist, holds nothing of the kind, or holds something unreadable.
    """
    sources = [_split(argument) for argument in arguments]
    repeated = [path for _, path in sources]
    if len(set(repeated)) != len(repeated):
        twice = next(path for path in repeated if repeated.count(path) > 1)
        raise InputError(f"{twice} was given twice; name each folder once")
    material = Material()
    responses: list[tuple[str, Path]] = []
    for name, path in zip(_names(sources), repeated, strict=True):
        _read(name, path, material, responses)
    _check_names(material)
    for items in (material.evaluations, material.runs):
        items.sort(key=lambda item: _ORDER.get(role(item["name"]), 0))
    material.comparisons, notes = paired_comparisons(material.evaluations)
    material.notes += notes
    material.samples = _samples(responses)
    return material


def _split(argument: str) -> tuple[str | None, Path]:
    path = Path(argument)
    name, equals, rest = argument.partition("=")
    if equals and name and rest and not path.exists():
        return name, Path(rest)
    return None, path


def _names(sources: Sequence[tuple[str | None, Path]]) -> list[str]:
    """The name given, which a training run and its evaluation may share, or the folder's, with enough parents."""
    folders = [path.absolute() if path.is_dir() else path.absolute().parent for _, path in sources]
    for depth in range(1, 6):
        names = [name or "/".join(folder.parts[-depth:]) for (name, _), folder in zip(sources, folders, strict=True)]
        found = [name for name, (given, _) in zip(names, sources, strict=True) if not given]
        if len(set(found)) == len(found) and not set(found) & {given for given, _ in sources}:
            return names
    return [given or f"{name} ({n})" for n, (name, (given, _)) in enumerate(zip(names, sources, strict=True), 1)]


def _check_names(material: Material) -> None:
    for kind in ("analyses", "runs", "evaluations", "tokens", "inside"):
        names = [item["name"] for item in getattr(material, kind)]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"two {kind} are named {name}; give each another name (NAME=PATH)")


def _read(name: str, path: Path, material: Material, responses: list[tuple[str, Path]]) -> None:
    if not path.exists():
        raise InputError(f"{path} does not exist")
    files = [path] if path.is_file() else [path / file for file in (ANALYSIS, LOG, RESULTS, TOKENS, COMPARISON)]
    files = [file for file in files if file.is_file()]
    if not files:
        inside = sorted(
            p.name
            for p in path.iterdir()
            if any((p / known).is_file() for known in (ANALYSIS, LOG, RESULTS, COMPARISON))
        )
        hint = f"; its folders {', '.join(inside[:6])} do: name those" if inside else ""
        raise InputError(f"{path} holds no {ANALYSIS}, {RESULTS}, {COMPARISON} or {LOG}{hint}")
    folder = path if path.is_dir() else path.parent
    run = _json(folder / RUN) if (folder / RUN).is_file() else None
    if run is not None:
        material.what_was_run.append({**run, "name": name})
    else:
        material.what_was_run.append(f"{name}: no {RUN} beside it, so how it was made is not known.")
    for file in files:
        _read_file(name, file, run or {}, material)
        if file.name == RESULTS and path.is_dir():
            responses.append((name, folder / "responses.parquet"))


def _read_file(name: str, file: Path, run: Mapping[str, Any], material: Material) -> None:
    if file.suffix == ".jsonl":
        inside = read_inside_folder(file.parent / "inside")
        material.runs.append({"name": name, "log": read_log(file), "config": run.get("config", {}), "inside": inside})
        return
    content = _json(file)
    if "tasks" in content:
        _check_results(content, file)
        material.evaluations.append({"name": name, "results": content})
    elif "models" in content:
        check_comparison(content, str(file))
        material.inside.append({**content, "name": name})
    elif "sites" in content or file.name == ANALYSIS:
        check_analysis(content, str(file))
        material.analyses.append({**content, "name": name})
    elif "samples" in content:
        check_tokens(content, str(file))
        material.tokens.append({**content, "name": name, "path": str(file)})
    else:
        raise InputError(f"{file} is no analysis, no evaluation, no comparison and no training log")


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no JSON object")
    return content


def _check_results(content: Mapping[str, Any], file: Path) -> None:
    if content.get("schema") != 1:
        raise InputError(f"{file} is no evaluation of schema 1 (its schema is {content.get('schema')!r})")
    tasks = content["tasks"]
    if not isinstance(tasks, Mapping) or not all(isinstance(task, Mapping) for task in tasks.values()):
        raise InputError(f"{file}: 'tasks' is no object of results by task; write it again with `bupo eval`")
    for name, task in tasks.items():
        for value in [task.get("avg_at_k"), *task.get("pass_at_k", [])]:
            if value is None:
                continue
            interval = value.get("ci95") if isinstance(value, Mapping) else None
            if not (isinstance(interval, list) and len(interval) == 2 and "mean" in value and "k" in value):
                raise InputError(f"{file}: task {name} has a score without k, mean and ci95; run `bupo eval` again")


def _samples(sources: Sequence[tuple[str, Path]]) -> list[dict[str, Any]]:
    """The first sample of the first problems on file, one response a model."""
    shown: dict[tuple[str, str], dict[str, Any]] = {}
    for name, path in sources:
        if not path.is_file():
            continue
        import pyarrow.parquet

        columns = ["task", "problem_id", "prompt", "response", "answer", "status", "sample"]
        try:
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256, columns=columns)
            rows = [row for batch in batches for row in batch.to_pylist() if row["sample"] == 0]
        except (pyarrow.ArrowException, OSError, KeyError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None
        for row in rows:
            key = (row["task"], row["problem_id"])
            if key not in shown:
                if len(shown) >= SAMPLES:
                    continue
                shown[key] = {k: row[k] for k in ("problem_id", "prompt", "answer")} | {"responses": []}
            shown[key]["responses"].append({"model": name, "response": row["response"], "status": row["status"]})
    return list(shown.values())
