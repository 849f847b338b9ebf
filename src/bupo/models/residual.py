"""Finds what each layer adds to the residual stream on a short probe batch, instead of trusting submodule names.

One forward pass records the input and output of each layer and its submodules. The two contributions are then solved
for: ``H^l - H^{l-1} = a * A^l + b * F^l``, with the multipliers a and b that some architectures apply (Granite).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise

import torch
from torch import Tensor, nn

from bupo.errors import InputError
from bupo.models.layout import DecoderLayout, eval_mode, find_layout, first_tensor, module_input, unwrap

# Allowed deviation from the residual identity, relative to the size of the terms, element by element: a few rounding
# errors of the dtype in which the layer adds.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
TensorId = tuple[int, torch.Size]  # address and shape: the same for two modules that pass one tensor on


@dataclass(frozen=True)
class ResidualWrite:
    """One contribution of a layer to the residual stream: the sum of ``scale`` times the output of ``submodule``.

    Attributes:
        module: path of the attention or FFN within the layer; it receives ``LN(...)`` of the stream.
        terms: (submodule, scale) pairs, paths within the layer. Most models have one term. Its submodule differs from
            ``module`` where a norm follows before the sum (Gemma-2, OLMo-2) or the sum is computed inside ``module``
            (BLOOM). There are two terms where modules run side by side (Falcon-H1, Granite's shared expert).
    """

    module: str
    terms: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        return " + ".join(name if scale == 1.0 else f"{scale:g} * {name}" for name, scale in self.terms)


@dataclass(frozen=True)
class LayerWrites:
    """The two contributions of one layer, and the relative deviation of ``H^{l-1} + A^l + F^l`` from ``H^l``."""

    attn: ResidualWrite
    ffn: ResidualWrite
    deviation: float


@dataclass(eq=False)
class ModuleCall:
    """One call of a submodule."""

    name: str
    input_id: TensorId | None
    output_id: TensorId
    output: Tensor  # float64 copy, (tokens, d)
    has_matrix: bool  # has a matrix of parameters: an attention or FFN rather than a norm or dropout
    is_norm: bool


@dataclass
class LayerIO:
    """One call of a layer: input and output as float64 copies (tokens, d), its dtype, its submodules' calls."""

    before: Tensor
    after: Tensor
    dtype: torch.dtype
    calls: list[ModuleCall]


class _Recording:
    """The calls of all layers and of their submodules (with ``nested``, at any depth) in one probe forward."""

    def __init__(self, model: nn.Module, layout: DecoderLayout, *, nested: bool):
        self.layers: list[list[LayerIO]] = [[] for _ in layout.layers]
        self.norm_inputs: list[Tensor] = []
        self._alive: list[Tensor] = []  # keeps tensors alive during the forward, so that an address names one tensor
        hooks = [layout.final_norm.register_forward_pre_hook(self._on_norm, with_kwargs=True)]
        for layer, ios in zip(layout.layers, self.layers, strict=True):
            calls: list[ModuleCall] = []
            hooks.append(layer.register_forward_hook(partial(self._on_layer, ios, calls), with_kwargs=True))
            for name, child in layer.named_modules() if nested else layer.named_children():
                if name:
                    hooks.append(child.register_forward_hook(partial(self._on_child, calls, name), with_kwargs=True))
        try:
            _run_probe(model, layout)
        finally:
            for hook in hooks:
                hook.remove()
            self._alive.clear()

    def _id(self, tensor: Tensor) -> TensorId:
        self._alive.append(tensor)
        return tensor.data_ptr(), tensor.reshape(-1, tensor.shape[-1]).shape

    def _on_norm(self, module, args, kwargs):
        if (hidden := module_input(args, kwargs)) is not None:
            self.norm_inputs.append(_copy(hidden))

    def _on_layer(self, ios, calls, module, args, kwargs, output):
        before, after = module_input(args, kwargs), first_tensor(output)
        if before is not None and after is not None:
            ios.append(LayerIO(_copy(before), _copy(after), after.dtype, calls))

    def _on_child(self, calls, name, module, args, kwargs, output):
        before, after = module_input(args, kwargs), first_tensor(output)
        if after is None or after.ndim < 2:
            return
        is_norm = "norm" in type(module).__name__.lower()
        # a quantised linear map may have no parameters, but it has `in_features`
        has_matrix = not is_norm and (
            any(p.ndim >= 2 for p in module.parameters()) or any(hasattr(m, "in_features") for m in module.modules())
        )
        input_id = None if before is None else self._id(before)
        # a copy, because some layers (Falcon) add to this tensor in place afterwards
        calls.append(ModuleCall(name, input_id, self._id(after), _copy(after), has_matrix, is_norm))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1]).to("cpu", copy=True).double()  # MPS has no float64


def _run_probe(model: nn.Module, layout: DecoderLayout) -> None:
    inner = unwrap(model)
    embedding = inner.get_input_embeddings().weight
    # where the embedding is offloaded, the library's own hooks move the inputs to where they are needed
    device = layout.unembedding.weight.device if embedding.is_meta else embedding.device
    tokens = (torch.arange(16, device=device).view(2, 8) * 7 + 3) % len(embedding)
    with eval_mode(inner), torch.no_grad():
        layout.backbone(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)


_cache: weakref.WeakKeyDictionary[nn.Module, tuple[LayerWrites, ...]] = weakref.WeakKeyDictionary()


def find_residual_writes(model: nn.Module) -> tuple[LayerWrites, ...]:
    """Find what each layer adds to the residual stream, checked on a probe batch and cached per model.

    Returns one :class:`LayerWrites` per layer.

    Raises:
        InputError: the layers do not pass one stream on to each other and to the final norm, or the outputs of some
            layer's submodules do not add up to ``H^l - H^{l-1}``; the message names the layer and the deviation.
    """
    inner = unwrap(model)
    if inner in _cache:
        return _cache[inner]
    layout = find_layout(model)
    recording = _Recording(model, layout, nested=False)
    _check_stream(recording, type(inner).__name__)
    nested: _Recording | None = None
    writes = []
    for index, (io,) in enumerate(recording.layers):
        try:
            writes.append(_solve_layer(index + 1, io))
        except InputError:
            # where the sum is computed inside a submodule (BLOOM, MPT), its terms are found among nested submodules
            nested = nested or _Recording(model, layout, nested=True)
            if (solution := _solve_nested(nested.layers[index][0])) is None:
                raise
            writes.append(solution)
    _cache[inner] = tuple(writes)
    return _cache[inner]


def _check_stream(recording: _Recording, name: str) -> None:
    """Check that the layers run once each, in order, on one stream, which reaches the final norm unchanged."""
    previous: Tensor | None = None
    for layer, ios in enumerate(recording.layers, start=1):
        problem = None
        if len(ios) != 1:
            problem = f"ran {len(ios)} times in one forward" if ios else "did not run as a module with hidden states"
        elif ios[0].before.shape != ios[0].after.shape:
            problem = "changes the shape of its input"
        elif previous is not None and not torch.equal(previous, ios[0].before):
            problem = f"does not receive what layer {layer - 1} returned (the model changes the stream between layers)"
        if problem:
            raise InputError(f"{name}: layer {layer} {problem}; this layout cannot be read")
        previous = ios[0].after
    # NanoChat applies this norm to the embedding too: the last call counts
    last = recording.norm_inputs[-1] if recording.norm_inputs else None
    if last is None or previous is None or last.shape != previous.shape or not torch.equal(last, previous):
        raise InputError(
            f"{name}: the final norm does not receive what the last layer returned; this layout cannot be read"
        )


def _solve_layer(layer: int, io: LayerIO) -> LayerWrites:
    tolerance, candidates = _TOLERANCE.get(io.dtype, 2e-2), _candidates(io)
    best: tuple[float, list[ModuleCall], list[float]] | None = None
    for size in (2, 3):  # two contributions, or one of them the sum of two modules that run side by side
        for chosen in combinations(candidates, size):
            deviation, scales = _fit(io, chosen)
            if deviation < (math.inf if best is None else best[0] * 0.5):
                best = (deviation, list(chosen), scales)
        if best is not None and best[0] <= tolerance:
            deviation, terms, scales = best
            cut = _attention_terms(terms, io.calls)
            pairs = tuple((call.name, scale) for call, scale in zip(terms, scales, strict=True))
            attn = ResidualWrite(_module_of(terms[0], io.calls), pairs[:cut])
            return LayerWrites(attn, ResidualWrite(_module_of(terms[cut], io.calls), pairs[cut:]), deviation)
    names = ", ".join(dict.fromkeys(call.name for call in io.calls)) or "none"
    for call in candidates:
        if _fit(io, [call])[0] <= tolerance:
            raise InputError(
                f"layer {layer} adds one contribution only ({call.name}) to the residual stream: it has no separate "
                f"attention and FFN to read (component 'layer' works); its submodules are: {names}"
            )
    closest = f"{best[0]:.1e} ({' + '.join(c.name for c in best[1])})" if best else "unknown (no pair of submodules)"
    raise InputError(
        f"layer {layer}: no submodules' outputs add up to what the layer adds to the residual stream "
        f"(H^(l-1) + A + F = H^l): the smallest relative deviation is {closest}, "
        f"allowed {tolerance:.0e}; its submodules are: {names}"
    )


def _solve_nested(io: LayerIO) -> LayerWrites | None:
    """Find two terms inside two different submodules of the layer; None if there are none."""
    for chosen in combinations(_candidates(io), 2):
        modules = [call.name.split(".")[0] for call in chosen]
        deviation, scales = _fit(io, chosen) if modules[0] != modules[1] else (math.inf, [])
        if deviation <= _TOLERANCE.get(io.dtype, 2e-2):
            attn, ffn = (ResidualWrite(modules[i], ((chosen[i].name, scales[i]),)) for i in (0, 1))
            return LayerWrites(attn, ffn, deviation)
    return None


def _candidates(io: LayerIO) -> list[ModuleCall]:
    """Select the outputs that the layer may have added to the stream: of its shape, and not a norm of the stream."""
    first = next((i for i, call in enumerate(io.calls) if call.has_matrix), len(io.calls))
    candidates: dict[TensorId, ModuleCall] = {}
    for index, call in enumerate(io.calls):
        if call.output.shape == io.after.shape and not (call.is_norm and index < first):
            candidates.setdefault(call.output_id, call)  # a dropout in evaluation mode returns its input
    return list(candidates.values())


def _fit(io: LayerIO, chosen: Sequence[ModuleCall]) -> tuple[float, list[float]]:
    """Fit the layer's change as a weighted sum of the chosen outputs.

    Returns the largest relative deviation (infinite if an output's scale is too small to count) and the scales.
    """
    change = (io.after - io.before).flatten()
    size = (io.before.abs() + io.after.abs()).flatten()
    size += 1e-9 * size.max().clamp(min=1e-30)
    outputs = torch.stack([call.output.flatten() for call in chosen], dim=1)

    def solve(columns: Tensor) -> list[float]:
        weighted = columns / size[:, None]  # every element counts by its own rounding error
        gram, target = weighted.T @ weighted, weighted.T @ (change / size)[:, None]
        solution = torch.linalg.lstsq(gram, target, driver="gelsd").solution
        return [_round_scale(scale, io.dtype) for scale in solution.flatten().tolist()]

    def deviation(scales: list[float]) -> float:
        if min(map(abs, scales)) <= 1e-4:
            return math.inf
        terms = outputs * outputs.new_tensor(scales)
        return ((change - terms.sum(1)).abs() / (size + terms.abs().sum(1))).max().item()

    separate = solve(outputs)
    common = solve(outputs.sum(1, keepdim=True)) * len(chosen)
    fits = [(deviation(common), common), (deviation(separate), separate)]
    # most layers have one multiplier; in a separate fit, that of a small output drowns in bfloat16's rounding
    return fits[0] if fits[0][0] <= 1.5 * fits[1][0] else fits[1]


def _round_scale(scale: float, dtype: torch.dtype) -> float:
    """Remove the noise of the fit from a multiplier (0.22 for 0.21999997)."""
    sixteen_bit = dtype in (torch.bfloat16, torch.float16)
    if abs(scale - 1) < (5e-3 if sixteen_bit else 1e-4):
        return 1.0
    return float(f"{scale:.{3 if sixteen_bit else 6}g}")


def _attention_terms(terms: list[ModuleCall], calls: list[ModuleCall]) -> int:
    """How many of the terms make up A: of three, those before a norm that runs between them."""
    if len(terms) == 2:
        return 1
    places = [calls.index(call) for call in terms]
    norm_between = [any(c.is_norm for c in calls[a + 1 : b]) for a, b in pairwise(places)]
    return 1 if norm_between[0] or not norm_between[1] else 2


def _module_of(source: ModuleCall, calls: list[ModuleCall]) -> str:
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
