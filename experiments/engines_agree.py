"""Checks that the engines agree: same prompt token ids, and accuracies within what sampling explains.

Run ``python -m experiments.engines_agree --engines transformers,vllm [--output FILE.json]``.

Every engine answers the same small sums. A model as small as SmolLM2-135M seldom boxes its answer, so a response counts
as correct if the sum occurs anywhere in it. The paired test is that of ``bupo report``.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from bupo import run_folder as rundir
from bupo.evaluate.config import EvalConfig
from bupo.evaluate.metrics import bootstrap, compare
from bupo.evaluate.run import evaluate, load_engine

REPOSITORY = Path(__file__).resolve().parents[1]


def write_questions(folder: Path, count: int) -> Path:
    """Write a file of sums of two consecutive numbers."""
    path = folder / "sums.jsonl"
    rows = [{"problem": f"What is {a} + {a + 1}?", "answer": str(2 * a + 1)} for a in range(1, count + 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(name: str, model: str, questions: Path, samples: int, new_tokens: int) -> tuple[EvalConfig, Any]:
    """Return configuration and engine."""
    config = EvalConfig(
        model=model, tasks=(str(questions),), n=samples, max_new_tokens=new_tokens, dtype="float32", engine=name
    )
    return config, load_engine(config, device=None if name == "vllm" else "cpu")


def measure(loaded: tuple[EvalConfig, Any], output: Path) -> tuple[list[list[int]], np.ndarray, dict[str, Any]]:
    """Return the prompt token ids per response, the share of correct samples per question, and the results."""
    config, engine = loaded
    results = evaluate(config, lambda: engine, output)
    rows = pyarrow.parquet.read_table(output / "responses.parquet").to_pylist()
    assert all(row["response_ids"] and row["finished"] == (row["response_ids"][-1] in engine.end_ids) for row in rows)
    right = [re.search(rf"(?<!\d){row['answer']}(?!\d)", row["response"]) is not None for row in rows]
    shares = np.asarray(right, dtype=float).reshape(-1, results["tasks"]["sums"]["n_samples"]).mean(axis=1)
    return [row["prompt_ids"] for row in rows], shares, results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(REPOSITORY / "models" / "smollm2"))
    parser.add_argument("--engines", default="transformers,vllm")
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    prompts, shares, accuracies = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        questions = write_questions(Path(folder), options.questions)
        for name in options.engines.split(","):
            loaded = load(name, options.model, questions, options.samples, options.new_tokens)
            start = time.perf_counter()
            prompts[name], shares[name], results = measure(loaded, Path(folder) / name)
            task = results["tasks"]["sums"]
            accuracies[name] = {
                **bootstrap(shares[name]),
                "mean_length": task["mean_length"],
                "truncation_rate": task["truncation_rate"],
                "seconds": time.perf_counter() - start,
            }
            print(name, json.dumps(accuracies[name]))
            versions = results["versions"]
    pairs = []
    for first, second in combinations(shares, 2):
        same = prompts[first] == prompts[second]
        pairs.append({"first": first, "second": second, "same_prompt_ids": same})
        pairs[-1].update(compare(shares[first], shares[second]))
        print(json.dumps(pairs[-1]))
    if options.output:
        settings = {"questions": options.questions, "samples": options.samples, "new_tokens": options.new_tokens}
        figures = {
            "model": Path(options.model).name,
            **settings,
            "engines": accuracies,
            "pairs": pairs,
            "versions": versions,
        }
        rundir.write_json(options.output, figures)


if __name__ == "__main__":
    main()
