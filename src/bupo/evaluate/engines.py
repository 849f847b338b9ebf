"""The interface of sampling engines, and their seeds. This module loads no torch."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bupo.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn; the defaults are the paper's."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy decoding
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Samples drawn together: pairs (problem, sample), both counted from 0, and their seed."""

    items: tuple[tuple[int, int], ...]
    seed: int


class Engine(ABC):
    """Samples responses from one model; a batch depends on its own seed and content only, so runs can be continued."""

    tokenizer: Any
    end_ids: frozenset[int]  # tokens that end a response
    context: int | None  # most tokens of a prompt with its response, None if unknown
    vocabulary: int | None  # number of tokens that the model knows, None if unknown
    facts: dict[str, Any]  # what results record: revision, device and dtype

    @abstractmethod
    def responses_per_batch(self, samples: int) -> int:
        """Return the size of a batch if every problem gets this number of samples."""

    def plan(self, problems: int, samples: int, seed: int) -> list[Batch]:
        """Return all batches of a task; the samples of a problem are neighbours."""
        pairs = [(problem, sample) for problem in range(problems) for sample in range(samples)]
        size = self.responses_per_batch(samples)
        starts = range(0, len(pairs), size)
        return [Batch(tuple(pairs[start : start + size]), derived_seed(seed, *pairs[start])) for start in starts]

    @abstractmethod
    def run(self, prompts: Sequence[Sequence[int]], batch: Batch, sampling: Sampling) -> list[list[int]]:
        """Return the response token ids of a batch, each with the end-of-sequence token that ended it."""

    def is_finished(self, response: Sequence[int]) -> bool:
        """Whether the model ended this response itself, rather than the length limit."""
        return bool(response) and response[-1] in self.end_ids


def derived_seed(seed: int, *names: object) -> int:
    """Derive a 63-bit seed from a seed and names, independent for each combination."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def response_limit(prompts: Sequence[Sequence[int]], context: int | None, asked: int | None, default: int) -> int:
    """Return the most tokens a response may have: ``asked``, or else up to ``default`` as the model's context allows.

    Raises `InputError` if the longest prompt leaves no room for them.
    """
    longest = max(map(len, prompts))
    tokens = asked or (default if context is None else max(1, min(default, context - longest)))
    if context is not None and longest + tokens > context:
        remedy = "lower --max-new-tokens" if longest < context else "choose another model, or problems that fit"
        total = f"the longest prompt has {longest} tokens, and with {tokens} new ones"
        raise InputError(f"{total} that is more than the model's context of {context}; {remedy}")
    return tokens


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
