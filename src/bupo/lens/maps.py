"""Lenses: one affine map per layer in front of the final norm, ``softmax(LN(A_l H^l + b_l) E_u^T)``.

``raw`` has neither map nor norm (Eq. 5 of arXiv 2512.19673), ``norm`` is the usual logit lens, ``ridge`` is the least
squares map from H^l to H^L (arXiv 2303.09435). `bupo.lens.published` reads Jacobian and tuned lenses.

Shape legend: L layers, N tokens, d width.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from bupo.errors import InputError
from bupo.lens.batching import TokenPair, check_rollouts, subsample
from bupo.lens.readings import KINDS, DrawnStates, Progress, draw_states, read_states
from bupo.lens.ridge import sum_states
from bupo.models.layout import eval_mode, find_layout, unwrap
from bupo.models.load import model_revision
from bupo.run_folder import LENS_CARD, read_json, versions, write_bytes, write_json

WEIGHTS = "lens.safetensors"
TOKENS_PER_DIMENSION = 8  # response tokens that a fit should have
FACTORS = (1e-3, 1e-2, 1e-1, 1.0, math.inf)  # of the ridge term; the last leaves the states as they are (`norm`)
_IDENTITY = ("model", "revision", "architecture")
LEAST_PROMPTS = 4  # for a lens that is fitted on the responses to half of the prompts
HELD_OUT = 4  # the responses to every fourth prompt are held out
_FACTOR_TOKENS, _CARD_TOKENS = 64, 128  # held-out tokens that choose the factors, and that the card's figures are of


@dataclass(frozen=True)
class Lens:
    """A way to read every layer of one model; layers count from 1, and layer L is always the model's own output.

    Attributes:
        kind: ``raw``, ``norm``, ``ridge``, ``jacobian`` or ``tuned``.
        maps, biases: A_l (L-1, d, d) and b_l (L-1, d) of layers 1..L-1 in float32; None for ``raw`` and ``norm``.
        card: where the maps come from and how well they read held-out responses, as saved in ``lens.json``.
    """

    kind: str
    maps: Tensor | None = None
    biases: Tensor | None = None
    card: dict[str, Any] = field(default_factory=dict, compare=False)
    _placed: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def norm(self) -> bool:
        """Whether the final norm is applied after the map."""
        return self.kind != "raw"

    @property
    def width(self) -> int:
        """The width d of the states that the maps take; 0 without maps."""
        return 0 if self.maps is None else self.maps.shape[-1]

    def transport(self, layer: int, states: Tensor, *, linear: bool = False) -> Tensor:
        """Map states (..., d) of ``layer`` to the output's basis, before the final norm.

        Gradients flow through the states and never into the map. ``linear`` leaves out the bias, for what a module
        adds to the stream.
        """
        if self.maps is None or layer > len(self.maps):
            return states
        key = (layer, states.device, states.dtype)
        if key not in self._placed:
            assert self.biases is not None
            self._placed[key] = (self.maps[layer - 1].to(states), self.biases[layer - 1].to(states))
        weight, bias = self._placed[key]
        return functional.linear(states, weight, None if linear else bias)

    @classmethod
    def identity(cls) -> Self:
        """The usual logit lens: the final norm and no map (``norm``)."""
        return cls("norm")

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        responses: Sequence[Any],
        *,
        batch_tokens: int = 2048,
        seed: int = 0,
        share: bool = False,
        progress: Progress | None = None,
    ) -> Self:
        """Fit a ridge lens on all response tokens; the arguments are those of `bupo.analyze_rollouts`.

        The maps of layer l are first fitted on three of four prompts with several ridge factors. The factor whose map
        reads the other prompts' responses best, by KL(full policy || lens), is taken for the fit on all of them. The
        card holds how well the first maps read the held-out responses (``held_out``), beside ``raw`` and ``norm``.

        Raises:
            InputError: unusable responses, responses to a single prompt, or states that are not finite.
        """
        pairs = check_rollouts(model, responses)
        part = _by_prompt(pairs, HELD_OUT)
        if not part[0]:
            raise InputError("a lens needs responses to two or more prompts, because it is checked on prompts left out")
        tokens = [range(len(pair.response_ids)) for pair in pairs]
        done, total = 0, sum(map(len, tokens))

        def advance(n: int) -> None:
            nonlocal done
            done += n
            if progress is not None:
                progress("fitting maps", min(done, total), total)

        how: dict[str, Any] = {"batch_tokens": batch_tokens, "share": share, "on_tokens": advance}
        with eval_mode(unwrap(model)):
            fitted, rest = (sum_states(model, pairs, tokens, indices, **how) for indices in part)
        if not bool(torch.isfinite(fitted.values).all() and torch.isfinite(rest.values).all()):
            raise InputError("the states of this model are not finite; check its weights, or load it in a wider dtype")
        checked, layers = [pairs[i] for i in part[1]], len(fitted.values)
        draw = partial(subsample, [len(pair.response_ids) for pair in checked], seed=seed)
        drawn = draw_states(model, checked, draw(_CARD_TOKENS))
        candidates = [cls("ridge", *fitted.solve([factor] * layers)) for factor in FACTORS]
        read = read_states(model, drawn.only(draw(_FACTOR_TOKENS)), candidates)  # with one seed, these are among those
        best = read.values[:, KINDS.index("kl"), :-1].mean(-1).argmin(0)
        factors = [FACTORS[i] for i in best.tolist()]
        card = identity_of(model) | {
            "tokens": fitted.tokens + rest.tokens,
            "responses": len(pairs),
            "ridge_factors": [None if math.isinf(factor) else factor for factor in factors],  # None: no map
            "held_out": cls("ridge", *fitted.solve(factors))._compare(model, drawn),
        }
        return cls("ridge", *(fitted + rest).solve(factors), card)

    def measure(self, model: nn.Module, responses: Sequence[Any], *, seed: int = 0) -> dict[str, Any]:
        """Compare ``raw``, ``norm`` and this lens on responses it was not fitted on (``held_out`` of a card)."""
        pairs = check_rollouts(model, responses)
        drawn = subsample([len(pair.response_ids) for pair in pairs], _CARD_TOKENS, seed)
        return self._compare(model, draw_states(model, pairs, drawn))

    def _compare(self, model: nn.Module, drawn: DrawnStates) -> dict[str, Any]:
        readings = read_states(model, drawn, [*PLAIN.values(), self])
        counts = {"tokens": sum(readings.counts), "responses": len(readings.counts)}
        return counts | dict(zip(("curves", "standard_errors"), readings.curves([*PLAIN, self.kind]), strict=True))

    def check(self, model: nn.Module) -> Self:
        """Return this lens if it belongs to ``model``, with a warning if it was made on another revision of it.

        Raises:
            InputError: another architecture, number of layers or width.
        """
        if self.maps is None:
            return self
        layers, width = find_layout(model).n_layers, find_layout(model).unembedding.weight.shape[1]
        if self.maps.shape != (layers - 1, width, width):
            raise InputError(
                f"this {self.kind} lens is for {len(self.maps) + 1} layers of width {self.maps.shape[-1]}, but the "
                f"model has {layers} layers of width {width}; use the lens of this model"
            )
        made, used = {key: self.card.get(key) for key in _IDENTITY}, identity_of(model)
        if made["architecture"] not in (None, used["architecture"]):
            raise InputError(f"this lens was made on {made['architecture']}, but the model is {used['architecture']}")
        if made["model"] is not None and made != {**used, "architecture": made["architecture"]}:
            names = (f"{one['model']} (revision {one['revision'] or 'unknown'})" for one in (made, used))
            warnings.warn("this lens was made on {}, and is used on {}".format(*names), stacklevel=2)
        return self

    def save(self, folder: str | Path) -> Path:
        """Write ``lens.safetensors`` and its card ``lens.json`` into a folder, and return the folder."""
        if self.maps is None or self.biases is None:
            raise InputError(f"the lens {self.kind} has no maps to save")
        tensors = {"maps": self.maps.contiguous(), "biases": self.biases.contiguous()}
        # without the card there is no lens: an old one never meets new maps
        (Path(folder) / LENS_CARD).unlink(missing_ok=True)
        write_bytes(Path(folder) / WEIGHTS, save(tensors))
        write_json(Path(folder) / LENS_CARD, {"schema": 1, "kind": self.kind, **self.card, "versions": versions()})
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a folder that `save` wrote.

        Raises:
            InputError: the folder holds no lens, or its files do not belong together.
        """
        folder = Path(folder)
        try:
            card = read_json(folder / LENS_CARD)
            tensors = load_file(folder / WEIGHTS)
            lens = cls(card["kind"], tensors["maps"], tensors["biases"], card)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(f"{folder} holds no lens ({LENS_CARD} and {WEIGHTS}): {error}") from error
        return lens.complete()

    def complete(self) -> Self:
        """Return this lens if its maps are finite and their shapes agree; raise `InputError` otherwise."""
        maps, biases = self.maps, self.biases
        if maps is None or biases is None or maps.ndim != 3 or maps.shape[1] != maps.shape[2]:
            raise InputError(f"a {self.kind} lens needs one square matrix per layer")
        if biases.shape != maps.shape[:2]:
            raise InputError(f"a {self.kind} lens needs one bias vector per layer, as wide as its matrices")
        if not bool(torch.isfinite(maps).all() and torch.isfinite(biases).all()):
            raise InputError(f"this {self.kind} lens holds numbers that are not finite; fit or download it again")
        return self


PLAIN = {"raw": Lens("raw"), "norm": Lens("norm")}


def named_lens(name: str | Lens) -> Lens:
    """Return the lens that a user names: ``raw``, ``norm``, or the folder of a saved one."""
    return name if isinstance(name, Lens) else PLAIN.get(name) or Lens.load(name)


def fit_on_half(model: nn.Module, pairs: Sequence[TokenPair], **how: Any) -> tuple[Lens, list[TokenPair]]:
    """Fit a ridge lens on the responses to every other prompt; return it with the other responses, to be read."""
    if len(set(map(_prompt, pairs))) < LEAST_PROMPTS:
        raise InputError("a ridge lens needs responses to four or more prompts; pass more, or a --lens without ridge")
    read, fitted = ([pairs[i] for i in part] for part in _by_prompt(pairs, 2))
    return Lens.fit(model, fitted, **how), read


def _by_prompt(pairs: Sequence[TokenPair], every: int) -> tuple[list[int], list[int]]:
    """The indices of the responses to every n-th prompt (or the last of fewer), after those of the others."""
    names = list(map(_prompt, pairs))
    prompts = list(dict.fromkeys(names))
    chosen = set(prompts[every - 1 :: every] or prompts[-1:])
    others = [i for i, name in enumerate(names) if name not in chosen]
    return others, [i for i, name in enumerate(names) if name in chosen]


def _prompt(pair: TokenPair) -> tuple[Any, ...]:
    """What tells prompts apart: the same words about another image are another prompt."""
    return (*pair.prompt_ids, pair.problem_id if pair.image_inputs else None)


def identity_of(model: nn.Module) -> dict[str, str | None]:
    """What tells models apart: name, revision and architecture, where they are known."""
    inner: Any = unwrap(model)
    name = getattr(inner.config, "_name_or_path", "") or None
    return dict(zip(_IDENTITY, (name, model_revision(inner), type(inner).__name__), strict=True))
