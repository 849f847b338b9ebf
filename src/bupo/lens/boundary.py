"""The boundary layer, and the regions of depth around it: exploration, integration and convergence.

Section 4 of arXiv 2512.19673: the FFN entropy change ``H(F^l) - H(LN(H^{l-1} + A^l))`` is positive in the first layers
(exploration), about zero in the middle (integration) and negative in the last ones (convergence). The *boundary layer*
is the last layer with a positive change before the shift to integration or convergence. Models that do not show the
pattern have no boundary layer; the reason says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

# "About zero" means within this share of the largest positive change, or within two standard errors of zero. The
# positive changes set the scale: in Llama models they are weak everywhere and still make up the exploration region.
ABOUT_ZERO = 0.15
# At most this share of the layers may have another sign than their region's.
MISFITS = 0.15
_WHAT = "FFN entropy change"
Range = tuple[int, int]


@dataclass(frozen=True)
class Boundary:
    """The boundary layer (from 1) or None, the reason in one sentence, and the regions as inclusive ranges or None."""

    layer: int | None
    reason: str
    exploration: Range | None = None
    integration: Range | None = None
    convergence: Range | None = None

    def regions(self) -> dict[str, list[int] | None]:
        """The regions by name, for the result file."""
        names = ("exploration", "integration", "convergence")
        return {name: None if getattr(self, name) is None else list(getattr(self, name)) for name in names}


class LayerSigns(NamedTuple):
    """Whether the change of each layer is positive, about zero, and negative."""

    positive: list[bool]
    small: list[bool]
    negative: list[bool]


class Split(NamedTuple):
    """Exploration is layers 1..first, integration first+1..last, convergence last+1..L; misfits do not fit theirs."""

    misfits: int
    first: int
    last: int


def find_boundary(ffn_change: Sequence[float], standard_errors: Sequence[float] | None = None) -> Boundary:
    """Split the layers 1..L into the three regions by the sign of the FFN entropy change.

    A layer fits *exploration* if its change is positive and *convergence* if it is negative, each by more than two
    standard errors, and *integration* if it is about zero. Of all splits into consecutive regions, the one with the
    fewest layers that do not fit is chosen; among equals, the one with the smallest squared deviations from the
    regions' means (zero for integration). The integration region may be empty (an abrupt model).

    Args:
        ffn_change: FFN entropy change of layers 1..L, nats.
        standard_errors: of the same, nats; zero where not given or unknown (NaN).
    """
    change = list(ffn_change)
    errors = [0.0 if math.isnan(e) else e for e in standard_errors or [0.0] * len(change)]
    if len(errors) != len(change) or not change:
        raise ValueError("pass one change and one standard error per layer")
    signs = classify_layers(change, errors)
    return _missing_sign(signs) or explain(change, signs, best_split(change, signs))


def classify_layers(change: list[float], errors: list[float]) -> LayerSigns:
    """Tell positive, small and negative changes apart, with two standard errors of noise."""
    zero = ABOUT_ZERO * max(0.0, *change)
    noisy = [(c, 2 * e) for c, e in zip(change, errors, strict=True)]
    return LayerSigns([c > e for c, e in noisy], [abs(c) <= max(e, zero) for c, e in noisy], [c < -e for c, e in noisy])


def best_split(change: list[float], signs: LayerSigns) -> Split | None:
    """The split with the fewest misfits, then the smallest deviations; None if only the last layer is positive."""
    n = len(change)
    not_positive, not_small, not_negative = (_cumulative([not fit for fit in fits]) for fits in signs)
    sums, squares = _cumulative(change), _cumulative([c * c for c in change])

    def spread(start: int, stop: int) -> float:  # squared deviations from the mean of change[start:stop]
        total = sums[stop] - sums[start]
        return max(0.0, squares[stop] - squares[start] - total * total / max(1, stop - start))

    splits = []
    for first in (layer for layer in range(1, n) if signs.positive[layer - 1]):
        for last in range(first, n):
            misfits = not_positive[first] + not_small[last] - not_small[first] + not_negative[n] - not_negative[last]
            deviations = spread(0, first) + squares[last] - squares[first] + spread(last, n)
            splits.append((misfits, deviations, first, last))
    if not splits:
        return None
    misfits, _, first, last = min(splits)
    return Split(int(misfits), first, last)


def explain(change: list[float], signs: LayerSigns, split: Split | None) -> Boundary:
    """The boundary of a split, or the reason why the signs are too disordered to have one."""
    n = len(change)
    allowed = int(MISFITS * n)
    if split is None or split.misfits > allowed:
        signs_text = "".join("+" if p else "-" if m else "0" for p, _, m in zip(*signs, strict=True))
        seen = "only the last layer is positive"
        if split is not None:
            seen = f"{split.misfits} of {n} layers do not fit the best split (at most {allowed} may)"
        return Boundary(
            None, f"the signs of the {_WHAT} do not fall into positive, about zero, negative: {seen}: {signs_text}"
        )
    misfits, first, last = split
    abrupt = last == first
    shift = (
        f"the abrupt convergence from {first + 1} on" if abrupt else f"the shift to integration in layer {first + 1}"
    )
    return Boundary(
        first,
        f"layer {first} is the last with a positive {_WHAT} ({change[first - 1]:+.3g} nats) before {shift}; "
        f"{misfits} of {n} layers do not fit their region",
        exploration=(1, first),
        integration=None if abrupt else (first + 1, last),
        convergence=(last + 1, n),
    )


def _missing_sign(signs: LayerSigns) -> Boundary | None:
    """The reason for no boundary where a sign is missing, and the region that all layers form, if they do."""
    n = len(signs.positive)
    if all(signs.negative):
        reason = (
            f"the {_WHAT} is negative in every layer (1 to {n}): there is no exploration region, so the rule gives no"
        )
        return Boundary(None, f"{reason} boundary layer", convergence=(1, n))
    if all(signs.positive):
        reason = f"the {_WHAT} is positive in every layer (1 to {n}): it never shifts to integration or convergence, so"
        return Boundary(None, f"{reason} the rule would only return the last layer, which is no boundary", (1, n))
    for present, side, region in ((signs.positive, "above", "exploration"), (signs.negative, "below", "convergence")):
        if not any(present):
            reason = f"the {_WHAT} is {side} zero by two standard errors in no layer: no {region} region"
            return Boundary(None, reason)
    return None


def _cumulative(values: Sequence[float]) -> list[float]:
    """Sums of the first 0, 1, 2, ... values."""
    return list(accumulate(values, initial=0.0))
