"""Writes one self-contained page: figures inline, no network request, every text from outside escaped."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from bupo.report import analysis_figures, inside_figures, run_figures
from bupo.report.collect import ReportData, TrainingRun
from bupo.report.conclusion import Conclusion, conclude, outcome
from bupo.report.explorer import data_block, script, script_policy, template_text
from bupo.report.logs import last_internal_rollout, summary
from bupo.report.results import Analysis, Comparison, Estimate, Evaluation, TaskScore
from bupo.report.style import inline_svg
from bupo.run_folder import write_text

_RECORD_KEYS = {"schema", "command", "argv", "config", "machine", "versions", "seed", "seconds", "name"}


def write_page(path: str | Path, title: str, data: ReportData) -> Path:
    """Write the page atomically."""
    return write_text(path, render(title, data))


def render(title: str, data: ReportData) -> str:
    """The page as HTML; explanations and captions are in ``templates/report.html.j2``."""
    over_training = [(n, run.readings, last_internal_rollout(run.log)) for n, run in data.runs if run.readings]
    content: dict[str, Any] = {
        "title": title,
        "data": data,
        "conclusion": _layers(data.analyses)
        if data.analyses and not data.evaluations
        else conclude(data.evaluations, data.differences),
        "analyses": [_analysis(name, analysis, f"a{i}") for i, (name, analysis) in enumerate(data.analyses, 1)],
        "overlay": _several(data.analyses),
        "script_policy": script_policy() if data.tokens else "'none'",
        "explorer": {"data": data_block(data.tokens), "script": script()} if data.tokens else None,
        "curves": _figure(
            "curves",
            run_figures.training_curves([(name, run.log) for name, run in data.runs]),
            f"Reward, entropy, length and clip fraction over rollout batches of {_listed(data.runs)}",
        )
        if data.runs
        else None,
        "runs": [(name, _run(run)) for name, run in data.runs],
        "over_training": _figure(
            "over-training",
            inside_figures.training_figure(over_training),
            f"Cosines, entropy, perplexity and divergence over the rollout batches of {_listed(over_training)}",
        )
        if over_training
        else None,
        "first_reading": over_training[0][1][0] if over_training else None,
        "comparisons": [_comparison(item, f"inside{i}") for i, (_, item) in enumerate(data.comparisons, 1)],
        "evaluation_figures": _evaluation_figures(data.evaluations),
        "tables": [_table(task, data.evaluations) for task in run_figures.task_names(data.evaluations)],
        "differences": [_difference(d) for d in data.differences],
        "records": [item if isinstance(item, str) else _record(item) for item in data.records],
    }
    text = _environment().get_template("report.html.j2").render(content)
    return text.encode("utf-8", "replace").decode("utf-8")  # JSON may hold half a surrogate pair, which is not text


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("bupo.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals["css"] = Markup(template_text("style.css") + template_text("explorer.css"))
    environment.filters["chat"] = _chat
    return environment


def _figure(name: str, figure: Figure, alt: str) -> dict[str, Any]:
    """A figure for the template; matplotlib escapes the texts it draws, `inline_svg` the alternative text."""
    return {"name": f"fig-{name}", "svg": Markup(inline_svg(figure, name, alt))}


def _listed(items: Sequence[tuple[Any, ...]]) -> str:
    return ", ".join(str(item[0]) for item in items)


def _boundary(analysis: Analysis) -> str:
    if analysis.boundary_layer is None:
        return f"none, because {analysis.boundary_reason}"
    return f"layer {analysis.boundary_layer} of {analysis.layers}: {analysis.boundary_reason}"


def _knee(analysis: Analysis) -> str | None:
    """The knee as a sentence, with its standard error where one is known."""
    knee = analysis.layer_choice.knee if analysis.layer_choice else None
    if knee is None:
        return None
    if knee.layer is None:
        return f"none, because {knee.reason}"
    error = "" if knee.standard_error is None else f" ± {knee.standard_error:.1f} (standard error)"
    return f"layer {knee.layer}{error}: {knee.reason}"


def _layers(analyses: Sequence[tuple[str, Analysis]]) -> Conclusion:
    """The conclusion of a page without evaluations: each model's boundary layer."""
    lines = tuple(
        f"{name}: boundary layer {_boundary(analysis).removeprefix('layer ')}." for name, analysis in analyses
    )
    return Conclusion(lines[0]) if len(lines) == 1 else Conclusion(f"{len(lines)} models were analysed.", lines=lines)


def _analysis(name: str, analysis: Analysis, key: str) -> dict[str, Any]:
    alts = {
        "entropy_flow": "Entropy of the layer, attention and FFN policies over the layers",
        "entropy_change": "Entropy change within attention and FFN over the layers; boundary layer: "
        f"{analysis.boundary_layer or 'none'}",
        "residual_cosine": "Residual cosine of attention and FFN over the layers",
        "layer_choice": "Agreement with the model's output, divergence and entropy over the layers",
    }
    figures = {
        kind: _figure(f"{key}-{kind.replace('_', '-')}", figure, f"{alts[kind]}, for {name}")
        for kind, figure in analysis_figures.draw(analysis).items()
    }
    return {"name": name, "it": analysis, "boundary": _boundary(analysis), "knee": _knee(analysis), "figures": figures}


def _several(analyses: Sequence[tuple[str, Analysis]]) -> dict[str, Any] | None:
    if len(analyses) < 2:
        return None
    alt = f"Layer-policy entropy, residual cosine and entropy changes of {_listed(analyses)} in one figure"
    return _figure("overlay", analysis_figures.overlay(analyses), alt)


def _comparison(comparison: Comparison, key: str) -> dict[str, Any]:
    models = ", ".join(model.name for model in comparison.models)
    alt = f"Cosines, entropies, perplexity and divergence of layer {comparison.layer} of {models}"
    return {"it": comparison, "models": models, **_figure(key, inside_figures.comparison_figure(comparison), alt)}


def _run(run: TrainingRun) -> list[str]:
    """The cells of a run's row: rollout batches, updates, switch of phases, trained layers, and changes of means."""
    numbers, switch = summary(run.log), last_internal_rollout(run.log)
    layers = dict.fromkeys(str(row["layer"]) for row in run.log if row.get("layer") is not None)
    cells = [str(numbers.get("rollouts", "–")), str(numbers["steps"]), "–" if switch is None else f"{switch:.0f}"]
    cells.append(", ".join(layers) or "–")
    for name, digits in (("reward", 3), ("entropy", 3), ("length", 0)):
        cells.append(" → ".join(f"{v:.{digits}f}" for v in numbers[name]) if name in numbers else "–")
    return [*cells, f"{numbers['seconds']:.0f}" if "seconds" in numbers else "–"]


def _evaluation_figures(evaluations: Sequence[tuple[str, Evaluation]]) -> dict[str, Any]:
    figures = {
        "average": (run_figures.average_dots(evaluations), "Average accuracy with 95 % intervals"),
        "pass": (run_figures.pass_curves(evaluations), "Pass@K with 95 % intervals"),
    }
    of = f"of {_listed(evaluations)}; the numbers are in the table below"
    return {name: _figure(name, figure, f"{what} {of}") for name, (figure, what) in figures.items() if figure}


def _table(task: str, evaluations: Sequence[tuple[str, Evaluation]]) -> dict[str, Any]:
    scores = [(name, evaluation.tasks[task]) for name, evaluation in evaluations if task in evaluation.tasks]
    ks = sorted({point.k for _, score in scores for point in score.pass_at_k} - {1})
    heads = [
        "Model",
        "Avg@K",
        *(f"Pass@{k}" for k in ks),
        "Problems",
        "Samples",
        "Mean length",
        "Cut off",
        "Unreadable",
    ]
    return {"task": task, "heads": heads, "rows": [(name, _cells(score, ks)) for name, score in scores]}


def _cells(score: TaskScore, ks: Sequence[int]) -> list[tuple[str, str]]:
    """Values and intervals of one row."""

    def estimate(value: Estimate | None, prefix: str = "") -> tuple[str, str]:
        if value is None:
            return "–", ""
        low, high = value.ci95
        return f"{prefix}{100 * value.mean:.1f}", f"[{100 * low:.1f}, {100 * high:.1f}]"

    passes = {point.k: point for point in score.pass_at_k}
    average = score.avg_at_k
    plain = [(score.n_problems, "{:.0f}"), (score.n_samples, "{:.0f}"), (score.mean_length, "{:.0f}")]
    shares = [(score.truncation_rate, "{:.1%}"), (score.unparsable_rate, "{:.1%}")]
    return [
        estimate(average, f"@{average.k} " if average else ""),
        *(estimate(passes.get(k)) for k in ks),
        *(("–" if value is None else show.format(value).replace("%", " %"), "") for value, show in [*plain, *shares]),
    ]


def _difference(d: Mapping[str, Any]) -> dict[str, Any]:
    low, high = (f"{100 * end:+.1f}".replace("-", "−") for end in d["ci95"])
    p, kind = d.get("p_value"), outcome(d)
    return {
        **{key: d[key] for key in ("task", "first", "second")},
        "points": f"{100 * d['difference']:+.1f}".replace("-", "−"),
        "interval": f"[{low}, {high}]",
        "p": "–" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001",
        "problems": d.get("problems", "–"),
        "outcome": kind,
        "words": "not shown to differ" if kind == "open" else kind,
    }


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
