"""Measures how much plain GRPO gains on the shipped model at several learning rates, for the recipe of the demo.

Run ``python -m experiments.small_model_room --out experiments/results/small_model_room.json`` (about eight minutes on
two cores).

Each run is ``bupo train`` with the recipe of the demo and one seed, then ``bupo eval`` on 256 held-out problems with 4
samples each; two runs at a time use one core each. Only GRPO is tuned; BuPO takes the same rate.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from bupo.cli.demo import run_jobs
from bupo.run_folder import describe_run, write_json

RECIPE = Path(__file__).parent.parent / "src" / "bupo" / "assets" / "demo.yaml"
PROBLEMS, SAMPLES = 256, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 3e-5, 6e-5, 1e-4])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rollouts", type=int, default=45)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = sweep(args, Path(scratch))
    write_json(args.out, result)
    for row in result["runs"]:
        print(f"{row['learning_rate']}: {row['avg']['mean']:.3f} {row['avg']['ci95']}")


def sweep(args: argparse.Namespace, folder: Path) -> dict:
    trainings, evaluations = {}, {}
    for rate in [0.0, *args.rates]:
        out = folder / f"train-{rate}"
        if rate:
            changes = f"--set learning_rate={rate} --rollouts {args.rollouts} --seed {args.seed}".split()
            trainings[f"train {rate}"] = ["train", str(RECIPE), *changes, "--output", str(out)]
        options = f"--tasks arithmetic --limit {PROBLEMS} --k {SAMPLES} --max-new-tokens 40 --seed {args.seed}".split()
        model = str(out / "model") if rate else "small"
        output = str(folder / f"eval-{rate}")
        evaluations[f"eval {rate}"] = ["eval", "--model", model, *options, "--output", output]
    seconds = run_jobs(trainings, folder / "logs", args.rollouts)
    run_jobs(evaluations, folder / "logs", PROBLEMS * SAMPLES)
    rows = []
    for rate in [0.0, *args.rates]:
        results = json.loads((folder / f"eval-{rate}" / "results.json").read_text())["tasks"]["arithmetic"]
        rows.append(
            {
                "learning_rate": rate or "start, not trained",
                "avg": results["avg_at_k"],
                "mean_length": results["mean_length"],
                "seconds": round(seconds[f"train {rate}"]) if rate else None,
                "command": " ".join(["bupo", *evaluations[f"eval {rate}"]]).replace(str(folder), "runs"),
            }
        )
    config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "out"}
    return {
        **describe_run("small_model_room", config),
        "problems": PROBLEMS,
        "samples": SAMPLES,
        "recipe": RECIPE.read_text(),
        "runs": rows,
    }


if __name__ == "__main__":
    main()
