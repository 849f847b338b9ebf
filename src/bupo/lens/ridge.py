"""Least squares from each layer's states to the last layer's, with a ridge term towards the identity.

The maps are those of linear short-cuts (arXiv 2303.09435). One streaming pass over the responses sums the products of
the states in float64; the sums of two halves of the responses add up to those of the whole.

Shape legend: L layers, N tokens, d width.
"""

import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from bupo.lens.batching import TokenPair, batches, own_part, pad
from bupo.models.capture import capture_layers
from bupo.models.layout import find_layout

_BYTES = 4 * 2**30  # of sums per pass over the responses; more layers take more passes


class RidgeSums:
    """Sums over N tokens for layers 1..L-1: ``values`` (L-1, d+1, 2d+1), of ``[x, 1]^T [x, y, 1]`` in float64."""

    def __init__(self, values: Tensor):
        self.values = values

    def __add__(self, other: Self) -> Self:
        return type(self)(self.values + other.values.to(self.values.device))

    @property
    def tokens(self) -> int:
        """Number of tokens N."""
        return int(self.values[0, -1, -1])

    def solve(self, factors: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The maps (L-1, d, d) and biases (L-1, d) in float32, given a ridge factor per layer.

        A map is ``I + W``, where W minimises the mean of ``|y - x - W x - b|^2`` plus ``factor c |W|^2``, with c the
        mean variance of the components of x. An infinite factor leaves the states as they are.
        """
        maps, biases = [], []
        for sums, factor in zip(self.values, factors, strict=True):
            d, n = len(sums) - 1, sums[-1, -1]
            x, y = sums[:d, -1] / n, sums[-1, d:-1] / n
            covariance = sums[:d, :d] / n - torch.outer(x, x)
            identity = torch.eye(d).to(sums)
            if math.isinf(factor):
                maps.append(identity.float())
                biases.append(torch.zeros_like(x).float())
                continue
            penalised = covariance + factor * covariance.diagonal().mean().clamp(min=1e-12) * identity
            rest = sums[:d, d:-1] / n - torch.outer(x, y) - covariance
            weight = torch.linalg.solve(penalised, rest).T + identity
            maps.append(weight.float())
            biases.append((y - weight @ x).float())
        return torch.stack(maps), torch.stack(biases)


@torch.no_grad()
def sum_states(
    model: nn.Module,
    responses: Sequence[TokenPair],
    tokens: Sequence[Sequence[int]],
    indices: Sequence[int],
    *,
    batch_tokens: int = 2048,
    share: bool = False,
    on_tokens: Callable[[int], None] | None = None,
) -> RidgeSums:
    """Sum over the given ``tokens`` (from 0) of the responses with these ``indices``.

    ``share`` distributes the responses over the processes of a launcher, unless the model is sharded. ``on_tokens`` is
    called with the number of tokens of each batch.
    """
    layout = find_layout(model)
    width, device = layout.unembedding.weight.shape[1], layout.unembedding.weight.device
    part, processes = own_part(model, [len(tokens[i]) for i in indices], share)
    indices = [indices[i] for i in part]
    per_pass = max(1, _BYTES // (8 * (width + 1) * (2 * width + 1)))
    parts = []
    for first in range(0, layout.n_layers - 1, per_pass):
        layers = range(first, min(first + per_pass, layout.n_layers - 1))
        sums = torch.zeros(len(layers), width + 1, 2 * width + 1, dtype=torch.float64, device=device)
        for group in batches(responses, batch_tokens, indices):
            batch = pad(responses, tokens, group, device)
            states, _ = capture_layers(model, *batch.inputs)
            last = nn.functional.pad(states[-1].double(), (0, 1), value=1.0)
            for total, layer in zip(sums, layers, strict=True):
                x = states[layer].double()
                total.addmm_(nn.functional.pad(x, (0, 1), value=1.0).T, torch.cat([x, last], dim=-1))
            if on_tokens is not None:
                on_tokens(sum(batch.counts))
        parts.append(sums.cpu() if per_pass < layout.n_layers - 1 else sums)
    total = torch.cat(parts)
    if processes > 1:
        total = reduce(total, reduction="sum")
    return RidgeSums(total)
