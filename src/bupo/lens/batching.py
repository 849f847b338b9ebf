"""Checks responses, draws tokens from them, groups them into length-sorted batches, and averages over their tokens."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bupo.errors import InputError
from bupo.models.layout import context_length, find_layout, unwrap
from bupo.models.load import join_processes


class TokenPair(NamedTuple):
    """A prompt and its response as token ids."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    problem_id: str | None = None
    image_inputs: Mapping[str, Tensor] | None = None  # what else a vision-language model is called with for this row


def check_rollouts(model: nn.Module, responses: Sequence[Any]) -> list[TokenPair]:
    """Check that the model can be analysed on these responses, and return them as token pairs.

    The responses are objects with ``prompt_ids`` and ``response_ids``, mappings with these keys, or pairs of the two.
    Raises InputError where the model or a response is unusable; it names the first such response, counted from 1.
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
            has = f"response {number} with its prompt has {length} tokens"
            raise InputError(f"{has}, more than the model's context of {limit}; shorten or drop it")
        for token in (extreme(ids) for ids in pair[:2] for extreme in (min, max)):
            if not 0 <= token < vocabulary:
                what = f"response {number} contains token id {token}, outside this model's vocabulary of {vocabulary}"
                raise InputError(f"{what}; check that the ids come from this model's tokenizer")
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
    """Ascending indices (from 0) of tokens per response, drawn at random from all or ``max_responses`` responses."""
    generator = torch.Generator().manual_seed(seed)
    responses = sorted(torch.randperm(len(lengths), generator=generator)[:max_responses].tolist())
    places = [(response, token) for response in responses for token in range(lengths[response])]
    drawn: list[list[int]] = [[] for _ in lengths]
    for index in sorted(torch.randperm(len(places), generator=generator)[:tokens].tolist()):
        response, token = places[index]
        drawn[response].append(token)
    return drawn


def subsample_evenly(lengths: Sequence[int], tokens: int, seed: int) -> list[list[int]]:
    """About ``tokens`` tokens as by `subsample`, but the same share of every response and at least two of each."""
    share = min(1.0, tokens / sum(lengths))
    drawn = []
    for index, length in enumerate(lengths):
        order = torch.randperm(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + index))
        drawn.append(sorted(order[: max(2, math.ceil(share * length))].tolist()))
    return drawn


def batches(responses: Sequence[TokenPair], max_tokens: int, indices: Sequence[int]) -> list[list[int]]:
    """Group response indices into batches of at most ``max_tokens`` padded tokens, longest first to save padding.

    A response with images is a batch of its own, because models lay out the pixels of several in different ways.
    """
    lengths = [len(r.prompt_ids) + len(r.response_ids) - 1 for r in responses]
    images, grouped = [bool(r.image_inputs) for r in responses], list[list[int]]()
    for index in sorted(indices, key=lambda i: -lengths[i]):
        alone = not grouped or images[index] or images[grouped[-1][0]]
        if not alone and lengths[grouped[-1][0]] * (len(grouped[-1]) + 1) <= max_tokens:
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


def own_part(model: nn.Module, lengths: Sequence[int], share: bool) -> tuple[list[int], int]:
    """The responses (from 0) that this process reads, and the number of processes that they are divided among.

    A forward of a sharded model is a collective operation, so every process of such a model reads them all.
    """
    sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    if not share or sharded:
        return list(range(len(lengths))), 1
    state = join_processes()
    return balance(lengths, state.num_processes)[state.process_index], state.num_processes


@dataclass(frozen=True)
class PaddedBatch:
    """Responses padded on the right, and the N tokens of them that are read."""

    # ids (the last token of each response is only predicted), mask, and bool positions, True at the N that predict the
    # tokens read; each (B, T); then the inputs that belong to the images, if there are any
    inputs: tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]
    targets: Tensor  # the ids of the tokens read (N,), response by response
    places: Tensor  # for each, the number of its response and its own number within it, from 1, (N, 2)
    counts: list[int]  # number of tokens read per response


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
    images = {name: value.to(device) for name, value in (responses[indices[0]].image_inputs or {}).items()}
    inputs, counts = (ids.to(device), mask.to(device), positions.to(device), images), [len(tokens[i]) for i in indices]
    return PaddedBatch(inputs, targets.to(device), places[:, 1:] + 1, counts)


class ClusterMeans:
    """Means over tokens of K quantities, with standard errors clustered by response.

    The mean is the ratio ``sum_i S_i / sum_i n_i`` over responses i; where some of the n_i tokens are read, ``S_i`` is
    ``n_i`` times their mean. Its standard error is the linearised one of R responses,
    ``sqrt(R/(R-1) sum_i (S_i - mean n_i)^2) / N``; of a single response, that over its tokens (NaN for one token).
    """

    def __init__(self) -> None:
        # by the response's index: sums (K,) and sums of squares over the tokens read, their number, and the response's
        self.rows: dict[int, tuple[Tensor, Tensor, int, int]] = {}

    @classmethod
    def of(cls, values: Tensor, counts: list[int], sizes: list[int] | None = None) -> Self:
        """The means of values (K, N), response by response: ``counts`` tokens of each, which stand for ``sizes``."""
        means = cls()
        for index, part in enumerate(values.split(counts, dim=-1)):
            means.add(part, index, sizes[index] if sizes else None)
        return means

    def add(self, values: Tensor, response: int, size: int | None = None) -> None:
        """Add values (K, n) of tokens of one response, which stand for ``size`` tokens (default: for themselves)."""
        values, n = values.detach().to("cpu", torch.float64), values.shape[-1]
        self.rows[response] = (values.sum(-1), values.square().sum(-1), n, size or n)

    @property
    def tokens(self) -> int:
        return sum(read for _, _, read, _ in self.rows.values())

    @property
    def method(self) -> str:
        return "clustered by response" if len(self.rows) > 1 else "over tokens (a single response)"

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Means over all tokens and their standard errors, each (K,) float64."""
        rows = [self.rows[index] for index in sorted(self.rows)]
        sums = torch.stack([total if read == size else total * (size / read) for total, _, read, size in rows])
        counts = torch.tensor([size for *_, size in rows], dtype=torch.float64)
        mean = sums.sum(0) / counts.sum()
        if len(rows) > 1:
            residual = sums - mean * counts[:, None]
            return mean, (residual.square().sum(0) * len(rows) / (len(rows) - 1)).sqrt() / counts.sum()
        total, squares, read, _ = rows[0]
        if read == 1:
            return mean, torch.full_like(mean, math.nan)
        variance = (squares / read - (total / read).square()).clamp(min=0)
        return mean, (variance / (read - 1)).sqrt()


def rounded(values: Tensor, digits: int = 6) -> list[Any]:
    """A plain list for JSON, nested as the tensor is; an unknown standard error (NaN) becomes None."""
    if values.ndim > 1:
        return [rounded(row, digits) for row in values]
    return [None if math.isnan(value) else round(value, digits) for value in values.tolist()]
