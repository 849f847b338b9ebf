"""Reads every layer through one or several lenses, and compares each reading with the model's output token by token."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, nn

from bupo.errors import InputError
from bupo.lens.batching import ClusterMeans, TokenPair, pad, rounded
from bupo.lens.online import StatsRequest
from bupo.lens.softmax_stats import lens_stats
from bupo.models.capture import capture_layers
from bupo.models.internal_policy import LayerMap
from bupo.models.layout import eval_mode, find_layout, unwrap
from bupo.models.unembed import get_unembedding

KINDS = ("entropy", "change", "kl", "top1")
Progress = Callable[[str, int, int], None]
_LAYERS_AT_ONCE = 8


@dataclass(frozen=True)
class Readings:
    """The readings of N tokens, response by response.

    Attributes:
        values: the `KINDS` per lens and layer, (lenses, 4, L, N) float64: entropy and its change from the layer before
            (NaN in layer 1), ``KL(pi || reading)``, and whether the most likely token is that of the full policy pi.
        uniform_kl: ``KL(pi || uniform)``, (N,).
        counts: number of tokens per response.
    """

    values: Tensor
    uniform_kl: Tensor
    counts: list[int]

    def recovered(self, lens: int) -> tuple[Tensor, Tensor]:
        """``R(l) = 1 - KL(pi || reading) / KL(pi || uniform)`` (L,), and the influence of each token on it (L, N)."""
        kl, scale = self.values[lens, 2], self.uniform_kl.mean()
        recovered = 1 - kl.mean(1) / scale
        # R is a ratio of means: to first order, its error is that of the mean influence of each token
        return recovered, ((1 - recovered)[:, None] * self.uniform_kl - kl) / scale

    def curves(self, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Means and standard errors by lens and kind, as lists over layers; ``recovered`` beside the `KINDS`."""
        curves: dict[str, Any] = {}
        errors: dict[str, Any] = {}
        for index, name in enumerate(names):
            recovered, influence = self.recovered(index)
            rows = torch.cat([self.values[index].flatten(0, 1), influence])
            means, deviations = (x.view(-1, len(recovered)) for x in ClusterMeans.of(rows, self.counts).statistics())
            curves[name] = dict(zip((*KINDS, "recovered"), rounded(torch.stack([*means[:-1], recovered])), strict=True))
            errors[name] = dict(zip((*KINDS, "recovered"), rounded(deviations), strict=True))
        return curves, errors


@dataclass(frozen=True)
class DrawnStates:
    """The states of every layer (L, N, d) and of the final norm (N, d) at the ``drawn`` tokens of each response."""

    states: Tensor
    final: Tensor
    drawn: Sequence[Sequence[int]]

    def only(self, drawn: Sequence[Sequence[int]]) -> Self:
        """The states at some of these tokens."""
        pairs = zip(self.drawn, drawn, strict=True)
        kept = torch.tensor([token in part for all_of, part in pairs for token in all_of], device=self.final.device)
        return type(self)(self.states[:, kept], self.final[kept], drawn)


@torch.no_grad()
def draw_states(model: nn.Module, responses: Sequence[TokenPair], drawn: Sequence[Sequence[int]]) -> DrawnStates:
    """Run the responses with drawn tokens (from 0), one by one, and keep the states at these tokens."""
    device, captured = get_unembedding(model).weight.device, []
    with eval_mode(unwrap(model)):
        for index in (i for i, part in enumerate(drawn) if part):
            captured.append(capture_layers(model, *pad(responses, drawn, [index], device).inputs))
    states, final = (torch.cat(parts, dim=-2) for parts in zip(*captured, strict=True))
    return DrawnStates(states, final, drawn)


def read_layers(
    model: nn.Module,
    responses: Sequence[TokenPair],
    drawn: Sequence[Sequence[int]],
    lenses: Sequence[LayerMap],
    progress: Progress | None = None,
) -> Readings:
    """Read the ``drawn`` tokens (from 0) of the responses through every lens.

    Costs a forward pass of the responses with drawn tokens, and one vocabulary product per token, layer and lens.

    Raises:
        InputError: non-finite logits.
    """
    return read_states(model, draw_states(model, responses, drawn), lenses, progress)


@torch.no_grad()
def read_states(
    model: nn.Module, drawn: DrawnStates, lenses: Sequence[LayerMap], progress: Progress | None = None
) -> Readings:
    """As `read_layers`, from states that were kept."""
    unembedding, norm = get_unembedding(model), find_layout(model).final_norm
    like = next(chain(norm.parameters(), model.parameters()))  # the model's own dtype, and the norm's device
    states, final = drawn.states, drawn.final
    output = lens_stats(final[None], unembedding, StatsRequest(top_k=1))
    request = StatsRequest(reference=final, kl_from_reference=True, top_k=1)
    parts = []
    for first in range(0, len(states), _LAYERS_AT_ONCE):
        group = states[first : first + _LAYERS_AT_ONCE]
        read = []
        for lens in lenses:
            mapped = torch.stack([lens.transport(first + i, state) for i, state in enumerate(group, start=1)])
            read.append(norm(mapped.to(like.device, like.dtype)).to(group) if lens.norm else mapped)
        stats = lens_stats(torch.cat(read), unembedding, request)
        same = (stats["top"] == output["top"]).squeeze(-1).double()
        kl = stats["kl_from_reference"].clamp(min=0)  # it is negative by rounding only
        parts.append(torch.stack(torch.stack([stats["entropy"], kl, same]).cpu().chunk(len(lenses), dim=1)))
        if progress is not None:
            progress("comparing layers", sum(part.shape[2] for part in parts), len(states))
    entropy, kl, same = torch.cat(parts, dim=2).unbind(1)
    if not bool(torch.isfinite(entropy).all() and torch.isfinite(kl).all()):
        raise InputError("comparing the layers with the output gave non-finite numbers; load the model in float32")
    change = torch.cat([torch.full_like(entropy[:, :1], math.nan), entropy.diff(dim=1)], dim=1)
    uniform_kl = math.log(len(unembedding.weight)) - output["entropy"][0].cpu()
    counts = [len(part) for part in drawn.drawn if part]
    return Readings(torch.stack([entropy, change, kl, same], dim=1), uniform_kl, counts)
