"""Per-layer freezing and learning rates, the two methods the paper compares BuPO with (arXiv 2512.19673, Table 11).

- ``frozen_layers: l`` keeps the weights of layers 1 to l (with LoRA: their adapters). The embedding, the layers above
  l, the final norm and the unembedding are trained, whether or not the vocabulary matrices are tied.
- ``upper_learning_rate_scale: s`` with ``upper_learning_rate_above: l`` trains the layers above l and the final norm at
  s times the learning rate. The gradient of the internal policy of layer l does not reach these parameters. All others,
  including the embedding and the unembedding, keep the full learning rate.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from bupo.errors import ConfigError
from bupo.models.layout import find_layout


def freeze_layers(model: nn.Module, layers: int | None) -> None:
    """Freeze the lowest layers. Call it before any wrapping, so that DDP and the optimizer never see them."""
    if layers is not None:
        for layer in find_layout(model).layers[:layers]:
            layer.requires_grad_(False)


def scale_upper_learning_rate(optimizer: Any, model: nn.Module, args: Any) -> None:
    """Move the upper layers and the final norm into parameter groups with a scaled learning rate, if that is set.

    The remaining groups keep their places, so that the logged learning rate is the unscaled one.

    Raises:
        ConfigError: the optimizer has no parameter groups.
    """
    above, scale = args.upper_learning_rate_above, args.upper_learning_rate_scale
    if above is None:
        return
    if not hasattr(optimizer, "add_param_group"):
        raise ConfigError(f"upper_learning_rate_scale needs a torch optimizer, not {type(optimizer).__name__}")
    layout = find_layout(model)
    upper = {id(p) for module in (*layout.layers[above:], layout.final_norm) for p in module.parameters()}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in upper]
        if moved:
            group["params"] = [p for p in group["params"] if id(p) not in upper]
            optimizer.add_param_group({**group, "params": moved, "lr": group["lr"] * scale})
