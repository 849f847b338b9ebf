"""Turns a causal LM into one of its internal policies within a context [Eq. 5-6 of arXiv 2512.19673].

Attributes are shadowed in instance dictionaries and no module is replaced: that would be silently wrong under FSDP2 and
break transformers' lazily installed output capture. Hooks, parameter names and all wrappers stay as they are.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from bupo.errors import InputError
from bupo.models.layout import DecoderLayout, find_layout, on_output, unwrap
from bupo.models.residual import find_residual_writes

Component = Literal["layer", "attn", "ffn"]
COMPONENTS: tuple[Component, ...] = ("layer", "attn", "ffn")
_Model = TypeVar("_Model", bound=nn.Module)
_ABSENT = object()


def check_layer(n_layers: int, layer: int, component: str = "layer") -> None:
    """Raise `InputError` unless ``layer`` is in 1..``n_layers`` and ``component`` is in `COMPONENTS`."""
    if component not in COMPONENTS:
        raise InputError(f"unknown component {component!r}; choose one of {', '.join(COMPONENTS)}")
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise InputError(f"layer must be a whole number from 1 to {n_layers}, not {layer!r}")
    if not 1 <= layer <= n_layers:
        raise InputError(f"layer {layer} does not exist: this model has layers 1 to {n_layers}")


class LayerMap(Protocol):
    """A map of each layer's states to the output's basis, in front of the final norm; `bupo.Lens` is one."""

    @property
    def norm(self) -> bool:
        """Whether the final norm follows the map."""

    def transport(self, layer: int, states: Tensor, *, linear: bool = False) -> Tensor:
        """Map states (..., d) of a layer; ``linear`` leaves out the bias."""


@contextmanager
def internal_policy(
    model: _Model,
    layer: int,
    component: Component = "layer",
    lens: Literal["raw", "norm"] | LayerMap = "raw",
    temperature: float = 1.0,
) -> Iterator[_Model]:
    """Within this context, ``model`` is its internal policy ``softmax(S E_u^T / temperature)``.

    ``model(...)`` returns its logits and ``model.generate(...)`` samples from it. Gradients reach only the layers up to
    ``layer`` (from 1), the embedding and ``E_u``; no layer above runs. Logit scaling, soft-capping and a bias of the
    unembedding are applied as the model itself applies them.

    Args:
        component: ``S`` is ``H^l``, the stream after the layer (Eq. 5), for ``"layer"``; what the attention or the FFN
            adds to the stream, ``A^l`` or ``F^l`` (Eq. 6), for ``"attn"`` or ``"ffn"``.
        lens: ``"raw"`` (Eq. 5), ``"norm"`` for ``softmax(LN(S) E_u^T)`` (the paper's ablation), or a `bupo.Lens` for
            ``softmax(LN(A_l S + b_l) E_u^T)``. What a module adds to the stream is read without b_l.
        temperature: above 0; divides the input of the unembedding, which also reaches a head that TRL fuses into its
            loss. A bias and soft-capping come afterwards and are not divided. 1 in the paper.

    Yields the same model, which may be inside PEFT, DDP or FSDP wrappers. Leaving the context, also by an exception,
    restores it exactly; the backward pass of a forward inside may run after it. Within it, the model cannot be copied
    or pickled, because the copy would remain an internal policy, and other threads that call it get the internal policy
    too; give each thread a model of its own.

    Raises `InputError` for an argument outside these ranges, a model that is no decoder-only causal LM or is inside
    another ``internal_policy``, and in a forward where the model changes the stream between the layer and the norm.
    """
    layout = find_layout(model)
    check_layer(layout.n_layers, layer, component)
    if not 0.0 < temperature < math.inf:
        raise InputError(f"the temperature of an internal policy must be a number above 0, not {temperature!r}")
    if layout.layers_name in layout.backbone.__dict__:
        raise InputError("this model is already inside an internal_policy context; leave that one first")
    if isinstance(lens, str) and lens not in ("raw", "norm"):
        raise InputError(f"unknown lens {lens!r}; pass 'raw', 'norm' or what bupo.Lens.load returns")
    norm = lens == "norm" if isinstance(lens, str) else lens.norm
    reader = _Reader(layout, layer, norm, temperature, name=type(unwrap(model)).__name__)
    if not isinstance(lens, str):
        reader.transport = partial(lens.transport, layer, linear=component != "layer")
    last = layout.layers[layer - 1]
    terms = () if component == "layer" else getattr(find_residual_writes(model)[layer - 1], component).terms
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(_shadow(layout.backbone, layout.layers_name, layout.layers[:layer]))
        enter(_shadow(layout.final_norm, "forward", reader.read))
        enter(layout.backbone.register_forward_pre_hook(partial(_cut_cache, layer), with_kwargs=True))
        enter(layout.backbone.register_forward_pre_hook(reader.begin))
        enter(layout.backbone.register_forward_hook(reader.end))
        enter(on_output(last, reader.watch))
        for submodule, scale in terms:
            enter(on_output(last.get_submodule(submodule), partial(reader.keep, submodule, scale)))
        if terms:  # reentrant checkpointing would run the layer without gradients, and the terms would have none
            enter(_shadow(last, "gradient_checkpointing", False))
        yield model


class _Reader:
    """Stands for the final norm: checks that the layer's state reaches it unchanged, and returns the state to read."""

    def __init__(self, layout: DecoderLayout, layer: int, norm: bool, temperature: float, name: str):
        self._layer, self._norm, self._temperature, self._name = layer, norm, temperature, name
        self._normalize = layout.final_norm.forward
        self.transport: Callable[[Tensor], Tensor] | None = None
        self.begin()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputError("this model is inside an internal_policy context; copy or pickle it outside")

    def begin(self, *_: Any) -> None:
        self._state: Tensor | None = None  # the layer's state, until the norm receives it
        self._terms: dict[str, Tensor] = {}  # of the component, by submodule
        self._read = False

    def keep(self, submodule: str, scale: float, output: Tensor | None) -> None:
        assert output is not None
        # a copy, because some layers (Falcon) add to this tensor in place afterwards
        self._terms[submodule] = output.clone() if scale == 1.0 else output * scale

    def watch(self, output: Tensor | None) -> None:
        if torch._C._current_graph_task_id() == -1:  # not a recomputation by gradient checkpointing
            self._state = output

    def read(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state, self._state = self._state, None
        if state is None:  # NanoChat applies this norm to its embedding too
            return self._normalize(hidden_states, *args, **kwargs)
        if not torch.compiler.is_compiling() and not _is_same(state, hidden_states):
            raise self._error()
        self._read = True
        if self._terms:
            terms = [term.reshape(hidden_states.shape).to(hidden_states.device) for term in self._terms.values()]
            hidden_states, self._terms = sum(terms[1:], terms[0]), {}
        if self.transport is not None:
            hidden_states = self.transport(hidden_states)
        if self._norm:
            hidden_states = self._normalize(hidden_states, *args, **kwargs)
        return hidden_states if self._temperature == 1.0 else hidden_states / self._temperature

    def end(self, *_: Any) -> None:
        """Raise if the layer's state never reached the norm: the model's layout is not the expected one."""
        if not self._read:
            raise self._error()

    def _error(self) -> InputError:
        problem = "does not reach the final norm unchanged (the model changes it on the way, or skips the layer)"
        return InputError(f"{self._name}: what layer {self._layer} returns {problem}; this policy cannot be read")


def _is_same(state: Tensor, arrived: Tensor) -> bool:
    """Whether the tensor that arrived is the layer's state; values are compared only where addresses differ."""
    if state.shape == arrived.shape and state.device == arrived.device and state.data_ptr() == arrived.data_ptr():
        return True
    state, arrived = state.detach().reshape(-1, state.shape[-1]), arrived.detach().reshape(-1, arrived.shape[-1])
    return state.shape == arrived.shape and torch.equal(state.to(arrived.device, arrived.dtype), arrived)


def _cut_cache(layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Remove states of the layers that do not run from the cache.

    Hybrid models (OLMo-hybrid) ask the cache's last recurrent layer whether there is a past, which must be a layer that
    runs. Assisted decoding cuts the states of every attention layer, which must not be empty. Other states of attention
    (also beside a recurrence, as in Zamba-2) stay, because they tell the cache's length.
    """
    states = getattr(kwargs.get("past_key_values"), "layers", None)
    if not isinstance(states, list) or len(states) <= layer:
        return
    kept = states[:layer]
    recurrent, attention = (any(hasattr(s, n) for s in kept) for n in ("has_previous_state", "get_seq_length"))
    for state in states[layer:]:
        empty = not getattr(state, "is_initialized", True)
        if not (attention and empty if hasattr(state, "get_seq_length") else recurrent):
            kept.append(state)
    if len(kept) < len(states):
        states[:] = kept


@contextmanager
def _shadow(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Shadow a module's attribute in its instance dictionary, and restore the dictionary exactly afterwards."""
    before = module.__dict__.get(name, _ABSENT)  # accelerate's device hooks also live in `__dict__["forward"]`
    module.__dict__[name] = value
    try:
        yield
    finally:
        if before is _ABSENT:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before
