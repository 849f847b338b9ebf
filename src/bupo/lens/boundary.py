"""The boundary layer, and the regions of depth around it: exploration, integration and convergence.

Section 4 of arXiv 2512.19673: the FFN entropy change ``H(F^l) - H(LN(H^{l-1} + A^l))`` is positive in the first layers
(exploration), about zero in the middle (integration) and negative in the last ones (convergence). The *boundary layer*
is the last layer with a positive change before the shift to integration or convergence. Models that do not show the
pattern have no boundary layer; the reason says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

# "About zero" means within this share of the largest positive change, or within two standard errors of zero. The
# positive changes set the scale: in Llama models they are weak everywhere and still make up the exploration region.
ABOUT_ZERO = 0.15
MISFITS = 0.15  # at most this share of the layers may have another sign than their region's
Range = tuple[int, int]


class Boundary(NamedTuple):
    """The boundary layer (from 1) or None, the reason in one sentence, and the regions as inclusive ranges or None."""

    layer: int | None
    reason: str
    exploration: Range | None = None
    integration: Range | None = None
    convergence: Range | None = None

    def regions(self) -> dict[str, list[int] | None]:
        """The regions by name, for the result file."""
        return {name: region and list(region) for name, region in zip(self._fields[2:], self[2:], strict=True)}


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
    change, n, what = list(ffn_change), len(ffn_change), "FFN entropy change"
    noise = [0.0 if math.isnan(e) else 2 * e for e in standard_errors or [0.0] * n]
    zero = ABOUT_ZERO * max(0.0, *change)
    positive, negative = ([s * c > e for c, e in zip(change, noise, strict=True)] for s in (1, -1))
    small = [abs(c) <= max(e, zero) for c, e in zip(change, noise, strict=True)]
    if all(negative):
        reason = f"the {what} is negative in every layer (1 to {n}): there is no exploration region"
        return Boundary(None, f"{reason}, so the rule gives no boundary layer", convergence=(1, n))
    if all(positive):
        reason = f"the {what} is positive in every layer (1 to {n}): it never shifts to integration or convergence"
        return Boundary(None, f"{reason}, so the rule would only return the last layer, which is no boundary", (1, n))
    for present, side, region in ((positive, "above", "exploration"), (negative, "below", "convergence")):
        if not any(present):
            return Boundary(None, f"the {what} is {side} zero by two standard errors in no layer: no {region} region")
    misfits, first, last = _best_split(change, positive, small, negative)
    allowed = int(MISFITS * n)
    if misfits > allowed:
        seen = "only the last layer is positive"
        if first:
            seen = f"{misfits} of {n} layers do not fit the best split (at most {allowed} may)"
        signs = "".join("+" if p else "-" if m else "0" for p, m in zip(positive, negative, strict=True))
        reason = f"the signs of the {what} do not fall into positive, about zero, negative"
        return Boundary(None, f"{reason}: {seen}: {signs}")
    abrupt, after = last == first, first + 1
    shift = f"the abrupt convergence from {after} on" if abrupt else f"the shift to integration in layer {after}"
    return Boundary(
        first,
        f"layer {first} is the last with a positive {what} ({change[first - 1]:+.3g} nats) before {shift}; "
        f"{misfits} of {n} layers do not fit their region",
        exploration=(1, first),
        integration=None if abrupt else (after, last),
        convergence=(last + 1, n),
    )


def _best_split(change: list[float], *fits: list[bool]) -> tuple[int, int, int]:
    """Number of misfits and the last layers of exploration and integration; (L, 0, 0) if only layer L is positive."""
    n, positive = len(change), fits[0]
    not_positive, not_small, not_negative = (_cumulative(not fit for fit in region) for region in fits)
    sums, squares = _cumulative(change), _cumulative(c * c for c in change)

    def spread(start: int, stop: int) -> float:  # squared deviations from the mean of change[start:stop]
        total = sums[stop] - sums[start]
        return max(0.0, squares[stop] - squares[start] - total * total / max(1, stop - start))

    splits = [(n, math.inf, 0, 0)]
    for first in (layer for layer in range(1, n) if positive[layer - 1]):
        for last in range(first, n):
            misfits = not_positive[first] + not_small[last] - not_small[first] + not_negative[n] - not_negative[last]
            deviations = spread(0, first) + squares[last] - squares[first] + spread(last, n)
            splits.append((misfits, deviations, first, last))
    misfits, _, first, last = min(splits)
    return misfits, first, last


def _cumulative(values: Iterable[Any]) -> list[Any]:
    """Sums of the first 0, 1, 2, ... values."""
    return list(accumulate(values, initial=0))
