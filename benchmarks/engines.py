"""Tokens a second of transformers' plain batches against its continuous batching, taken in turn (A B A B ...).

Command: ``python benchmarks/engines.py --output benchmarks/results/engines.json``
(with ``--model models/smollm2 --task FILE --new-tokens 256`` for a larger model; ``--threads`` for torch).

Plain batches drop rows that have ended and start the next batch when all have; continuous batching fills a free place
at once and pages its cache. Both draw the same number of responses to the same prompts; the ratio is of tokens a
second, pair by pair, and its median is the result.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from bupo import run_folder as rundir
from bupo.data.templates import prompt_ids
from bupo.evaluate.engine_continuous import ContinuousEngine
from bupo.evaluate.engines import Sampling
from bupo.evaluate.hf_engine import TransformersEngine
from bupo.evaluate.tasks import find_task, task_problems
from bupo.models.load import load_model


def rate(engine: TransformersEngine, prompts: list[list[int]], samples: int, sampling: Sampling) -> tuple[float, float]:
    """Tokens a second and mean length of all responses."""
    start, tokens, responses = time.perf_counter(), 0, 0
    for batch in engine.plan(len(prompts), samples, sampling.seed):
        made = engine.run(prompts, batch, sampling)
        tokens, responses = tokens + sum(map(len, made)), responses + len(made)
    return tokens / (time.perf_counter() - start), tokens / responses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small")
    parser.add_argument("--task", default="arithmetic")
    parser.add_argument("--problems", type=int, default=32)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = load_model(options.model)
    problems = task_problems(find_task(options.task), limit=options.problems)
    prompts = [prompt_ids(problem.prompt, tokenizer) for problem in problems]
    made = [kind(model, tokenizer, batch_size=options.batch_size) for kind in (TransformersEngine, ContinuousEngine)]
    for engine in made:  # first calls set things up
        rate(engine, prompts[:2], 2, Sampling(4))
    rates: dict[str, list[float]] = {engine.name: [] for engine in made}
    lengths: dict[str, list[float]] = {engine.name: [] for engine in made}
    for seed in range(options.rounds):
        for engine in made if seed % 2 == 0 else reversed(made):
            speed, length = rate(engine, prompts, options.samples, Sampling(options.new_tokens, seed=seed))
            rates[engine.name].append(speed)
            lengths[engine.name].append(length)
        print({name: round(values[-1]) for name, values in rates.items()}, flush=True)
    ratios = [b / a for a, b in zip(rates["transformers"], rates["continuous"], strict=True)]
    figures = {
        "model": Path(options.model).name,
        "settings": {key: value for key, value in vars(options).items() if isinstance(value, int)},
        "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "mean_length": {name: statistics.mean(values) for name, values in lengths.items()},
        "continuous_over_plain": {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)},
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "machine": rundir.machine(),
        "versions": rundir.versions(),
    }
    print(figures["continuous_over_plain"])
    if options.output:
        rundir.write_json(options.output, figures)


if __name__ == "__main__":
    main()
