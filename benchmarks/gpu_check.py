"""Checks everything that a GPU changes with one command, and writes one file of results and a table.

Run ``make smollm2 gpu-check`` on a machine with a GPU; it takes about a quarter of an hour on a large one. Without a
GPU the parts that need none run in small. Each part is a command of its own with a limit of time, so that one that
fails or hangs costs nothing but itself; what they print is kept in ``benchmarks/results/gpu-NAME.json``.

doctor     `bupo doctor`: tiny models and, on CUDA, the Triton kernel against float64
tests      the kernel's tests on the GPU (interpreted on a CPU)
analysis   `benchmarks.analysis`: the kernel against the products alone (goal: 60 %) and the plain procedure (4 times)
updates    `benchmarks.training`: an internal update at three depths against the counted gain; GRPO against TRL's own
lens       `benchmarks.lens`: the cost of a fit and of an internal update through it
small      `recipes/small.yaml` over both phases, twice with one seed: are the weights the same?
smollm2    `recipes/smollm2.yaml` over both phases
vllm       sampling with vLLM against transformers, if it is installed
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bupo.run_folder import describe_run, write_json

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 240  # seconds of a part
QUICK = "--rounds 1 --responses 4 --tokens 24"


def parts(device: str, scratch: Path) -> dict[str, list[str]]:
    """What Python is to run for every part; with a CPU, in small."""
    cuda = device == "cuda"
    dtype = "bfloat16" if cuda else "float32"
    on, model = f"--device {device} --dtype {dtype}", "models/smollm2" if cuda else "small"
    train = "--json --set rollouts=4 --set save_every=100"
    train += " --set precision=bfloat16" if cuda else " --set prompts_per_rollout=4 --set micro_batch=8"
    sections = "phase1,phase2" if cuda else "phase2"
    rounds = "--rounds-phase1 8 --rounds-phase2 12" if cuda else "--rounds-phase2 2"
    long = "--parts time --responses 8 --tokens 1024 --rounds 3"
    return {
        "doctor": [f"-m bupo doctor --device {device} --json"],
        "tests": ["-m pytest -q -p no:cacheprovider tests/lens/test_kernel.py"]
        if importlib.util.find_spec("triton") else [],
        "analysis": [f"-m benchmarks.analysis {on} {long}"] if cuda else [],
        "updates": [f"-m benchmarks.training {on} --sections {sections} {rounds}"],
        "lens": [f"-m benchmarks.lens {on} --model {model} {'--rounds 4' if cuda else QUICK}"],
        "small": [f"-m bupo train recipes/small.yaml --output {scratch}/small-{n} {train} --set internal_steps=2"
                  for n in (1, 2)],
        "smollm2": [f"-m bupo train recipes/smollm2.yaml --output {scratch}/smollm2 {train}"] if cuda else [],
        "vllm": ["-m pytest -q -m slow -p no:cacheprovider tests/evaluate/test_vllm.py"]
        if importlib.util.find_spec("vllm") else [],
    }  # fmt: skip


def run(line: str, device: str, scratch: Path) -> dict[str, Any]:
    """Run one command line; its exit code (null where it ran out of time), seconds, and the end of what it printed."""
    environment = os.environ | {"TRITON_INTERPRET": "0" if device == "cuda" else "1"}
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *line.split()], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
        code, printed = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        code, printed = None, str(late.stdout or "")
    seconds = round(time.perf_counter() - started, 1)
    for path, name in ((scratch, "runs"), (ROOT, "."), (Path.home(), "~")):  # no paths of a machine
        line, printed = line.replace(str(path), name), printed.replace(str(path), name)
    return {"command": line, "exit_code": code, "seconds": seconds, "printed": printed[-4000:]}


def same_weights(scratch: Path) -> bool | None:
    """Whether two runs with one seed ended with the same weights; None if one of them did not end."""
    files = [scratch / f"small-{n}" / "model" / "model.safetensors" for n in (1, 2)]
    if not all(file.exists() for file in files):
        return None
    one, other = map(load_file, files)
    return all(torch.equal(one[name], other[name]) for name in one)


def table(result: dict[str, Any]) -> str:
    """One line per part, for the documentation."""
    rows = [f"| part | on {result['name']} | seconds |", "| --- | --- | --- |"]
    for name, runs in result["parts"].items():
        ended = "not run" if not runs else "passed" if all(r["exit_code"] == 0 for r in runs) else "FAILED"
        rows.append(f"| {name} | {ended} | {sum(r['seconds'] for r in runs):.0f} |")
    return "\n".join([*rows, f"| the same seed twice | {result['same_seed_same_weights']} | |"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", help="comma-separated parts")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-NAME.json")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    slug = re.sub(r"\W+", "-", name.lower())
    out = args.out or ROOT / "benchmarks" / "results" / f"gpu-{slug}.json"
    result: dict[str, Any] = {
        **describe_run("gpu check", {"device": args.device}),
        "argv": [],
        "name": name,
        "parts": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for part, lines in parts(args.device, Path(folder)).items():
            if args.only and part not in args.only.split(","):
                continue
            result["parts"][part] = [run(line, args.device, Path(folder)) for line in lines]
            result["same_seed_same_weights"] = same_weights(Path(folder))
            write_json(out, result)  # after each part, because a later one may take the machine down
            print(part, json.dumps([run["exit_code"] for run in result["parts"][part]]), flush=True)
    print(table(result))
    failed = any(run["exit_code"] != 0 for runs in result["parts"].values() for run in runs)
    return int(failed or result["same_seed_same_weights"] is False)


if __name__ == "__main__":
    raise SystemExit(main())
