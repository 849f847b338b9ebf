"""Validates responses, draws tokens from them, and groups them into length-sorted batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bupo.errors import InputError
from bupo.models.layout import context_length, find_layout, unwrap


class TokenPair(NamedTuple):
    """A prompt and its response as token ids."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
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
    limit = context_length(unwrap(model).config) or math.inf
    vocabulary = unwrap(model).get_input_embeddings().weight.shape[0]
    pairs = [_token_pair(number, response) for number, response in enumerate(responses, start=1)]
    for number, pair in enumerate(pairs, start=1):
        if not len(pair.response_ids):
            raise InputError(f"response {number} is empty; every row needs at least one response token")
        if not len(pair.prompt_ids):
            raise InputError(f"prompt {number} is empty; the first response token is predicted from its last token")
        if (length := len(pair.prompt_ids) + len(pair.response_ids)) > limit:
            raise InputError(
                f"response {number} with its prompt has {length} tokens, more than the model's context of {limit}; "
                f"shorten or drop it"
            )
        for token in (extreme(ids) for ids in pair[:2] for extreme in (min, max)):
            if not 0 <= token < vocabulary:
                raise InputError(
                    f"response {number} contains token id {token}, outside this model's vocabulary of {vocabulary}; "
                    f"check that the ids come from this model's tokenizer"
                )
    return pairs


def _token_pair(number: int, response: Any) -> TokenPair:
    if isinstance(response, tuple | list) and len(response) == 2:
        pair = TokenPair(*response)
    else:
        get = response.get if isinstance(response, Mapping) else partial(getattr, response)
        pair = TokenPair(*(get(name, None) for name in TokenPair._fields))
    if all(hasattr(ids, "__len__") and not isinstance(ids, str) for ids in pair[:2]):
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
    share = min(1.0, tokens / sum(lengths))
    drawn = []
    for index, length in enumerate(lengths):
        order = torch.randperm(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + index))
        drawn.append(sorted(order[: max(2, math.ceil(share * length))].tolist()))
    return drawn


def batches(responses: Sequence[TokenPair], max_tokens: int, indices: Sequence[int]) -> list[list[int]]:
    """Group response indices into batches of at most ``max_tokens`` padded tokens, longest first to save padding."""
    lengths = [len(r.prompt_ids) + len(r.response_ids) - 1 for r in responses]
    grouped: list[list[int]] = []
    for index in sorted(indices, key=lambda i: -lengths[i]):
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
    """Pad the responses with these indices into one batch, which reads the given ``tokens`` (from 0) of each."""
    rows = [torch.tensor([*responses[i].prompt_ids, *responses[i].response_ids][:-1]) for i in indices]
    ids, mask = (pad_sequence(part, batch_first=True) for part in (rows, [torch.ones_like(row) for row in rows]))
    places = torch.tensor([(row, i, token) for row, i in enumerate(indices) for token in tokens[i]])
    row, _, token = places.T
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[row, token + torch.tensor([len(responses[i].prompt_ids) - 1 for i in indices])[row]] = True
    targets = torch.tensor([responses[i].response_ids[token] for i in indices for token in tokens[i]])
    ids, mask, positions, targets = (tensor.to(device) for tensor in (ids, mask, positions, targets))
    return PaddedBatch(ids, mask, positions, targets, places[:, 1:] + 1, [len(tokens[i]) for i in indices])
