"""Measures how fast grading is, and the cost of hostile answers.

Run ``python -m benchmarks.grading [--workers 2]``. Ordinary answers are MATH500's, each in forms that differ from the
gold answer as text, so that none can be decided without parsing, with wrong ones among them. Hostile answers are those
of the tests (`tests/support/hostile.py`).
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

from bupo import run_folder as rundir
from bupo.data.grading import Grader
from bupo.data.problems import Problem, load_problems
from tests.support import hostile

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data", default=str(REPOSITORY.parent / "shared" / "data" / "math500.parquet"))
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    options = parser.parse_args()
    problems = load_problems(options.data)
    with Grader(workers=options.workers) as grader:
        start = time.perf_counter()
        grader.grade(["\\boxed{x^2}"] * len(problems), problems)
        first = time.perf_counter() - start
        responses = [f"Thus $\\boxed{{{p.answer}+0}}$" for p in problems]
        responses += [f"So \\boxed{{x = {p.answer}}}." for p in problems]
        responses += [f"\\boxed{{{p.answer} + 1}}" for p in problems]
        start = time.perf_counter()
        grades = grader.grade(responses, problems * 3)
        seconds = time.perf_counter() - start
        print(f"first call, with start-up and {len(problems)} gold answers: {first:.1f} s")
        print(f"ordinary: {len(responses)} answers in {seconds:.1f} s, {len(responses) / seconds:.0f} per second, "
              f"{dict(Counter(g.status for g in grades))}")  # fmt: skip
        longest, total, accepted, statuses = 0.0, 0, 0, Counter()
        four = Problem("hostile/0", "?", hostile.GOLD, "hostile")
        start = time.perf_counter()
        for kind, answers in hostile.answers().items():
            slowest = 0.0
            for answer in answers:
                before = time.perf_counter()
                (grade,) = grader.grade([answer], [four])
                slowest = max(slowest, time.perf_counter() - before)
                statuses[grade.status] += 1
                accepted += grade.status == "correct"
            longest, total = max(longest, slowest), total + len(answers)
            print(f"  {kind:<24} {len(answers):>5} answers, slowest {slowest:.2f} s")
        alone = time.perf_counter() - start
        print(f"hostile, one by one: {total} answers in {alone:.0f} s, slowest {longest:.2f} s, {dict(statuses)}")
    if options.output:
        figures = {
            "ordinary_per_second": len(responses) / seconds,
            "hostile_answers": total,
            "hostile_slowest_seconds": longest,
            "hostile_accepted": accepted,
            "workers": options.workers,
            "machine": rundir.machine(),
            "versions": rundir.versions(),
        }
        rundir.write_json(options.output, figures)


if __name__ == "__main__":
    main()
