r"""Writes sums of reasoning-gym's ``chain_sum`` as continuations of a solved one, a task SmolLM2-135M can learn.

Run ``make smollm2`` (``python -m experiments.smollm2_sums --out models/sums``). It writes three files of JSON lines:
``train.jsonl`` and ``held-out.jsonl``, sums and differences of two one-digit numbers without overlap, and
``shifted.jsonl``, three one-digit or two two-digit numbers, which do not occur in training.

When asked through its chat template, the (4-bit, dequantised) model talks and never solves a sum. After a solved sum,
it writes ``\boxed{`` at once in two thirds of its responses and is correct in less than a tenth, which leaves room for
training.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import reasoning_gym

SHOWN = "3 + 5"
SHOT = f"{SHOWN} = \\boxed{{8}}\n"


def sums(numbers: int, digits: int, each: int, seed: int) -> list[dict[str, str]]:
    """Return ``each`` different sums and differences of so many numbers; reasoning-gym draws and solves them."""
    data = reasoning_gym.create_dataset(
        "chain_sum", min_terms=numbers, max_terms=numbers, min_digits=digits, max_digits=digits, seed=seed,
        size=20 * each,
    )  # fmt: skip
    found: dict[str, str] = {}
    for entry in data:
        question = entry["question"].split(":")[-1].strip().removesuffix("=").strip()
        if question != SHOWN and len(found) < each:
            found[question] = entry["answer"]
    if len(found) < each:
        raise SystemExit(f"only {len(found)} different sums of {numbers} numbers with {digits} digits")
    return [{"id": q.replace(" ", ""), "prompt": f"{q} =", "answer": a} for q, a in found.items()]


def draw(kinds: list[tuple[int, int]], each: int, seed: int) -> list[dict[str, str]]:
    """Return ``each`` different sums per kind (numbers, digits) after a solved one, shuffled."""
    mixed = [row for i, kind in enumerate(kinds) for row in sums(*kind, each, seed + i)]
    random.Random(seed).shuffle(mixed)
    return [{**row, "prompt": SHOT + row["prompt"]} for row in mixed]


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} sums, such as {rows[0]['id']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/sums"))
    out: Path = parser.parse_args().out
    standard = draw([(2, 1)], 180, seed=1)
    sets = {"held-out": standard[:64], "train": standard[64:], "shifted": draw([(3, 1), (2, 2)], 32, seed=2)}
    for name, rows in sets.items():
        write_rows(out / f"{name}.jsonl", rows)


if __name__ == "__main__":
    main()
