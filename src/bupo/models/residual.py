"""What every layer adds to the residual stream, found and checked on a short probe batch instead of trusted by name.

One forward records each layer's input and output and those of its submodules. The two contributions are then solved
for: ``H^l - H^{l-1} = a * A^l + b * F^l`` (Eq. 4 of arXiv 2512.19673, with the multipliers some architectures apply).

Shape legend: B batch, T positions, d width.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import torch
from torch import Tensor, nn

from bupo.errors import InputError
from bupo.models.layout import DecoderLayout, eval_mode, find_layout, first_tensor, module_input, unwrap

# Deviation allowed in the residual identity, relative to the size of what is summed, element by element: a few
# roundings of the dtype that the layer adds in.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class ResidualWrite:
    """One contribution of a layer to the residual stream: the sum of ``scale`` times the output of ``submodule``.

    Attributes:
        module: the attention or FFN itself; its input is the ``LN(...)`` of Eq. 12-13.
        terms: (submodule, scale) pairs, paths within the layer. One for most models. The submodule differs from
            ``module`` where a norm follows before the sum (Gemma-2, OLMo-2) or the sum is made inside ``module``
            (BLOOM); there are two where modules run side by side (Falcon-H1, Granite's shared expert).
    """

    module: str
    terms: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        return " + ".join(name if scale == 1.0 else f"{scale:g} * {name}" for name, scale in self.terms)


@dataclass(frozen=True)
class LayerWrites:
    """The two contributions of one layer, and how far ``H^{l-1} + A^l + F^l`` was from ``H^l`` on the probe batch."""

    attn: ResidualWrite
    ffn: ResidualWrite
    deviation: float


@dataclass
class _Call:
    name: str
    given: tuple[int, torch.Size] | None  # identity of the input tensor
    made: tuple[int, torch.Size]  # identity of the output tensor
    output: Tensor  # float64 copy, (B*T, d)
    has_matrix: bool  # has a matrix of parameters: an attention or FFN rather than a norm or dropout
    is_norm: bool


@dataclass
class _Ends:
    before: Tensor
    after: Tensor
    dtype: torch.dtype


class _Probe:
    """Records, for every layer, its input and output and those of its submodules, on one short forward."""

    def __init__(self, layout: DecoderLayout, *, deep: bool):
        self.calls: list[list[_Call]] = [[] for _ in layout.layers]
        self.ends: list[list[_Ends]] = [[] for _ in layout.layers]
        self.normed: list[Tensor] = []  # what the final norm received
        self.alive: list[Tensor] = []  # keeps recorded tensors alive, so that an address names one tensor
        self.hooks = [layout.final_norm.register_forward_pre_hook(self._norm_hook, with_kwargs=True)]
        for index, layer in enumerate(layout.layers):
            self.hooks.append(layer.register_forward_hook(self._layer_hook(index), with_kwargs=True))
            for name, child in layer.named_modules() if deep else layer.named_children():
                if name:
                    self.hooks.append(child.register_forward_hook(self._child_hook(index, name), with_kwargs=True))

    def _identity(self, tensor: Tensor | None) -> tuple[int, torch.Size] | None:
        if tensor is None:
            return None
        self.alive.append(tensor)
        return tensor.data_ptr(), tensor.reshape(-1, tensor.shape[-1]).shape

    def _norm_hook(self, module, args, kwargs):
        given = module_input(args, kwargs)
        if given is not None:
            self.normed.append(_flat(given))

    def _layer_hook(self, index: int):
        def hook(module, args, kwargs, output):
            given, made = module_input(args, kwargs), first_tensor(output)
            if given is not None and made is not None:
                self.ends[index].append(_Ends(_flat(given), _flat(made), made.dtype))

        return hook

    def _child_hook(self, index: int, name: str):
        def hook(module, args, kwargs, output):
            given, made = module_input(args, kwargs), first_tensor(output)
            if made is None or made.ndim < 2:
                return
            made_identity = self._identity(made)
            assert made_identity is not None
            # quantised linear maps may hold no parameters, but say how wide they are
            has_matrix = any(p.ndim >= 2 for p in module.parameters()) or any(
                hasattr(m, "in_features") for m in module.modules()
            )
            is_norm = "norm" in type(module).__name__.lower()
            # some layers (Falcon) add in place afterwards: keep a copy of the value, not the tensor
            self.calls[index].append(
                _Call(name, self._identity(given), made_identity, _flat(made), has_matrix and not is_norm, is_norm)
            )

        return hook

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1]).to("cpu", torch.float64, copy=True)


def _run(model: nn.Module, layout: DecoderLayout, *, deep: bool) -> _Probe:
    inner = unwrap(model)
    probe = _Probe(layout, deep=deep)
    try:
        device = inner.get_input_embeddings().weight.device
        if device.type == "meta":  # offloaded: the library's own hooks bring inputs to where they are needed
            device = layout.unembedding.weight.device
        vocabulary = inner.get_input_embeddings().weight.shape[0]
        tokens = (torch.arange(16, device=device).view(2, 8) * 7 + 3) % vocabulary
        with eval_mode(inner), torch.no_grad():
            layout.backbone(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    finally:
        probe.close()
    return probe


_blocks: weakref.WeakKeyDictionary[nn.Module, tuple[LayerWrites, ...]] = weakref.WeakKeyDictionary()


def find_residual_writes(model: nn.Module, *, refresh: bool = False) -> tuple[LayerWrites, ...]:
    """What every layer adds to the residual stream, found and checked on a probe batch (cached per model).

    Returns one :class:`LayerWrites` a layer.

    Raises:
        InputError: the layers do not pass one stream on to each other and to the final norm, or for some layer no
            submodules' outputs make up ``H^l - H^{l-1}``; the message names the layer, the smallest deviation and the
            submodules seen.
    """
    inner = unwrap(model)
    if not refresh and inner in _blocks:
        return _blocks[inner]
    layout = find_layout(model)
    probe = _run(model, layout, deep=False)
    _check_stream(probe, type(inner).__name__)
    blocks: list[LayerWrites] = []
    for index in range(layout.n_layers):
        try:
            blocks.append(_solve_block(index + 1, probe.ends[index][0], probe.calls[index]))
        except InputError:
            # where the sum is made inside a submodule (BLOOM, MPT), the addends are found one level further down
            deep = _run(model, layout, deep=True)
            block = _solve_deep(index + 1, deep.ends[index][0], deep.calls[index])
            if block is None:
                raise
            blocks.append(block)
    _blocks[inner] = tuple(blocks)
    return _blocks[inner]


def _check_stream(probe: _Probe, name: str) -> None:
    """The layers run once each, one after another on one stream, and the final norm receives what the last returned."""
    previous: Tensor | None = None
    for layer, ends in enumerate(probe.ends, start=1):
        if len(ends) != 1:
            what = "did not run as a module with hidden states" if not ends else f"ran {len(ends)} times"
            raise InputError(f"{name}: layer {layer} {what} in one forward; this layout cannot be read")
        before, after = ends[0].before, ends[0].after
        if before.shape != after.shape:
            raise InputError(
                f"{name}: layer {layer} returns another shape than it receives; no residual stream to read"
            )
        if previous is not None and not torch.equal(previous, before):
            raise InputError(
                f"{name}: layer {layer} does not receive what layer {layer - 1} returned (the model changes the stream "
                f"between its layers); this layout cannot be read"
            )
        previous = after
    # NanoChat's norm also serves the embedding: its last call counts
    last = probe.normed[-1] if probe.normed else None
    if last is None or previous is None or last.shape != previous.shape or not torch.equal(last, previous):
        raise InputError(
            f"{name}: the final norm does not receive what layer {len(probe.ends)} returned; this layout cannot be read"
        )


def _solve_block(layer: int, ends: _Ends, calls: list[_Call]) -> LayerWrites:
    tolerance = _tolerance(ends.dtype)
    candidates = _candidates(ends, calls)
    best: tuple[float, list[_Call], list[float]] | None = None
    for size in (2, 3):  # two contributions, or one of them the sum of two modules that run side by side
        for chosen in combinations(candidates, size):
            deviation, scales = _fit(ends, chosen)
            if min(map(abs, scales)) > 1e-4 and (best is None or deviation < best[0] * 0.5):
                best = (deviation, list(chosen), scales)
        if best is not None and best[0] <= tolerance:
            deviation, found, scales = best
            cut = _cut(found, calls)
            return LayerWrites(
                _part(found[:cut], scales[:cut], calls), _part(found[cut:], scales[cut:], calls), deviation
            )
    names = ", ".join(dict.fromkeys(call.name for call in calls)) or "none"
    for call in candidates:
        deviation, scales = _fit(ends, [call])
        if deviation <= tolerance and abs(scales[0]) > 1e-4:
            raise InputError(
                f"layer {layer} adds one contribution only ({call.name}) to the residual stream: it has no separate "
                f"attention and FFN to read (component 'layer' works); submodules seen: {names}"
            )
    smallest = (
        f"smallest relative deviation {best[0]:.1e} ({' + '.join(c.name for c in best[1])})" if best else "no pair"
    )
    raise InputError(
        f"layer {layer}: no submodules' outputs add up to what the layer adds to the residual stream "
        f"(H^(l-1) + A + F = H^l): {smallest}, allowed {tolerance:.0e}; submodules seen: {names}"
    )


def _solve_deep(layer: int, ends: _Ends, calls: list[_Call]) -> LayerWrites | None:
    """Two addends inside two different submodules of the layer; None if there are none."""
    candidates = _candidates(ends, calls)
    for chosen in combinations(candidates, 2):
        tops = [call.name.split(".")[0] for call in chosen]
        if tops[0] == tops[1]:
            continue
        deviation, scales = _fit(ends, chosen)
        if deviation <= _tolerance(ends.dtype) and min(map(abs, scales)) > 1e-4:
            parts = [ResidualWrite(top, ((c.name, a),)) for top, c, a in zip(tops, chosen, scales, strict=True)]
            return LayerWrites(parts[0], parts[1], deviation)
    return None


def _tolerance(dtype: torch.dtype) -> float:
    return _TOLERANCE.get(dtype, 2e-2)


def _candidates(ends: _Ends, calls: Sequence[_Call]) -> list[_Call]:
    """Outputs that may have been added to the stream: of its shape, no norms of the stream itself, no aliases.

    A dropout in evaluation returns its input: the first name is kept.
    """
    first = next((i for i, call in enumerate(calls) if call.has_matrix), len(calls))
    seen: dict[tuple[int, torch.Size], _Call] = {}
    for index, call in enumerate(calls):
        if call.output.shape == ends.after.shape and not (call.is_norm and index < first):
            seen.setdefault(call.made, call)
    return list(seen.values())


def _fit(ends: _Ends, chosen: Sequence[_Call]) -> tuple[float, list[float]]:
    """Scales that best make up the layer's change from the chosen outputs, and the largest deviation they leave."""
    change = (ends.after - ends.before).flatten()
    size = (ends.before.abs() + ends.after.abs()).flatten()
    size += 1e-9 * size.max().clamp(min=1e-30)
    outputs = torch.stack([call.output.flatten() for call in chosen], dim=1)

    def solve(columns: Tensor) -> list[float]:
        weighted = columns / size[:, None]  # every element counts by its own rounding error
        gram, target = weighted.T @ weighted, weighted.T @ (change / size)[:, None]
        half = ends.dtype in (torch.bfloat16, torch.float16)
        return [_tidy(x, half) for x in torch.linalg.lstsq(gram, target, driver="gelsd").solution.flatten().tolist()]

    def deviation(scales: list[float]) -> float:
        parts = outputs * outputs.new_tensor(scales)
        return ((change - parts.sum(1)).abs() / (size + parts.abs().sum(1))).max().item()

    own = solve(outputs)
    common = solve(outputs.sum(1, keepdim=True)) * len(chosen)
    found = [(deviation(common), common), (deviation(own), own)]
    # a layer has one multiplier as a rule; fitted apart, that of a small output drowns in bfloat16's rounding
    return found[0] if found[0][0] <= 1.5 * found[1][0] else found[1]


def _tidy(scale: float, half: bool) -> float:
    """A multiplier without the noise of the fit (0.22 for 0.21999997)."""
    if abs(scale - 1) < (5e-3 if half else 1e-4):
        return 1.0
    return float(f"{scale:.{3 if half else 6}g}")


def _cut(found: list[_Call], calls: list[_Call]) -> int:
    """How many of the outputs make up A: those before a norm that runs between them, where there are three."""
    if len(found) == 2:
        return 1
    places = [calls.index(call) for call in found]
    between = [any(c.is_norm for c in calls[a + 1 : b]) for a, b in pairwise(places)]
    return 1 if between[0] or not between[1] else 2


def _part(sources: list[_Call], scales: list[float], calls: list[_Call]) -> ResidualWrite:
    terms = tuple((call.name, scale) for call, scale in zip(sources, scales, strict=True))
    return ResidualWrite(_module_of(sources[0], calls), terms)


def _module_of(source: _Call, calls: list[_Call]) -> str:
    """Walk back along the data flow from what is added to the stream to the attention or FFN that made it.

    Its input is the last norm before it, or the stream: OPT's FFN begins with ``fc1``, though ``fc2`` makes its output.
    """
    call, found = source, None
    for _ in calls:
        if call.has_matrix:
            found = call.name
        previous = next((c for c in calls if c is not call and c.made == call.given), None)
        if previous is None or (previous.is_norm and found is not None):
            break
        call = previous
    return found or source.name
