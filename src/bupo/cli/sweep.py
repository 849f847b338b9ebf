"""``bupo sweep``: the arms of a grid with several seeds each, one row per run."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bupo.cli import eval, options
from bupo.errors import InputError
from bupo.run_folder import RUN_FILE, claim, describe_run, read_json, write_json

_EVAL = typer.Typer()
_EVAL.command("eval")(eval.evaluate)


def sweep(
    grid: Annotated[Path, typer.Argument(help="Grid: recipe, arms, seeds and evaluation, in YAML.")],
    output: options.Output,
    rows: Annotated[Path | None, typer.Option(help="File of the rows. Default: runs.jsonl in --output.")] = None,
    only: Annotated[str | None, typer.Option(metavar="ARMS", help="Arms to run, separated by commas.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds to run, for instance 0,1,2 or 0-9.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of runs at a time; they share cores and GPUs.")] = 1,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the trained models in --output, under models/.")] = False,
    as_json: options.AsJson = False,
) -> int:
    """Train and evaluate every arm of a grid with every seed, and write one row of JSON per run.

    GRID is a YAML file (see recipes/sweeps/): a recipe, changes to it per arm, seeds, and options of `bupo eval`. It is
    checked before the first run. Runs with a row are skipped, so the same command continues an interrupted sweep.
    `bupo report` draws the rows, and `bupo power` says how many seeds a difference needs.

    Examples:
      bupo sweep recipes/sweeps/layers.yaml --output runs/layers
      bupo sweep recipes/sweeps/layers.yaml --output runs/layers --only grpo,layer4 --seeds 0-2 --workers 2
    """
    options.refuse_launcher("bupo sweep", "start it without a launcher; --workers runs several at a time")
    known = (output / RUN_FILE).is_file() and read_json(output / RUN_FILE).get("command") == "sweep"
    if not known and output.is_dir() and any(path.name != ".lock" for path in output.iterdir()):
        raise InputError(f"output folder {output} is not empty and holds no sweep; choose another")
    claim(output, resume=True)

    from pydantic_core import PydanticCustomError

    from bupo.sweep import grid as grids
    from bupo.sweep.rows import ROWS_FILE, Rows, read_rows
    from bupo.sweep.run import Commands, Runner, commit_of, locked, run_sweep

    what, to = grids.read_grid(grid), rows or output / ROWS_FILE
    _check_evaluation(grid, what.evaluation())
    try:
        chosen = None if seeds is None else grids.seeds_of(seeds)
    except PydanticCustomError as error:
        raise InputError(f"--seeds must be {error}, not {seeds!r}") from None
    arms = None if only is None else options.split_names(only)

    def done() -> Rows:
        return read_rows(to) if to.exists() else {}

    def say(text: str) -> None:
        print(text, file=sys.stderr if as_json else sys.stdout, flush=True)

    grids.pending(what, done(), arms, chosen)  # before the folder is made
    with locked(output) as lock:
        runs = grids.pending(what, done(), arms, chosen)
        config: dict[str, Any] = {"grid": str(grid), **what.model_dump(mode="json"), "rows": to, "workers": workers}
        write_json(output / RUN_FILE, describe_run("sweep", config))
        for text in grids.changed(what, done()).values():
            say(f"note: {text}; its rows count as done")
        say(f"{len(runs)} of {len(what.runs())} runs of the grid are to do")
        runner = Runner(what, output, to, keep, commit_of(grid.parent), Commands(workers, lock))
        failed, stopped = run_sweep(runner, runs, workers, say)
        left = len(grids.pending(what, done(), arms, chosen))
    if stopped:
        print(f"bupo: interrupted. {left} runs have no row in {to} yet; the same command continues.", file=sys.stderr)
    elif failed:
        print(f"bupo: error: {failed} of {len(runs)} runs failed; the same command tries them again", file=sys.stderr)
    elif not as_json:
        print(f"rows: {to}; draw them with: bupo report {to if rows else output}")
    if as_json:
        print(json.dumps({"schema": 1, "rows": str(to), "done": len(runs) - left, "failed": failed, "left": left}))
    return 130 if stopped else int(bool(failed))


def _check_evaluation(grid: Path, arguments: list[str]) -> None:
    """Raise `InputError` unless `bupo eval` takes the options, and all problems of the tasks can be loaded."""
    from bupo.evaluate.config import EvalConfig, find_task, task_problems

    try:
        parsed = typer.main.get_command(_EVAL).make_context("eval", [*arguments]).params
    except Exception as error:
        if not hasattr(error, "format_message"):  # that of a usage error; typer brings its own click
            raise
        raise InputError(f"{grid}: evaluate: {error.format_message()}") from None
    if not parsed["tasks"]:
        raise InputError(f"{grid}: evaluate lacks tasks, such as 'tasks: arithmetic'")
    names, folder = options.split_names(parsed["tasks"]), parsed["data_dir"]
    EvalConfig("model", tuple(names), k=parsed["k"], n=parsed["n"], top_p=parsed["top_p"])
    for name in names:
        task_problems(find_task(name), folder, parsed["limit"], parsed["seed"])
