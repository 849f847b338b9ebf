"""What `bupo analyze` costs, against the arithmetic it cannot avoid and against the plain procedure; one run, in turns.

Command: ``make smollm2 && python -m benchmarks.analysis --out benchmarks/results/analysis.json`` (about 25 minutes on
two cores; ``--parts time`` etc. for some of it)

time       On SmolLM2-135M and on a random-weight model with a 151,936-token vocabulary (d=896, 24 layers), for the same
           responses of random tokens:
           *products*  four vocabulary products a layer and the forward pass alone, nothing else;
           *analysis*  `analyze_rollouts`, whole;
           *plain*     what the authors' script does: two forwards a sample with eager attention in float32, all
                       activations kept on the host, six separate projections a layer with softmax and log-softmax, and
                       a Python record a token.
           Ratios are of medians over the rounds; the entropies of both ways are compared.
memory     Peak resident memory of a fresh process above the loaded model, for one response of 8,192 tokens.
processes  Two processes of one thread each against one of one thread (torchrun; accelerate's own launcher starts one
           process on a CPU), the time of the analysis without start-up, and the largest difference of a result.
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
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config

from bupo.lens.analyze import SITES, analyze_rollouts
from bupo.lens.batching import pad
from bupo.lens.softmax_stats import Tiling
from bupo.models.layout import find_layout
from bupo.models.load import load_model
from bupo.models.unembed import get_unembedding
from bupo.run_folder import describe_run, write_json

MODULE = ("-m", "benchmarks.analysis")
PARTS = ("time", "memory", "processes")
MODELS = ("smollm2", "wide")


@dataclass
class Pair:
    """A prompt and its response as token ids."""

    prompt_ids: list[int]
    response_ids: list[int]


def make_model(name: str, args: argparse.Namespace, layers: int | None = None) -> nn.Module:
    """The model to be measured, in float32 on the CPU unless told otherwise."""
    if name == "smollm2":
        model, _ = load_model(args.smollm2, dtype=args.dtype, device=args.device)
        model.config.max_position_embeddings = 16384  # random tokens: what they mean does not matter here
        return model
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers or 24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval()
    return model.to(args.device)


def responses(model: nn.Module, count: int, tokens: int, prompt: int = 8) -> list[Pair]:
    generator = torch.Generator().manual_seed(1)

    def draw(n: int) -> list[int]:
        return torch.randint(10, 40_000, (n,), generator=generator).tolist()

    return [Pair(draw(prompt), draw(tokens)) for _ in range(count)]


@torch.no_grad()
def products_alone(model: nn.Module, rollouts: list[Pair]) -> None:
    """The forward pass, and four products (N, d) x (d, V) a layer in the same blocks as the analysis, thrown away."""
    rule = get_unembedding(model)
    every = [range(len(r.response_ids)) for r in rollouts]
    batch = pad(rollouts, every, range(len(rollouts)), rule.weight.device)
    find_layout(model).backbone(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    n, d = len(batch.targets), rule.weight.shape[1]
    tiling = Tiling.of(rule.weight.device)
    rows = min(n, tiling.rows)
    states = torch.randn(4 * rows, d, device=rule.weight.device)
    out = torch.empty(4 * rows, tiling.tile, device=rule.weight.device)
    for first in range(0, n, rows):
        size = 4 * min(rows, n - first)
        for start in range(0, len(rule.weight), tiling.tile):
            tile = rule.weight[start : start + tiling.tile].float()
            for _ in range(find_layout(model).n_layers):
                torch.mm(states[:size], tile.T, out=out[:size, : len(tile)])


@torch.no_grad()
def plain(model: nn.Module, rollouts: list[Pair]) -> dict[str, list[float]]:
    """The procedure without any of our means; entropies by site and layer."""
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
    """One forward of one sample with everything kept on the host (Qwen2 and Llama layouts)."""
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
    model = make_model(name, args)
    rollouts = responses(model, args.responses, args.tokens)
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
            _wait(args.device)
            started = time.perf_counter()
            run()
            _wait(args.device)
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


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def memory_kib(name: str) -> int:
    """VmRSS (now) or VmHWM (the most since it was reset) of this process, KiB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])


def measure_memory(name: str, args: argparse.Namespace) -> dict:
    """In a fresh process; the wide model with two layers, one group: more groups would not change its peak."""
    layers = 2 if name == "wide" else None
    model = make_model(name, args, layers)
    analyze_rollouts(model, responses(model, 1, 4))  # what is made once: probes, libraries' work space
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew: loading is not what is measured
    loaded = memory_kib("VmRSS")
    rollouts = responses(model, 1, args.long)
    started = time.perf_counter()
    analyze_rollouts(model, rollouts)
    return {
        "tokens": args.long,
        "layers": find_layout(model).n_layers,
        "gib_above_loaded_model": round((memory_kib("VmHWM") - loaded) / 2**20, 3),
        "loaded_gib": round(loaded / 2**20, 3),
        "seconds": round(time.perf_counter() - started, 1),
    }


def share(args: argparse.Namespace) -> None:
    """One of the processes of `measure_processes`; the first prints."""
    from bupo.models.processes import join_processes

    model = make_model("smollm2", args)
    rollouts = responses(model, 8, args.tokens // 4)
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
    parser.add_argument("--parts", default=",".join(PARTS), help="some of time, memory, processes")
    parser.add_argument("--models", default=",".join(MODELS), help="some of smollm2, wide")
    parser.add_argument("--smollm2", default="models/smollm2")
    parser.add_argument("--responses", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="of a response, in time and processes")
    parser.add_argument("--long", type=int, default=8192, help="tokens of the response in memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-plain", action="store_true", help="leave the plain procedure out")
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
