"""``bupo demo``: the main job from end to end on a CPU, by the same commands a user would type."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from bupo.cli import options
from bupo.cli.report import write_report
from bupo.errors import BupoError, InputError
from bupo.run_folder import claim, read_json, write_json

RECIPE = Path(__file__).parent.parent / "assets" / "demo.yaml"
# Where the model has no boundary layer, the middle one is trained, and everything shown says so.
FALLBACK = "the middle of the model (a choice of this demonstration, not a finding)"
_GROWING = {"train": "log.jsonl", "eval": "responses.partial.jsonl"}  # gets a line with each step of the command


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything.")] = Path("demo"),
    rollouts: Annotated[int | None, typer.Option(min=2, help="Rollout batches per run. Default: the recipe's.")] = None,
    internal_steps: Annotated[int, typer.Option(min=1, help="Rollout batches of BuPO's internal phase.")] = 8,
    problems: Annotated[int, typer.Option("--limit", "--problems", min=2, help="Held-out problems.")] = 256,
    samples: Annotated[int, typer.Option(min=1, help="Number of responses per problem.")] = 8,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Run the main job from end to end on a CPU: analyse, train twice, evaluate, report.

    Analyses the shipped model, trains plain GRPO and BuPO from the same start with the same rollouts, evaluates the
    three models on held-out problems and writes report.html. Every step is an ordinary bupo command and is printed.

    Example:
      bupo demo --output demo
    """
    from bupo.recipe import read_recipe

    total = rollouts or read_recipe(RECIPE)["rollouts"]
    if internal_steps >= total:
        raise InputError(f"--internal-steps {internal_steps} must be fewer than the {total} rollout batches")
    claim(output, overwrite=overwrite)
    for name in ("analysis", "grpo", "bupo", "eval", "logs"):
        shutil.rmtree(output / name, ignore_errors=True)
    console = Console(stderr=True, quiet=as_json, highlight=False)
    started, finished = time.monotonic(), list[str]()

    def step(title: str, steps: int, jobs: Mapping[str, Sequence[str]]) -> None:
        console.print(f"[bold]{title}[/bold]  ({time.monotonic() - started:.0f} s so far)")
        for arguments in jobs.values():
            console.print(f"  $ bupo {' '.join(arguments)}", soft_wrap=True, markup=False)
        seconds = run_jobs(jobs, output / "logs", steps, quiet=as_json)
        finished.extend(f"bupo {' '.join(jobs[name])}  ({taken:.0f} s)" for name, taken in seconds.items())

    look = f"analyze --model small --dataset arithmetic --split test --max-new-tokens 40 --seed {seed}".split()
    job = {"analyse": [*look, "--limit", str(min(100, problems)), "--output", str(output / "analysis")]}
    step("1/4  The internal policies of the shipped model", 1, job)
    analysis = read_json(output / "analysis" / "analysis.json")
    layer = analysis["boundary_layer"] or analysis["layers"] // 2
    because = "its boundary layer" if analysis["boundary_layer"] else FALLBACK
    console.print(f"  {analysis['boundary_reason']}", markup=False)
    console.print(f"  BuPO trains layer {layer} of {analysis['layers']} first: {because}", markup=False)

    train = ["train", str(RECIPE), "--seed", str(seed), *(["--set", f"rollouts={rollouts}"] if rollouts else [])]
    internal = ["--internal-layer", str(layer), "--internal-steps", str(internal_steps)]
    runs = {"GRPO": output / "grpo", "BuPO": output / "bupo"}
    jobs = {f"train {name}": [*train, "--output", str(run)] for name, run in runs.items()}
    jobs["train BuPO"][-2:-2] = internal
    step(f"2/4  Training from the same start, {total} rollout batches each", total, jobs)

    tasks = f"--tasks arithmetic --limit {problems} --k {samples} --max-new-tokens 40 --seed {seed}".split()
    models = {"start": "small", **{name: str(run / "model") for name, run in runs.items()}}
    scores = {name: output / "eval" / name.lower() for name in models}
    jobs = {f"evaluate {n}": ["eval", "--model", models[n], *tasks, "--output", str(scores[n])] for n in models}
    step(f"3/4  Three models on {problems} held-out problems, {samples} samples each", problems * samples, jobs)

    summary = {"schema": 1, "seconds": round(time.monotonic() - started, 1), "layer": layer, "layer_reason": because}
    note = f"BuPO trained layer {layer} first, {because}. Each run has one seed: a difference holds for these two "
    note += "runs, and another seed can come out otherwise."
    page, title = output / "report.html", "Bottom-up policy optimization: a demonstration"
    results = [("shipped model", output / "analysis"), *scores.items(), *runs.items()]
    _, shown = write_report(page, title, [f"{name}={folder}" for name, folder in results], [note], finished)
    summary |= {**{key: shown[key] for key in ("headline", "lines", "comparisons")}, "report": str(page)}
    write_json(output / "summary.json", summary)
    console.print(f"[bold]4/4  Report[/bold]  ({summary['seconds']:.0f} s in all)")
    for line in (shown["headline"], *shown["lines"]):
        console.print(f"  {line}", markup=False)
    typer.echo(json.dumps(summary, ensure_ascii=False) if as_json else f"open {page.absolute()}")


def run_jobs(jobs: Mapping[str, Sequence[str]], logs: Path, steps: int, quiet: bool = False) -> dict[str, float]:
    """Run bupo commands by name, two at a time with an equal share of the cores each; return the seconds they took.

    A command's last argument is its folder, and what it prints goes to a file in ``logs``. Where one failed, the others
    are stopped, and `BupoError` has the last line of its output.
    """
    cores, stop = os.cpu_count() or 1, threading.Event()
    at_once = min(2, cores, len(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores // at_once), "COLUMNS": "120"}
    columns = ("  {task.description:<28}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    logs.mkdir(parents=True, exist_ok=True)

    def run(name: str) -> float:
        if stop.is_set():
            return 0.0
        log, started, bar = logs / f"{name.replace(' ', '-')}.log", time.monotonic(), bars.add_task(name, total=steps)
        growing = Path(jobs[name][-1]) / _GROWING.get(jobs[name][0], "none")
        with log.open("wb") as stream:
            command, nothing = [sys.executable, "-m", "bupo", *jobs[name]], subprocess.DEVNULL
            process = subprocess.Popen(command, stdin=nothing, stdout=stream, stderr=stream, env=environment)
        while process.poll() is None and not stop.wait(0.2):
            with suppress(OSError):  # there is no such file yet, or no longer
                bars.update(bar, completed=min(steps, growing.read_bytes().count(b"\n")))
        if process.returncode:
            stop.set()
            last = (log.read_text(errors="replace").strip() or "no output").splitlines()[-1]
            raise BupoError(f"{name} failed: {last.removeprefix('bupo: error: ')} (all of its output: {log})")
        process.terminate()  # if it still runs, another one failed
        bars.update(bar, completed=steps if process.wait() == 0 else None)
        bars.stop_task(bar)
        return time.monotonic() - started

    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bars, ThreadPoolExecutor(at_once) as pool:
        try:
            return dict(zip(jobs, pool.map(run, jobs), strict=True))
        finally:
            stop.set()
