"""Which layers are trained: the settings ``trained_layers`` and ``frozen_layers``."""

import sys
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from bupo.models.internal_policy import check_layer
from bupo.models.layout import find_layout, unwrap
from bupo.train.schedule import Schedule, is_whole

FORMS = "a layer from 1 to L, a range such as 10-15, several of them (3,5,10-15 or a list), or middle-third"


@dataclass(frozen=True)
class Selection:
    """The layers of a model that are trained, and whether embedding, final norm and unembedding are."""

    layers: frozenset[int]
    outside: bool

    def apply(self, model: Any) -> None:
        """Freeze the parameters that are not selected, and take away the adapters that would only hold frozen ones."""
        layers = find_layout(model).layers
        inside = {id(p) for layer in layers for p in layer.parameters()}
        kept = {id(p) for number, layer in enumerate(layers, 1) if number in self.layers for p in layer.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in kept and not (self.outside and id(parameter) not in inside):
                parameter.requires_grad_(False)
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                frozen = not any(p.requires_grad for p in child.parameters())
                if frozen and isinstance(child, BaseTunerLayer):
                    setattr(module, name, child.get_base_layer())


def freeze(model: Any, settings: Any) -> None:
    """Freeze what the settings do not select, so that the backward pass stops below the lowest selected layer."""
    if (selection := select(settings, find_layout(model).n_layers if selects(settings) else 0)) is None:
        return
    selection.apply(model)
    if not (settings.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        stop_backward(model)


def stop_backward(model: Any) -> None:
    """Keep gradients from the embedding's output, where transformers asks for them for reentrant checkpointing only."""
    inner = unwrap(model)
    inner.disable_input_require_grads()
    inner.enable_input_require_grads = lambda: None  # called whenever checkpointing is switched on


def selects(settings: Any) -> bool:
    """Whether the settings name layers, so that the model's are needed."""
    return _setting(settings)[0] is not None


def select(settings: Any, depth: int) -> Selection | None:
    """The selection that the settings describe for a model of ``depth`` layers; None if everything is trained."""
    value, outside = _setting(settings)
    if value is None:
        return None
    named = frozenset(number for low, high in ranges(value, depth) for number in range(low, high + 1))
    return Selection(frozenset(range(1, depth + 1)) - named if outside else named, outside)


def ranges(value: Any, depth: int) -> list[tuple[int, int]]:
    """The first and last layers of the ranges that a setting names.

    Raises ValueError, with a message, for anything that is not one of `FORMS`, and for layers above ``depth``.
    """
    if value == "middle-third":
        return [(depth // 3 + 1, 2 * depth // 3)]
    found = []
    for part in value if isinstance(value, (list, tuple)) else str(value).split(","):
        first, dash, last = str(part).strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)):
            raise ValueError(f"must be {FORMS}, not {value!r}")
        low, high = int(first), int(last or first)
        if low > high:
            raise ValueError(f"{part} runs backwards; write {high}-{low}")
        for layer in (low, high):
            check_layer(depth, layer)
        found.append((low, high))
    if not found:
        raise ValueError(f"must be {FORMS}, not {value!r}")
    return found


def layer_problems(settings: Any, schedule: Schedule, depth: int | None = None) -> list[str]:
    """What is wrong with the two settings, with a schedule, and with a model of ``depth`` layers once it is known."""
    value, outside = _setting(settings)
    name = "frozen_layers" if outside else "trained_layers"
    if value is None or (depth is None and value == "middle-third"):
        return []
    if None not in (settings.trained_layers, settings.frozen_layers):
        return ["set either trained_layers or frozen_layers, not both: the rest is frozen, or trained"]
    if outside and (is_whole(value, low=0) or str(value).strip().isdecimal()):
        return [f"frozen_layers {value}: write 1-{value} for layers 1 to {value}, or [{value}] for that layer alone"]
    try:
        named = ranges(value, depth or sys.maxsize)
    except ValueError as error:
        return [f"{name} {error}" if str(error).startswith("must") else f"{name}: {error}"]

    def trained(number: int) -> bool:
        return any(low <= number <= high for low, high in named) != outside

    return [
        f"{name} {value} freezes every layer of the internal policy of layer {layer}; train one of them, or set "
        "internal_steps to 0"
        for layer in schedule.layers
        if not any(map(trained, range(1, layer + 1)))
    ]


def _setting(settings: Any) -> tuple[Any, bool]:
    """The value that is set, and whether it names the layers that are frozen."""
    frozen = settings.trained_layers is None
    return (settings.frozen_layers if frozen else settings.trained_layers), frozen
