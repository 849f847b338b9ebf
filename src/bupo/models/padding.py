"""Takes the effect from padding on the left: rows move to the left edge, where they are scored as if they stood alone.

A causal model ignores what follows a row. What stands before it counts where positions are absolute (the tables of
GPT-2 and XGLM, a scale after the rotation in HunYuan) or a recurrence takes padding for text (RWKV, RecurrentGemma).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from bupo.models.layout import eval_mode, unwrap

_LENGTH = 8  # tokens of the probe, and of the padding before them


def to_left(mask: Tensor, *rows: Tensor) -> list[Tensor]:
    """Rows (B, T) with the padding before their tokens moved behind them."""
    places = torch.arange(mask.size(1), device=mask.device) + _padding(mask)
    return [row.gather(1, places % mask.size(1)) for row in rows]


def from_left(mask: Tensor, values: Tensor) -> Tensor:
    """Values (B, T, ...) of rows that `to_left` moved, at the tokens' places in ``mask``; arbitrary at padding."""
    places = (torch.arange(values.size(1), device=mask.device) - _padding(mask)).clamp(min=0)
    return values.take_along_dim(places.view(*places.shape, *[1] * (values.dim() - 2)), dim=1)


def _padding(mask: Tensor) -> Tensor:
    return mask.long().argmax(dim=1, keepdim=True)  # the first of the largest values


def aligned(model: Callable[..., Any]) -> Callable[..., Any]:
    """A forward with TRL's fused head that gives each row the log-probabilities and entropies it has alone."""

    def forward(*, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **more: Any) -> Any:
        ids, mask, moved = to_left(attention_mask, input_ids, attention_mask, labels)
        output = model(input_ids=ids, attention_mask=mask, labels=moved, **more)
        for name in ("log_probs", "entropy"):
            if (values := getattr(output, name)) is not None:
                setattr(output, name, from_left(attention_mask, values))
        return output

    return forward


def attends_only(model: Any) -> bool:
    """Whether the model's cache holds keys and values of attention only, no recurrent states."""
    kinds = {type(layer) for layer in DynamicCache(config=unwrap(model).config.get_text_config()).layers}
    return not unwrap(model)._is_stateful and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


@torch.no_grad()
def padding_changes(model: nn.Module, *, sampling: bool = False) -> bool:
    """Whether padding before a prompt changes its log-probabilities, or with ``sampling`` those of the tokens after it.

    Measured on a short prompt, by more than rounding. Where the weights are not here, log-probabilities are taken to
    change, which costs little, and samples not to.
    """
    inner = unwrap(model)
    embedding = inner.get_input_embeddings().weight
    if embedding.is_meta or not len(embedding):  # offloaded, or split by DeepSpeed
        return not sampling
    ids = (torch.arange(2 * _LENGTH, device=embedding.device)[None] * 7 + 3) % len(embedding)
    mask = (torch.arange(2 * _LENGTH, device=embedding.device) >= _LENGTH).long()[None]
    ids, both = torch.cat([ids * mask, ids]), torch.cat([mask, torch.ones_like(mask)])
    rows = (ids, both), (ids[:1, _LENGTH:], both[1:, _LENGTH:])  # beside a longer prompt, and alone
    how: dict[str, Any] = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    with eval_mode(inner):
        if sampling:
            how |= {"output_logits": True, "return_dict_in_generate": True}
            padded, alone = (torch.stack(inner.generate(i, attention_mask=m, **how).logits, 1)[0] for i, m in rows)
        else:
            padded, alone = (inner(input_ids=i, attention_mask=m, use_cache=False).logits[0] for i, m in rows)
    padded, alone = (logits.float().log_softmax(-1) for logits in (padded[-len(alone) :], alone))
    rounding = max(1e-4, 6 * torch.finfo(inner.dtype).eps)
    return not (padded - alone).square().mean().sqrt() <= rounding * alone.std()  # NaN is no equality
