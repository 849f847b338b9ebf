"""The unembedding ``E_u`` and how a model turns its products into logits, checked against the model's own logits.

Shape legend: N tokens, d width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bupo.errors import InputError
from bupo.models.layout import eval_mode, find_layout, unwrap


@dataclass(frozen=True)
class Unembedding:
    """How a model turns a state into logits: ``softcap * tanh((scale * S E_u^T + bias) / softcap)``.

    Attributes:
        weight: ``E_u`` (V, d), in any floating dtype. Products are summed and returned in float32.
        bias: (V,) or None.
        scale: logit multiplier (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``); 1 for most models.
        softcap: final soft-capping (Gemma-2), or None.
        low_precision: multiply in the 16-bit dtype of ``weight``. The states of a model held in that dtype are exact
            in it, but contributions that are rescaled or summed (Granite, Falcon-H1) are rounded.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    low_precision: bool = False

    def to_logits_(self, products: Tensor, entries: slice | Tensor) -> Tensor:
        """Turn products into logits in place.

        Args:
            products: ``S E_u[entries]^T`` (..., V'), or one product per token (..., N).
            entries: the vocabulary entries along the last dimension: a slice of length V', or token ids (N,).
        """
        if self.scale != 1.0:
            products.mul_(self.scale)
        if self.bias is not None:
            products.add_(self.bias[entries])
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products

    @property
    def is_linear(self) -> bool:
        """Whether logits are a multiple of float32 products, so that the factor can be folded into the states."""
        return self.bias is None and self.softcap is None and not self.low_precision

    @property
    def products(self) -> str:
        """Name of the dtype in which products are computed, for the result file."""
        return str(self.weight.dtype if self.low_precision else torch.float32).removeprefix("torch.")


def matmul_fp32_(states: Tensor, weight: Tensor, out: Tensor, *, low_precision: bool) -> None:
    """Write ``states @ weight.T`` into ``out`` (float32).

    With ``low_precision`` the product runs on the device's 16-bit units (see :class:`Unembedding`).
    """
    if not low_precision:
        torch.mm(states, weight.T, out=out)
    elif weight.is_cuda:
        out.copy_(torch.mm(states, weight.T, out_dtype=torch.float32))
    else:
        # oneDNN rounds its float32 arguments to bfloat16, in which these are exact, and sums in float32
        matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
        try:
            torch.mm(states.float(), weight.T, out=out)
        finally:
            matmul.fp32_precision = before


def has_low_precision_units(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``device`` multiplies ``dtype`` (16-bit) faster than float32 and sums the products in float32."""
    if device.type == "cuda":
        return dtype in (torch.bfloat16, torch.float16)
    if device.type != "cpu" or dtype is not torch.bfloat16:
        return False
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def get_unembedding(model: nn.Module) -> Unembedding:
    """Return the model's unembedding, checked against the model's own logits on a short probe batch.

    Where FSDP2 shards ``E_u``, it is gathered. A model held in 16 bits keeps ``E_u`` in 16 bits if the device has
    units for it; otherwise ``E_u`` becomes float32, which is exact and faster there.

    Raises:
        InputError: the model's logits are not ``softcap * tanh((scale * S E_u^T + bias) / softcap)`` with the values
            of its configuration, or they are not finite.
    """
    head = find_layout(model).unembedding
    weight, bias = _gathered(head.weight), _gathered(getattr(head, "bias", None))
    assert weight is not None
    config = unwrap(model).config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    low_precision = has_low_precision_units(weight.device, weight.dtype)
    unembedding = Unembedding(
        weight if low_precision else weight.float(),
        None if bias is None else bias.float(),
        _logit_scale(config),
        softcap,
        low_precision,
    )
    _check_logits(model, unembedding, allowed=1e-4 if weight.dtype in (torch.float32, torch.float64) else 3e-2)
    return unembedding


def _gathered(parameter: Any) -> Tensor | None:
    if parameter is None:
        return None
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach()


def _logit_scale(config: Any) -> float:
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if not scaling:
        return 1.0
    # Granite divides its logits by `logits_scaling`, HyperCLOVA X multiplies them by it
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def _check_logits(model: nn.Module, unembedding: Unembedding, *, allowed: float) -> None:
    """Raise unless the model's logits are its final state times the unembedding, up to ``allowed`` (relative)."""
    inner, weight = unwrap(model), unembedding.weight
    tokens = torch.arange(3, 9, device=weight.device)[None] % len(weight)
    normed: list[Tensor] = []
    hook = find_layout(model).final_norm.register_forward_hook(lambda module, args, output: normed.append(output))
    try:
        with eval_mode(inner), torch.no_grad():
            logits = inner(input_ids=tokens, use_cache=False).logits.float()
    finally:
        hook.remove()
    name = type(inner).__name__
    if not normed:
        raise InputError(f"{name}: the final norm did not run; its internal policies cannot be read")
    state = normed[-1]
    if state.shape[-1] != weight.shape[1]:
        raise InputError(
            f"{name}: the final state is {state.shape[-1]} wide, but the unembedding reads {weight.shape[1]} numbers: "
            f"the model changes the stream between them, so its internal policies cannot be read"
        )
    if not bool(torch.isfinite(logits).all()):
        raise InputError("the model returns non-finite logits; check its weights, or load it in a wider dtype")
    expected = unembedding.to_logits_(state.float() @ weight.float().T, slice(None))
    deviation = ((logits - expected).abs().max() / logits.abs().max().clamp(min=1e-6)).item()
    if not deviation <= allowed:
        raise InputError(
            f"this model's logits are not its final state times the unembedding (relative deviation {deviation:.1e}, "
            f"allowed {allowed:.0e}); its internal policies cannot be read"
        )
