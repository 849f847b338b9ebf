"""Responses, unembeddings and their definitions in float64, for the tests of the lens."""

import copy

import torch

from bupo.lens.batching import TokenPair
from bupo.lens.maps import Lens
from bupo.models.unembed import Unembedding

RULES = [{}, {"bias": True}, {"scale": 0.3}, {"softcap": 5.0}, {"scale": 2.0, "softcap": 3.0, "bias": True}]


def pairs(lengths=((3, 5), (6, 2), (1, 9), (4, 1)), seed=0) -> list[TokenPair]:
    """Random responses with these numbers of prompt and response tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [TokenPair(*(torch.randint(3, 97, (n,), generator=generator).tolist() for n in pair)) for pair in lengths]


def random_lens(seed=0, kind="ridge", layers=4, width=32) -> Lens:
    """Random maps for a tiny model."""
    torch.manual_seed(seed)
    maps = torch.eye(width) + 0.3 * torch.randn(layers - 1, width, width)
    return Lens(kind, maps, torch.randn(layers - 1, width))


@torch.no_grad()
def moved(model, scale=0.3):
    """A copy of a tiny model with a changed second layer."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    for parameter in other.model.layers[1].parameters():
        parameter += scale * torch.randn(parameter.shape, generator=generator) * parameter.abs().mean()
    return other


def unembedding(vocabulary=50, width=7, *, scale=1.0, softcap=None, bias=False, spread=1.0) -> Unembedding:
    torch.manual_seed(1)
    weight = torch.randn(vocabulary, width) * spread
    return Unembedding(weight, torch.randn(vocabulary) if bias else None, scale, softcap)


def logits_of(states, e: Unembedding):
    """The definition, in float64."""
    z = e.scale * (states.double() @ e.weight.double().T)
    if e.bias is not None:
        z = z + e.bias.double()
    return z if e.softcap is None else e.softcap * torch.tanh(z / e.softcap)
