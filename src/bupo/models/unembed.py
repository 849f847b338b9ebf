"""How a model turns its final state into logits, checked instead of assumed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bupo.errors import InputError
from bupo.lens.softmax_stats import Unembedding
from bupo.models.internal_policy import unembedding
from bupo.models.layout import eval_mode, find_layout, unwrap


def has_low_precision_units(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device multiplies 16-bit numbers faster than float32 and sums them in float32."""
    if device.type == "cuda":
        return dtype in (torch.bfloat16, torch.float16)
    if device.type != "cpu" or dtype is not torch.bfloat16:
        return False
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def get_unembedding(model: nn.Module) -> Unembedding:
    """``E_u`` and how the model turns products into logits, checked against the model's own logits on a probe.

    A model held in 16 bits has states and an ``E_u`` that are exact in 16 bits; their products are then exact in
    float32, and may run on 16-bit units without changing more than the order of a sum. Where there are no such units,
    products run in float32, which is faster there.

    Raises:
        InputError: the model's logits are not ``softcap(scale * S E_u^T + bias)`` with the configuration's values.
    """
    inner = unwrap(model)
    config = inner.config.get_text_config()
    weight, bias = unembedding(model)
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale = float(getattr(config, name))
            break
    else:
        if getattr(config, "logits_scaling", None):
            scale = 1.0 / float(config.logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    half = has_low_precision_units(weight.device, weight.dtype)
    rule = Unembedding(
        weight.detach() if half else weight.detach().float(),
        None if bias is None else bias.detach().float(),
        scale,
        softcap,
        half,
    )
    layout = find_layout(model)
    tokens = torch.arange(3, 9, device=weight.device)[None] % weight.shape[0]
    seen: list[Tensor] = []
    hook = layout.final_norm.register_forward_hook(lambda m, i, o: seen.append(o))
    try:
        with eval_mode(inner), torch.no_grad():
            logits = inner(input_ids=tokens, use_cache=False).logits.float()
    finally:
        hook.remove()
    if not seen or seen[-1].shape[-1] != weight.shape[1]:
        width = f"{seen[-1].shape[-1]} wide" if seen else "not made"
        raise InputError(
            f"{type(inner).__name__}: the final state is {width}, the unembedding reads {weight.shape[1]} numbers; the "
            f"model changes the stream between them, and its internal policies cannot be read"
        )
    expected = rule.finish_(seen[-1].float() @ rule.weight.float().T, 0, len(weight))
    unit = logits.abs().max().clamp(min=1e-6)
    deviation = ((logits - expected).abs().max() / unit).item()
    allowed = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 3e-2
    if not deviation <= allowed:
        if not bool(torch.isfinite(logits).all()):
            raise InputError("the model gives non-finite logits: damaged weights, or a dtype too narrow for it?")
        raise InputError(
            f"this model's logits are not its final state times the unembedding (relative deviation {deviation:.1e}, "
            f"allowed {allowed:.0e}); its internal policies cannot be read"
        )
    return rule
