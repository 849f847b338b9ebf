"""Writes one self-contained page: figures inline, no network request, every text from outside escaped.

The page's words are in ``templates/report.html.j2``. Tokens of the explorer are text that a model wrote: they reach the
page only inside a JSON data block in which no character can end the block, and the script shows them as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from bupo.report import analysis_figures, inside_figures, run_figures
from bupo.report.collect import ReportData
from bupo.report.conclusion import Conclusion, conclude, outcome
from bupo.report.logs import last_internal_rollout, summary
from bupo.report.results import Analysis, Estimate, ExploredTokens, TaskScore
from bupo.report.style import inline_svg
from bupo.run_folder import write_text

_RECORD_KEYS = {"schema", "command", "argv", "config", "machine", "versions", "seed", "seconds", "name"}
# Characters that could end a script element early; json itself escapes everything beyond ASCII.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}


def write_page(path: str | Path, title: str, data: ReportData) -> Path:
    """Write the page atomically."""
    switches = {name: last_internal_rollout(run.log) for name, run in data.runs}
    over_training = [(name, run.readings, switches[name]) for name, run in data.runs if run.readings]
    only_analyses = data.analyses and not data.evaluations
    page = _environment().get_template("report.html.j2")
    text = page.render(
        title=title,
        data=data,
        conclusion=_layers(data.analyses) if only_analyses else conclude(data.evaluations, data.differences),
        runs=[(name, summary(run.log), switches[name], _layers_trained(run.log)) for name, run in data.runs],
        over_training=over_training,
        tasks=run_figures.task_names(data.evaluations),
        records=[item if isinstance(item, str) else _record(item) for item in data.records],
    )
    return write_text(path, text.encode("utf-8", "replace").decode("utf-8"))  # JSON may hold half a surrogate pair


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("bupo.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    script = template_text("explorer.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {
        "css": Markup(template_text("style.css") + template_text("explorer.css")),
        "script": Markup(script),
        "script_policy": Markup(f"'sha256-{digest}'"),  # no other script of the page can run
        "analysis_figures": analysis_figures,
        "inside_figures": inside_figures,
        "run_figures": run_figures,
    }
    environment.filters |= {
        "svg": _svg, "names": _names, "chat": _chat, "data_block": data_block, "boundary": _boundary, "knee": _knee,
        "cells": _cells, "outcome": outcome, "points": _points, "arrow": _arrow,
    }  # fmt: skip
    return environment


@cache
def template_text(name: str) -> str:
    """The text of a file in the templates folder."""
    return files("bupo.report").joinpath("templates", name).read_text(encoding="utf-8")


def data_block(tokens: Sequence[tuple[str, ExploredTokens]]) -> Markup:
    """The samples of each named model as JSON that is safe inside ``<script type="application/json">``."""
    models = [
        {"name": name, "samples": [sample.model_dump(exclude_none=True) for sample in item.samples]}
        for name, item in tokens
    ]
    return Markup(json.dumps({"models": models}, separators=(",", ":"), allow_nan=False).translate(_ESCAPES))


def _svg(figure: Figure, name: str, alt: str) -> Markup:
    return Markup(inline_svg(figure, name, alt))  # matplotlib escapes the texts it draws, inline_svg the alternative


def _names(items: Sequence[tuple[Any, ...]]) -> str:
    return ", ".join(str(item[0]) for item in items)


def _boundary(analysis: Analysis) -> str:
    if analysis.boundary_layer is None:
        return f"none, because {analysis.boundary_reason}"
    return f"layer {analysis.boundary_layer} of {analysis.layers}: {analysis.boundary_reason}"


def _knee(analysis: Analysis) -> str:
    """The knee as a sentence, with its standard error where one is known; empty if it was not measured."""
    knee = analysis.layer_choice.knee if analysis.layer_choice else None
    if knee is None or knee.layer is None:
        return f"none, because {knee.reason}" if knee else ""
    error = "" if knee.standard_error is None else f" ± {knee.standard_error:.1f} (standard error)"
    return f"layer {knee.layer}{error}: {knee.reason}"


def _layers(analyses: Sequence[tuple[str, Analysis]]) -> Conclusion:
    """The conclusion of a page without evaluations: each model's boundary layer."""
    lines = tuple(f"{name}: boundary layer {_boundary(a).removeprefix('layer ')}." for name, a in analyses)
    return Conclusion(lines[0]) if len(lines) == 1 else Conclusion(f"{len(lines)} models were analysed.", lines=lines)


def _layers_trained(log: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(str(row["layer"]) for row in log if row.get("layer") is not None))


def _cells(score: TaskScore, ks: Sequence[int]) -> list[tuple[str, str]]:
    """Values and intervals of one model's row of results."""

    def estimate(value: Estimate | None, prefix: str = "") -> tuple[str, str]:
        if value is None:
            return "–", ""
        low, high = value.ci95
        return f"{prefix}{100 * value.mean:.1f}", f"[{100 * low:.1f}, {100 * high:.1f}]"

    passes, average = {point.k: point for point in score.pass_at_k}, score.avg_at_k
    numbers = [(score.n_problems, "{:.0f}"), (score.n_samples, "{:.0f}"), (score.mean_length, "{:.0f}")]
    numbers += [(score.truncation_rate, "{:.1%}"), (score.unparsable_rate, "{:.1%}")]
    return [
        estimate(average, f"@{average.k} " if average else ""),
        *(estimate(passes.get(k)) for k in ks),
        *(("–" if value is None else show.format(value).replace("%", " %"), "") for value, show in numbers),
    ]


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _arrow(ends: Sequence[float] | None, digits: int) -> str:
    return " → ".join(f"{value:.{digits}f}" for value in ends) if ends else "–"


def _chat(prompt: Any) -> str:
    """A prompt as text; chat messages follow each other with their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in prompt)


def _record(run: Mapping[str, Any]) -> dict[str, Any]:
    """What ``run.json`` says: the command line first, then everything else in it."""
    config, argv = run.get("config") or {}, run.get("argv")
    command = shlex.join(["bupo", *map(str, argv)]) if argv else f"bupo {run.get('command', '')}"
    seed, seconds = run.get("seed", config.get("seed")), run.get("seconds")
    rows = {"command line": command, "seed": seed, "time": None if seconds is None else f"{seconds:.0f} s"}
    for key in ("machine", "versions"):
        rows[key] = ", ".join(f"{name} {value}" for name, value in run.get(key, {}).items())
    rows |= {key.replace("_", " "): value for key, value in run.items() if key not in _RECORD_KEYS}
    shown = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in rows.items()
        if value or value == 0
    }
    title = f"{run['name']}: {command}" if run.get("name") else command
    return {"title": title, "rows": shown, "config": json.dumps(config, indent=1, ensure_ascii=False) if config else ""}
