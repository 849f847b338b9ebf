"""A self-test in seconds: tiny random models read by this installation, against definitions written out here."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bupo.lens.maps import Lens
from bupo.lens.softmax_stats import residual_group_stats
from bupo.models.internal_policy import internal_policy
from bupo.models.layout import find_layout
from bupo.models.unembed import Unembedding

LAYOUTS = ("llama", "qwen2", "qwen3", "gemma2", "gpt_neox")
_SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
TOLERANCE = 1e-3  # of logits about 1, in float32


def checks(device: str) -> Iterator[tuple[str, float | str, bool]]:
    """Run the checks one by one; yield the name, the largest deviation (or an error), and whether it is small."""
    named: list[tuple[str, Callable[[], float]]] = []
    for layout in LAYOUTS:
        named.append((f"{layout}: layer policies equal the model's own states", partial(_reading, layout, device)))
        named.append((f"{layout}: gradients stop at the layer", partial(_gradients, layout, device)))
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        named.append((f"entropies in {kind} on {device} equal float64", partial(_entropies, device, dtype)))
    for name, check in named:
        try:
            deviation = check()
            yield name, deviation, deviation < TOLERANCE
        except Exception as error:  # whatever a broken installation raises is the finding
            yield name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", False


def _tiny(layout: str, device: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(layout, **_SIZES)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().to(device)


def _ids(device: str) -> torch.Tensor:
    return torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(1)).to(device)


@torch.no_grad()
def _reading(layout: str, device: str) -> float:
    """The policies of layers 1..L-1 are ``H^l E_u^T``, and that of layer L through any lens is the model's own."""
    model, ids = _tiny(layout, device), _ids(device)
    output, unembedding = model(ids, output_hidden_states=True), find_layout(model).unembedding
    softcap = getattr(model.config, "final_logit_softcapping", None)
    worst = 0.0
    for layer in range(1, _SIZES["num_hidden_layers"] + 1):
        whole = layer == _SIZES["num_hidden_layers"]
        with internal_policy(model, layer, lens=Lens.identity() if whole else "raw"):
            found = model(ids).logits
        expected = output.logits if whole else unembedding(output.hidden_states[layer])
        if softcap and not whole:
            expected = softcap * torch.tanh(expected / softcap)
        worst = max(worst, float((found - expected).abs().max()))
    return worst


def _gradients(layout: str, device: str) -> float:
    """Zero if the layers below the one that is read have gradients and the layer above has none, else infinity."""
    model = _tiny(layout, device)
    with internal_policy(model, 2):
        model(_ids(device)).logits.square().mean().backward()
    *below, above = ([p.grad for p in layer.parameters()] for layer in find_layout(model).layers)
    right = not any(grad is None for part in below for grad in part) and all(grad is None for grad in above)
    return 0.0 if right else math.inf


@torch.no_grad()
def _entropies(device: str, dtype: torch.dtype) -> float:
    """Of what a layer's modules receive and add, as the analysis reads them (on CUDA, by the Triton kernel)."""
    torch.manual_seed(0)
    before, layer = (torch.randn(*size, 64).to(device, dtype) for size in ((5,), (4, 5)))
    weight = torch.randn(3000, 64).to(device, dtype)
    _, found = residual_group_stats(before, [layer], Unembedding(weight, None, 1.0, None))
    logps = (layer.double() @ weight.double().T).log_softmax(-1)
    return float((found["entropy"][0, :4].double() + (logps.exp() * logps).sum(-1)).abs().max())
