"""Which policy the ratio of a rollout batch belongs to: a pure function of the rollout's number.

A *rollout batch* is one round of sampling; it is scored once and then consumed by several updates. Rollouts count
from 0 here and from 1 wherever a user reads them. A schedule is a row of stages; BuPO (Eq. 10 of arXiv 2512.19673) is
two of them: the internal policy of one layer for ``s_inter`` rollout batches, then the full policy.

The trainer counts micro-batches. ``generate_every`` is how many of them one rollout batch feeds
(``steps_per_generation * num_iterations``), ``accumulation`` how many make one update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from bupo.errors import ConfigError


@dataclass(frozen=True)
class Stage:
    """The settings of consecutive rollout batches.

    Attributes:
        rollouts: how many rollout batches; None means until the end (the last stage only).
        layer: l of the internal policy whose ratio is used; None is the full policy; ``"auto"`` is to be found.
        weight: share of the internal policy's surrogate; below 1 the rest is the full policy's (joint objective).
        temperature: T of the internal policy, ``softmax(H^l E_u^T / T)``; ``"auto"`` is to be fitted.
    """

    rollouts: int | None = None
    layer: int | Literal["auto"] | None = None
    weight: float = 1.0
    temperature: float | Literal["auto"] = 1.0

    @property
    def resolved(self) -> bool:
        """Whether nothing is left to be found on the first rollout batch."""
        return "auto" not in (self.layer, self.temperature)

    @property
    def phase(self) -> str:
        """``internal``, ``joint`` or ``full``: the name used in logs."""
        if self.layer is None:
            return "full"
        return "internal" if self.weight == 1.0 else "joint"

    @property
    def number(self) -> int:
        """The phase as a number, for loggers that take nothing else: 1 while an internal policy is trained, then 2."""
        return 2 if self.layer is None else 1


@dataclass(frozen=True)
class Schedule:
    """Stages in order; every rollout batch belongs to exactly one."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        problems = []
        if not self.stages or self.stages[-1].rollouts is not None:
            problems.append("the last stage of a schedule must have no end")
        for number, stage in enumerate(self.stages[:-1], start=1):
            if stage.rollouts is None or stage.rollouts < 1:
                problems.append(f"stage {number} needs at least one rollout batch, not {stage.rollouts}")
        for number, stage in enumerate(self.stages, start=1):
            if not 0.0 < stage.weight <= 1.0:
                problems.append(f"stage {number}: the internal weight must be in (0, 1], not {stage.weight}")
        if problems:
            raise ConfigError(problems)

    def index(self, rollout: int) -> int:
        """Which stage the rollout batch with this number (from 0) belongs to."""
        end = 0
        for index, stage in enumerate(self.stages):
            if stage.rollouts is None:
                return index
            end += stage.rollouts
            if rollout < end:
                return index
        raise AssertionError("the last stage has no end")

    def at(self, rollout: int) -> Stage:
        """The stage of a rollout batch."""
        return self.stages[self.index(rollout)]

    def filled_from(self, found: Schedule) -> Schedule:
        """This schedule with every ``auto`` replaced by what ``found`` has in the same stage."""
        if len(found.stages) != len(self.stages):
            return self
        return Schedule(
            tuple(
                replace(
                    mine,
                    layer=theirs.layer if mine.layer == "auto" else mine.layer,
                    temperature=theirs.temperature if mine.temperature == "auto" else mine.temperature,
                )
                for mine, theirs in zip(self.stages, found.stages, strict=True)
            )
        )

    @property
    def switches(self) -> tuple[int, ...]:
        """Rollout numbers (from 0) that open a new stage."""
        found, end = [], 0
        for stage in self.stages[:-1]:
            assert stage.rollouts is not None
            end += stage.rollouts
            found.append(end)
        return tuple(found)

    @property
    def layers(self) -> tuple[int | Literal["auto"], ...]:
        """Layers whose internal policies are trained, in order."""
        return tuple(stage.layer for stage in self.stages if stage.layer is not None)


def two_phase(
    layer: int | Literal["auto"] | None,
    rollouts: int,
    weight: float = 1.0,
    temperature: float | Literal["auto"] = 1.0,
) -> Schedule:
    """BuPO: layer ``layer`` for ``rollouts`` rollout batches, then the full policy; plain GRPO where that is 0."""
    if rollouts == 0 or layer is None:
        return Schedule((Stage(),))
    return ladder([(layer, rollouts)], weight, temperature)


def ladder(
    rungs: Iterable[tuple[int | Literal["auto"], int]],
    weight: float = 1.0,
    temperature: float | Literal["auto"] = 1.0,
) -> Schedule:
    """Internal policies of several layers one after the other, then the full policy.

    Args:
        rungs: pairs (layer, rollout batches), in order.
        weight: share of the internal surrogate in every rung.
        temperature: of every rung's internal policy, or ``"auto"``: fitted for each.
    """
    stages = [Stage(rollouts, layer, weight, temperature) for layer, rollouts in rungs]
    return Schedule((*stages, Stage()))


def ladder_problems(rungs: Any) -> list[str]:
    """What is wrong with a ladder that a user wrote; empty if nothing is."""
    wrong = f"a ladder is a list of [layer, rollout batches], both whole numbers from 1, not {rungs!r}"
    if not isinstance(rungs, (list, tuple)) or not rungs:
        return [wrong]
    for rung in rungs:
        if not isinstance(rung, (list, tuple)) or len(rung) != 2:
            return [wrong]
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in rung):
            return [wrong]
    return []


def alignment_problems(
    schedule: Schedule, generate_every: int, accumulation: int, epoch: int | None = None
) -> list[str]:
    """What would make one update use micro-batches of two stages; empty if nothing would.

    Args:
        epoch: micro-batches in one pass over the data, where known: an accumulation window ends with the pass, so that
            windows after it start anew.
    """
    problems = []
    for switch in schedule.switches:
        at = switch * generate_every
        offset = at % epoch if epoch else at
        if offset % accumulation == 0:
            continue
        step = accumulation // math.gcd(accumulation, generate_every)
        within = f" (micro-batch {offset} of a pass over the data, which has {epoch})" if epoch and offset != at else ""
        problems.append(
            f"after {switch} rollout batches x {generate_every} micro-batches = {at}{within} the phase would switch "
            f"inside an update of {accumulation} accumulated micro-batches; make internal_steps a multiple of {step}, "
            "or steps_per_generation a multiple of gradient_accumulation_steps"
        )
    return problems
