"""Compares two source trees of bupo, an old and a new one: the same measurements in turns (A B B A ...) in one run.

Run ``make smollm2 && python -m benchmarks.paired --against PATH_TO_OLD/src [--out FILE.json]`` on a quiet machine, from
the root of the new repository. Each tree has a process of its own, which loads what it needs, warms up, and then works
only when it is its turn. Reported per measurement: the ratio new / old of the seconds (medians, and median and
quartiles of the pairs), each process's peak memory, and whether both returned the same result.

analysis-smollm2, analysis-wide   `analyze_rollouts` on SmolLM2-135M, and with a vocabulary of 151,936
train-full, train-internal        rollout batches of `BuPOTrainer` on the shipped model, in a full or internal phase
train-smollm2                     the same in an internal phase on SmolLM2-135M

A training measurement has two parts: the whole rollout batch, and its updates after the first (without sampling).
With ``--dtype bfloat16``, models are analysed in bfloat16 and trained under autocast.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from benchmarks import common
from bupo import BuPOConfig, BuPOTrainer, analyze_rollouts, load_model

Turn = Callable[[], None]
Report = Callable[..., None]
# model and internal layer (None: full phase)
TRAININGS = {"train-full": ("small", None), "train-internal": ("small", 4), "train-smollm2": ("smollm2", 6)}
MEASUREMENTS = ("analysis-smollm2", "analysis-wide", *TRAININGS)


def measure_analysis(args: argparse.Namespace, turn: Turn, report: Report) -> Any:
    name = args.worker.removeprefix("analysis-")
    model = common.make_model(name, smollm2=args.smollm2, dtype=args.dtype, device=args.device)
    rollouts = common.responses(args.responses, args.tokens)
    result: dict[str, Any] = {}
    for _ in range(args.rounds + 1):
        turn()
        started = time.perf_counter()
        result = analyze_rollouts(model, rollouts)
        common.synchronize(args.device)
        report(whole=time.perf_counter() - started)
    return result["sites"]


def measure_training(args: argparse.Namespace, turn: Turn, report: Report) -> Any:
    name, layer = TRAININGS[args.worker]
    model, tokenizer = load_model(args.smollm2 if name == "smollm2" else "small", device=args.device)
    tokenizer.padding_side = "left"
    rollouts = args.rounds + 1
    settings = {**common.TRAINING, "max_steps": rollouts * common.UPDATES, "seed": 0}
    if name == "smollm2":
        settings |= {"per_device_train_batch_size": 8, "max_completion_length": 32, "learning_rate": 1e-6}
    with tempfile.TemporaryDirectory() as folder:
        config = BuPOConfig(
            output_dir=folder,
            updates_per_rollout=common.UPDATES,
            internal_layer=layer,
            internal_steps=rollouts if layer else 0,
            bf16=args.dtype == "bfloat16",
            use_cpu=args.device == "cpu",
            **settings,
        )
        trainer = BuPOTrainer(
            model=model,
            reward_funcs=common.share_of_digits,
            args=config,
            train_dataset=Dataset.from_list(common.prompts(16 * rollouts, 0)),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(StepTimer(turn, report, args.device))
        trainer.train()
    return hashlib.sha256(common.trained_parameters(trainer.model)).hexdigest()


class StepTimer(TrainerCallback):
    """Waits for its turn before each rollout batch, and reports its seconds after its last update."""

    def __init__(self, turn: Turn, report: Report, device: str):
        self.turn, self.report, self.device = turn, report, device
        self.started: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % common.UPDATES == 0:
            self.turn()
            self.started = []
        self.started.append(time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % common.UPDATES == 0:
            common.synchronize(self.device)
            ended = time.perf_counter()
            self.report(whole=ended - self.started[0], updates=ended - self.started[1])


def work(args: argparse.Namespace) -> None:
    """The process of one tree: a line on stdin is its turn; it answers with a line of JSON."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be mistaken for an answer
    disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)

    def report(**values: Any) -> None:
        print(json.dumps(values), file=channel, flush=True)

    def turn() -> None:
        if not sys.stdin.readline():
            raise SystemExit("the parent process has ended")

    measure = measure_training if args.worker in TRAININGS else measure_analysis
    result = measure(args, turn, report)
    report(result=result, peak_gib=round(common.resident("VmHWM") / 2**30, 3))


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One measurement of both trees in turns."""
    command = [sys.executable, "-m", "benchmarks.paired", *sys.argv[1:], "--worker", name]
    processes = {
        tree: subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(path.resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for tree, path in (("old", args.against), ("new", args.source))
    }

    def read(tree: str) -> dict[str, Any]:
        line = processes[tree].stdout.readline()
        if not line:
            raise SystemExit(f"{name}: the process of the {tree} tree failed")
        return json.loads(line)

    seconds: dict[str, dict[str, list[float]]] = {}
    for number in range(args.rounds + 1):
        for tree in ("old", "new") if number % 2 else ("new", "old"):
            processes[tree].stdin.write("\n")
            processes[tree].stdin.flush()
            for part, value in read(tree).items():
                if number:  # the first round warms up
                    seconds.setdefault(part, {}).setdefault(tree, []).append(value)
    ends = {tree: read(tree) for tree in processes}
    for process in processes.values():
        process.communicate()
    comparison: dict[str, Any] = {
        part: {
            **common.paired_ratios(values["old"], values["new"]),
            "seconds": {tree: [round(s, 4) for s in values[tree]] for tree in values},
        }
        for part, values in seconds.items()
    }
    comparison["peak_gib"] = {tree: end["peak_gib"] for tree, end in ends.items()}
    old, new = ends["old"]["result"], ends["new"]["result"]
    if isinstance(old, dict):
        pairs = [pair for site in old for pair in zip(old[site], new[site], strict=True)]
        comparison["largest_difference_nats"] = max(abs(a - b) for a, b in pairs)
    else:
        comparison["same_weights_at_the_end"] = old == new
    return comparison


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="the old tree's src folder")
    parser.add_argument("--source", type=Path, default=Path("src"), help="the new tree's src folder")
    parser.add_argument("--measurements", default=",".join(MEASUREMENTS))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--responses", type=int, default=2, help="responses to analyse")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per response to analyse")
    parser.add_argument("--smollm2", default="models/smollm2")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    from bupo.run_folder import describe_run, write_json

    config = {k: str(v) for k, v in vars(args).items() if k not in ("out", "worker", "against", "source")}
    result = describe_run("benchmark paired", config)
    for name in args.measurements.split(","):
        result[name] = compare(name, args)
        for part in ("whole", "updates"):
            if part in result[name]:
                ratio = result[name][part]
                low, high = ratio["quartiles_of_pairs"]
                print(f"{name}, {part}: new / old {ratio['median_of_pairs']:.3f} [{low:.3f}, {high:.3f}]", flush=True)
        print("  " + json.dumps({k: v for k, v in result[name].items() if k not in ("whole", "updates")}), flush=True)
    if args.out:
        write_json(args.out, {**result, "argv": []})  # the paths of a machine
    return None


if __name__ == "__main__":
    main()
