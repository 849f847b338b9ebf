"""One self-contained page: figures inline, no request to anywhere, every text from outside escaped."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bupo.report import choice, explorer, figures
from bupo.report.curves import average_dots, pass_curves, tasks_of, training_curves
from bupo.report.inside import inside_figure
from bupo.report.inside_training import inside_training_figure
from bupo.report.logs import last_internal_rollout, summary
from bupo.report.style import inline_svg
from bupo.report.verdict import Verdict, outcome, verdict
from bupo.run_folder import write_text

if TYPE_CHECKING:
    from jinja2 import Environment

Item = Mapping[str, Any]
_SHOWN = {"flow": figures.entropy_flow, "change": figures.entropy_change, "cosine": figures.residual_cosine}
_CAPTIONS = {
    "flow": "Mean entropy of the policies read from the residual stream after each layer, from attention and from the "
    "FFN. Dashed: the model's own output. Dotted: the uniform distribution.",
    "change": "How much each module changes the entropy from its input to its output. Above zero a module widens the "
    "choice of tokens, below zero it narrows it.",
    "cosine": "Cosine between what a module adds and the stream it is added to. Positive: it strengthens the direction "
    "that is there; negative: it takes from it; near zero: it writes a new one.",
    "overlay": "The analysed models in one figure; bands are two standard errors, dashed lines boundary layers.",
    "choice": "Each layer's policy against the model's own, on a random part of the tokens. Recovered: 0 is "
    "no better than uniform, 100 is the final policy, read through the final norm at the nearest temperature. Bands: "
    "two standard errors; triangles at the top: no temperature helps. Bars: how often each criterion names a layer.",
    "choices": "The analysed models' agreement with their own final policies; dashed lines: recommended layers.",
    "curves": "Faint: values of each rollout batch; bold: running means. A dashed vertical line marks the end of a "
    "run's internal phase. In that phase the clip fraction is the internal policy's.",
    "average": "Mean accuracy of single samples.",
    "pass": "Probability that at least one of K samples is right (unbiased estimate).",
}


def write_report(
    path: str | Path,
    *,
    title: str,
    analyses: Sequence[Item] = (),
    runs: Sequence[Item] = (),
    evaluations: Sequence[Item] = (),
    comparisons: Sequence[Item] = (),
    notes: Sequence[str] = (),
    what_was_run: Sequence[Item | str] = (),
    samples: Sequence[Item] = (),
    tokens: Sequence[Item] = (),
    inside: Sequence[Item] = (),
) -> Path:
    """Write the page, whole or not at all.

    Args:
        analyses: contents of ``analysis.json``; a key ``name`` is shown instead of the model's name.
        runs: ``{"name", "log": rows of log.jsonl, "config": settings}``.
        evaluations: ``{"name", "results": content of results.json}``.
        comparisons: paired, second minus first; see `bupo.report.verdict.verdict`.
        notes: sentences shown below the verdict.
        what_was_run: contents of ``run.json`` (with a ``name``), or sentences.
        samples: ``{"problem_id", "prompt", "answer"?, "responses": [{"model", "response", "status"?}]}``.
        tokens: contents of ``tokens.json`` with a ``name``; see `bupo.report.explorer`.
        inside: contents of ``compare.json`` with a ``name``.

    Raises:
        InputError: an analysis is not of schema 1.
    """
    return write_text(
        path,
        render(
            title=title, analyses=analyses, runs=runs, evaluations=evaluations, comparisons=comparisons, notes=notes,
            what_was_run=what_was_run, samples=samples, tokens=tokens, inside=inside,
        ),
    )  # fmt: skip


def render(
    *,
    title: str,
    analyses: Sequence[Item],
    runs: Sequence[Item],
    evaluations: Sequence[Item],
    comparisons: Sequence[Item],
    notes: Sequence[str],
    what_was_run: Sequence[Item | str],
    samples: Sequence[Item],
    tokens: Sequence[Item] = (),
    inside: Sequence[Item] = (),
) -> str:
    """The page as text; arguments as of `write_report`."""
    for analysis in analyses:
        figures.check_analysis(analysis, f"the analysis of {_name(analysis)}")
    scored = [(e["name"], e["results"]) for e in evaluations]
    logs = [(run["name"], run["log"]) for run in runs]
    result_figures = [
        _figure(name, drawn, f"{what} of {', '.join(n for n, _ in scored)}; the numbers are in the table below")
        for name, drawn, what in (
            ("average", average_dots(scored), "Average accuracy with 95 % intervals"),
            ("pass", pass_curves(scored), "Pass@K with 95 % intervals"),
        )
        if drawn is not None
    ]
    content: dict[str, Any] = {
        "title": title,
        "verdict": verdict(evaluations, comparisons) if evaluations or not analyses else _in_short(analyses),
        "verdict_title": "Verdict" if evaluations or not analyses else "In short",
        "notes": notes,
        "analyses": [_analysis(a, f"a{i}") for i, a in enumerate(analyses, 1)],
        "overlay": None,
        "choices": None,
        "explorer": _explorer(tokens),
        "inside": [_inside(item, f"inside{i}") for i, item in enumerate(inside, 1)],
        "script_policy": explorer.script_policy() if tokens else "'none'",
        "runs": [_run(run) for run in runs],
        "curves": None,
        "over_training": _over_training(runs),
        "result_figures": result_figures,
        "evaluations": [_table(task, scored) for task in tasks_of(scored)],
        "comparisons": [_comparison(c) for c in comparisons],
        "samples": [_sample(s) for s in samples],
        "what_was_run": [_what(item) for item in what_was_run],
    }
    if len(analyses) > 1:
        named = [(_name(a), a) for a in analyses]
        alt = f"Layer-policy entropy and FFN entropy change of {', '.join(n for n, _ in named)} in one figure"
        content["overlay"] = _figure("overlay", figures.overlay(named), alt)
    if runs:
        alt = f"Reward, entropy, length and clip fraction over rollout batches of {', '.join(n for n, _ in logs)}"
        content["curves"] = _figure("curves", training_curves(logs), alt)
    chosen = [(_name(a), a) for a in analyses if a.get("layer_choice")]
    if len(chosen) > 1:
        alt = f"Agreement with the final policy over the layers of {', '.join(n for n, _ in chosen)}"
        content["choices"] = _figure("choices", choice.overlay(chosen), alt)
    content["sections"] = [("verdict", content["verdict_title"])] + [
        (id, text)
        for id, text, there in (
            ("policies", "Internal policies", analyses),
            ("tokens", "Token explorer", tokens),
            ("training", "Training", runs),
            ("inside", "What training did inside", inside or content["over_training"]),
            ("results", "Results", evaluations),
            ("samples", "Sample responses", samples),
        )
        if there
    ]
    content["sections"].append(("run", "What was run"))
    text = _environment().get_template("report.html.j2").render(content)
    return text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair is no text; JSON may hold one


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("bupo.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    # ours, and free of the characters that would need escaping inside <style>
    environment.globals["css"] = Markup(template_text("style.css") + template_text("explorer.css"))
    return environment


@cache
def template_text(name: str) -> str:
    """A file of the templates folder."""
    return files("bupo.report").joinpath("templates", name).read_text(encoding="utf-8")


def _figure(name: str, drawn: Any, alt: str, caption: str | None = None) -> dict[str, Any]:
    from markupsafe import Markup

    # matplotlib escapes the texts it draws, inline_svg the alternative text
    return {"name": f"fig-{name}", "svg": Markup(inline_svg(drawn, name, alt)), "caption": caption or _CAPTIONS[name]}


def _name(analysis: Item) -> str:
    return str(analysis.get("name") or analysis.get("model") or "model")


def _analysis(analysis: Item, key: str) -> dict[str, Any]:
    name, layer = _name(analysis), analysis.get("boundary_layer")
    reason = str(analysis.get("boundary_reason") or "").strip()
    boundary = f"layer {layer} of {analysis['layers']}" if layer is not None else "none"
    alts = {
        "flow": "Entropy of the layer, attention and FFN policies over the layers",
        "change": f"Entropy change within attention and FFN over the layers; boundary: {boundary}",
        "cosine": "Residual cosine of attention and FFN over the layers",
    }
    measured = [f"{analysis[key]:,} {key}" for key in ("samples", "tokens") if isinstance(analysis.get(key), int)]
    measured += [f"dtype {analysis['dtype']}"] if analysis.get("dtype") else []
    return {
        "name": name,
        "layers": analysis["layers"],
        "boundary": f"{boundary}: {reason}" if reason else boundary,
        "regions": [
            (region.capitalize(), "none" if span is None else f"layers {span[0]} to {span[1]}")
            for region, span in (analysis.get("regions") or {}).items()
        ],
        "measured": ", ".join(measured) or "not recorded",
        "figures": [
            _figure(f"{key}-{kind}", draw(analysis), f"{alts[kind]}, for {name}", _CAPTIONS[kind])
            for kind, draw in _SHOWN.items()
        ],
        "choice": _choice(analysis, key, name),
    }


def _in_short(analyses: Sequence[Item]) -> Verdict:
    """What analyses without an evaluation found: each model's layers."""
    lines = []
    for analysis in analyses:
        layer = analysis.get("boundary_layer")
        line = f"{_name(analysis)}: " + ("no boundary layer" if layer is None else f"boundary layer {layer}")
        if analysis.get("layer_choice"):
            line += f"; recommended: {choice.answer_text(analysis['layer_choice']['recommendation'])}"
        lines.append(f"{line}.")
    if len(lines) == 1:
        return Verdict(lines[0], "none")
    return Verdict(f"{len(lines)} models were analysed.", "none", tuple(lines))


def _choice(analysis: Item, key: str, name: str) -> dict[str, Any] | None:
    block = analysis.get("layer_choice")
    if not block:
        return None
    best = block["recommendation"]
    alt = f"Layer choice for {name}: {choice.answer_text(best)}; the numbers are in the table above it"
    return {
        "answer": choice.answer_text(best),
        "reason": best["reason"],
        "measured": f"{block['tokens']:,} random tokens of {block['responses']:,} responses, seed {block['seed']}",
        "criteria": [
            {"title": a.get("title") or a["name"], "answer": choice.answer_text(a), "reason": a["reason"]}
            for a in block["criteria"]
        ],
        "figure": _figure(f"{key}-choice", choice.layer_choice(analysis), alt, _CAPTIONS["choice"]),
    }


def _inside(found: Item, key: str) -> dict[str, Any]:
    models = ", ".join(str(m["name"]) for m in found["models"])
    alt = f"Cosines, entropies, perplexity and divergence of layer {found['layer']} of {models}"
    caption = (
        f"{models} on the same {found['samples']} responses ({found['tokens']} tokens); layer {found['layer']} of "
        f"{found['layers']}. The first is the baseline. Bands and bars: two standard errors."
    )
    return {"name": found["name"], "figure": _figure(key, inside_figure(found), alt, caption)}


def _over_training(runs: Sequence[Item]) -> dict[str, Any] | None:
    read = [(r["name"], r["inside"], last_internal_rollout(r["log"])) for r in runs if r.get("inside")]
    if not read:
        return None
    names = ", ".join(name for name, _, _ in read)
    first = read[0][1][0]
    alt = f"Cosines, entropy, perplexity and divergence over the rollout batches of {names}"
    caption = (
        f"Over training, each run on its own fixed {first['samples']} responses ({first['tokens']} tokens), read "
        "before a rollout batch's updates and after the last. Dashed: end of the internal phase. Bands: two standard "
        "errors of the change since the start."
    )
    return _figure("over-training", inside_training_figure(read), alt, caption)


def _explorer(tokens: Sequence[Item]) -> Any:
    from markupsafe import Markup

    if not tokens:
        return None
    page = _environment().get_template("explorer.html.j2")
    return Markup(page.render(data=explorer.data_block(tokens), script=explorer.script()))


def _run(run: Item) -> dict[str, Any]:
    found, last = summary(run["log"]), last_internal_rollout(run["log"])

    def change(name: str, digits: int) -> str:
        return " → ".join(f"{v:.{digits}f}" for v in found[name]) if name in found else "–"

    seconds = f"{found['seconds']:.0f}" if "seconds" in found else "–"
    phase = "–" if last is None else f"{last:.0f}"
    numbers = [found.get("rollouts", "–"), found["steps"], phase]
    return {
        "name": run["name"],
        "cells": [*numbers, change("reward", 3), change("entropy", 3), change("length", 0), seconds],
    }


def _table(task: str, scored: Sequence[tuple[str, Item]]) -> dict[str, Any]:
    rows = [(name, results["tasks"][task]) for name, results in scored if task in results.get("tasks", {})]
    ks = sorted({point["k"] for _, row in rows for point in row.get("pass_at_k", [])} - {1})
    heads = ["Avg@K", *(f"Pass@{k}" for k in ks), "Problems", "Samples", "Mean length", "Cut off", "Unreadable"]
    return {"task": task, "heads": heads, "rows": [{"name": n, "cells": _cells(row, ks)} for n, row in rows]}


def _cells(row: Item, ks: Sequence[int]) -> list[dict[str, str]]:
    def estimate(value: Item | None, prefix: str = "") -> dict[str, str]:
        if not value:
            return {"value": "–", "interval": ""}
        low, high = value["ci95"]
        return {"value": f"{prefix}{100 * value['mean']:.1f}", "interval": f"[{100 * low:.1f}, {100 * high:.1f}]"}

    def plain(key: str, show: str, scale: float = 1) -> dict[str, str]:
        value = row.get(key)
        return {"value": "–" if value is None else show.format(scale * value), "interval": ""}

    average = row.get("avg_at_k")
    passes = {point["k"]: point for point in row.get("pass_at_k", [])}
    return [
        estimate(average, f"@{average['k']} " if average else ""),
        *(estimate(passes.get(k)) for k in ks),
        plain("n_problems", "{:.0f}"),
        plain("n_samples", "{:.0f}"),
        plain("mean_length", "{:.0f}"),
        plain("truncation_rate", "{:.1f} %", 100),
        plain("unparsable_rate", "{:.1f} %", 100),
    ]


def _comparison(c: Item) -> dict[str, Any]:
    low, high = c["ci95"]
    p = c.get("p_value")
    found = outcome(c)
    return {
        "task": c.get("task", ""),
        "first": c["first"],
        "second": c["second"],
        "difference": f"{100 * c['difference']:+.1f}".replace("-", "−"),
        "interval": f"[{100 * low:+.1f}, {100 * high:+.1f}]".replace("-", "−"),
        "p": "–" if p is None else (f"{p:.3f}" if p >= 0.001 else "< 0.001"),
        "problems": c.get("problems", "–"),
        "outcome": found,
        "words": {"open": "not shown to differ"}.get(found, found),
    }


def _sample(sample: Item) -> dict[str, Any]:
    return {
        "id": sample.get("problem_id", "sample"),
        "prompt": prompt_text(sample.get("prompt", "")),
        "answer": sample.get("answer") or "",
        "responses": [
            {"model": r.get("model", ""), "text": r.get("response", ""), "status": r.get("status") or ""}
            for r in sample.get("responses", [])
        ],
    }


def prompt_text(prompt: Any) -> str:
    """A prompt as text: chat messages one below the other with their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in prompt)


def _what(item: Item | str) -> dict[str, Any]:
    if isinstance(item, str):
        return {"text": item}
    config = item.get("config") or {}
    argv = item.get("argv")
    command = shlex.join(["bupo", *map(str, argv)]) if argv else f"bupo {item.get('command', '')}"
    seed = item.get("seed", config.get("seed"))
    rows = [("command line", command)]
    rows += [("seed", str(seed))] if seed is not None else []
    rows += [("time", f"{item['seconds']:.0f} s")] if isinstance(item.get("seconds"), int | float) else []
    for key in ("machine", "versions"):
        if item.get(key):
            rows.append((key, ", ".join(f"{name} {value}" for name, value in item[key].items())))
    known = {"schema", "command", "argv", "config", "machine", "versions", "seed", "seconds", "name"}
    rows += [(key.replace("_", " "), _plain(value)) for key, value in item.items() if key not in known and value]
    title = f"{item['name']}: {command}" if item.get("name") else command
    return {"title": title, "rows": rows, "config": json.dumps(config, indent=1, ensure_ascii=False) if config else ""}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
