"""Rows of sweeps, and a stand-in for bupo that trains and evaluates in no time (run as a program)."""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml


def a_row(arm: str, seed: int, counts: list[int], samples: int = 4, **more: Any) -> dict[str, Any]:
    """A row with the number of correct samples of each problem of task ``t``."""
    task = {"samples": samples, "avg": 0.5, "correct": " ".join(map(str, counts)), "mean_length": 3.0}
    return {"arm": arm, "seed": seed, "changes": {}, "tasks": {"t": task}, **more}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(recipe: Path, out: Path, how: list[str]) -> int:
    """Fail with a learning rate of 0.5; wait for Ctrl-C with 0.25, save, and finish with --resume."""
    settings, log = yaml.safe_load(recipe.read_text()), out / "log.jsonl"
    row = {"rollout": 1, "reward": 0.25, "entropy": 1.0, "internal_entropy": None, "sampling_seconds": 1.0}
    if settings["learning_rate"] == 0.5:
        print("a line before\nbupo: error: the rate is too high", flush=True)
        return 2
    for folder in ("checkpoints/checkpoint-1", "model"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    if settings["learning_rate"] == 0.25 and "--resume" not in how:
        stopped: list[int] = []
        signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
        log.write_text(json.dumps({**row, "seconds": 5.0}) + "\n")
        while not stopped:
            time.sleep(0.01)
        (out / "checkpoints/checkpoint-1/bupo_state.json").write_text("{}")
        return 130
    with log.open("a") as lines:
        lines.write(json.dumps({**row, "seconds": 3.0}) + "\n")
    (out / "model" / "weights").write_text(str(settings["seed"]))
    result = {"phase_end": None, "internal_layer": None, "model": str(out / "model")}
    (out / "run.json").write_text(json.dumps({"result": result}))
    return 0


def evaluate(model: str, out: Path) -> int:
    first = int(Path(model, "weights").read_text()) if Path(model, "weights").exists() else 0
    out.mkdir(parents=True)
    task = {"n_samples": 2, "avg_at_k": {"mean": 0.5}, "problems": [{"correct": first}, {"correct": 2}]}
    task |= {"mean_length": 3.0, "truncation_rate": 0.0, "unparsable_rate": 0.0}
    (out / "results.json").write_text(json.dumps({"tasks": {"arithmetic": task}}))
    return 0


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    where = Path(rest[rest.index("--output") + 1])
    run = (
        train(Path(rest[0]), where, rest[3:])
        if command == "train"
        else evaluate(rest[rest.index("--model") + 1], where)
    )
    sys.exit(run)
