"""`bupo plan` against measured runs of the two small recipes, one process per recipe and phase.

Command: ``make smollm2 && python -m benchmarks.plan_check --out benchmarks/results/plan.json``

Memory is the largest resident size above that of the loaded model, over two rollout batches (at the second one's
updates the optimizer has its moments). The plan gets the padded lengths that the run had. Time per rollout batch is of
the second one; it is reported only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = ("small", "smollm2")
PHASES = {"internal": 2, "full": 0}  # rollout batches of the internal phase


def resident(kind: str) -> int:
    """Bytes of resident memory now (``VmRSS``) or at most (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1]) * 1024


def recipe_of(name: str, phase: str):
    from bupo.recipe import read_recipe
    from bupo.train.build import check_recipe

    raw = read_recipe(REPOSITORY / "recipes" / f"{name}.yaml")
    return check_recipe({**raw, "rollouts": 2, "internal_steps": PHASES[phase]})


def measure(name: str, phase: str) -> dict:
    """Train two rollout batches in this process."""
    from bupo.train.build import build

    with tempfile.TemporaryDirectory() as folder:
        trainer = build(recipe_of(name, phase), Path(folder), lambda text: None)
        trainer.args.save_strategy = "no"
        sample, lengths, starts = trainer._generate_and_score_completions, [], []

        def watched(inputs):
            starts.append(time.perf_counter())
            batch = sample(inputs)
            lengths.append([batch["prompt_ids"].shape[1], batch["completion_ids"].shape[1]])
            return batch

        trainer._generate_and_score_completions = watched
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here
        loaded = resident("VmRSS")
        trainer.train()
        seconds = time.perf_counter() - starts[-1]
        peak = resident("VmHWM") - loaded
        trainer.reward_funcs[0].close()
    prompt, response = map(max, zip(*lengths, strict=True))
    return {"memory": peak, "seconds": seconds, "prompt": prompt, "response": response}


def planned(name: str, phase: str, prompt: int, response: int) -> dict:
    from bupo.plan import PlanRequest, find_device, make_plan

    request = PlanRequest(find_device("cpu"), prompt=prompt, response=response)
    plan = make_plan(recipe_of(name, phase), request)
    return {
        "memory": plan["memory"]["peak_above_weights"][phase],
        "seconds": plan["seconds"][phase]["rollout_batch"],
        "flops_per_second": plan["device"]["flops"],
    }


def child(*arguments: object) -> dict:
    command = [sys.executable, "-m", "benchmarks.plan_check", "--child", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, phase, *lengths = args.child
        print(json.dumps(planned(name, phase, *map(int, lengths)) if lengths else measure(name, phase)))
        return
    checks = {}
    for name in args.recipes:
        for phase in PHASES:
            run = child(name, phase)
            plan = child(name, phase, run["prompt"], run["response"])
            ratio = {key: round(plan[key] / run[key], 3) for key in ("memory", "seconds")}
            checks[f"{name}/{phase}"] = {"measured": run, "planned": plan, "ratio": ratio}
            print(
                f"{name}, {phase} phase: {plan['memory'] / 2**20:,.0f} MiB planned, {run['memory'] / 2**20:,.0f} "
                f"measured ({ratio['memory']:.2f}); {plan['seconds']:.1f} s planned, {run['seconds']:.1f} measured",
                flush=True,
            )
    within = all(abs(check["ratio"]["memory"] - 1) <= 0.2 for check in checks.values())
    print(f"every memory within 20 %: {within}")
    if args.out:
        from bupo.run_folder import describe_run, write_json

        run = describe_run("plan_check", {"recipes": list(args.recipes)})
        write_json(args.out, {**run, "within_20_percent": within, "checks": checks})


if __name__ == "__main__":
    main()
