"""Responses on their way into a model: checks, batches without padding to speak of, and which tokens are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from bupo.errors import InputError
from bupo.models.layout import unwrap


class TokenPair(Protocol):
    """A prompt and its response as token ids."""

    @property
    def prompt_ids(self) -> Sequence[int]: ...
    @property
    def response_ids(self) -> Sequence[int]: ...


def context_length(model: nn.Module) -> int | None:
    """The most tokens the model's position encoding was made for, or None if the configuration does not say."""
    config = unwrap(model).config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def check_rollouts(model: nn.Module, rollouts: Sequence[TokenPair]) -> None:
    """Raise :class:`InputError` for responses that cannot be analysed, naming the first one."""
    if not rollouts:
        raise InputError("there are no responses to analyse")
    limit = context_length(model)
    vocabulary = unwrap(model).get_input_embeddings().weight.shape[0]
    for number, rollout in enumerate(rollouts, start=1):
        length = len(rollout.prompt_ids) + len(rollout.response_ids)
        if not len(rollout.response_ids):
            raise InputError(f"response {number} is empty; every row needs at least one response token")
        if not len(rollout.prompt_ids):
            raise InputError(f"prompt {number} is empty; the first response token is predicted from its last token")
        if limit is not None and length > limit:
            raise InputError(
                f"response {number} with its prompt has {length} tokens, more than the model's context of {limit}; "
                f"shorten or drop it"
            )
        highest = max(max(rollout.prompt_ids), max(rollout.response_ids))
        if highest >= vocabulary or min(min(rollout.prompt_ids), min(rollout.response_ids)) < 0:
            raise InputError(
                f"response {number} holds token id {highest}, outside this model's vocabulary of {vocabulary}: "
                f"were the ids made with another tokenizer?"
            )


def batches(
    rollouts: Sequence[TokenPair], most_tokens: int, chosen: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Indices of responses in batches of at most ``most_tokens`` padded tokens, longest first (little padding).

    Args:
        chosen: only these responses (default: all).
    """
    lengths = [len(r.prompt_ids) + len(r.response_ids) - 1 for r in rollouts]
    batch: list[int] = []
    for index in sorted(range(len(rollouts)) if chosen is None else chosen, key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > most_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def shares(lengths: Sequence[int], processes: int) -> list[list[int]]:
    """Responses dealt out to processes so that all have about as many tokens: the longest first, to who has least."""
    found: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        least = loads.index(min(loads))
        found[least].append(index)
        loads[least] += lengths[index]
    return [sorted(part) for part in found]


@dataclass(frozen=True)
class Batch:
    """Responses padded on the right, and which of their tokens are read.

    Attributes:
        ids, mask: (B, T); the last response token is predicted, never read.
        keep: (B, T) bool, N positions that predict the tokens read (P-1 .. P+R-2 for all of them).
        targets: the tokens read, (N,), response by response.
        counts: how many of each response.
    """

    ids: Tensor
    mask: Tensor
    keep: Tensor
    targets: Tensor
    counts: list[int]


def pad(rollouts: Sequence[TokenPair], tokens: Sequence[Sequence[int]], device: torch.device) -> Batch:
    """Responses and, for each, the numbers (from 0, ascending) of the response tokens to read."""
    rows = [[*r.prompt_ids, *r.response_ids][:-1] for r in rollouts]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    keep = torch.zeros(len(rows), width, dtype=torch.bool)
    targets: list[int] = []
    for i, (row, rollout, wanted) in enumerate(zip(rows, rollouts, tokens, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        keep[i, torch.tensor(wanted, dtype=torch.long) + len(rollout.prompt_ids) - 1] = True
        targets += [rollout.response_ids[t] for t in wanted]
    return Batch(
        ids.to(device), mask.to(device), keep.to(device), torch.tensor(targets, device=device), [len(t) for t in tokens]
    )
