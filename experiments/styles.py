"""Pretrains the small model in Qwen3 and Llama style, tied and untied, and compares the entropies of its layers.

Run ``python -m experiments.styles`` (models that have a line already are skipped; about five minutes per model on one
core). It writes one line per model to ``experiments/results/styles.jsonl`` and a summary to ``styles.json``.

For a seed, all models see the same texts in the same order (`experiments.pretrain_small`) and have the same width,
depth and number of updates. They differ in architecture (``qwen3`` normalises queries and keys, ``llama`` does not), in
whether the unembedding is the embedding (``tied``), and in the data. ``worked``: 65 % of longer problems show their
working; ``bare``: none does; ``longer``: ``worked`` with 4.3 times as many texts, about 25 minutes per model and
therefore with seed 0 only (these are the settings of the shipped model, which takes that place). Every model is
analysed on its own responses to the same held-out problems, raw (Eq. 5-13 of arXiv 2512.19673) and through the final
norm.

Two measures tell how abruptly a model decides. *Late share*: the part of the fall of the layer policy's entropy from
layer 1 to L that happens in the last quarter of layers, about 0.25 for a model that sharpens evenly and 1 for one that
decides at the end. *Last step*: the FFN entropy change of layer L - 1 minus that of layer L, in nats. The latter was
chosen after seeds 0 and 1 had been seen, and is therefore tested on later seeds only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bupo.run_folder import write_json
from experiments.summary import read_lines, student

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "experiments" / "results"
ARCHITECTURES = ("qwen3", "llama")
SHIPPED = REPOSITORY / "src" / "bupo" / "assets" / "small"
PROBLEMS = 128
DATA: dict[str, dict[str, Any]] = {
    "worked": {"left_out": 0.35, "updates": 600, "batch": 32},
    "bare": {"left_out": 1.0, "updates": 600, "batch": 32},
    "longer": {"left_out": 0.35, "updates": 1300, "batch": 64},
}
# four architectures on the worked data; the other data for both architectures, untied only
CELLS = [(a, t, "worked") for t, a in itertools.product((False, True), ARCHITECTURES)]
CELLS += [(a, False, data) for data in ("bare", "longer") for a in ARCHITECTURES]
KEPT = ("layers", "tokens", "samples", "boundary_layer", "boundary_reason", "sites", "entropy_change", "final_entropy")


def one(arch: str, tied: bool, data: str, seed: int) -> dict[str, Any]:
    """Pretrain a model, sample from it and analyse it."""
    settings = {"arch": arch, "tied": tied, "seed": seed, **DATA[data]}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        model, out = Path(temporary) / "model", Path(temporary) / "analysis"
        if settings.items() <= json.loads((SHIPPED / "pretraining.json").read_text())["settings"].items():
            model = SHIPPED
        else:
            _run("-m", "experiments.pretrain_small", "--out", model, *flags(settings))
        trained = json.loads((model / "pretraining.json").read_text())
        _run(
            "-m", "bupo", "analyze", "--model", model, "--dataset", "arithmetic", "--split", "test",
            "--limit", PROBLEMS, "--max-new-tokens", 40, "--lens", "raw,norm", "--output", out, "--json",
        )  # fmt: skip
        analysis = json.loads((out / "analysis.json").read_text())
    return {
        "arch": arch,
        "tied": tied,
        "data": data,
        "seed": seed,
        "updates": settings["updates"],
        "parameters": trained["parameters"],
        "solved": trained["test_solved"],
        "loss": trained["history"][-1]["loss"],
        **{name: analysis[name] for name in KEPT},
        "curves": {
            reading: {name: analysis["layer_choice"]["curves"][reading][name] for name in ("entropy", "kl")}
            for reading in ("raw", "norm")
        },
        "seconds": round(time.monotonic() - started),
    }


def flags(settings: dict[str, Any]) -> list[str]:
    """Options of `experiments.pretrain_small`: a switch for a value that is true, nothing for one that is false."""
    options = {f"--{name.replace('_', '-')}": value for name, value in settings.items() if value is not False}
    return [part for name, value in options.items() for part in ((name,) if value is True else (name, str(value)))]


def _run(*arguments: Any) -> None:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))}: exit code {done.returncode}\n{done.stderr[-2000:]}")


def measures(row: dict[str, Any]) -> dict[str, float]:
    """Scalars of one model: how late the entropy of its layer policies falls, and how its FFNs change it."""
    late = max(1, row["layers"] // 4)
    found = {}
    for name, curve in (("raw", row["sites"]["layer_out"]), ("norm", row["curves"]["norm"]["entropy"])):
        fall = curve[0] - curve[-1]
        found[f"entropy_first_{name}"], found[f"entropy_last_{name}"] = curve[0], curve[-1]
        found[f"largest_fall_{name}"] = max(a - b for a, b in itertools.pairwise(curve)) / fall if fall > 0.1 else None
        found[f"late_share_{name}"] = (curve[-1 - late] - curve[-1]) / fall if fall > 0.1 else None
    ffn, attention = row["entropy_change"]["ffn"], row["entropy_change"]["attn"]
    found["ffn_last_step"] = ffn[-2] - ffn[-1]
    found["ffn_positive_layers"] = sum(c > 0 for c in ffn)
    found["attention_positive_layers"] = sum(c > 0 for c in attention)
    found["solved"] = row["solved"]
    return {name: value if value is None else round(value, 4) for name, value in found.items()}


def contrast(rows: list[dict[str, Any]], one: dict[str, Any], other: dict[str, Any], since: int = 0) -> dict[str, Any]:
    """Differences of all measures, ``one`` minus ``other``, with Student's 95 % interval.

    They are paired by seed, and by tying where both have tied and untied models.
    """

    def cell(filters: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, float]]:
        mine = [r for r in rows if all(r[k] == v for k, v in filters.items()) and r["seed"] >= since]
        return {tuple(r[k] for k in ("seed", "tied") if k not in filters): measures(r) for r in mine}

    first, second = cell(one), cell(other)
    seeds = sorted(first.keys() & second.keys())
    result: dict[str, Any] = {"one": one, "other": other, "seeds": [key[0] for key in seeds], "differences": {}}
    for name in first[seeds[0]] if seeds else ():
        values = [first[s][name] - second[s][name] for s in seeds if None not in (first[s][name], second[s][name])]
        if not values:
            continue
        each = [round(value, 4) for value in values]
        result["differences"][name] = {"mean": round(statistics.fmean(values), 4), "each": each, **student(values)}
    return result


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The measures of every cell, and the contrasts between architectures, tying and data."""
    cells = []
    for arch, tied, data in CELLS:
        mine = [r for r in rows if (r["arch"], r["tied"], r["data"]) == (arch, tied, data)]
        if not mine:
            continue
        each = [measures(r) for r in mine]
        means = {}
        for name in each[0]:
            known = [e[name] for e in each if e[name] is not None]
            means[name] = {"mean": round(statistics.fmean(known), 4), "each": known} if known else None
        layers = mine[0]["layers"]
        entropy = [round(statistics.fmean(r["sites"]["layer_out"][i] for r in mine), 4) for i in range(layers)]
        cells.append(
            {
                "arch": arch,
                "tied": tied,
                "data": data,
                "seeds": [r["seed"] for r in mine],
                "parameters": mine[0]["parameters"],
                "boundary_layers": [r["boundary_layer"] for r in mine],
                "entropy": entropy,
                "ffn_change": [
                    round(statistics.fmean(r["entropy_change"]["ffn"][i] for r in mine), 4) for i in range(layers)
                ],
                "measures": means,
            }
        )
    plain = {"tied": False, "data": "worked"}
    return {
        "schema": 1,
        "cells": cells,
        "contrasts": {
            "architecture, untied": contrast(rows, {"arch": "llama", **plain}, {"arch": "qwen3", **plain}),
            "architecture, untied, seeds from 2": contrast(
                rows, {"arch": "llama", **plain}, {"arch": "qwen3", **plain}, since=2
            ),
            "architecture, tied": contrast(
                rows, {"arch": "llama", **plain, "tied": True}, {"arch": "qwen3", **plain, "tied": True}
            ),
            "architecture, both": contrast(
                rows, {"arch": "llama", "data": "worked"}, {"arch": "qwen3", "data": "worked"}
            ),
            "architecture, answers only": contrast(
                rows, {"arch": "llama", **plain, "data": "bare"}, {"arch": "qwen3", **plain, "data": "bare"}
            ),
            "tying, qwen3": contrast(rows, {"arch": "qwen3", **plain, "tied": True}, {"arch": "qwen3", **plain}),
            "tying, llama": contrast(rows, {"arch": "llama", **plain, "tied": True}, {"arch": "llama", **plain}),
            "data, qwen3": contrast(rows, {"arch": "qwen3", **plain, "data": "bare"}, {"arch": "qwen3", **plain}),
            "data, llama": contrast(rows, {"arch": "llama", **plain, "data": "bare"}, {"arch": "llama", **plain}),
            "architecture, longer": contrast(
                rows, {"arch": "llama", **plain, "data": "longer"}, {"arch": "qwen3", **plain, "data": "longer"}
            ),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--data", choices=DATA, help="run only the models of these data")
    parser.add_argument("--out", type=Path, default=RESULTS / "styles.jsonl")
    parser.add_argument("--untied", action="store_true", help="run only untied models")
    parser.add_argument("--summary", action="store_true", help="only write styles.json from the existing lines")
    args = parser.parse_args()
    rows = read_lines(args.out) if args.out.exists() else []
    if not args.summary:
        done = {(r["arch"], r["tied"], r["data"], r["seed"]) for r in rows}
        pending = [(*cell, int(seed)) for seed in args.seeds.split(",") for cell in CELLS]
        pending = [run for run in pending if run not in done and args.data in (None, run[2])]
        pending = [run for run in pending if (run[2] != "longer" or run[3] == 0) and not (args.untied and run[1])]
        for number, run in enumerate(pending, start=1):
            row = one(*run)
            rows.append(row)
            with args.out.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row, separators=(",", ":")) + "\n")
            print(f"{number}/{len(pending)} {run}: {measures(row)} in {row['seconds']} s", flush=True)
    write_json(args.out.with_suffix(".json"), summarise(rows))


if __name__ == "__main__":
    main()
