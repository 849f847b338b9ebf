"""Trains and evaluates the arms of a grid, seed by seed, and writes one line of JSON per run.

Run ``python -m experiments.grid experiments/grids/small.yaml``; runs that have a line already are skipped.

A grid is a YAML mapping: ``recipe``; ``base``, the changes to it that all arms share; ``arms``, further changes per
arm, and ``seeds`` where an arm does not run all of them; ``seeds``; ``evaluate``, the options of `bupo eval`;
``order``, the arms to run first. The arm ``start`` is the untrained model. Runs are ordered by seed, then by arm.

A line contains the arm, seed, changes, commit and seconds; when and why a guard ended the phase; curves with one value
per rollout batch; with ``inside_every`` among the changes, the measurements inside the model; and per task, the number
of correct samples per problem, so that comparisons can be paired by problem. Weights are discarded unless
``--keep FOLDER`` is passed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from bupo import run_folder as rundir
from bupo.cli import main as bupo
from experiments.summary import read_lines

REPOSITORY = Path(__file__).resolve().parents[1]
CURVES = ("reward", "entropy", "internal_entropy", "mean_length", "perplexity", "internal/divergence", "grad_norm")


def runs(grid: dict[str, Any]) -> list[tuple[str, int]]:
    """The (arm, seed) pairs in the order in which they run."""
    arms = grid["arms"]
    names = [*grid.get("order", []), *(name for name in arms if name not in grid.get("order", []))]
    seeds = {name: (arms[name] or {}).get("seeds", grid["seeds"]) for name in names}
    ordered = sorted({seed for own in seeds.values() for seed in own}, key=lambda s: (s not in grid["seeds"], s))
    return [(name, seed) for seed in ordered for name in names if seed in seeds[name]]


def changes(grid: dict[str, Any], arm: str) -> dict[str, Any]:
    own = {k: v for k, v in (grid["arms"][arm] or {}).items() if k != "seeds"}
    return {**grid.get("base", {}), **own}


def one_run(grid: dict[str, Any], arm: str, seed: int, folder: Path, keep: Path | None) -> None:
    """Train (except for the arm ``start``) and evaluate; writes ``row.json`` into ``folder``."""
    started = time.monotonic()
    settings = changes(grid, arm)
    row: dict[str, Any] = {"arm": arm, "seed": seed, "changes": settings, "commit": _commit()}
    model = yaml.safe_load((REPOSITORY / grid["recipe"]).read_text())["model"]
    if arm != "start":
        out = folder / "train"
        options = {**settings, "seed": seed, "save_every": 10_000, "keep_checkpoints": 2}
        flags = [part for key, value in options.items() for part in ("--set", f"{key}={_yaml(value)}")]
        _bupo("train", REPOSITORY / grid["recipe"], "--output", out, *flags, "--json")
        result = json.loads((out / "run.json").read_text())["result"]
        row |= {"phase_end": result["phase_end"], "internal_layer": result["internal_layer"]}
        log = read_lines(out / "log.jsonl")
        row |= {"curves": _curves(log), "update_seconds": _update_seconds(log)}
        if settings.get("inside_every"):
            row["inside"] = [_rounded(rundir.read_json(path)) for path in sorted((out / "inside").glob("after-*.json"))]
        model = str(out / "model")
    row["train_seconds"] = round(time.monotonic() - started, 1)
    options = [part for key, value in grid["evaluate"].items() for part in (f"--{key}", str(value))]
    _bupo("eval", "--model", model, "--seed", "0", "--output", folder / "eval", *options)
    tasks = json.loads((folder / "eval" / "results.json").read_text())["tasks"]
    row["tasks"] = {
        name: {
            "samples": task["n_samples"],
            "avg": round(task["avg_at_k"]["mean"], 5),
            "correct": " ".join(str(p["correct"]) for p in task["problems"]),
            "mean_length": round(task["mean_length"], 2),
            "truncation_rate": round(task["truncation_rate"], 4),
            "unparsable_rate": round(task["unparsable_rate"], 4),
        }
        for name, task in tasks.items()
    }
    if keep is not None and arm != "start":
        shutil.copytree(folder / "train" / "model", keep / f"{arm}-{seed}", dirs_exist_ok=True)
    row["seconds"] = round(time.monotonic() - started, 1)
    rundir.write_json(folder / "row.json", row)


def _curves(rows: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    found = {}
    for name in CURVES:
        values = [row.get(name) for row in rows]
        if any(v is not None for v in values):
            found[name] = [None if v is None else round(v, 4) for v in values]
    return found


def _update_seconds(rows: list[dict[str, Any]]) -> float:
    """Seconds of training that were not spent on sampling and rewards, lens fits included."""
    rows = [row for row in rows if "sampling_seconds" in row]
    return round(rows[-1]["seconds"] - sum(row["sampling_seconds"] for row in rows), 1)


def _rounded(reading: dict[str, Any]) -> dict[str, Any]:
    """The parts of one measurement that the figures use, with four decimals."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: short(part) for name, part in value.items()}
        if isinstance(value, list):
            return [short(part) for part in value]
        return round(value, 4) if isinstance(value, float) else value

    return short({k: v for k, v in reading.items() if k not in ("schema", "kind", "change", "standard_error_method")})


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).replace("\n...", "").strip()


def _bupo(*arguments: Any) -> None:
    if code := bupo([str(a) for a in arguments]):
        raise SystemExit(f"bupo {' '.join(map(str, arguments))}: exit code {code}")


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--out", type=Path, help="file of JSON lines (default: experiments/results/NAME.jsonl)")
    parser.add_argument("--only", help="comma-separated arms to run")
    parser.add_argument("--seeds", help="comma-separated seeds to run")
    parser.add_argument("--keep", type=Path, help="folder for the trained models")
    args = parser.parse_args()
    grid = yaml.safe_load(args.grid.read_text())
    out = args.out or REPOSITORY / "experiments" / "results" / f"{args.grid.stem}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    done = set()
    if out.exists():
        done = {(row["arm"], row["seed"]) for row in read_lines(out)}
    pending = [run for run in runs(grid) if run not in done]
    if args.only:
        pending = [run for run in pending if run[0] in args.only.split(",")]
    if args.seeds:
        pending = [run for run in pending if str(run[1]) in args.seeds.split(",")]
    import bupo.evaluate.run
    import bupo.train.run  # noqa: F401  (once, before forking)

    context = multiprocessing.get_context("fork")
    for number, (arm, seed) in enumerate(pending, start=1):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            log = folder / "log"
            process = context.Process(target=_quietly, args=(log, grid, arm, seed, folder, args.keep))
            process.start()
            process.join()
            if process.exitcode:
                print(f"{arm}, seed {seed}: failed\n{log.read_text()[-2000:]}", file=sys.stderr, flush=True)
                continue
            row = json.loads((folder / "row.json").read_text())
        with out.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row, separators=(",", ":")) + "\n")
        averages = {name: f"{task['avg']:.1%}" for name, task in row["tasks"].items()}
        ended = row.get("phase_end")
        print(
            f"{number}/{len(pending)} {arm}, seed {seed}: {averages} in {row['seconds']:.0f} s", ended or "", flush=True
        )


def _quietly(log: Path, *arguments: Any) -> None:
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        one_run(*arguments)


if __name__ == "__main__":
    main()
