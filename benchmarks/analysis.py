"""The cost of `bupo analyze` compared with the arithmetic it cannot avoid and with the plain procedure, in turns.

Run ``make smollm2 && python -m benchmarks.analysis --out benchmarks/results/analysis.json`` from the repository root
(about 25 minutes on two cores; ``--parts time`` etc. for a part). `benchmarks.paired` compares two versions of bupo.

time       On SmolLM2-135M and on a random-weight model with a 151,936-token vocabulary (d=896, 24 layers), for the same
           responses of random tokens:
           *products*  only the forward pass and four vocabulary products per layer, in the same tiles, the same dtype
                       and on the same units as the analysis;
           *analysis*  `analyze_rollouts`;
           *plain*     the procedure of the authors' script: two forwards per sample with eager attention, all
                       activations kept on the host, six separate float32 projections per layer with softmax and
                       log-softmax, and a Python record per token.
           Ratios are of medians over the rounds; the entropies of analysis and plain are compared.
memory     Peak resident memory of a fresh process above the loaded model, for one response of 8,192 tokens.
processes  Two processes of one thread each compared with one of one thread (torchrun; accelerate's own launcher starts
           one process on a CPU): the time of the analysis without start-up, and the largest difference of the results.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import Pair
from bupo.lens.analyze import SITES, analyze_rollouts
from bupo.lens.softmax_stats import tile_size
from bupo.models.layout import find_layout
from bupo.models.load import join_processes
from bupo.models.unembed import get_unembedding, matmul_fp32_
from bupo.run_folder import describe_run, write_json

MODULE = ("-m", "benchmarks.analysis")
PARTS = ("time", "memory", "processes")
MODELS = ("smollm2", "wide")


def load(name: str, args: argparse.Namespace, layers: int | None = None) -> Any:
    return common.make_model(name, smollm2=args.smollm2, dtype=args.dtype, device=args.device, layers=layers)


@torch.no_grad()
def products_alone(model: nn.Module, rollouts: list[Pair]) -> None:
    """Run the forward pass and the products (N, d) x (d, V) of the analysis, four per layer, and discard them."""
    unembedding, layout = get_unembedding(model), find_layout(model)
    weight, low_precision = unembedding.weight, unembedding.low_precision
    ids = torch.tensor([[*r.prompt_ids, *r.response_ids][:-1] for r in rollouts], device=weight.device)
    layout.backbone(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    n, (rows, tile_width) = sum(len(r.response_ids) for r in rollouts), tile_size(weight.device)
    rows = min(n, rows)
    states = torch.randn(4 * rows, weight.shape[1], device=weight.device)
    states = states.to(weight.dtype) if low_precision else states
    out = torch.empty(4 * rows * tile_width, device=weight.device)
    for first in range(0, n, rows):
        size = 4 * min(rows, n - first)
        for start in range(0, len(weight), tile_width):
            tile = weight[start : start + tile_width]
            tile = tile if low_precision and tile.is_cuda else tile.float()
            into = out[: size * len(tile)].view(size, len(tile))
            for _ in range(layout.n_layers):
                matmul_fp32_(states[:size], tile, into, low_precision=low_precision)


@torch.no_grad()
def plain(model: nn.Module, rollouts: list[Pair]) -> dict[str, list[float]]:
    """Run the plain procedure; returns the mean entropies per site and layer."""
    layout = find_layout(model)
    weight = layout.unembedding.weight
    records: list[dict[str, float]] = []
    model.set_attn_implementation("eager")
    try:
        for rollout in rollouts:
            kept = [_activations(model, rollout) for _ in range(2)][-1]  # logits first, then the activations
            at = slice(len(rollout.prompt_ids) - 1, None)
            for layer in range(layout.n_layers):
                for site in SITES:
                    logits = kept[site, layer][0, at].float() @ weight.float().T
                    shares, logs = logits.softmax(-1), logits.log_softmax(-1)
                    values = -(shares * logs).sum(-1)
                    for token, value in enumerate(values):
                        records.append({"site": site, "layer": layer, "token": token, "entropy": value.item()})
    finally:
        model.set_attn_implementation("sdpa")
    sums: dict[tuple[str, int], list[float]] = {}
    for record in records:
        sums.setdefault((record["site"], record["layer"]), []).append(record["entropy"])
    return {site: [statistics.fmean(sums[site, i]) for i in range(layout.n_layers)] for site in SITES}


def _activations(model: nn.Module, rollout: Pair) -> dict[tuple[str, int], Tensor]:
    """Run one forward of one sample and keep all activations on the host (Qwen2 and Llama layouts)."""
    kept: dict[tuple[str, int], Tensor] = {}
    hooks = []

    def keep(site: str, layer: int, *, entry: bool) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: object = None) -> None:
            value = (args[0] if args else kwargs["hidden_states"]) if entry else output
            kept[site, layer] = (value[0] if isinstance(value, tuple) else value).detach().cpu().clone()

        return hook

    for index, layer in enumerate(find_layout(model).layers):
        for module, name in ((layer.self_attn, "attn"), (layer.mlp, "ffn"), (layer, "layer")):
            entry, exit_ = keep(f"{name}_in", index, entry=True), keep(f"{name}_out", index, entry=False)
            hooks.append(module.register_forward_pre_hook(entry, with_kwargs=True))
            hooks.append(module.register_forward_hook(exit_, with_kwargs=True))
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids][:-1]], device=model.device)
    try:
        model(input_ids=ids, use_cache=False, output_hidden_states=True)
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def measure_time(name: str, args: argparse.Namespace) -> dict:
    model = load(name, args)
    rollouts = common.responses(args.responses, args.tokens)
    found: dict[str, dict] = {}

    def analysis() -> None:
        found["analysis"] = analyze_rollouts(model, rollouts)["sites"]

    def plainly() -> None:
        found["plain"] = plain(model, rollouts)

    ways = {"products": lambda: products_alone(model, rollouts), "analysis": analysis, "plain": plainly}
    analyze_rollouts(model, rollouts[:1])  # warm-up: probes, allocations
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.rounds):
        for way, run in ways.items():
            if way == "plain" and args.no_plain:
                continue
            common.synchronize(args.device)
            started = time.perf_counter()
            run()
            common.synchronize(args.device)
            seconds[way].append(time.perf_counter() - started)
            print(f"{name}: {way:9} {seconds[way][-1]:.1f} s", flush=True)
    median = {way: statistics.median(values) for way, values in seconds.items() if values}
    layout = find_layout(model)
    tokens = args.responses * args.tokens
    operations = 2 * 4 * layout.n_layers * layout.unembedding.weight.numel() * tokens
    result = {
        "tokens": tokens,
        "seconds": {way: [round(s, 2) for s in values] for way, values in seconds.items()},
        "analysis_over_products": round(median["analysis"] / median["products"], 3),
        "products_gflops_a_second": round(operations / median["products"] / 1e9, 1),
    }
    if "plain" in median:
        result["plain_over_analysis"] = round(median["plain"] / median["analysis"], 3)
        result["largest_difference_nats"] = max(
            abs(a - b) for s in SITES for a, b in zip(found["analysis"][s], found["plain"][s], strict=True)
        )
    return result


def measure_memory(name: str, args: argparse.Namespace) -> dict:
    """Run in a fresh process; the wide model has two layers, one group, because more would not change its peak."""
    model = load(name, args, layers=2 if name == "wide" else None)
    analyze_rollouts(model, common.responses(1, 4))  # allocates what exists once: probes, work space of libraries
    gc.collect()
    loaded = common.reset_peak()
    started = time.perf_counter()
    analyze_rollouts(model, common.responses(1, args.long))
    return {
        "tokens": args.long,
        "layers": find_layout(model).n_layers,
        "gib_above_loaded_model": round((common.resident("VmHWM") - loaded) / 2**30, 3),
        "loaded_gib": round(loaded / 2**30, 3),
        "seconds": round(time.perf_counter() - started, 1),
    }


def share(args: argparse.Namespace) -> None:
    """Run as one of the processes of `measure_processes`; the first writes the result."""
    model = load("smollm2", args)
    rollouts = common.responses(8, args.tokens // 4)
    state = join_processes()
    analyze_rollouts(model, rollouts[:2], share=True)
    state.wait_for_everyone()
    started = time.perf_counter()
    result = analyze_rollouts(model, rollouts, share=True)
    state.wait_for_everyone()
    if state.is_main_process:
        Path(args.share).write_text(json.dumps({"seconds": time.perf_counter() - started, "sites": result["sites"]}))


def measure_processes(args: argparse.Namespace) -> dict:
    seconds: dict[int, list[float]] = {1: [], 2: []}
    sites: dict[int, dict] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory() as folder:
        into = str(Path(folder) / "found.json")
        for _ in range(args.rounds):
            for processes in seconds:
                launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
                own = [*MODULE, "--share", into, "--smollm2", args.smollm2, "--tokens", str(args.tokens)]
                subprocess.run([*launcher, "--master_port", "29655", *own], check=True, env=environment)
                found = json.loads(Path(into).read_text())
                seconds[processes].append(found["seconds"])
                sites[processes] = found["sites"]
                print(f"processes: {processes}: {found['seconds']:.1f} s", flush=True)
    return {
        "tokens": 8 * (args.tokens // 4),
        "seconds": {str(n): [round(s, 2) for s in values] for n, values in seconds.items()},
        "speedup": round(statistics.median(seconds[1]) / statistics.median(seconds[2]), 3),
        "largest_difference_nats": max(
            abs(a - b) for s in SITES for a, b in zip(sites[1][s], sites[2][s], strict=True)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="one or more of time, memory, processes")
    parser.add_argument("--models", default=",".join(MODELS), help="one or both of smollm2, wide")
    parser.add_argument("--smollm2", default="models/smollm2")
    parser.add_argument("--responses", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="tokens per response, in time and processes")
    parser.add_argument("--long", type=int, default=8192, help="tokens of the response, in memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-plain", action="store_true", help="skip the plain procedure")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--share", help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", choices=MODELS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.share:
        return share(args)
    if args.memory_of:
        print(json.dumps(measure_memory(args.memory_of, args)))
        return None
    models, parts = args.models.split(","), args.parts.split(",")
    result = {
        **describe_run("benchmark analysis", {k: str(v) for k, v in vars(args).items() if k != "out"}),
        "threads": torch.get_num_threads(),
    }
    if "time" in parts:
        result["time"] = {name: measure_time(name, args) for name in models}
    if "memory" in parts:
        own = [sys.executable, *MODULE, "--smollm2", args.smollm2, "--long", str(args.long), "--dtype", args.dtype]
        result["memory"] = {
            name: json.loads(subprocess.run([*own, "--memory-of", name], check=True, capture_output=True).stdout)
            for name in models
        }
    if "processes" in parts:
        result["processes"] = measure_processes(args)
    print(json.dumps({part: result[part] for part in parts}, indent=1))
    if args.out:
        if args.out.exists():  # parts that were measured in another run stay
            before = json.loads(args.out.read_text())
            result |= {part: before[part] for part in PARTS if part not in parts and part in before}
        write_json(args.out, result)
    return None


if __name__ == "__main__":
    main()
