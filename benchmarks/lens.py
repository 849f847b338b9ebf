"""What a ridge lens costs: fitting it, reading an analysis through it, and an internal update through it.

Run ``make smollm2 && python -m benchmarks.lens --out benchmarks/results/lens.json`` on a quiet machine, from the
repository root. Everything is measured in turns (A B A B ...) on one model, SmolLM2-135M-Instruct by default.

- ``fit``: `Lens.fit` (sums, ridge factors, held-out card) compared with one plain forward pass of the same responses,
  logits included; and the most memory of each above the loaded model, a fresh process each.
- ``analysis``: `analyze_rollouts` with raw and ridge, the fit included, compared with no lens at all.
- ``update``: one internal update (old log-probabilities, forward, clipped surrogate, backward, AdamW) read through the
  lens compared with raw, at several layers; and with the update of the whole model (``full``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, training
from bupo import Lens, analyze_rollouts, load_model
from bupo.lens.analyze import AnalysisOptions
from bupo.models.layout import find_layout
from bupo.run_folder import describe_run, write_json

SECTIONS = ("fit", "analysis", "update")


def in_turns(rounds: int, ways: dict[str, Callable[[], Any]], *, warm_up: bool = True) -> dict[str, list[float]]:
    """Seconds of each way per round, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + warm_up):
        for name, work in ways.items():
            started = time.perf_counter()
            work()
            if number >= warm_up:
                seconds[name].append(round(time.perf_counter() - started, 4))
    return seconds


def against(base: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    ratios = {name: common.paired_ratios(seconds[base], own) for name, own in seconds.items() if name != base}
    return {"seconds": seconds, "against": base, **ratios}


def load(args: argparse.Namespace) -> Any:
    torch.set_num_threads(args.threads)
    return load_model(args.model, dtype="float32", device=args.device)[0].eval()


@torch.no_grad()
def plain_forward(model: Any, responses: list[common.Pair]) -> None:
    for pair in responses:
        model(torch.tensor([pair.prompt_ids + pair.response_ids], device=model.device), use_cache=False)


def responses_of(model: Any, args: argparse.Namespace) -> list[common.Pair]:
    """Random tokens, with another prompt for each response: their meaning plays no part in the cost."""
    size = model.config.vocab_size
    drawn = common.responses(args.responses, args.tokens)
    return [common.Pair(*([token % size for token in ids] for ids in (p.prompt_ids, p.response_ids))) for p in drawn]


def fit(args: argparse.Namespace) -> dict[str, Any]:
    model = load(args)
    responses = responses_of(model, args)
    ways = {"forward": lambda: plain_forward(model, responses), "fit": lambda: Lens.fit(model, responses)}
    peaks = {name: int(_child(args, name)) for name in ways}
    return {**against("forward", in_turns(args.rounds, ways)), "peak_bytes_above_model": peaks}


def _child(args: argparse.Namespace, name: str) -> str:
    command = [sys.executable, "-m", "benchmarks.lens", *sys.argv[1:], "--peak-of", name]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


def peak_of(args: argparse.Namespace) -> int:
    """Bytes above the loaded model of one way of `fit`."""
    model = load(args)
    responses = responses_of(model, args)
    plain_forward(model, [replace(responses[0], response_ids=responses[0].response_ids[:2])])
    before = common.reset_peak()
    plain_forward(model, responses) if args.peak_of == "forward" else Lens.fit(model, responses)
    return common.resident("VmHWM") - before


def analysis(args: argparse.Namespace) -> dict[str, Any]:
    model = load(args)
    responses = responses_of(model, args)
    options = {"none": AnalysisOptions(layer_choice=False), "raw,ridge": AnalysisOptions(lenses=("raw", "ridge"))}
    ways = {name: lambda o=one: analyze_rollouts(model, responses, options=o) for name, one in options.items()}
    return against("none", in_turns(max(1, args.rounds // 2), ways, warm_up=False))


def update(args: argparse.Namespace) -> dict[str, Any]:
    model = load(args)
    lens, depth = Lens.fit(model, responses_of(model, args)), find_layout(model).n_layers
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7, fused=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40_000, (args.batch, args.length), generator=generator).to(model.device)
    ids, advantages = ids % model.config.vocab_size, torch.randn(args.batch, 1, generator=generator).to(model.device)

    def one(read: Any, layer: int) -> Callable[[], Any]:
        way = training.EarlyExit(model, read)
        return lambda: training.update(way, ids, layer, advantages, optimizer, training.precision(args))

    ways = {"full": one("norm", depth)}  # layer L through the final norm is the model's own policy
    for layer in (max(1, depth // 6), depth // 2, 3 * depth // 4):
        ways |= {f"raw {layer}": one("raw", layer), f"ridge {layer}": one(lens, layer)}
    seconds = in_turns(args.rounds, ways)
    raw = {name: common.paired_ratios(seconds[name.replace("ridge", "raw")], own) for name, own in seconds.items()
           if "ridge" in name}  # fmt: skip
    return {**against("full", seconds), "ridge_against_raw": raw, "tokens": args.batch * args.length}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--responses", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256, help="per response")
    parser.add_argument("--batch", type=int, default=2, help="sequences of an update")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of an update's products")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak-of", choices=["forward", "fit"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print(peak_of(args))
        return
    config = {key: value for key, value in vars(args).items() if key not in ("out", "peak_of")}
    result = describe_run("benchmark lens", config)
    for section in args.sections.split(","):
        result[section] = {"fit": fit, "analysis": analysis, "update": update}[section](args)
        print(section, json.dumps({k: v for k, v in result[section].items() if k != "seconds"}), flush=True)
        if args.out:
            write_json(args.out, result)


if __name__ == "__main__":
    main()
