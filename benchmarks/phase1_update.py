"""One phase-1 update by early exit against the same update through the full forward, paired in one run.

Command: ``make smollm2 && python benchmarks/phase1_update.py --out benchmarks/results/phase1_update.json``

An update is: old log-probs (no gradient), forward, clipped surrogate, backward, optimizer step. The *full* way is
what the authors' released code does: the whole network runs, the logits of the chosen layer and of the last one are
both made whole, and the loss takes the former. *Early exit* is what ``BuPOTrainer`` does: ``internal_policy``
around TRL's fused head (which also computes entropies, and recomputes its logits in backward instead of keeping
them). Both are run in turn (A B A B ...) on the same tokens; ratios are of medians. Peak memory is of a fresh
process each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from bupo import internal_policy, load_model
from bupo.model.anatomy import dissect
from bupo.rundir import describe_run, write_json


def surrogate(logps: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """Clipped surrogate (Eq. 9), token mean, clip 0.2."""
    ratio = (logps - old).exp()
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


class EarlyExit:
    """Log-probs of pi^l as the trainer computes them."""

    def __init__(self, model, layer: int):
        add_fused_lm_head(model, temperature=1.0, outputs=("log_probs", "entropy"))
        self.model, self.layer = model, layer

    def log_probs(self, ids: Tensor) -> Tensor:
        with internal_policy(self.model, self.layer):
            return self.model(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False).log_probs


class FullForward:
    """Log-probs of pi^l beside the full policy's logits: every layer, two vocabulary projections, both made whole."""

    def __init__(self, model, layer: int):
        self.model, self.anatomy, self.layer = model, dissect(model), layer
        self.state: list[Tensor] = []
        self.anatomy.layers[layer - 1].register_forward_hook(lambda m, i, o: self.state.append(o))

    def log_probs(self, ids: Tensor) -> Tensor:
        self.state.clear()
        full = self.model(input_ids=ids, use_cache=False).logits
        internal = self.model.lm_head(self.state.pop())
        assert full.shape == internal.shape
        return internal[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


WAYS = {"early_exit": EarlyExit, "full_forward": FullForward}


def update(way, ids: Tensor, advantages: Tensor, optimizer) -> float:
    """Seconds of one whole update."""
    started = time.perf_counter()
    with torch.no_grad():
        old = way.log_probs(ids)
    surrogate(way.log_probs(ids), old, advantages).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started


def peak_kib() -> int:
    """High-water mark of this process's resident memory, KiB (``ru_maxrss`` would include the parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def predicted(model, layer: int) -> dict[str, float]:
    """Multiply-adds a token of both ways from the matrices' sizes (attention's products left out: short sequences)."""
    anatomy = dissect(model)
    sizes = [sum(p.numel() for p in module.parameters() if p.ndim == 2) for module in anatomy.layers]
    head = anatomy.unembedding.weight.numel()
    below, whole = sum(sizes[:layer]) + head, sum(sizes) + 2 * head
    # backward costs twice the forward of what the loss depends on, in both ways the same
    return {"early_exit": 2 * below + 2 * below, "full_forward": 2 * whole + 2 * below}


def setting(args, name: str):
    torch.manual_seed(args.seed)
    model, _ = load_model(args.model, dtype=args.dtype)
    model.train()
    ids = torch.randint(3, 40_000, (args.batch, args.length), generator=torch.Generator().manual_seed(args.seed))
    ids = ids.to(model.device) % model.config.vocab_size
    advantages = torch.randn(args.batch, 1).to(model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    return model, WAYS[name](model, args.layer), ids, advantages, optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--layer", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak-of", choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.peak_of:
        _, way, ids, advantages, optimizer = setting(args, args.peak_of)
        loaded = peak_kib()
        update(way, ids, advantages, optimizer)
        print(json.dumps({"loaded": loaded, "peak": peak_kib()}))
        return

    ways = {name: setting(args, name) for name in WAYS}
    counts = predicted(ways["early_exit"][0], args.layer)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(args.rounds + 1):
        for name, (_, way, ids, advantages, optimizer) in ways.items():
            spent = update(way, ids, advantages, optimizer)
            if turn:  # the first is a warm-up
                seconds[name].append(spent)
                print(f"{name:13} {spent:.2f} s", flush=True)
    ratio = statistics.median(seconds["full_forward"]) / statistics.median(seconds["early_exit"])
    pairs = [f / e for f, e in zip(seconds["full_forward"], seconds["early_exit"], strict=True)]
    wanted = counts["full_forward"] / counts["early_exit"]

    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of"]
    peaks = {
        name: json.loads(subprocess.run([*command, name], check=True, capture_output=True, text=True).stdout)
        for name in WAYS
    }
    above = {name: (p["peak"] - p["loaded"]) / 2**20 for name, p in peaks.items()}
    result = {
        **describe_run("phase1_update", {k: str(v) for k, v in vars(args).items() if k not in ("out", "peak_of")}),
        "threads": torch.get_num_threads(),
        "tokens": args.batch * args.length,
        "seconds": {name: [round(s, 3) for s in values] for name, values in seconds.items()},
        "time_ratio": round(ratio, 3),
        "time_ratio_range": [round(min(pairs), 3), round(max(pairs), 3)],
        "predicted_time_ratio": round(wanted, 3),
        "share_of_prediction": round(ratio / wanted, 3),
        "peak_gib_above_loaded": {name: round(v, 3) for name, v in above.items()},
        "peak_gib": {name: round(p["peak"] / 2**20, 3) for name, p in peaks.items()},
        "peak_ratio": round(peaks["early_exit"]["peak"] / peaks["full_forward"]["peak"], 3),
    }
    for key in ("time_ratio", "time_ratio_range", "predicted_time_ratio", "share_of_prediction", "peak_gib"):
        print(f"{key}: {result[key]}")
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
