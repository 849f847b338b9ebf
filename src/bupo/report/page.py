"""Finds out what folders hold, and shows it on one self-contained page: no network request, all outside text escaped.

Tokens of the explorer are text that a model wrote: they reach the page only inside a JSON data block that no character
can end, and the script shows them as text.
"""

import base64
import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bupo.errors import InputError
from bupo.report import analysis_figures, evaluations, inside_figures, style, sweeps
from bupo.report.evaluations import Conclusion, compare_evaluations, conclude
from bupo.report.logs import TrainingRun, load_readings
from bupo.report.results import Analysis, Comparison, Evaluation, ExploredTokens, ResultFile
from bupo.report.sweeps import Sweep
from bupo.run_folder import RUN_FILE, read_json
from bupo.sweep.rows import ROWS_FILE, is_rows, read_rows
from bupo.sweep.statistics import in_order

LOG = "log.jsonl"
# file name -> type, key that identifies the type under another file name, and field of `ReportData`
KINDS: dict[str, tuple[type[ResultFile], str, str]] = {
    "analysis.json": (Analysis, "sites", "analyses"),
    "results.json": (Evaluation, "tasks", "evaluations"),
    "tokens.json": (ExploredTokens, "samples", "tokens"),
    "compare.json": (Comparison, "models", "comparisons"),
}
_ORDER: dict[str | None, int] = {"start": -1, "grpo": 1, "bupo": 2}  # others between, in the order given
SAMPLES = 3  # number of problems whose responses are shown
SHOWN = 4000  # characters of a sampled response


@dataclass
class ReportData:
    """Everything a page shows; results come with their names."""

    analyses: list[tuple[str, Analysis]] = field(default_factory=list)
    runs: list[tuple[str, TrainingRun]] = field(default_factory=list)
    evaluations: list[tuple[str, Evaluation]] = field(default_factory=list)
    comparisons: list[tuple[str, Comparison]] = field(default_factory=list)
    sweeps: list[tuple[str, Sweep]] = field(default_factory=list)
    tokens: list[tuple[str, ExploredTokens]] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)  # see `evaluations`
    notes: list[str] = field(default_factory=list)
    samples: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)  # of (task, problem): responses
    records: list[dict[str, Any] | str] = field(default_factory=list)  # contents of run.json, or sentences

    @property
    def conclusion(self) -> Conclusion:
        """What the evaluations show, or the sweeps where there is no evaluation."""
        if self.sweeps and not self.evaluations:
            return sweeps.conclude(self.sweeps)
        return conclude(self.evaluations, self.differences)


def collect(arguments: Sequence[str]) -> ReportData:
    """Read the results in folders (or files), each ``PATH`` or ``NAME=PATH``, and compare the evaluations."""
    sources = []
    for argument in arguments:
        name, equals, rest = argument.partition("=")
        named = equals and name and rest and not Path(argument).exists()
        sources.append((name, Path(rest)) if named else ("", Path(argument)))
    paths = [path for _, path in sources]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise InputError(f"{twice} was given twice; name each folder once")
    data = ReportData()
    for name, path in zip(_names(sources), paths, strict=True):
        _read(name, path, data)
    for kind in ("analyses", "runs", "evaluations", "tokens", "comparisons", "sweeps"):
        names = [name for name, _ in getattr(data, kind)]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"two {kind} are named {repeated}; give each its own name (NAME=PATH)")
    for items in (data.evaluations, data.runs):
        items.sort(key=lambda item: _ORDER.get(style.role(item[0]), 0))
    data.differences, data.notes = compare_evaluations(data.evaluations)
    cut = "the last line of its log is incomplete and was left out: the run is writing, or was ended while it wrote."
    data.notes += [f"{name}: {cut}" for name, run in data.runs if run.cut]
    return data


def _names(sources: Sequence[tuple[str, Path]]) -> list[str]:
    """The chosen name (a training run and its evaluation may share one), or the folder's with enough parents."""
    folders = [path.absolute() if path.is_dir() else path.absolute().parent for _, path in sources]
    chosen = {name for name, _ in sources if name}
    for depth in range(1, 6):
        own = ["" if name else "/".join(at.parts[-depth:]) for (name, _), at in zip(sources, folders, strict=True)]
        taken = list(filter(None, own))
        if len(set(taken)) == len(taken) and not chosen & set(taken):
            return [name or one for (name, _), one in zip(sources, own, strict=True)]
    return [name or f"{one} ({n})" for n, ((name, _), one) in enumerate(zip(sources, own, strict=True), 1)]


def _read(name: str, path: Path, data: ReportData) -> None:
    if not path.exists():
        raise InputError(f"{path} does not exist")
    folder, known = path if path.is_dir() else path.parent, [*KINDS, LOG, ROWS_FILE]
    files = [path] if path.is_file() else [path / file for file in known if (path / file).is_file()]
    if path.is_dir() and not (path / LOG).is_file() and (readings := load_readings(path)):
        data.runs.append((name, TrainingRun((), readings)))  # of another trainer, by `bupo.callbacks.LayerReadings`
    elif not files:
        below = sorted(p.name for p in path.iterdir() if any((p / file).is_file() for file in known))
        hint = f"; its folders {', '.join(below[:6])} do: name those" if below else ""
        raise InputError(f"{path} contains none of {', '.join(known)}{hint}")
    if (folder / RUN_FILE).is_file():
        data.records.append({**read_json(folder / RUN_FILE), "name": name})
    else:
        data.records.append(f"{name}: there is no {RUN_FILE} in its folder, so how it was made is not known.")
    for file in files:
        if file.name == ROWS_FILE or is_rows(file):
            if not (rows := read_rows(file)):
                raise InputError(f"{file} holds no row of a sweep yet")
            data.sweeps.append((name, Sweep(in_order(rows))))
            continue
        if file.suffix == ".jsonl":
            data.runs.append((name, TrainingRun.load(file)))
            continue
        content = read_json(file)
        kind = KINDS.get(file.name) or next((kind for kind in KINDS.values() if kind[1] in content), None)
        if kind is None:
            raise InputError(f"{file} is not an analysis, an evaluation, a comparison or a training log")
        getattr(data, kind[2]).append((name, kind[0].parse(content, file)))
        if kind[0] is Evaluation and (path / "responses.parquet").is_file():
            _read_samples(name, path / "responses.parquet", data.samples)


def _read_samples(name: str, path: Path, shown: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """Add a model's first response to each of the first problems on file."""
    columns = ["task", "problem_id", "prompt", "response", "answer", "status", "sample"]
    try:
        rows = pyarrow.parquet.read_table(path, columns=columns, filters=[("sample", "=", 0)]).to_pylist()
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    for row in rows:
        key = row["task"], row["problem_id"]
        if key in shown or len(shown) < SAMPLES:
            shown.setdefault(key, []).append({**row, "model": name})


def render(title: str, data: ReportData, template: str = "report.html.j2") -> str:
    """The page, or with ``look.html.j2`` its token explorer alone."""
    loader = PackageLoader("bupo.report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"svg": style.inline_svg, "data_block": data_block, "shell": shlex.join, "text": _text}
    environment.filters["shortened"] = _shortened
    names = ("style.css", "explorer.css", "explorer.js", "groups.js")
    look, more_look, *scripts = (loader.get_source(environment, name)[0] for name in names)
    shown: dict[str, Any] = {"title": title, "data": data, "css": Markup(look + more_look)}
    shown |= {"analysis_figures": analysis_figures, "inside_figures": inside_figures}
    shown |= {"evaluations": evaluations, "sweeps": sweeps}
    shown["grouped"] = [(name, run.batches) for name, run in data.runs if run.batches]
    used = {"script": data.tokens, "filter_script": shown["grouped"]}
    shown |= {name: Markup(script) for name, script in zip(used, scripts, strict=True)}
    hashes = [hashlib.sha256(shown[name].encode()).digest() for name, present in used.items() if present]
    policy = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes)
    shown["script_policy"] = Markup(policy or "'none'")  # no other script of the page can run
    shown["trained"] = [(name, run) for name, run in data.runs if run.log]
    shown["over_training"] = [(name, run.readings, run.switch) for name, run in data.runs if run.readings]
    text = environment.get_template(template).render(shown)
    return text.encode("utf-8", "replace").decode("utf-8")  # JSON may hold half a surrogate pair


def data_block(tokens: Sequence[tuple[str, ExploredTokens]]) -> Markup:
    """The samples of each named model as JSON that is safe inside ``<script type="application/json">``."""
    models = [{"name": name, "samples": item.model_dump(exclude_none=True)["samples"]} for name, item in tokens]
    # These characters could end a script element early; json itself escapes everything beyond ASCII.
    escapes = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}
    return Markup(json.dumps({"models": models}, separators=(",", ":"), allow_nan=False).translate(escapes))


def _shortened(text: str) -> str:
    """A response as the page shows it: of a long one the beginning and the end."""
    left_out = len(text) - SHOWN
    if left_out <= 0:
        return text
    return f"{text[: SHOWN // 2]}\n[... {left_out:,} characters left out ...]\n{text[-SHOWN // 2 :]}"


def _text(value: Any, indent: int | None = None) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=indent, ensure_ascii=False)
