"""`bupo analyze --tolerance` against reading every token: where the means land, and how much time was saved.

Command: ``make smollm2 && python experiments/tolerance.py --responses RESPONSES.jsonl`` (rows with ``prompt_ids`` and
``response_ids``; 20 rows of SmolLM2's own responses to MATH500 here), results in ``experiments/results/tolerance.json``

Every tolerance and the full answer are made in one run on the same machine. Deviations are given in units of both
standard errors: the clustered one, which the tolerance is about, and the sampling one, which is what the deviation from
the full answer should look like (about 68 % within one, 95 % within two, if tokens were independent).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bupo.data.rollouts import read_responses
from bupo.lens.analyze import SITES, analyze_rollouts
from bupo.models.load import load_model
from bupo.run_folder import describe_run, write_json


def compare(part: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """Deviations of every site's mean from the full answer."""
    nats, clustered = [], []
    for site in SITES:
        rows = zip(part["sites"][site], whole["sites"][site], part["standard_errors"][site], strict=True)
        for got, want, error in rows:
            nats.append(abs(got - want))
            clustered.append(abs(got - want) / max(error, 1e-6))
    return {
        "largest_deviation_nats": round(max(nats), 5),
        "largest_deviation_in_standard_errors": round(max(clustered), 3),
        "within_one_standard_error": round(sum(c <= 1 for c in clustered) / len(clustered), 4),
        "sites": len(nats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=Path, required=True)
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--first-tokens", type=int, help="cut every response after so many (default: whole)")
    parser.add_argument("--tolerances", default="0.02,0.05,0.1,0.2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("experiments/results/tolerance.json"))
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, dtype="float32")
    rollouts = read_responses(args.responses, tokenizer, "auto")[: args.limit]
    if args.first_tokens:
        rollouts = [replace(r, response_ids=r.response_ids[: args.first_tokens]) for r in rollouts]
    analyze_rollouts(model, rollouts[:1], tolerance=10.0)  # what is made once

    def timed(tolerance: float | None) -> tuple[dict[str, Any], float]:
        started = time.perf_counter()
        found = analyze_rollouts(model, rollouts, tolerance=tolerance, seed=args.seed)
        seconds = time.perf_counter() - started
        print(f"tolerance {tolerance}: {found['tokens']} tokens in {seconds:.0f} s", flush=True)
        return found, seconds

    rows = []
    tolerances = [float(t) for t in args.tolerances.split(",")]
    parts = {t: timed(t) for t in tolerances}
    whole, seconds = timed(None)
    for part, spent in parts.values():
        rows.append(
            {**part["sampling"], **compare(part, whole), "seconds": round(spent, 1),
             "share_of_the_time": round(spent / seconds, 3)}
        )  # fmt: skip
    config = {k: str(v) for k, v in vars(args).items() if k not in ("out", "responses")}
    result = {
        **describe_run("tolerance", {**config, "responses": args.responses.name}),
        "threads": torch.get_num_threads(),
        "samples": whole["samples"],
        "tokens": whole["tokens"],
        "largest_standard_error_of_all_tokens": max(max(whole["standard_errors"][s]) for s in SITES),
        "seconds_of_all_tokens": round(seconds, 1),
        "tolerances": rows,
    }
    result["argv"] = []  # paths of a machine
    write_json(args.out, result)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
