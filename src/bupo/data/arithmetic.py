r"""The built-in task family: arithmetic in plain ASCII, answered step by step and ending in ``\boxed{...}``.

``standard`` problems are ``(a+b)*c=`` and ``(a-b)*c=``; ``hard`` ones have one more operation, ``(a+b)*c-d=``. The
model shipped in the package was pretrained on the train split (with the steps sometimes left out), so reinforcement
learning can still improve it; it never saw the test split.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

from bupo.errors import InputError

LEVELS = ("standard", "hard")
SPLITS = ("train", "test")
TEST_SHARE = 0.1
SIZES = {  # numbers of different problems
    ("standard", "train"): 87_849, ("standard", "test"): 9_711, ("hard", "train"): 5_248_266, ("hard", "test"): 583_734
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One problem: its text, the lines of working that solve it, and its answer."""

    prompt: str
    steps: tuple[str, ...]
    answer: int

    def response(self, with_steps: bool = True) -> str:
        r"""Return the full response, e.g. ``17+25=42\n42*6=252\n\boxed{252}``."""
        lines = [*self.steps] if with_steps else []
        return "\n".join([*lines, f"\\boxed{{{self.answer}}}"])


def split_of(prompt: str) -> str:
    """Return ``train`` or ``test``; it depends on the problem's text alone, so no problem is in both."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64 else "train"


def draw(generator: random.Random, level: str = "standard") -> Task:
    """Draw a random problem of either split."""
    a, b, c = generator.randint(10, 99), generator.randint(10, 99), generator.randint(2, 9)
    if level == "standard" and generator.random() < 0.5:
        a, b = max(a, b), min(a, b)
        first, inner = f"{a}-{b}", a - b
    else:
        first, inner = f"{a}+{b}", a + b
    product = inner * c
    steps = (f"{first}={inner}", f"{inner}*{c}={product}")
    if level == "standard":
        return Task(f"({first})*{c}=", steps, product)
    if level == "hard":
        d = generator.randint(10, 99)
        return Task(f"({first})*{c}-{d}=", (*steps, f"{product}-{d}={product - d}"), product - d)
    raise ValueError(f"unknown level {level!r}; choose one of {', '.join(LEVELS)}")


def draw_from(generator: random.Random, split: str, level: str = "standard") -> Task:
    """Draw a random problem of one split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    while True:
        task = draw(generator, level)
        if split_of(task.prompt) == split:
            return task


def problems(n: int, *, seed: int = 0, split: str = "train", level: str = "standard") -> list[dict[str, Any]]:
    """Draw ``n`` different problems as rows with ``id``, ``prompt`` (ending in a newline) and ``answer``.

    The same seed gives the same list, and a longer list begins with the shorter one.

    Raises:
        InputError: the split has fewer than ``n`` problems.
    """
    if n > SIZES.get((level, split), n):
        raise InputError(
            f"the {split} split of {level} arithmetic has {SIZES[level, split]:,} problems, fewer than {n:,}; "
            "lower the number of problems"
        )
    generator = random.Random(f"{seed}/{split}/{level}")
    tasks: dict[str, Task] = {}
    while len(tasks) < n:
        task = draw_from(generator, split, level)
        tasks.setdefault(task.prompt, task)
    return [
        {"id": f"arithmetic/{level}/{prompt}", "prompt": f"{prompt}\n", "answer": str(task.answer)}
        for prompt, task in tasks.items()
    ]
