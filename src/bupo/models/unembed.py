"""The unembedding ``E_u`` and how a model turns its products into logits, checked against the model's own logits."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bupo.errors import InputError
from bupo.models.layout import eval_mode, find_layout, on_output, unwrap


@dataclass(frozen=True)
class Unembedding:
    """How a model turns a state into logits: ``softcap * tanh((scale * S E_u^T + bias) / softcap)``.

    Products are summed and returned in float32. With ``low_precision``, they are multiplied in the 16-bit dtype of
    ``weight``: the states of a model held in that dtype are exact in it, but contributions that are rescaled or summed
    (Granite, Falcon-H1) are rounded.
    """

    weight: Tensor  # E_u (V, d), in any floating dtype
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0  # Cohere's `logit_scale`, one over Granite's `logits_scaling`
    softcap: float | None = None  # Gemma-2's `final_logit_softcapping`
    low_precision: bool = False

    def to_logits_(self, products: Tensor, entries: slice | Tensor) -> Tensor:
        """Turn products with ``E_u[entries]`` into logits in place; the last dimension is that of ``entries``."""
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
    """Write ``states @ weight.T`` into ``out`` (float32), with ``low_precision`` on the device's 16-bit units."""
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
    if device.type == "cuda":  # before Ampere, bfloat16 is emulated
        fast = dtype is torch.bfloat16 and torch.cuda.is_bf16_supported(including_emulation=False)
        return fast or dtype is torch.float16
    cpu = device.type == "cpu" and dtype is torch.bfloat16
    return cpu and bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def get_unembedding(model: nn.Module) -> Unembedding:
    """Return the model's unembedding, checked against the model's own logits on a short probe batch.

    Where FSDP2 shards ``E_u``, it is gathered. In 16 bits, ``E_u`` stays so if the device has units for it; else it
    becomes float32, which is exact and faster there. `InputError`: the logits are other ones, or not finite.
    """
    head = find_layout(model).unembedding
    weight, bias = _gathered(head.weight), _gathered(getattr(head, "bias", None))
    config = unwrap(model).config.get_text_config()
    low_precision = has_low_precision_units(weight.device, weight.dtype)
    unembedding = Unembedding(
        weight=weight if low_precision else weight.float(),
        bias=None if bias is None else bias.float(),
        scale=_logit_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None),
        low_precision=low_precision,
    )
    _check_logits(model, unembedding, allowed=1e-4 if weight.dtype in (torch.float32, torch.float64) else 3e-2)
    return unembedding


def _gathered(parameter: Any) -> Any:
    return None if parameter is None else getattr(parameter, "full_tensor", parameter.detach)().detach()


def _logit_scale(config: Any) -> float:
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)
    # Granite divides its logits by `logits_scaling`, HyperCLOVA X multiplies them by it
    return scaling if config.model_type == "hyperclovax" else 1.0 / scaling


def _check_logits(model: nn.Module, unembedding: Unembedding, *, allowed: float) -> None:
    """Raise unless the model's logits are its final state times the unembedding, up to ``allowed`` (relative)."""
    inner, weight = unwrap(model), unembedding.weight
    tokens = torch.arange(3, 9, device=weight.device)[None] % len(weight)
    normed: list[Any] = []
    with on_output(find_layout(model).final_norm, normed.append), eval_mode(inner), torch.no_grad():
        logits = inner(input_ids=tokens, use_cache=False).logits.float()
    name, unreadable = type(inner).__name__, "its internal policies cannot be read"
    if not normed:
        raise InputError(f"{name}: the final norm did not run; {unreadable}")
    state = normed[-1]
    if state.shape[-1] != weight.shape[1]:
        problem = f"the final state is {state.shape[-1]} wide, but the unembedding reads {weight.shape[1]} numbers"
        raise InputError(f"{name}: {problem}: the model changes the stream between them, so {unreadable}")
    if not bool(torch.isfinite(logits).all()):
        raise InputError("the model returns non-finite logits; check its weights, or load it in a wider dtype")
    expected = unembedding.to_logits_(state.float() @ weight.float().T, slice(None))
    deviation = ((logits - expected).abs().max() / logits.abs().max().clamp(min=1e-6)).item()
    if not deviation <= allowed:
        problem = f"relative deviation {deviation:.1e}, allowed {allowed:.0e}"
        raise InputError(f"{name}: the logits are not the final state times the unembedding ({problem}); {unreadable}")
