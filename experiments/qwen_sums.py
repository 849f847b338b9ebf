r"""Writes sums that Qwen2.5-Coder-0.5B-Instruct solves in part, as continuations of a solved one.

Run ``python -m experiments.fetch_model qwen-coder``, then ``python -m experiments.qwen_sums``. It writes
``train.jsonl``, ``tuning.jsonl`` and ``held-out.jsonl``, a three-digit plus or minus a two-digit number without
overlap, and ``shifted.jsonl``, two three-digit numbers, which do not occur in training.

As plain text (``960 - 62 =``), the (4-bit, dequantized) model writes no box and is wrong in 99 of 100 samples. After
a solved sum it boxes its answer at once, and a third of its answers are right.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from experiments.smollm2_sums import write_rows

SHOWN = (251, "-", 37)
SHOT = "251 - 37 = \\boxed{214}\n"


def sums(second: range, each: int, rng: random.Random) -> list[dict[str, str]]:
    """Return so many different sums and differences of a three-digit number and one from ``second``."""
    found: dict[tuple[int, str, int], int] = {}
    while len(found) < each:
        a, sign, b = rng.randint(100, 999), rng.choice("+-"), rng.choice(second)
        if (a, sign, b) != SHOWN:
            found[a, sign, b] = a + b if sign == "+" else a - b
    return [{"id": f"{a}{sign}{b}", "prompt": f"{SHOT}{a} {sign} {b} =", "answer": str(answer)}
            for (a, sign, b), answer in found.items()]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/qwen-sums"))
    out, rng = parser.parse_args().out, random.Random(4)
    standard, shifted = sums(range(10, 100), 1216, rng), sums(range(100, 1000), 128, rng)
    sets = {"held-out": standard[:256], "tuning": standard[256:320], "train": standard[320:], "shifted": shifted}
    for name, rows in sets.items():
        write_rows(out / f"{name}.jsonl", rows)


if __name__ == "__main__":
    main()
