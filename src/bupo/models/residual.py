"""Finds what each layer adds to the residual stream on a short probe batch, instead of trusting submodule names.

Solves for ``H^l - H^{l-1} = a * A^l + b * F^l``, with the multipliers a and b that some architectures have (Granite).
"""

import math
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from bupo.errors import InputError
from bupo.models.layout import DecoderLayout, eval_mode, find_layout, first_tensor, module_input, on_input, unwrap

# Allowed deviation from the residual identity, relative to the size of the terms, element by element: a few rounding
# errors of the dtype in which the layer adds.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class ResidualWrite:
    """One contribution of a layer to the residual stream: the sum of ``scale`` times the output of ``submodule``.

    There are two terms where modules run side by side (Falcon-H1, Granite's experts). A term is not of ``module``
    itself where a norm follows (Gemma-2, OLMo-2) or the sum is computed inside ``module`` (BLOOM).
    """

    module: str  # path of the attention or FFN within the layer; it receives LN(...) of the stream
    terms: tuple[tuple[str, float], ...]  # (submodule, scale) pairs, paths within the layer

    def __str__(self) -> str:
        return " + ".join(name if scale == 1.0 else f"{scale:g} * {name}" for name, scale in self.terms)


@dataclass(frozen=True)
class LayerWrites:
    """The two contributions of one layer, and the relative deviation of ``H^{l-1} + A^l + F^l`` from ``H^l``."""

    attn: ResidualWrite
    ffn: ResidualWrite
    deviation: float


@dataclass(eq=False)
class _Call:
    """One call of a submodule. Two modules that pass one tensor on have the same address and shape there."""

    name: str
    input_id: tuple | None
    output_id: tuple
    output: Tensor  # float64 copy, (tokens, d)
    has_matrix: bool  # has a matrix of parameters: an attention or FFN rather than a norm or dropout
    is_norm: bool


@dataclass
class _LayerCall:
    """One call of a layer."""

    before: Tensor  # input and output as float64 copies, (tokens, d)
    after: Tensor
    dtype: torch.dtype
    calls: list[_Call]  # of its submodules


_cache: weakref.WeakKeyDictionary[nn.Module, tuple[LayerWrites, ...]] = weakref.WeakKeyDictionary()


def find_residual_writes(model: nn.Module) -> tuple[LayerWrites, ...]:
    """Find what each layer adds to the residual stream, checked on a probe batch and cached per model.

    Raises `InputError`, which names the layer, if the layers do not pass one stream on to each other and to the final
    norm, or the outputs of some layer's submodules do not add up to ``H^l - H^{l-1}``.
    """
    inner = unwrap(model)
    if inner in _cache:
        return _cache[inner]
    layout = find_layout(model)
    layers, nested = _probe(inner, layout), None
    writes = []
    for index, layer in enumerate(layers):
        try:
            writes.append(_solve_layer(index + 1, layer))
        except InputError:
            # where the sum is computed inside a submodule (BLOOM, MPT), its terms are found among nested submodules
            nested = nested or _probe(inner, layout, nested=True)
            if (solution := _solve_nested(nested[index])) is None:
                raise
            writes.append(solution)
    _cache[inner] = tuple(writes)
    return _cache[inner]


def _probe(inner: Any, layout: DecoderLayout, *, nested: bool = False) -> list[_LayerCall]:
    """Record the layers and their submodules (with ``nested``, at any depth) in a forward of a short batch."""
    alive: list[Tensor] = []  # keeps tensors alive during the forward, so that an address names one tensor
    recorded: list[list[_LayerCall]] = [[] for _ in layout.layers]
    norm_inputs: list[Tensor | None] = []

    def identify(tensor: Tensor) -> tuple:
        alive.append(tensor)
        return tensor.data_ptr(), tensor.numel(), tensor.shape[-1]

    def on_layer(index, calls, module, args, kwargs, output):
        before, after = module_input(args, kwargs), first_tensor(output)
        if before is not None and after is not None:
            recorded[index].append(_LayerCall(_copy(before), _copy(after), after.dtype, calls))

    def on_child(calls, name, module, args, kwargs, output):
        before, after = module_input(args, kwargs), first_tensor(output)
        if after is None or after.ndim < 2:
            return
        is_norm = "norm" in type(module).__name__.lower()
        # a quantised linear map may have no parameters, but it has `in_features`
        has_matrix = any(p.ndim >= 2 for p in module.parameters())
        has_matrix = has_matrix or any(hasattr(m, "in_features") for m in module.modules())
        input_id = None if before is None else identify(before)
        # a copy, because some layers (Falcon) add to this tensor in place afterwards
        calls.append(_Call(name, input_id, identify(after), _copy(after), has_matrix and not is_norm, is_norm))

    embedding = inner.get_input_embeddings().weight
    # where the embedding is offloaded, the library's own hooks move the inputs to where they are needed
    device = layout.unembedding.weight.device if embedding.is_meta else embedding.device
    tokens = (torch.arange(16, device=device).view(2, 8) * 7 + 3) % len(embedding)
    with ExitStack() as stack, eval_mode(inner), torch.no_grad():
        stack.enter_context(on_input(layout.final_norm, norm_inputs.append))
        for index, layer in enumerate(layout.layers):
            calls: list[_Call] = []
            stack.enter_context(layer.register_forward_hook(partial(on_layer, index, calls), with_kwargs=True))
            for name, child in layer.named_modules() if nested else layer.named_children():
                if name:
                    stack.enter_context(child.register_forward_hook(partial(on_child, calls, name), with_kwargs=True))
        layout.backbone(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    # NanoChat applies its final norm to the embedding too: the last call counts
    return _check_stream(type(inner).__name__, recorded, norm_inputs[-1] if norm_inputs else None)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1]).to("cpu", copy=True).double()  # MPS has no float64


def _check_stream(name: str, recorded: list[list[_LayerCall]], last: Tensor | None) -> list[_LayerCall]:
    """Check that the layers run once each, in order, on one stream, which reaches the final norm unchanged."""
    stream: Tensor | None = None
    for layer, calls in enumerate(recorded, start=1):
        problem = None
        if not calls:
            problem = "did not run as a module with hidden states"
        elif len(calls) > 1:
            problem = f"ran {len(calls)} times in one forward"
        elif calls[0].before.shape != calls[0].after.shape:
            problem = "changes the shape of its input"
        elif stream is not None and not torch.equal(stream, calls[0].before):
            problem = f"does not receive what layer {layer - 1} returned (the model changes the stream between layers)"
        if problem:
            raise InputError(f"{name}: layer {layer} {problem}; this layout cannot be read")
        stream = calls[0].after
    if last is None or stream is None or not torch.equal(_copy(last), stream):
        problem = "the final norm does not receive what the last layer returned"
        raise InputError(f"{name}: {problem}; this layout cannot be read")
    return [call for (call,) in recorded]


def _solve_layer(number: int, layer: _LayerCall) -> LayerWrites:
    tolerance, candidates = _TOLERANCE.get(layer.dtype, 2e-2), _candidates(layer)
    best: tuple[float, Sequence[_Call], list[float]] = (math.inf, (), [])
    for size in (2, 3):  # two contributions, or one of them the sum of two modules that run side by side
        for chosen in combinations(candidates, size):
            deviation, scales = _fit(layer, chosen)
            if deviation < best[0] * 0.5:
                best = (deviation, chosen, scales)
        if best[0] <= tolerance:
            deviation, terms, scales = best
            places = [layer.calls.index(call) for call in terms]
            norm_between = [any(c.is_norm for c in layer.calls[a + 1 : b]) for a, b in pairwise(places)]
            # of three terms, two make up A where a norm runs after the second only
            cut = 2 if norm_between[-1] and not norm_between[0] else 1
            pairs = tuple((call.name, scale) for call, scale in zip(terms, scales, strict=True))
            attn = ResidualWrite(_module_of(terms[0], layer.calls), pairs[:cut])
            return LayerWrites(attn, ResidualWrite(_module_of(terms[cut], layer.calls), pairs[cut:]), deviation)
    names = ", ".join(dict.fromkeys(call.name for call in layer.calls)) or "none"
    for call in candidates:
        if _fit(layer, [call])[0] <= tolerance:
            problem = f"adds one contribution only ({call.name}) to the residual stream"
            remedy = "it has no separate attention and FFN to read (component 'layer' works)"
            raise InputError(f"layer {number} {problem}: {remedy}; its submodules are: {names}")
    closest = " + ".join(call.name for call in best[1]) or "no pair of submodules"
    problem = "no submodules' outputs add up to what the layer adds to the residual stream"
    nearest = f"the smallest relative deviation is {best[0]:.1e} ({closest}), allowed {tolerance:.0e}"
    raise InputError(f"layer {number}: {problem}; {nearest}; its submodules are: {names}")


def _solve_nested(layer: _LayerCall) -> LayerWrites | None:
    """Find two terms inside two different submodules of the layer; None if there are none."""
    for chosen in combinations(_candidates(layer), 2):
        modules = [call.name.split(".")[0] for call in chosen]
        deviation, scales = _fit(layer, chosen) if modules[0] != modules[1] else (math.inf, [])
        if deviation <= _TOLERANCE.get(layer.dtype, 2e-2):
            attn, ffn = (ResidualWrite(modules[i], ((chosen[i].name, scales[i]),)) for i in (0, 1))
            return LayerWrites(attn, ffn, deviation)
    return None


def _candidates(layer: _LayerCall) -> list[_Call]:
    """Select the outputs that the layer may have added to the stream: of its shape, and not a norm of the stream."""
    first = next((i for i, call in enumerate(layer.calls) if call.has_matrix), len(layer.calls))
    candidates: dict[tuple, _Call] = {}
    for index, call in enumerate(layer.calls):
        if call.output.shape == layer.after.shape and not (call.is_norm and index < first):
            candidates.setdefault(call.output_id, call)  # a dropout in evaluation mode returns its input
    return list(candidates.values())


def _fit(layer: _LayerCall, chosen: Sequence[_Call]) -> tuple[float, list[float]]:
    """Fit the layer's change as a weighted sum of the outputs; return the largest relative deviation and the scales."""
    change = (layer.after - layer.before).flatten()
    size = (layer.before.abs() + layer.after.abs()).flatten()
    size += 1e-9 * size.max().clamp(min=1e-30)
    outputs = torch.stack([call.output.flatten() for call in chosen], dim=1)

    def fit(columns: Tensor, copies: int = 1) -> tuple[float, list[float]]:
        weighted = columns / size[:, None]  # every element counts by its own rounding error
        gram, target = weighted.T @ weighted, weighted.T @ (change / size)[:, None]
        solution = torch.linalg.lstsq(gram, target, driver="gelsd").solution.flatten()
        scales = [_round_scale(scale, layer.dtype) for scale in solution.tolist()] * copies
        if min(map(abs, scales)) <= 1e-4:  # an output that does not count
            return math.inf, scales
        terms = outputs * outputs.new_tensor(scales)
        return ((change - terms.sum(1)).abs() / (size + terms.abs().sum(1))).max().item(), scales

    common, separate = fit(outputs.sum(1, keepdim=True), len(chosen)), fit(outputs)
    # most layers have one multiplier; in a separate fit, that of a small output drowns in bfloat16's rounding
    return common if common[0] <= 1.5 * separate[0] else separate


def _round_scale(scale: float, dtype: torch.dtype) -> float:
    """Remove the noise of the fit from a multiplier (0.22 for 0.21999997)."""
    sixteen_bit = dtype in (torch.bfloat16, torch.float16)
    if abs(scale - 1) < (5e-3 if sixteen_bit else 1e-4):
        return 1.0
    return float(f"{scale:.{3 if sixteen_bit else 6}g}")


def _module_of(source: _Call, calls: list[_Call]) -> str:
    """Walk back from a term to the module that reads the last norm or the stream (``fc1`` for ``fc2`` in OPT's FFN)."""
    call, module = source, None
    for _ in calls:
        if call.has_matrix:
            module = call.name
        previous = next((c for c in calls if c is not call and c.output_id == call.input_id), None)
        if previous is None or (previous.is_norm and module is not None):
            break
        call = previous
    return module or source.name
