"""Layers that learn differently: the two methods the paper compares BuPO with (arXiv 2512.19673, Table 11).

- ``frozen_layers: l``: layers 1 to l keep their weights (with LoRA: their adapters). Only the layers: the embedding,
  the layers above l, the final norm and the unembedding are trained, whether or not the vocabulary matrices are tied.
- ``upper_learning_rate_scale: s`` with ``upper_learning_rate_above: l``: layers above l and the final norm learn at s
  times the learning rate. These are the parameters that the gradient of the internal policy of layer l does not reach;
  all others, also the embedding and the unembedding, learn at the whole rate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bupo.errors import ConfigError
from bupo.models.internal_policy import check_layer
from bupo.models.layout import find_layout
from bupo.train.schedule import Schedule

if TYPE_CHECKING:
    from trl import GRPOTrainer as _Parent
else:
    _Parent = object


def problems_of_settings(args: Any, schedule: Schedule | None) -> list[str]:
    """What is wrong with these settings whatever the model; ``schedule`` is None where that is wrong itself."""
    found = []
    frozen, scale, above = args.frozen_layers, args.upper_learning_rate_scale, args.upper_learning_rate_above
    for name, layer in (("frozen_layers", frozen), ("upper_learning_rate_above", above)):
        if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 1):
            found.append(f"{name} must be a layer from 1 to L, not {layer!r}")
    if (scale is None) != (above is None):
        found.append("upper_learning_rate_scale and upper_learning_rate_above go together: the factor, and the layer")
    if scale is not None and not scale > 0:
        found.append(f"upper_learning_rate_scale must be above 0, not {scale}; to keep layers as they are, freeze them")
    if schedule is not None and not found:
        found += frozen_problems(frozen, schedule)
    return found


def frozen_problems(frozen: int | None, schedule: Schedule) -> list[str]:
    """An internal phase whose every layer is frozen has nothing to align."""
    low = [layer for layer in schedule.layers if isinstance(layer, int) and frozen is not None and layer <= frozen]
    return [
        f"frozen_layers {frozen} freezes all of the internal policy of layer {layer} but the vocabulary; freeze fewer "
        "layers, or set internal_steps to 0"
        for layer in low
    ]


class LearnsLayerwise(_Parent):
    """What `BuPOTrainer` freezes, and the parameter groups of its optimizer."""

    if TYPE_CHECKING:  # of BuPOTrainer
        args: Any
        model: Any

    def _freeze_layers(self) -> None:
        """Freeze before any wrapping: DDP never hears of these parameters, the optimizer has no state for them."""
        if self.args.frozen_layers is not None:
            for layer in find_layout(self.model).layers[: self.args.frozen_layers]:
                layer.requires_grad_(False)

    def _layerwise_problems(self) -> list[str]:
        """What does not fit this model, or an optimizer made elsewhere."""
        found: list[str] = []
        above = self.args.upper_learning_rate_above
        if above is None and self.args.frozen_layers is None:
            return found
        layers = find_layout(self.model).n_layers
        for name, layer in (("frozen_layers", self.args.frozen_layers), ("upper_learning_rate_above", above)):
            try:
                if layer is not None:
                    check_layer(layers, layer)
            except ValueError as error:
                found.append(f"{name}: {error}")
        if above == layers:
            found.append(f"upper_learning_rate_above: there is no layer above {layers}; give at most {layers - 1}")
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        given = self.optimizer is not None or (plugin is not None and "optimizer" in plugin.deepspeed_config)
        if above is not None and given:
            found.append(
                "upper_learning_rate_scale makes parameter groups of the trainer's own optimizer; pass none, and leave "
                "the optimizer out of DeepSpeed's configuration"
            )
        return found

    def create_optimizer(self, model: Any = None) -> Any:
        fresh = self.optimizer is None
        optimizer: Any = super().create_optimizer(model)
        above = self.args.upper_learning_rate_above
        if fresh and above is not None:
            if not hasattr(optimizer, "add_param_group"):
                raise ConfigError(
                    f"upper_learning_rate_scale needs an optimizer of the trainer's own, not {type(optimizer).__name__}"
                )
            layout = find_layout(self.model if model is None else model)
            upper = {id(p) for module in (*layout.layers[above:], layout.final_norm) for p in module.parameters()}
            split_groups(optimizer, upper, self.args.upper_learning_rate_scale)
        return optimizer


def split_groups(optimizer: Any, upper: set[int], scale: float) -> None:
    """Move the parameters with these ids into groups of their own, at ``scale`` times the learning rate.

    The groups they leave stay where they are, so that the learning rate in the log is the unscaled one.
    """
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in upper]
        if moved:
            group["params"] = [p for p in group["params"] if id(p) not in upper]
            rest = {name: value for name, value in group.items() if name != "params"}
            optimizer.add_param_group({**rest, "params": moved, "lr": group["lr"] * scale})
