"""The built-in tasks in plain ASCII: ``(a+b)*c=`` and ``(a-b)*c=`` (standard), ``(a+b)*c-d=`` (hard)."""

import hashlib
import random
from typing import Any

from bupo.errors import InputError

SPLITS = ("train", "test")
TEST_SHARE = 0.1
SIZES = {  # numbers of different problems
    ("standard", "train"): 87_849, ("standard", "test"): 9_711, ("hard", "train"): 5_248_266, ("hard", "test"): 583_734
}  # fmt: skip


def split_of(prompt: str) -> str:
    """Return ``train`` or ``test``; it depends on the problem's text alone, so no problem is in both."""
    hashed = hashlib.sha256(prompt.encode()).digest()[:8]
    return "test" if int.from_bytes(hashed, "big") < TEST_SHARE * 2**64 else "train"


def draw(generator: random.Random, split: str, level: str = "standard") -> tuple[str, int]:
    """Draw the text and the answer of a random problem."""
    while True:
        a, b, c = generator.randint(10, 99), generator.randint(10, 99), generator.randint(2, 9)
        if level == "standard" and generator.random() < 0.5:
            prompt, answer = f"({max(a, b)}-{min(a, b)})*{c}", abs(a - b) * c
        else:
            prompt, answer = f"({a}+{b})*{c}", (a + b) * c
        if level == "hard":
            d = generator.randint(10, 99)
            prompt, answer = f"{prompt}-{d}", answer - d
        if split_of(f"{prompt}=") == split:
            return f"{prompt}=", answer


def problems(n: int, *, seed: int = 0, split: str = "train", level: str = "standard") -> list[dict[str, Any]]:
    """Draw ``n`` different problems as rows with ``id``, ``prompt`` (ending in a newline) and ``answer``.

    The same seed gives the same list, and a longer list begins with the shorter one.
    """
    if n > (size := SIZES[level, split]):
        raise InputError(f"the {split} split of {level} arithmetic has {size:,} problems, fewer than {n:,}; lower that")
    generator = random.Random(f"{seed}/{split}/{level}")
    answers: dict[str, int] = {}
    while len(answers) < n:
        answers.update([draw(generator, split, level)])
    return [{"id": f"arithmetic/{level}/{p}", "prompt": f"{p}\n", "answer": str(a)} for p, a in answers.items()]
