"""The cost of training compared with the alternatives, in turns (A B A B ...).

Run ``make smollm2 && python -m benchmarks.training --out benchmarks/results/training.json`` from the repository root
(on a GPU: ``--device cuda --dtype bfloat16``; not measured there). `benchmarks.paired` compares two versions of bupo.

- ``phase2``: a rollout batch (sampling, scoring, four updates) of `BuPOTrainer` after its internal phase compared with
  TRL's `GRPOTrainer`: whole training loops with the same settings and seeds on the shipped model. It is checked that
  both end with the same weights.
- ``phase1``: one internal update (old log-probabilities, forward, clipped surrogate, backward, AdamW) with early exit
  compared with the *full* forward of the authors' released code: the whole network runs, the logits of the chosen layer
  and of the last one are both computed, and the loss takes the former. The prediction counts the products of both:
  early exit's tiled head computes its logits again in the backward pass instead of keeping them, a fifth product.
- ``memory``: the most memory of such a forward and backward pass (layers checkpointed) above weights and gradients,
  with a vocabulary of 151,936, a fresh process each; and the same counted on tensors without numbers for an
  accelerator, whose kernel needs no float32 copies of a tile (`bupo.train.footprint`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks import common
from benchmarks.common import large_vocabulary
from bupo import BuPOConfig, BuPOTrainer, internal_policy, load_model
from bupo.models.layout import find_layout
from bupo.run_folder import describe_run, write_json
from bupo.train.tiles import narrow_tiles
from bupo.train.trainer import add_fused_lm_head, trl_utils

SECTIONS = ("phase2", "phase1", "memory")
LAYERS = (6, 15, 27)


# -- phase 2 -----------------------------------------------------------------------------------------------------------


class Turns:
    """Two training loops in two threads that take turns per rollout batch, each with its own random state."""

    def __init__(self, names: tuple[str, str], updates: int):
        self.names, self.updates = names, updates
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self._turn = {name: threading.Semaphore(int(name == names[0])) for name in names}
        self._random: dict[str, Tensor] = {}

    def callback(self, name: str):
        turns, other = self, self.names[1 - self.names.index(name)]

        class Turn(TrainerCallback):
            started = 0.0

            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step % turns.updates == 0:
                    turns._turn[name].acquire()
                    if name in turns._random:
                        torch.set_rng_state(turns._random[name])
                    else:
                        torch.manual_seed(args.seed)
                    self.started = time.perf_counter()

            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step % turns.updates == 0:
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    turns.seconds[name].append(time.perf_counter() - self.started)
                    turns._random[name] = torch.get_rng_state()
                    turns._turn[other].release()

        return Turn()


def phase2(args) -> dict:
    """Alternate rollout batches of both trainers."""
    rounds, updates = args.rounds_phase2, common.UPDATES
    data = Dataset.from_list(common.prompts(16 * (rounds + 1), args.seed))
    settings = {**common.TRAINING, "max_steps": (rounds + 1) * updates, "seed": args.seed}
    settings |= {"bf16": args.dtype == "bfloat16", "use_cpu": args.device == "cpu"}
    turns = Turns(("trl", "bupo"), updates)
    trainers = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in turns.names:
            model, tokenizer = load_model("small", device="cpu")
            tokenizer.padding_side = "left"
            kind, config = (GRPOTrainer, GRPOConfig) if name == "trl" else (BuPOTrainer, BuPOConfig)
            per_rollout = {"steps_per_generation" if name == "trl" else "updates_per_rollout": updates}
            trainer = kind(
                model=model,
                reward_funcs=common.share_of_digits,
                args=config(output_dir=f"{folder}/{name}", **per_rollout, **settings),
                train_dataset=data,
                processing_class=tokenizer,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(turns.callback(name))
            trainers[name] = trainer
        threads = [threading.Thread(target=trainer.train) for trainer in trainers.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    weights = [trainer.model.state_dict() for trainer in trainers.values()]
    equal = all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
    seconds = {name: values[1:] for name, values in turns.seconds.items()}  # the first warms up
    ratios = common.paired_ratios(seconds["trl"], seconds["bupo"])
    return {
        "rounds": rounds,
        "seconds": {name: [round(s, 4) for s in values] for name, values in seconds.items()},
        **ratios,
        "same_weights_at_the_end": equal,
        "at_most_1_percent_slower": ratios["ratio_of_medians"] <= 1.01,
    }


# -- phase 1 -----------------------------------------------------------------------------------------------------------


def surrogate(logps: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """Clipped surrogate (Eq. 9 of arXiv 2512.19673), token mean, clip 0.2."""
    ratio = (logps - old).exp()
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


class EarlyExit:
    """Log-probabilities of the internal policy as the trainer computes them."""

    def __init__(self, model, lens="raw"):
        add_fused_lm_head(model, temperature=1.0, outputs=("log_probs", "entropy"))
        self.model, self.lens = model, lens

    def log_probs(self, ids: Tensor, layer: int) -> Tensor:
        with internal_policy(self.model, layer, lens=self.lens), narrow_tiles(trl_utils, ids.device, ids.numel()):
            return self.model(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False).log_probs


class FullForward:
    """Log-probabilities of the internal policy from a forward of all layers, with the logits of both policies."""

    def __init__(self, model):
        self.model, self.layout = model, find_layout(model)

    @contextmanager
    def _state(self, layer: int):
        states: list[Tensor] = []
        hook = self.layout.layers[layer - 1].register_forward_hook(lambda m, i, o: states.append(o))
        try:
            yield states
        finally:
            hook.remove()

    def log_probs(self, ids: Tensor, layer: int) -> Tensor:
        with self._state(layer) as state:
            full = self.model(input_ids=ids, use_cache=False).logits
        internal = self.model.lm_head(state.pop())
        assert full.shape == internal.shape
        return internal[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


WAYS = {"early_exit": EarlyExit, "full_forward": FullForward}


def update(way, ids: Tensor, layer: int, advantages: Tensor, optimizer, low) -> float:
    """Run one update; returns its seconds."""
    started = time.perf_counter()
    with low():
        with torch.no_grad():
            old = way.log_probs(ids, layer)
        loss = surrogate(way.log_probs(ids, layer), old, advantages)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    common.synchronize(ids.device)
    return time.perf_counter() - started


def predicted(model, layer: int, length: int) -> dict[str, float]:
    """Multiply-adds per token of both ways.

    In both, the backward pass costs twice the forward of the layers that the loss depends on. Head products: early exit
    computes its logits for the old log-probabilities, in the forward and again in the backward pass, which has two
    products of its own: 5. The full forward computes the logits of two policies twice, and has two products in the
    backward pass: 6.
    """
    layout, text = find_layout(model), model.config.get_text_config()
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    sizes = [sum(p.numel() for p in m.parameters() if p.ndim == 2) + 2 * length * width for m in layout.layers]
    head = layout.unembedding.weight.numel()
    below, whole = sum(sizes[:layer]), sum(sizes)
    return {"early_exit": 4 * below + 5 * head, "full_forward": 2 * whole + 2 * below + 6 * head}


def precision(args):
    low = args.dtype == "bfloat16"
    return (lambda: torch.autocast(args.device, dtype=torch.bfloat16)) if low else nullcontext


def phase1(args) -> dict:
    """Alternate updates of both ways at several layers, on one model."""
    torch.manual_seed(args.seed)
    model, _ = load_model(args.model, dtype="float32", device=args.device)
    model.train()
    ways = {name: make(model) for name, make in WAYS.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    ids = torch.randint(3, 40_000, (args.batch, args.length), generator=torch.Generator().manual_seed(args.seed))
    ids = ids.to(model.device) % model.config.vocab_size
    advantages = torch.randn(args.batch, 1).to(model.device)
    result: dict = {"tokens": args.batch * args.length, "model": args.model, "layers": {}}
    for layer in (int(n) for n in args.layers.split(",")):
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(args.rounds_phase1 + 1):
            for name, way in ways.items():
                spent = update(way, ids, layer, advantages, optimizer, precision(args))
                if turn:  # the first warms up
                    seconds[name].append(spent)
        counts = predicted(model, layer, args.length)
        predicted_ratio = counts["full_forward"] / counts["early_exit"]
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        ratio = medians["full_forward"] / medians["early_exit"]
        pairs = [f / e for f, e in zip(seconds["full_forward"], seconds["early_exit"], strict=True)]
        result["layers"][str(layer)] = {
            "seconds": {name: [round(s, 3) for s in values] for name, values in seconds.items()},
            "time_ratio": round(ratio, 3),
            "time_ratio_range": [round(min(pairs), 3), round(max(pairs), 3)],
            "predicted_time_ratio": round(predicted_ratio, 3),
            "share_of_prediction": round(ratio / predicted_ratio, 3),
        }
        share = ratio / predicted_ratio
        print(f"  layer {layer}: {ratio:.3f} times as fast, {share:.1%} of {predicted_ratio:.3f}", flush=True)
    result["at_least_90_percent"] = all(row["share_of_prediction"] >= 0.9 for row in result["layers"].values())
    return result


# -- memory ------------------------------------------------------------------------------------------------------------


def peak_of(name: str, args) -> int:
    """Peak bytes of one forward and backward pass in this process, above weights and gradients."""
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(large_vocabulary(args.memory_layers)).to(args.device).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # gradients accumulate, as in a run
    ids = torch.randint(3, 40_000, (int(args.memory_tokens) // 512, 512)).to(args.device)
    way = WAYS[name](model)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.add_(1.0)  # zeros are not in memory until they are written
        before = common.reset_peak()
    with precision(args)():
        way.log_probs(ids, 6).sum().backward()
    return (torch.cuda.max_memory_allocated() if args.device == "cuda" else common.resident("VmHWM")) - before


def counted(name: str, tokens: int, layers: int, *, triton: bool) -> int:
    """The same by counting tensors without numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from bupo.models.fake import fake_model
    from bupo.train.footprint import BytesAlive, Workload, count_update

    config = large_vocabulary(layers)
    if name == "early_exit":
        work = Workload(torch.float32, torch.float32, tokens // 512, 0, 512, 1, True, True, triton)
        return count_update(config, 6, work, internal=True, narrow=True)["update"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(config).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ids = torch.zeros(tokens // 512, 512, dtype=torch.long)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        whole = torch.nn.Module()  # the tracker allows a second use of lm_head within one module only
        whole.model, whole.forward = model, lambda ids: FullForward(model).log_probs(ids, 6)
        with BytesAlive(model, ids) as tracker:
            whole(ids).sum().backward()
        return tracker.alive("peak")


def memory(args) -> dict:
    """Peaks of both ways at several numbers of tokens."""
    found = {tokens: _memory_at(int(tokens), args) for tokens in args.memory_tokens.split(",")}
    many = {name: counted(name, 16_384, args.memory_layers, triton=True) for name in WAYS}
    return {
        "vocabulary": 151_936,
        "layers": args.memory_layers,
        "tokens": found,
        "counted_accelerator_16384": {**many, "ratio": round(many["early_exit"] / many["full_forward"], 3)},
    }


def _memory_at(tokens: int, args) -> dict:
    command = [sys.executable, "-m", "benchmarks.training", *sys.argv[1:], "--memory-tokens", str(tokens), "--peak-of"]
    peaks = {
        name: json.loads(subprocess.run([*command, name], check=True, capture_output=True, text=True).stdout)
        for name in WAYS
    }
    result: dict = {"peak_above_loaded": peaks, "ratio": round(peaks["early_exit"] / peaks["full_forward"], 3)}
    for kind, triton in (("cpu", False), ("accelerator", True)):
        both = {name: counted(name, tokens, args.memory_layers, triton=triton) for name in WAYS}
        result[f"counted_{kind}"] = {**both, "ratio": round(both["early_exit"] / both["full_forward"], 3)}
    return {**result, "at_most_a_quarter": result["ratio"] <= 0.25}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--model", default="models/smollm2", help="for phase1")
    parser.add_argument("--layers", default=",".join(map(str, LAYERS)), help="for phase1")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds-phase1", type=int, default=8)
    parser.add_argument("--rounds-phase2", type=int, default=24)
    parser.add_argument("--memory-tokens", default="2048,4096", help="tokens per micro-batch, comma-separated")
    parser.add_argument("--memory-layers", type=int, default=6)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of matrix products")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak-of", choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print(json.dumps(peak_of(args.peak_of, args)))
        return
    config = {key: str(value) for key, value in vars(args).items() if key not in ("out", "peak_of")}
    result = {**describe_run("training", config), "threads": torch.get_num_threads()}
    if args.out and args.out.exists():  # keep sections that are not run now
        before = json.loads(args.out.read_text())
        result |= {section: before[section] for section in SECTIONS if section in before}
    run = {"phase2": phase2, "phase1": phase1, "memory": memory}
    for section in args.sections.split(","):
        started = time.perf_counter()
        print(f"{section} ...", flush=True)
        result[section] = {**run[section](args), "argv": sys.argv[1:]}
        print(json.dumps({k: v for k, v in result[section].items() if k not in ("seconds", "layers")}))
        print(f"  {time.perf_counter() - started:.0f} s", flush=True)
        if args.out:
            write_json(args.out, result)


if __name__ == "__main__":
    main()
