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
        return "\n".join([*(self.steps if with_steps else ()), f"\\boxed{{{self.answer}}}"])


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
    d = generator.randint(10, 99)
    return Task(f"({first})*{c}-{d}=", (*steps, f"{product}-{d}={product - d}"), product - d)


def draw_from(generator: random.Random, split: str, level: str = "standard") -> Task:
    """Draw a random problem of one split."""
    while split_of((task := draw(generator, level)).prompt) != split:
        pass
    return task


def problems(n: int, *, seed: int = 0, split: str = "train", level: str = "standard") -> list[dict[str, Any]]:
    """Draw ``n`` different problems as rows with ``id``, ``prompt`` (ending in a newline) and ``answer``.

    The same seed gives the same list, and a longer list begins with the shorter one. Raises `InputError` if the split
    has fewer than ``n`` problems.
    """
    if n > (size := SIZES[level, split]):
        raise InputError(
            f"the {split} split of {level} arithmetic has {size:,} problems, fewer than {n:,}; ask for fewer"
        )
    generator = random.Random(f"{seed}/{split}/{level}")
    tasks: dict[str, Task] = {}
    while len(tasks) < n:
        task = draw_from(generator, split, level)
        tasks.setdefault(task.prompt, task)
    name = f"arithmetic/{level}"
    return [{"id": f"{name}/{p}", "prompt": f"{p}\n", "answer": str(task.answer)} for p, task in tasks.items()]
