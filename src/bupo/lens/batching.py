"""Validates responses, draws tokens from them, and groups them into length-sorted batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bupo.errors import InputError
from bupo.models.layout import context_length, find_layout, unwrap


class TokenPair(Protocol):
    """A prompt and its response as token ids."""

    @property
    def prompt_ids(self) -> Sequence[int]: ...
    @property
    def response_ids(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class _Pair:
    """A response that was passed as a tuple or a mapping."""

    prompt_ids: Any
    response_ids: Any
    problem_id: str | None = None


def check_rollouts(model: nn.Module, responses: Sequence[Any]) -> list[TokenPair]:
    """Check that the model can be analysed on these responses, and return them as token pairs.

    Args:
        model: a decoder-only causal LM, outside of `internal_policy`.
        responses: objects with ``prompt_ids`` and ``response_ids``, mappings with these keys, or pairs of the two.

    Raises:
        InputError: the model or a response is unusable; the message names the first such response, counted from 1.
    """
    layout = find_layout(model)
    if (shadow := layout.backbone.__dict__.get(layout.layers_name)) is not None:
        raise InputError(
            f"the model is inside internal_policy(model, {len(shadow)}), so only its first {len(shadow)} layers run; "
            f"leave that context before analysing the model"
        )
    if not responses:
        raise InputError("there are no responses to analyse")
    limit = context_length(unwrap(model).config)
    vocabulary = unwrap(model).get_input_embeddings().weight.shape[0]
    pairs = [_token_pair(number, response) for number, response in enumerate(responses, start=1)]
    for number, pair in enumerate(pairs, start=1):
        if not len(pair.response_ids):
            raise InputError(f"response {number} is empty; every row needs at least one response token")
        if not len(pair.prompt_ids):
            raise InputError(f"prompt {number} is empty; the first response token is predicted from its last token")
        length = len(pair.prompt_ids) + len(pair.response_ids)
        if limit is not None and length > limit:
            raise InputError(
                f"response {number} with its prompt has {length} tokens, more than the model's context of {limit}; "
                f"shorten or drop it"
            )
        for token in (t for ids in (pair.prompt_ids, pair.response_ids) for t in (min(ids), max(ids))):
            if not 0 <= token < vocabulary:
                raise InputError(
                    f"response {number} contains token id {token}, outside this model's vocabulary of {vocabulary}; "
                    f"check that the ids come from this model's tokenizer"
                )
    return pairs


def _token_pair(number: int, response: Any) -> TokenPair:
    pair = response
    if isinstance(response, Mapping):
        pair = _Pair(response.get("prompt_ids"), response.get("response_ids"), response.get("problem_id"))
    elif isinstance(response, tuple | list) and len(response) == 2:
        pair = _Pair(*response)
    ids = (getattr(pair, "prompt_ids", None), getattr(pair, "response_ids", None))
    if all(hasattr(one, "__len__") and not isinstance(one, str) for one in ids):
        return pair
    raise InputError(
        f"response {number} is a {type(response).__name__} without prompt_ids and response_ids; pass objects or "
        f"mappings with these two lists of token ids, or (prompt_ids, response_ids) pairs"
    )


def subsample(lengths: Sequence[int], tokens: int, seed: int, *, max_responses: int | None = None) -> list[list[int]]:
    """Draw tokens uniformly at random from all responses, without replacement.

    Args:
        lengths: number of tokens per response.
        tokens: number of tokens to draw; all of them if there are fewer.
        seed: random seed.
        max_responses: draw from this many random responses only.

    Returns:
        For each response, the ascending indices (from 0) of its drawn tokens; often an empty list.
    """
    generator = torch.Generator().manual_seed(seed)
    responses = sorted(torch.randperm(len(lengths), generator=generator)[:max_responses].tolist())
    places = [(response, token) for response in responses for token in range(lengths[response])]
    drawn: list[list[int]] = [[] for _ in lengths]
    for index in sorted(torch.randperm(len(places), generator=generator)[:tokens].tolist()):
        response, token = places[index]
        drawn[response].append(token)
    return drawn


def subsample_evenly(lengths: Sequence[int], tokens: int, seed: int) -> list[list[int]]:
    """Draw about ``tokens`` tokens, the same share of every response and at least two; returned as by `subsample`."""
    share = tokens / sum(lengths)
    drawn = []
    for index, length in enumerate(lengths):
        order = torch.randperm(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + index))
        count = length if share >= 1 else min(length, max(2, math.ceil(share * length)))
        drawn.append(sorted(order[:count].tolist()))
    return drawn


def batches(responses: Sequence[TokenPair], max_tokens: int, indices: Sequence[int] | None = None) -> list[list[int]]:
    """Group response indices into batches of at most ``max_tokens`` padded tokens, longest first to save padding.

    Args:
        indices: the responses to group (default: all).
    """
    lengths = [len(r.prompt_ids) + len(r.response_ids) - 1 for r in responses]
    grouped: list[list[int]] = []
    for index in sorted(range(len(responses)) if indices is None else indices, key=lambda i: -lengths[i]):
        if grouped and lengths[grouped[-1][0]] * (len(grouped[-1]) + 1) <= max_tokens:
            grouped[-1].append(index)
        else:
            grouped.append([index])
    return grouped


def balance(lengths: Sequence[int], processes: int) -> list[list[int]]:
    """Distribute responses over processes: the longest first, each to the process with the fewest tokens so far."""
    parts: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        least = loads.index(min(loads))
        parts[least].append(index)
        loads[least] += lengths[index]
    return [sorted(part) for part in parts]


@dataclass(frozen=True)
class PaddedBatch:
    """Responses padded on the right, and the N tokens of them that are read.

    Attributes:
        ids, mask: (B, T); the last token of each response is only predicted.
        positions: (B, T) bool, True at the N positions that predict the tokens read (P-1 .. P+R-2 for all of them).
        targets: the ids of the tokens read (N,), response by response.
        places: for each, the number of its response and its own number within it, from 1, (N, 2).
        counts: number of tokens read per response.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    targets: Tensor
    places: Tensor
    counts: list[int]


def pad(
    responses: Sequence[TokenPair], tokens: Sequence[Sequence[int]], indices: Sequence[int], device: torch.device
) -> PaddedBatch:
    """Pad some responses into one batch.

    Args:
        responses, tokens: all responses, and the ascending indices (from 0) of the tokens to read of each.
        indices: the responses to pad, counted from 0.
    """
    rows = [[*responses[i].prompt_ids, *responses[i].response_ids][:-1] for i in indices]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for number, (row, i) in enumerate(zip(rows, indices, strict=True)):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
        positions[number, torch.tensor(tokens[i], dtype=torch.long) + len(responses[i].prompt_ids) - 1] = True
    places = [(i, token) for i in indices for token in tokens[i]]
    targets = torch.tensor([responses[i].response_ids[token] for i, token in places])
    return PaddedBatch(
        ids.to(device),
        mask.to(device),
        positions.to(device),
        targets.to(device),
        torch.tensor(places) + 1,
        [len(tokens[i]) for i in indices],
    )
