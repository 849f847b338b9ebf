"""``internal_temperature: auto``: T of ``softmax(H^l E_u^T / T)``, fitted once, on the first rollout batch.

Raw states differ in scale from layer to layer, so ``softmax(H^l E_u^T)`` may be nearly uniform or nearly certain for no
other reason. The fit minimises the mean surprisal of the sampled tokens under the internal policy. Samples come from
the full policy, so this estimates ``KL(full || internal_T) + H(full)`` without bias and has the same minimum; unlike
the divergence itself it needs no distribution over the vocabulary, only the log-probabilities that training computes
anyway (at the sampling temperature, through the same fused head and wrappers). It is convex in 1/T.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bupo.errors import BupoError
from bupo.train.probe import probe_rows
from bupo.train.schedule import Schedule, Stage

if TYPE_CHECKING:
    from trl import GRPOTrainer as _Parent
else:
    _Parent = object

RESPONSES = 32  # a process; one number is fitted to all of their tokens
LOWEST, HIGHEST = 1e-4, 1e4
_PRECISION = 0.01  # relative, of T
_BETTER = 1e-3  # nats a token
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_KEYS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")


class NoTemperature(BupoError):
    """No temperature makes this internal policy resemble the full one."""


@dataclass(frozen=True)
class TemperatureFit:
    """T, and the mean surprisal of the full policy's tokens (nats) under the internal policy at T = 1 and at it."""

    temperature: float
    before: float
    after: float


def fit_temperature(surprisal: Callable[[float], float]) -> TemperatureFit:
    """Minimise ``surprisal(T)``, which is convex in 1/T, by golden-section search over log T.

    Raises:
        NoTemperature: there is no minimum below the surprisal at `HIGHEST` (nearly uniform), or it is at `LOWEST`.
    """
    low, high = math.log(LOWEST), math.log(HIGHEST)
    points = [high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)]
    values = [surprisal(math.exp(x)) for x in points]
    while high - low > _PRECISION:
        if values[0] <= values[1]:
            high = points[1]
            points = [high - _GOLDEN * (high - low), points[0]]
            values = [surprisal(math.exp(points[0])), values[0]]
        else:
            low = points[0]
            points = [points[1], low + _GOLDEN * (high - low)]
            values = [values[1], surprisal(math.exp(points[1]))]
    temperature = float(f"{math.exp((low + high) / 2):.4g}")
    fit = TemperatureFit(temperature, surprisal(1.0), surprisal(temperature))
    if not fit.after < surprisal(HIGHEST) - _BETTER:
        raise NoTemperature("no temperature makes it better than chance at the tokens that the full policy chose")
    if temperature < LOWEST * (1 + 2 * _PRECISION):
        raise NoTemperature(f"its temperature would be below {LOWEST}")
    return fit


class FitsTemperatures(_Parent):
    """Where `BuPOTrainer` replaces ``auto`` by a number, for every internal policy of its schedule."""

    if TYPE_CHECKING:  # of BuPOTrainer
        args: Any
        schedule: Schedule

        def _read(self, stage: Stage | None) -> Any: ...
        def _score(self, batch: dict[str, Any], *, compute_entropy: bool = False) -> tuple[Any, Any]: ...

    temperature_fits: dict[int, TemperatureFit] | None = None  # by layer

    def _fit_temperatures(self, batch: dict[str, Any]) -> None:
        rows = probe_rows(len(batch["prompt_ids"]), RESPONSES).to(batch["prompt_ids"].device)
        some = {key: batch[key][rows] for key in _KEYS if key in batch}
        mask = some["completion_mask"] * some.get("tool_mask", 1)
        tokens = self.accelerator.reduce(mask.sum().double(), reduction="sum").item()
        fits: dict[int, TemperatureFit] = {}
        for stage in self.schedule.stages:
            if not isinstance(stage.layer, int) or stage.layer in fits:
                continue

            def surprisal(temperature: float, stage: Stage = stage) -> float:
                with self._read(replace(stage, temperature=temperature)):
                    logps, _ = self._score(some)
                return -self.accelerator.reduce((logps * mask).sum().double(), reduction="sum").item() / max(tokens, 1)

            try:
                fits[stage.layer] = fit_temperature(surprisal)
            except NoTemperature as error:
                raise NoTemperature(
                    f"internal_temperature auto: the policy of layer {stage.layer} cannot be fitted to the full one "
                    f"({error}); give a number, or another internal_layer"
                ) from error
        self.temperature_fits = fits
        self.schedule = Schedule(
            tuple(
                replace(stage, temperature=fits[stage.layer].temperature) if isinstance(stage.layer, int) else stage
                for stage in self.schedule.stages
            )
        )
