"""From single tokens to criteria: means with standard errors, curves over layers, answers with bootstrap shares.

Shape legend: D bootstrap draws, L layers, N tokens, K rows of values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bupo.lens.boundary import find_boundary
from bupo.lens.clustered import ClusterMeans, round_list
from bupo.lens.old_choice import Answer, find_knee, knee_layers, recommend, shares
from bupo.lens.old_temperature import Comparison, Final

READINGS = ("raw", "norm", "fitted", "norm_fitted")
FITTED = ("fitted", "norm_fitted")
TITLES = {
    "boundary": "the paper's rule on the FFN entropy change",
    "norm_entropy": "the same rule on the layers' entropy change, read through the final norm",
    "fitted_entropy": "the same rule on the layers' entropy change at fitted temperatures",
    "knee": "knee of the agreement with the final policy",
}


@dataclass(frozen=True)
class TokenValues:
    """What the criteria are means of.

    Attributes:
        rows: per-token values (K, N) float64 by name: ``ffn_change``, ``span`` (``ln V - H(p)``, the divergence of the
            uniform policy) and ``READING.entropy``, ``.change``, ``.kl``, ``.top1``, and of fitted readings ``.slope``
            and ``.curvature``.
        counts: tokens of each response, in the order of the columns.
        inverse_temperature: of the fitted readings, layers 1..L.
        mean, error: means and clustered standard errors (K,) by name, and those of ``recovered`` and
            ``READING.inverse_temperature``, which are computed from several means.
    """

    rows: dict[str, Tensor]
    counts: list[int]
    inverse_temperature: dict[str, list[float]]
    mean: dict[str, Tensor]
    error: dict[str, Tensor]

    def finite(self) -> bool:
        return all(bool(torch.isfinite(v).all()) for v in (*self.mean.values(), *self.error.values()))


def token_values(
    readings: Mapping[str, Sequence[Comparison]],
    final: Final,
    ffn_change: Tensor,
    counts: list[int],
    vocabulary: int,
) -> TokenValues:
    """Collect the values of layers 0..L and average them.

    Args:
        readings: comparisons of layers 0..L for each of `READINGS`.
        final: the final policy at the same tokens.
        ffn_change: Eq. 13 of arXiv 2512.19673 at the same tokens, (L, N).
        counts: tokens of each response.
        vocabulary: V.
    """
    rows = {"ffn_change": ffn_change, "span": math.log(vocabulary) - final.entropy[None]}
    for name, layers in readings.items():
        # of fitted readings, values whose spread includes that the temperature was fitted to these tokens
        each = [r.entropy_influence() if name in FITTED else r.entropy for r in layers]
        entropies = torch.stack(each)  # (L+1, N)
        rows[f"{name}.entropy"] = entropies[1:]
        rows[f"{name}.change"] = entropies.diff(dim=0)
        rows[f"{name}.kl"] = torch.stack([r.kl for r in layers[1:]])
        rows[f"{name}.top1"] = torch.stack([r.hit for r in layers[1:]])
        if name in FITTED:
            rows[f"{name}.slope"] = torch.stack([r.slope for r in layers[1:]])
            rows[f"{name}.curvature"] = torch.stack([r.curvature for r in layers[1:]])
    rows = {name: values.double().cpu() for name, values in rows.items()}
    inverse = {name: [r.inverse_temperature for r in readings[name][1:]] for name in FITTED}
    mean, error = {}, {}
    for name, values in rows.items():
        mean[name], error[name] = _statistics(values, counts)
    # a ratio of means and a root of a mean, by what a token changes in them to first order
    ratio = mean["norm_fitted.kl"] / mean["span"]
    mean["recovered"] = 1 - ratio
    error["recovered"] = _statistics((rows["norm_fitted.kl"] - ratio[:, None] * rows["span"]) / mean["span"], counts)[1]
    for name in FITTED:
        steepness = mean[f"{name}.curvature"].clamp(min=1e-30)
        inside = torch.tensor([b > 0 for b in inverse[name]])
        spread = _statistics(rows[f"{name}.slope"] / steepness[:, None], counts)[1]
        error[f"{name}.inverse_temperature"] = torch.where(inside, spread, 0.0)
    return TokenValues(rows, counts, inverse, mean, error)


def _statistics(values: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    cluster = ClusterMeans(len(values))
    for part in values.split(counts, dim=1):
        cluster.add(part)
    return cluster.mean(), cluster.standard_error()


def curves(values: TokenValues) -> tuple[dict[str, Any], dict[str, Any]]:
    """Lists over layers 1..L for each reading, and their standard errors, for ``analysis.json``."""
    shown: dict[str, dict[str, Any]] = {}
    errors: dict[str, dict[str, Any]] = {}
    for name in READINGS:
        kinds = ("entropy", "change", "kl", "top1")
        shown[name] = {kind: round_list(values.mean[f"{name}.{kind}"]) for kind in kinds}
        errors[name] = {kind: round_list(values.error[f"{name}.{kind}"]) for kind in kinds}
    for name in FITTED:
        inverse = values.inverse_temperature[name]
        shown[name]["inverse_temperature"] = [round(b, 6) for b in inverse]
        shown[name]["temperature"] = [None if b == 0 else round(1 / b, 6) for b in inverse]
        errors[name]["inverse_temperature"] = round_list(values.error[f"{name}.inverse_temperature"])
    shown["norm_fitted"]["recovered"] = round_list(values.mean["recovered"])
    errors["norm_fitted"]["recovered"] = round_list(values.error["recovered"])
    return shown, errors


def answers(
    values: TokenValues, boundary: Answer, change: tuple[Sequence[float], Sequence[float]], weights: Tensor
) -> dict[str, Any]:
    """The recommendation and every criterion's answer, each with the shares of the bootstrap.

    Args:
        boundary: what the paper's rule says of all tokens; it stands.
        change: the FFN entropy change over all tokens, and its standard errors.
        weights: (D, N), see `bupo.lens.old_choice.bootstrap_weights`.
    """
    total = weights.sum(1, keepdim=True)

    def drawn(name: str) -> Tensor:
        return (weights @ values.rows[name].T) / total

    whole, whole_error = (torch.tensor(list(column), dtype=torch.float64) for column in change)
    # the rule looks at all tokens: the sample's draws, brought to the precision of the whole
    finer = (whole_error / values.error["ffn_change"].clamp(min=1e-30)).clamp(max=1)
    changes = {
        "boundary": (whole + finer * (drawn("ffn_change") - values.mean["ffn_change"]), whole_error),
        "norm_entropy": (drawn("norm.change"), values.error["norm.change"]),
        "fitted_entropy": (drawn("fitted.change"), values.error["fitted.change"]),
    }
    draws: dict[str, list[int | None]] = {
        name: [find_boundary(row, error.tolist()).layer for row in curve.tolist()]
        for name, (curve, error) in changes.items()
    }
    draws["knee"] = knee_layers(1 - _refitted(values, drawn) / drawn("span"))
    found = {
        "boundary": boundary,
        "norm_entropy": _rule(values, "norm"),
        "fitted_entropy": _rule(values, "fitted"),
        "knee": find_knee(values.mean["recovered"].tolist()),
    }
    best = recommend(found["boundary"], found["knee"])
    repeated = [one if one is not None else two for one, two in zip(draws["boundary"], draws["knee"], strict=True)]
    return {
        "recommendation": {
            "layer": best.layer,
            "criterion": best.criterion,
            "reason": best.reason,
            **_shares(repeated, best.layer),
        },
        "criteria": [
            {
                "name": name,
                "title": TITLES[name],
                "layer": answer.layer,
                "reason": answer.reason,
                **_shares(draws[name], answer.layer),
            }
            for name, answer in found.items()
        ],
    }


def _refitted(values: TokenValues, drawn: Any) -> Tensor:
    """The divergence (D, L) of each draw at the temperature that its own tokens would be given, to second order."""
    slope, curvature = drawn("norm_fitted.slope"), drawn("norm_fitted.curvature").clamp(min=1e-30)
    inside = torch.tensor([b > 0 for b in values.inverse_temperature["norm_fitted"]])
    return drawn("norm_fitted.kl") - torch.where(inside, slope.square() / (2 * curvature), 0.0)


def _rule(values: TokenValues, name: str) -> Answer:
    """The paper's rule on a layer's entropy change, in the place of its FFN's."""
    key = f"{name}.change"
    found = find_boundary(values.mean[key].tolist(), values.error[key].tolist(), what="layers' entropy change")
    return Answer(found.layer, found.reason)


def _shares(found: Sequence[int | None], answer: int | None) -> dict[str, Any]:
    own, other = shares(found, answer)
    return {"share": round(own, 4), "other": {name: round(value, 4) for name, value in other.items()}}
