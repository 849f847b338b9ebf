"""Exploration, integration, convergence: the regions of a model's depth and the boundary layer between them.

Section 4 of arXiv 2512.19673: the FFN entropy change ``H(F^l) - H(LN(H^{l-1} + A^l))`` (Eq. 13) is positive in the
first layers (exploration), about zero in the middle (integration) and negative in the last ones (convergence). The
*boundary layer* is the last layer with a positive change before the shift to integration or convergence. Some models do
not show the pattern; then there is no boundary layer, and the reason is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

# "About zero" means within this share of the largest positive change, or within two standard errors of zero. The
# positive changes set the scale: in Llama models they are weak everywhere and still make up the exploration region.
ABOUT_ZERO = 0.15
# At most this share of the layers may have another sign than their region's.
MISFITS = 0.15


@dataclass(frozen=True)
class Boundary:
    """What the rule found; layers count from 1, regions are inclusive ranges or None."""

    layer: int | None
    reason: str
    exploration: tuple[int, int] | None
    integration: tuple[int, int] | None
    convergence: tuple[int, int] | None

    def regions(self) -> dict[str, list[int] | None]:
        return {
            name: None if value is None else list(value)
            for name, value in (
                ("exploration", self.exploration),
                ("integration", self.integration),
                ("convergence", self.convergence),
            )
        }


def find_boundary(
    ffn_change: Sequence[float],
    standard_errors: Sequence[float] | None = None,
    *,
    what: str = "FFN entropy change",
) -> Boundary:
    """Split the layers 1..L into the three regions by the sign of the FFN entropy change.

    A layer fits *exploration* if its change is positive and *convergence* if it is negative, each by more than two
    standard errors, and *integration* if it is about zero. Of all splits into consecutive regions the one with the
    fewest layers that do not fit is taken; among equals, the one with the smallest squared deviations from the regions'
    means (integration's being zero). The integration region may be empty (an abrupt model).

    Args:
        ffn_change: Eq. 13 for layers 1..L, nats.
        standard_errors: of the same, nats; zero if not given.
        what: what is given instead, for the wording of the reason.
    """
    change = list(ffn_change)
    errors = list(standard_errors) if standard_errors is not None else [0.0] * len(change)
    if len(errors) != len(change) or not change:
        raise ValueError("one change and one standard error a layer are needed")
    n = len(change)
    noise = [2 * e for e in errors]
    positive = [c > e for c, e in zip(change, noise, strict=True)]
    negative = [c < -e for c, e in zip(change, noise, strict=True)]
    zero = ABOUT_ZERO * max(0.0, *change)
    small = [abs(c) <= max(e, zero) for c, e in zip(change, noise, strict=True)]

    everything = (1, n)
    if all(negative):
        return _none(
            f"the {what} is negative in every layer (1 to {n}): there is no exploration region, so the "
            f"rule gives no boundary layer",
            convergence=everything,
        )
    if all(positive):
        return _none(
            f"the {what} is positive in every layer (1 to {n}): it never shifts to integration or "
            f"convergence, so the rule would only return the last layer, which is no boundary",
            exploration=everything,
        )
    if not any(positive):
        return _none(f"the {what} is above zero by two standard errors in no layer: no exploration region")
    if not any(negative):
        return _none(f"the {what} is below zero by two standard errors in no layer: no convergence region")

    not_positive, not_small, not_negative = (_misfits(fits) for fits in (positive, small, negative))
    sums, squares = _sums(change), _sums([c * c for c in change])

    def spread(start: int, stop: int) -> float:  # squared deviations from the mean of change[start:stop]
        total = sums[stop] - sums[start]
        return max(0.0, squares[stop] - squares[start] - total * total / max(1, stop - start))

    best: tuple[int, float, int, int] | None = None
    for first in range(1, n):  # exploration is layers 1..first
        if not positive[first - 1]:
            continue
        for last in range(first, n):  # integration is first+1..last, convergence last+1..n
            misfits = not_positive[first] + not_small[last] - not_small[first] + not_negative[n] - not_negative[last]
            deviations = spread(0, first) + squares[last] - squares[first] + spread(last, n)
            key = (misfits, deviations, first, last)
            if best is None or key < best:
                best = key
    allowed = int(MISFITS * n)
    if best is None or best[0] > allowed:
        seen = "only the last layer is positive" if best is None else f"{best[0]} of {n} layers do not fit"
        return _none(
            f"the signs of the {what} do not fall into positive, about zero, negative: {seen} the best "
            f"split (at most {allowed} may): {_signs(positive, negative)}"
        )
    misfits, _, first, last = best
    exploration = (1, first)
    integration = (first + 1, last) if last > first else None
    convergence = (last + 1, n)
    shift = (
        f"the shift to integration in layer {first + 1}"
        if integration
        else f"the abrupt convergence from {first + 1} on"
    )
    return Boundary(
        first,
        f"layer {first} is the last with a positive {what} ({change[first - 1]:+.3g} nats) before {shift}; "
        f"{misfits} of {n} layers do not fit their region",
        exploration,
        integration,
        convergence,
    )


def _sums(values: Sequence[float]) -> list[float]:
    """Sums of the first 0, 1, 2, ... values."""
    return [0.0, *accumulate(values)]


def _misfits(fits: Sequence[bool]) -> list[int]:
    """How many of the first 0, 1, 2, ... layers do not fit."""
    return [0, *accumulate(int(not fit) for fit in fits)]


def _none(
    reason: str,
    exploration: tuple[int, int] | None = None,
    integration: tuple[int, int] | None = None,
    convergence: tuple[int, int] | None = None,
) -> Boundary:
    return Boundary(None, reason, exploration, integration, convergence)


def _signs(positive: list[bool], negative: list[bool]) -> str:
    """The signs of all layers, first to last, e.g. ``+++0--``."""
    return "".join("+" if p else "-" if m else "0" for p, m in zip(positive, negative, strict=True))
