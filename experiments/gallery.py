"""Reads three real models side by side through raw, norm and ridge, on their own responses to the same problems.

Run ``make gallery``, or ``python -m experiments.gallery [NAME ...]``. Per model: samples one response to each word
problem (reasoning-gym, ``gsm_symbolic``), fits a ridge lens on the responses to half of the problems, reads tokens of
the other half through every lens, and writes ``results/gallery.json`` and ``docs/images/gallery_NAME.png``. A model
with figures is skipped. `experiments.tables` puts them into ``docs/gallery.md``.

Two shares say whether a model commits itself abruptly in its last layers or progressively: ``late``, of the fall of the
entropy from layer 1 to L, what happens in the last quarter of the layers (the measure of `experiments.styles`); and
``left``, of the divergence ``KL(full policy || reading)`` at layer 1, what is left before the last quarter.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bupo import load_model
from bupo.data.problems import load_problems
from bupo.data.prompts import prompts_of
from bupo.evaluate.engines import Sampling
from bupo.evaluate.hf_engine import sample
from bupo.lens.batching import ClusterMeans, check_rollouts, subsample_evenly
from bupo.lens.maps import PLAIN, Lens, fit_on_half
from bupo.lens.readings import KINDS, Readings, read_layers
from bupo.report import style
from bupo.report.analysis_figures import layer_choice
from bupo.report.results import Readings as Curves
from bupo.run_folder import describe_run, read_json, write_json
from experiments.fetch_model import PACKAGES
from experiments.summary import RESULTS

FILE = RESULTS / "gallery.json"
IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
TASK, SEED = "reasoning_gym/gsm_symbolic", 0


def share(part: Tensor, whole: Tensor, counts: list[int]) -> dict[str, float] | None:
    """``mean(part) / mean(whole)`` over tokens, with its standard error; None unless the whole is above 0.1 nats."""
    if whole.mean() <= 0.1:
        return None
    ratio = part.mean() / whole.mean()
    influence = (part - ratio * whole) / whole.mean()  # of each token on the ratio, to first order
    error = ClusterMeans.of(influence[None], counts).statistics()[1]
    return {"share": round(float(ratio), 4), "standard_error": round(float(error), 4)}


def shares(readings: Readings, lens: int) -> dict[str, Any]:
    """Both shares of one reading."""
    entropy, kl = (readings.values[lens, KINDS.index(kind)] for kind in ("entropy", "kl"))
    before = len(kl) - max(1, len(kl) // 4) - 1  # the last layer before the last quarter
    late = share(entropy[before] - entropy[-1], entropy[0] - entropy[-1], readings.counts)
    return {"late": late, "left": share(kl[before], kl[0], readings.counts), "layer": before + 1}


def look(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Sample, fit and read one model."""
    started = time.monotonic()
    model, tokenizer = load_model(f"models/{name}", dtype="float32", device="cpu")
    problems = load_problems(TASK, limit=args.problems, seed=SEED)
    prompts = prompts_of(problems, tokenizer, "auto")
    sampled = sample(model, tokenizer, prompts, Sampling(args.new_tokens, seed=SEED), samples=1, batch_size=args.batch)
    pairs = check_rollouts(model, [(p, r) for p, (r,) in zip(prompts, sampled, strict=True) if r])
    lens, read = fit_on_half(model, pairs, seed=SEED)
    lenses: dict[str, Lens] = {**PLAIN, "ridge": lens}
    drawn = subsample_evenly([len(pair.response_ids) for pair in read], args.tokens, SEED)
    readings = read_layers(model, read, drawn, list(lenses.values()))
    curves, errors = readings.curves(list(lenses))
    return {
        "architecture": type(model).__name__,
        "tied": model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        "responses": len(read),
        "tokens": sum(readings.counts),
        "fitted_tokens": lens.card["tokens"],
        "entropy_of_the_output": round(float(readings.values[1, 0, -1].mean()), 4),
        "uniform_kl": round(float(readings.uniform_kl.mean()), 4),
        "shares": {lens_name: shares(readings, i) for i, lens_name in enumerate(lenses)},
        "curves": curves,
        "standard_errors": errors,
        "seconds": round(time.monotonic() - started, 1),
    }


def draw(name: str, found: dict[str, Any]) -> None:
    style.save(layer_choice(Curves.model_validate(found | {"seed": SEED})), IMAGES, f"gallery_{name}")
    (IMAGES / f"gallery_{name}.svg").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(PACKAGES), help="default: all")
    parser.add_argument("--problems", type=int, default=60)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512, help="of the responses that are read")
    parser.add_argument("--batch", type=int, default=30, help="responses sampled together")
    args = parser.parse_args()
    models = read_json(FILE)["models"] if FILE.exists() else {}
    for name in args.names:
        if name in models:
            print(f"{name}: {FILE.name} has its figures already")
            continue
        models[name] = look(name, args)
        config = {key: value for key, value in vars(args).items() if key != "names"}
        write_json(
            FILE, {**describe_run("gallery", config | {"task": TASK, "seed": SEED}), "argv": [], "models": models}
        )
        print(name, json.dumps(models[name]["shares"]), f"{models[name]['seconds']:.0f} s", flush=True)
    for name, found in models.items():
        draw(name, found)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
