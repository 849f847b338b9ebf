"""A model that temporarily *is* one of its internal policies (Eq. 5-6 of arXiv 2512.19673).

Attributes are shadowed in the backbone's instance dictionary; no module is replaced. The module tree, hooks, parameter
names and every wrapper (DDP, FSDP, PEFT, a fused head) stay as they are: replacing modules is silently wrong under
FSDP2 and breaks transformers' lazily installed output capture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from bupo.errors import InputError
from bupo.models.layout import DecoderLayout, find_layout, first_tensor, n_layers, unwrap
from bupo.models.residual import ResidualWrite, find_residual_writes

Component = Literal["layer", "attn", "ffn"]
COMPONENTS: tuple[Component, ...] = ("layer", "attn", "ffn")
_Model = TypeVar("_Model", bound=nn.Module)
_ABSENT = object()


def check_layer(n_layers: int, layer: int, component: str = "layer") -> None:
    """Raise :class:`InputError` unless ``layer`` is in 1..``n_layers`` and ``component`` is one we know."""
    if component not in COMPONENTS:
        raise InputError(f"unknown component {component!r}; choose one of {', '.join(COMPONENTS)}")
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise InputError(f"layer must be a whole number from 1 to {n_layers}, not {layer!r}")
    if not 1 <= layer <= n_layers:
        raise InputError(f"layer {layer} does not exist: this model has layers 1 to {n_layers}")


@contextmanager
def internal_policy(
    model: _Model, layer: int, component: Component = "layer", norm: bool = False, temperature: float = 1.0
) -> Iterator[_Model]:
    """Within this context ``model`` is its internal policy ``softmax(S E_u^T / temperature)``.

    ``S`` is the state of the site: ``H^l`` for component ``"layer"`` (Eq. 5), ``A^l`` for ``"attn"`` and ``F^l`` for
    ``"ffn"`` (Eq. 6). ``model(...)`` returns that policy's logits (B, T, V), ``model.generate(...)`` samples from it,
    gradients reach the layers up to ``layer``, the embedding and ``E_u`` only (Eq. 15), and no layer above runs.
    Logit scaling, soft-capping and a bias of the unembedding are applied as the model itself applies them.

    Args:
        model: a Hugging Face causal LM, also inside PEFT, DDP or FSDP wrappers.
        layer: l, counted from 1 to L.
        component: what is read: the stream after the layer, or what its attention or FFN adds to it.
        norm: read through the final norm, ``softmax(LN(S) E_u^T)`` (the paper's ablation); off in the paper's Eq. 5.
        temperature: T, above 0; what the unembedding reads is divided by it, so that a head that TRL fuses into its
            loss sees it too. A bias and soft-capping of the unembedding come after, undivided. 1 in the paper.

    Yields the same model. Leaving the context, also by an exception, restores it exactly; a backward pass of a forward
    made inside may run after it.

    Raises:
        InputError: (a ``ValueError``) the layer or component does not exist, T is not above 0, ``model`` is no
            decoder-only causal LM, or it is inside another ``internal_policy`` already. During a forward: the backbone
            changes the stream between a layer and the final norm, so that ``H^l`` is not what the unembedding would
            read.
    """
    layout = find_layout(model)
    check_layer(layout.n_layers, layer, component)
    if not 0.0 < temperature < math.inf:
        raise InputError(f"the temperature of an internal policy must be a number above 0, not {temperature!r}")
    if layout.layers_name in layout.backbone.__dict__:
        raise InputError("this model is inside an internal_policy context already; leave that one first")
    layers: list[Any] = list(layout.layers[:layer])
    reader = _Reader(layout, layer, norm, temperature, name=type(unwrap(model)).__name__)
    if component != "layer":
        block = find_residual_writes(model)[layer - 1]
        part = block.attn if component == "attn" else block.ffn
        layers[-1] = _PartOfLayer(layout.layers[layer - 1], part, reader)
    with ExitStack() as stack:
        stack.enter_context(_shadow(layout.backbone, layout.layers_name, tuple(layers)))
        stack.enter_context(_shadow(layout.final_norm, "forward", reader.read))
        cut = layout.backbone.register_forward_pre_hook(partial(_cut_cache, layer), with_kwargs=True)
        stack.callback(cut.remove)
        for hook in (
            layout.backbone.register_forward_pre_hook(reader.begin),
            layout.backbone.register_forward_hook(reader.end),
        ):
            stack.callback(hook.remove)
        if component == "layer":
            stack.callback(layout.layers[layer - 1].register_forward_hook(reader.watch).remove)
        yield model


class _Reader:
    """Takes the final norm's place, or goes before it, and checks that the state of the site arrives there as it is."""

    def __init__(self, layout: DecoderLayout, layer: int, norm: bool, temperature: float, name: str):
        self._layer, self._norm, self._temperature, self._name = layer, norm, temperature, name
        self._normalize = layout.final_norm.forward
        self._state: Tensor | None = None  # what the site made and nobody has read yet
        self._read = False

    def begin(self, module: nn.Module, args: Any) -> None:
        self._state, self._read = None, False

    def watch(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch._C._current_graph_task_id() == -1:  # not a checkpoint's recomputation during backward
            self._state = first_tensor(output)

    def read(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state, self._state = self._state, None
        if state is None:  # NanoChat norms its embedding with the same module
            return self._normalize(hidden_states, *args, **kwargs)
        if not torch.compiler.is_compiling() and not _is_same(state, hidden_states):
            raise self._error()
        self._read = True
        if self._norm:
            hidden_states = self._normalize(hidden_states, *args, **kwargs)
        return hidden_states if self._temperature == 1.0 else hidden_states / self._temperature

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """A state that was never made or never read means a layout other than we think."""
        if not self._read:
            raise self._error()

    def _error(self) -> InputError:
        return InputError(
            f"{self._name}: what layer {self._layer} returns does not reach the final norm as it is (the model changes "
            f"it on the way, or skips the layer); this internal policy cannot be read"
        )


def _is_same(state: Tensor, arrived: Tensor) -> bool:
    """Whether the tensor that arrived is the state that was made; values are compared only where addresses differ."""
    if state.shape == arrived.shape and state.device == arrived.device and state.data_ptr() == arrived.data_ptr():
        return True
    state, arrived = state.detach().reshape(-1, state.shape[-1]), arrived.detach().reshape(-1, arrived.shape[-1])
    return state.shape == arrived.shape and torch.equal(state.to(arrived.device, arrived.dtype), arrived)


def _cut_cache(layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Drop the recurrent states of layers that do not run from a cache made for all layers.

    Hybrid models ask the cache's last recurrent layer whether there is a past (OLMo-hybrid): that must be one that
    runs. Attention layers stay, because a cache without any cannot tell its length.
    """
    cache = kwargs.get("past_key_values")
    states = getattr(cache, "layers", None)
    if not isinstance(states, list) or not any(hasattr(s, "has_previous_state") for s in states[:layer]):
        return
    # attention (also beside a recurrence, as in Zamba-2) can tell a length
    kept = [s for i, s in enumerate(states) if i < layer or hasattr(s, "get_seq_length")]
    if len(kept) < len(states):
        states[:] = kept


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

    def __init__(self, layer: nn.Module, part: ResidualWrite, reader: _Reader):
        self._layer, self._part, self._reader = layer, part, reader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        read: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                # a copy, because some layers (Falcon) add the other part into this tensor in place
                read[name] = first_tensor(output).clone()  # type: ignore[union-attr]

            return hook

        handles = [self._layer.get_submodule(n).register_forward_hook(keep(n)) for n, _ in self._part.terms]
        try:
            # nn.Module's own call: this one layer is not checkpointed, because a recomputation during backward would
            # run after the hook is gone
            output = nn.Module.__call__(self._layer, *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        whole = first_tensor(output)
        assert whole is not None
        state: Tensor | None = None
        for name, scale in self._part.terms:
            term = read[name].reshape(whole.shape).to(whole.device)
            term = term if scale == 1.0 else term * scale
            state = term if state is None else state + term
        self._reader.watch(self._layer, args, state)
        return state if isinstance(output, Tensor) else (state, *output[1:])


__all__ = ["COMPONENTS", "Component", "check_layer", "internal_policy", "n_layers"]
