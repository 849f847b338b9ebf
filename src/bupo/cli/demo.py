"""``bupo demo``: the main job from end to end on a CPU, by the same commands a user would type."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from bupo.cli import options
from bupo.errors import BupoError, InputError

HELP = """Run the main job from end to end on a CPU: analyse, train twice, evaluate, report.

Analyses the shipped model, trains plain GRPO and BuPO from the same start with the same rollouts, evaluates the three
models on held-out problems and writes report.html. Every step is an ordinary bupo command and is printed.

Example:

  bupo demo --output demo
"""
RECIPE = Path(__file__).parent.parent / "assets" / "demo.yaml"
# Where the model has no boundary layer, the middle one is trained, and everything shown says so.
FALLBACK = "the middle of the model (a choice of this demonstration, not a finding)"


@dataclass
class Job:
    """One bupo command: its arguments, and the file that grows by one line for each of its ``total`` steps."""

    name: str
    arguments: list[str]
    folder: Path  # its logs folder receives the output
    total: int = 1
    counted: Path | None = None
    seconds: float = 0.0

    @property
    def command(self) -> str:
        return "bupo " + " ".join(self.arguments)

    @property
    def log(self) -> Path:
        return self.folder / "logs" / f"{self.name.replace(' ', '-')}.log"

    @property
    def done(self) -> int:
        """Steps finished; the counted file may not exist yet, or no longer."""
        try:
            return 0 if self.counted is None else min(self.total, self.counted.read_bytes().count(b"\n"))
        except OSError:
            return 0


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything.")] = Path("demo"),
    rollouts: Annotated[int | None, typer.Option(min=2, help="Rollout batches per run. Default: the recipe's.")] = None,
    internal_steps: Annotated[int, typer.Option(min=1, help="Rollout batches of BuPO's internal phase.")] = 8,
    problems: Annotated[int, typer.Option(min=2, help="Number of held-out problems.")] = 256,
    samples: Annotated[int, typer.Option(min=1, help="Number of responses per problem.")] = 8,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    from rich.console import Console

    from bupo.run_folder import claim, write_json

    total = rollouts or _recipe_rollouts()
    if internal_steps >= total:
        raise InputError(f"--internal-steps {internal_steps} must be fewer than the {total} rollout batches")
    folder = claim(output, overwrite=overwrite)
    for name in ("analysis", "grpo", "bupo", "eval", "logs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    console = Console(stderr=True, quiet=as_json, highlight=False)
    started = time.monotonic()
    finished: list[Job] = []

    def step(title: str, *jobs: Job) -> None:
        console.print(f"[bold]{title}[/bold]  ({time.monotonic() - started:.0f} s so far)")
        for job in jobs:
            console.print(f"  $ {job.command}", soft_wrap=True, markup=False)
        run_jobs(jobs, at_once=min(2, os.cpu_count() or 1), quiet=as_json)
        finished.extend(jobs)

    look = folder / "analysis"
    arguments = "analyze --model small --dataset arithmetic --split test --limit 100 --max-new-tokens 40 --seed"
    job = Job("analyse", [*arguments.split(), str(seed), "--output", str(look)], folder)
    step("1/4  The internal policies of the shipped model", job)
    analysis = json.loads((look / "analysis.json").read_text(encoding="utf-8"))
    layer = analysis["boundary_layer"] or analysis["layers"] // 2
    because = "its boundary layer" if analysis["boundary_layer"] else FALLBACK
    console.print(f"  {analysis['boundary_reason']}", markup=False)
    console.print(f"  BuPO trains layer {layer} of {analysis['layers']} first: {because}", markup=False)

    train = ["train", str(RECIPE), "--seed", str(seed), *(["--set", f"rollouts={rollouts}"] if rollouts else [])]
    internal = ["--internal-layer", str(layer), "--internal-steps", str(internal_steps)]
    trained = {"GRPO": folder / "grpo", "BuPO": folder / "bupo"}
    step(
        f"2/4  Training from the same start, {total} rollout batches each",
        *(
            Job(f"train {name}", [*train, *more, "--output", str(run)], folder, total, run / "log.jsonl")
            for (name, run), more in zip(trained.items(), ([], internal), strict=True)
        ),
    )

    jobs = []
    for name, model in {"start": "small", **{name: str(run / "model") for name, run in trained.items()}}.items():
        where = folder / "eval" / name.lower()
        arguments = f"--tasks arithmetic --limit {problems} --k {samples} --max-new-tokens 40 --seed {seed} --output"
        command = ["eval", "--model", model, *arguments.split(), str(where)]
        jobs.append(Job(f"evaluate {name}", command, folder, problems * samples, where / "responses.partial.jsonl"))
    step(f"3/4  Three models on {problems} held-out problems, {samples} samples each", *jobs)

    summary = _report(folder, layer, because, finished, time.monotonic() - started)
    write_json(folder / "summary.json", summary)
    console.print(f"[bold]4/4  Report[/bold]  ({summary['seconds']:.0f} s in all)")
    for line in (summary["headline"], *summary["lines"]):
        console.print(f"  {line}", markup=False)
    typer.echo(json.dumps(summary, ensure_ascii=False) if as_json else f"open {Path(summary['report']).absolute()}")


def _recipe_rollouts() -> int:
    import yaml

    return int(yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["rollouts"])


def _report(folder: Path, layer: int, because: str, jobs: Sequence[Job], seconds: float) -> dict[str, Any]:
    """Write the page and return what it concludes."""
    from bupo.report.collect import collect
    from bupo.report.conclusion import conclude
    from bupo.report.page import write_page

    names = ("start", "GRPO", "BuPO")
    data = collect(
        [
            f"shipped model={folder / 'analysis'}",
            *(f"{name}={folder / 'eval' / name.lower()}" for name in names),
            *(f"{name}={folder / name.lower()}" for name in names[1:]),
        ]
    )
    data.notes.insert(
        0,
        f"BuPO trained layer {layer} first, {because}. Each run has one seed: a difference holds for these two runs, "
        "and another seed can come out otherwise.",
    )
    data.records[:0] = [f"{job.command}  ({job.seconds:.0f} s)" for job in jobs]
    page = write_page(folder / "report.html", "Bottom-up policy optimization: a demonstration", data)
    conclusion = conclude(data.evaluations, data.differences)
    return {
        "schema": 1,
        "seconds": round(seconds, 1),
        "layer": layer,
        "layer_reason": because,
        "headline": conclusion.headline,
        "lines": list(conclusion.lines),
        "comparisons": data.differences,
        "report": str(page),
    }


def run_jobs(jobs: Sequence[Job], *, at_once: int, quiet: bool = False) -> None:
    """Run commands side by side, at most ``at_once`` at a time with an equal share of the cores each.

    Raises:
        BupoError: one failed; the message is the last line of its output, and the others were stopped.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    threads = max(1, (os.cpu_count() or 1) // max(1, min(at_once, len(jobs))))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "COLUMNS": "120"}
    columns = (TextColumn("  {task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    waiting, running = list(jobs), dict[str, tuple[Job, subprocess.Popen[bytes], float]]()
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bars:
        tasks = {job.name: bars.add_task(job.name, total=None, start=False) for job in jobs}
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.pop(0)
                    running[job.name] = (job, _start(job, environment), time.monotonic())
                    bars.start_task(tasks[job.name])
                time.sleep(0.2)
                for job, process, started in list(running.values()):
                    code = process.poll()
                    bars.update(tasks[job.name], completed=job.total if code == 0 else job.done, total=job.total)
                    if code is not None:
                        del running[job.name]
                        job.seconds = time.monotonic() - started
                        bars.stop_task(tasks[job.name])
                    if code:
                        raise BupoError(f"{job.name} failed: {_last_line(job.log)} (all of its output: {job.log})")
        finally:
            for _, process, _ in running.values():
                process.terminate()
            for _, process, _ in running.values():
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    process.kill()


def _start(job: Job, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "bupo", *job.arguments]
    with job.log.open("wb") as log:
        streams: Any = {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(command, env=environment, **streams)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return (lines[-1] if lines else "no output").removeprefix("bupo: error: ")
