"""``bupo demo``: the main job from end to end on a CPU, by the same commands a user would type."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from bupo.errors import InputError

HELP = """The main job in one go, on a CPU: look, choose a layer, train twice, evaluate, report.

Analyses the shipped model, trains plain GRPO and BuPO from the same start with the same rollouts, evaluates the three
models on held-out problems and writes report.html. Every step is an ordinary bupo command and is printed.

Example:

  bupo demo --output demo
"""

# Where the rule gives no boundary layer the middle of the model is trained, and everything shown says so.
FALLBACK = "the middle of the model (a choice of this demonstration, not a finding)"


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("demo", help=HELP)(demo)


def demo(
    output: Annotated[Path, typer.Option(help="Folder for everything.")] = Path("demo"),
    rollouts: Annotated[int | None, typer.Option(min=2, help="Rollout batches of both runs; the recipe's 45.")] = None,
    internal_steps: Annotated[int, typer.Option(min=1, help="Rollout batches of BuPO's internal phase.")] = 8,
    problems: Annotated[int, typer.Option(min=2, help="Held-out problems of the evaluations.")] = 256,
    samples: Annotated[int, typer.Option(min=1, help="Responses a problem.")] = 8,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier demonstration in --output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON, no progress.")] = False,
) -> None:
    from rich.console import Console

    from bupo.cli.jobs import Job, lines_in, run_jobs
    from bupo.run_folder import claim, write_json

    recipe = Path(__file__).parent.parent / "assets" / "demo.yaml"
    total = rollouts or _recipe_rollouts(recipe)
    if internal_steps >= total:
        raise InputError(f"--internal-steps {internal_steps} must be fewer than the {total} rollout batches")
    folder = claim(output, overwrite=overwrite)
    _clear(folder)
    console = Console(stderr=True, quiet=as_json, highlight=False)
    started, jobs_run = time.monotonic(), []
    cores = os.cpu_count() or 1

    def step(title: str, jobs: list[Job]) -> None:
        console.print(f"[bold]{title}[/bold]  ({time.monotonic() - started:.0f} s so far)")
        for job in jobs:
            console.print(f"  $ {job.command}", soft_wrap=True, markup=False)
        run_jobs(jobs, at_once=min(2, cores), quiet=as_json)
        jobs_run.extend(jobs)

    def job(name: str, arguments: list[object], total: int, counted: Path | None = None) -> Job:
        log = folder / "logs" / f"{name.replace(' ', '-')}.log"
        progress = (lambda: (0, total)) if counted is None else (lambda: lines_in(counted, total))
        return Job(name, [str(a) for a in arguments], log, progress)

    look = folder / "analysis"
    arguments: list[object] = ["analyze", "--model", "small", "--dataset", "arithmetic", "--split", "test"]
    arguments += ["--limit", 100, "--max-new-tokens", 40, "--seed", seed, "--output", look]
    step("1/4  The internal policies of the shipped model", [job("analyse", arguments, 1)])
    analysis = json.loads((look / "analysis.json").read_text(encoding="utf-8"))
    layer = analysis["boundary_layer"] or analysis["layers"] // 2
    because = "its boundary layer" if analysis["boundary_layer"] else FALLBACK
    console.print(f"  {analysis['boundary_reason']}", markup=False)
    console.print(f"  BuPO trains layer {layer} of {analysis['layers']} first: {because}", markup=False)

    train: list[object] = ["train", recipe, "--seed", seed, *(["--set", f"rollouts={rollouts}"] if rollouts else [])]
    internal: list[object] = ["--internal-layer", layer, "--internal-steps", internal_steps]
    step(
        f"2/4  Training from the same start, {total} rollout batches each",
        [
            job("train GRPO", [*train, "--output", folder / "grpo"], total, folder / "grpo" / "log.jsonl"),
            job("train BuPO", [*train, *internal, "--output", folder / "bupo"], total, folder / "bupo" / "log.jsonl"),
        ],
    )

    models = {"start": "small", "GRPO": folder / "grpo" / "model", "BuPO": folder / "bupo" / "model"}
    evaluations = []
    for name, model in models.items():
        where = folder / "eval" / name.lower()
        arguments = ["eval", "--model", model, "--tasks", "arithmetic", "--limit", problems, "--k", samples]
        arguments += ["--max-new-tokens", 40, "--seed", seed, "--output", where]
        evaluations.append(job(f"evaluate {name}", arguments, problems * samples, where / "responses.partial.jsonl"))
    step(f"3/4  Three models on {problems} held-out problems, {samples} samples each", evaluations)

    page = folder / "report.html"
    summary = _report(folder, page, models, layer, because, jobs_run, time.monotonic() - started)
    write_json(folder / "summary.json", summary)
    console.print(f"[bold]4/4  Report[/bold]  ({summary['seconds']:.0f} s in all)")
    for line in (summary["headline"], *summary["lines"]):
        console.print(f"  {line}", markup=False)
    if as_json:
        typer.echo(json.dumps(summary, ensure_ascii=False))
    else:
        typer.echo(f"open {page.absolute()}")


def _recipe_rollouts(recipe: Path) -> int:
    import yaml

    return int(yaml.safe_load(recipe.read_text(encoding="utf-8"))["rollouts"])


def _clear(folder: Path) -> None:
    """Remove what an earlier demonstration left, and nothing else."""
    for name in ("analysis", "grpo", "bupo", "eval", "logs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("report.html", "summary.json"):
        (folder / name).unlink(missing_ok=True)


def _report(
    folder: Path,
    page: Path,
    models: dict[str, Any],
    layer: int,
    because: str,
    jobs: list[Any],
    seconds: float,
) -> dict[str, Any]:
    """Write the page and return what it concludes."""
    from bupo.report.collect import collect
    from bupo.report.html import write_report
    from bupo.report.verdict import verdict

    material = collect(
        [
            f"shipped model={folder / 'analysis'}",
            *(f"{name}={folder / 'eval' / name.lower()}" for name in models),
            f"GRPO={folder / 'grpo'}",
            f"BuPO={folder / 'bupo'}",
        ]
    )
    material.notes.insert(
        0,
        f"BuPO trained layer {layer} first, {because}. One seed each: a difference holds for these two "
        f"runs; another seed can come out otherwise.",
    )
    material.what_was_run[:0] = [f"{j.command}  ({j.seconds:.0f} s)" for j in jobs]
    write_report(page, title="Bottom-up policy optimization: a demonstration", **vars(material))
    judged = verdict(material.evaluations, material.comparisons)
    return {
        "schema": 1,
        "seconds": round(seconds, 1),
        "layer": layer,
        "layer_reason": because,
        "headline": judged.headline,
        "lines": list(judged.lines),
        "comparisons": material.comparisons,
        "report": str(page),
    }
