"""`bupo plan` against measured runs of the small recipes, a fresh process for each phase.

Command: ``make smollm2 && python -m benchmarks.plan_check --out benchmarks/results/plan_check.json``

Measured: the most resident memory above the loaded model, and the seconds of a rollout batch's generation, scoring and
updates. Planned: the same with ``--measure`` (some layers timed in a process of their own) and with the lengths that
the run's batches had. SmolLM2's rollout batches are cut to 16 responses and one update (a whole one takes many
minutes on two cores); micro-batch and lengths, which memory depends on, are the recipe's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
RUNS = {
    "small": {"rollouts": 4},
    "smollm2": {"rollouts": 2, "prompts_per_rollout": 2, "updates_per_rollout": 1, "model": "models/smollm2"},
}
PARTS = ("generation", "scoring", "updates")


def resident(kind: str) -> int:
    """Bytes of resident memory now (``VmRSS``) or at most (``VmHWM``)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(kind)).split()[1]) * 1024


def recipe_of(name: str, phase: str):
    from bupo.recipe import read_recipe
    from bupo.train.build import check_recipe

    raw = {**read_recipe(REPOSITORY / "recipes" / f"{name}.yaml"), **RUNS[name], "precision": "float32"}
    return check_recipe({**raw, "internal_steps": raw["rollouts"] if phase == "internal" else 0})


def run(name: str, phase: str) -> dict:
    """Train a few rollout batches in this process, watching memory and time."""
    from transformers import TrainerCallback

    from bupo.train.build import build

    recipe = recipe_of(name, phase)
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    lengths = []
    with tempfile.TemporaryDirectory() as folder:
        trainer, _, reward = build(recipe, Path(folder), lambda text: None)
        trainer.args.save_strategy = "no"
        generate, whole = trainer._generate, trainer._generate_and_score_completions

        def timed_generate(*args, **kwargs):
            started = time.perf_counter()
            try:
                return generate(*args, **kwargs)
            finally:
                seconds["generation"].append(time.perf_counter() - started)

        def timed_whole(inputs):
            started = time.perf_counter()
            batch = whole(inputs)
            spent = time.perf_counter() - started
            seconds["scoring"].append(spent - seconds["generation"][-1])
            seconds["updates"].append(-spent)  # the first update's step holds it
            lengths.append([batch["prompt_ids"].shape[1], batch["completion_ids"].shape[1]])
            return batch

        class Watch(TrainerCallback):
            started = 0.0

            def on_step_begin(self, args, state, control, **kwargs):
                self.started = time.perf_counter()

            def on_step_end(self, args, state, control, **kwargs):
                seconds["updates"][-1] += time.perf_counter() - self.started

        trainer._generate, trainer._generate_and_score_completions = timed_generate, timed_whole
        trainer.add_callback(Watch())
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark counts from here
        loaded = resident("VmRSS")
        trainer.train()
        peak = resident("VmHWM") - loaded
        if hasattr(reward, "close"):
            reward.close()
    # the first rollout batch warms up
    return {
        "memory": peak,
        "lengths": [max(a) for a in zip(*lengths, strict=True)],
        "mean_response": statistics.mean(b for _, b in lengths[1:] or lengths),
        "seconds": {part: statistics.median(found[1:] or found) for part, found in seconds.items()},
    }


def planned(name: str, phase: str, lengths: list[int], *, times: bool) -> dict:
    """The plan of the same run."""
    from bupo.plan.devices import find_device
    from bupo.plan.estimate import Question, make_plan, settings_of
    from bupo.plan.measure import measure
    from bupo.plan.shape import read_config, read_shape

    recipe = recipe_of(name, phase)
    shape = read_shape(*_named(read_config(recipe.model), recipe.model))
    asked = Question(find_device("cpu"), prompt=lengths[0], response=lengths[1])
    speeds = measure(shape, settings_of(recipe, asked), device="cpu") if times else None
    made = make_plan(recipe, shape, asked, speeds)
    memory = made["memory"]["peak_above_weights"][phase]
    return {"memory": memory, "seconds": {part: made["seconds"][phase][part] for part in PARTS}, "plan": made}


def _named(found, name):
    config, source = found
    return config, name, source


def child(*arguments: str) -> dict:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.plan_check", *arguments],
        check=True,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", default=",".join(RUNS))
    parser.add_argument("--memory-only", action="store_true", help="two rollout batches each, no times")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_only:
        for changes in RUNS.values():
            changes["rollouts"] = 2  # at the second one's updates the optimizer has its moments
    if args.child:
        what, name, phase, *rest = args.child
        found = (
            run(name, phase) if what == "run" else planned(name, phase, [int(n) for n in rest], times=what == "times")
        )
        print(json.dumps(found))
        return
    from bupo.run_folder import describe_run, write_json

    flag = ["--memory-only"] if args.memory_only else []
    checks: dict[str, dict] = {}
    for name in args.recipes.split(","):
        for phase in ("internal", "full"):
            real = child(*flag, "--child", "run", name, phase)
            what = "memory" if args.memory_only else "times"
            plan = child(*flag, "--child", what, name, phase, *map(str, real["lengths"]))
            check = {"measured": real, "planned": plan, "ratio": {"memory": plan["memory"] / real["memory"]}}
            print(
                f"{name}, {phase}: memory {plan['memory'] / 2**20:.0f} MiB planned, "
                f"{real['memory'] / 2**20:.0f} measured"
            )
            if not args.memory_only:
                total = [sum(side["seconds"].values()) for side in (plan, real)]
                check["ratio"]["seconds"] = total[0] / total[1]
                for part in PARTS:
                    check["ratio"][part] = plan["seconds"][part] / max(real["seconds"][part], 1e-9)
                    print(f"  {part:<11} {plan['seconds'][part]:.2f} s planned, {real['seconds'][part]:.2f} measured")
                print(f"  rollout batch {total[0]:.2f} s planned, {total[1]:.2f} measured", flush=True)
            checks[f"{name}/{phase}"] = check
    ratios = [
        check["ratio"][kind] for check in checks.values() for kind in ("memory", "seconds") if kind in check["ratio"]
    ]
    within = all(abs(ratio - 1) <= 0.2 for ratio in ratios)
    print(f"every memory and time within 20 %: {within} (ratios {min(ratios):.2f} to {max(ratios):.2f})")
    if args.out:
        config = {"recipes": args.recipes, "changes": RUNS, "memory_only": args.memory_only}
        write_json(args.out, {**describe_run("plan_check", config), "within_20_percent": within, "checks": checks})


if __name__ == "__main__":
    main()
