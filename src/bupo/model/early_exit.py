"""A model that temporarily *is* one of its internal policies (Eq. 5-6 of arXiv 2512.19673).

Attributes are shadowed in the backbone's instance dictionary; no module is replaced. The module tree, hooks, parameter
names and every wrapper (DDP, FSDP, PEFT, a fused head) stay as they are: replacing modules is silently wrong under
FSDP2 and breaks transformers' lazily installed output capture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from bupo.errors import InputError
from bupo.model.anatomy import Part, dissect, find_blocks, first_tensor

Component = Literal["layer", "attn", "ffn"]
COMPONENTS: tuple[Component, ...] = ("layer", "attn", "ffn")
_Model = TypeVar("_Model", bound=nn.Module)
_ABSENT = object()


def check_site(n_layers: int, layer: int, component: str = "layer") -> None:
    """Raise :class:`InputError` unless ``layer`` is in 1..``n_layers`` and ``component`` is one we know."""
    if component not in COMPONENTS:
        raise InputError(f"unknown component {component!r}; choose one of {', '.join(COMPONENTS)}")
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise InputError(f"layer must be a whole number from 1 to {n_layers}, not {layer!r}")
    if not 1 <= layer <= n_layers:
        raise InputError(f"layer {layer} does not exist: this model has layers 1 to {n_layers}")


@contextmanager
def internal_policy(model: _Model, layer: int, component: Component = "layer", norm: bool = False) -> Iterator[_Model]:
    """Within this context ``model`` is its internal policy ``softmax(S E_u^T)``.

    ``S`` is the state of the site: ``H^l`` for component ``"layer"`` (Eq. 5), ``A^l`` for ``"attn"`` and ``F^l`` for
    ``"ffn"`` (Eq. 6). ``model(...)`` returns that policy's logits (B, T, V), ``model.generate(...)`` samples from it,
    gradients reach the layers up to ``layer``, the embedding and ``E_u`` only (Eq. 15), and no layer above runs.
    Logit scaling, soft-capping and a bias of the unembedding are applied as the model itself applies them.

    Args:
        model: a Hugging Face causal LM, also inside PEFT, DDP or FSDP wrappers.
        layer: l, counted from 1 to L.
        component: what is read: the stream after the layer, or what its attention or FFN adds to it.
        norm: read through the final norm, ``softmax(LN(S) E_u^T)`` (the paper's ablation); off in the paper's Eq. 5.

    Yields the same model. Leaving the context, also by an exception, restores it exactly; a backward pass of a forward
    made inside may run after it.

    Raises:
        InputError: (a ``ValueError``) the layer or component does not exist, ``model`` is no decoder-only causal LM, or
            it is inside another ``internal_policy`` already.
    """
    anatomy = dissect(model)
    check_site(anatomy.n_layers, layer, component)
    if anatomy.layers_name in anatomy.backbone.__dict__:
        raise InputError("this model is inside an internal_policy context already; leave that one first")
    layers: list[Any] = list(anatomy.layers[:layer])
    if component != "layer":
        block = find_blocks(model)[layer - 1]
        layers[-1] = _PartOfLayer(anatomy.layers[layer - 1], block.attn if component == "attn" else block.ffn)
    with ExitStack() as stack:
        stack.enter_context(_shadow(anatomy.backbone, anatomy.layers_name, tuple(layers)))
        if not norm:
            stack.enter_context(_shadow(anatomy.final_norm, "forward", _identity))
        yield model


def _identity(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


@contextmanager
def _shadow(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Put ``value`` before a module's attribute in its instance dictionary, and take exactly that back."""
    before = module.__dict__.get(name, _ABSENT)  # accelerate's device hooks also live in `__dict__["forward"]`
    module.__dict__[name] = value
    try:
        yield
    finally:
        if before is _ABSENT:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


class _PartOfLayer:
    """Stands in for the last layer that runs and returns what one of its parts adds to the stream, not the stream."""

    def __init__(self, layer: nn.Module, part: Part):
        self._layer, self._part = layer, part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        read: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            # a copy, because some layers (Falcon) add the other part into this tensor in place
            read.append(first_tensor(output).clone())  # type: ignore[union-attr]

        handle = getattr(self._layer, self._part.source).register_forward_hook(keep)
        try:
            # nn.Module's own call: this one layer is not checkpointed, because a recomputation during backward would
            # run after the hook is gone
            output = nn.Module.__call__(self._layer, *args, **kwargs)
        finally:
            handle.remove()
        whole = first_tensor(output)
        assert whole is not None
        state = read[-1].reshape(whole.shape) * self._part.scale if self._part.scale != 1.0 else read[-1].view_as(whole)
        return state if isinstance(output, Tensor) else (state, *output[1:])


def n_layers(model: nn.Module) -> int:
    """L, the number of decoder layers."""
    return dissect(model).n_layers


def unembedding(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """``E_u`` (V, d) and the unembedding's bias (V,) or None, whole even where FSDP2 shards them."""
    head = dissect(model).unembedding
    weight, bias = head.weight, getattr(head, "bias", None)
    return _whole(weight), None if bias is None else _whole(bias)


def _whole(parameter: Any) -> Tensor:
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach()


__all__ = ["COMPONENTS", "Component", "check_site", "internal_policy", "n_layers", "unembedding"]
