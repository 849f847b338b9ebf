"""Maps a rollout batch to the policy whose importance ratio is optimised [Eq. 10].

A *rollout batch* is one round of sampling, which several updates then consume (a *step* of arXiv 2512.19673). It counts
from 0 here and from 1 wherever a user reads it. TRL counts micro-batches: one rollout batch feeds ``generate_every =
steps_per_generation * num_iterations`` of them, and ``accumulation`` of them make one update.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter

from bupo.errors import shown


@dataclass(frozen=True)
class Phase:
    """Consecutive rollout batches that optimise the same objective."""

    layer: int | Literal["auto"] | None = None  # of the internal policy, from 1 to L; None is the full policy
    rollouts: int | None = None  # None: until the end of the run
    weight: float = 1.0  # share of the internal policy's surrogate, in (0, 1]; the rest is the full policy's

    @property
    def name(self) -> str:
        """The phase's name in logs: ``internal``, ``joint`` or ``full``."""
        return "full" if self.layer is None else "internal" if self.weight == 1.0 else "joint"


FULL = Phase()


@dataclass(frozen=True)
class Schedule:
    """Internal phases in order; after the last one the full policy is optimised."""

    internal: tuple[Phase, ...] = ()

    def at(self, rollout: int) -> Phase:
        """The phase of a rollout batch."""
        return next((p for p, end in zip(self.internal, self.ends, strict=True) if rollout < end), FULL)

    @property
    def ends(self) -> tuple[int, ...]:
        """For each internal phase the rollout batch that follows it."""
        return tuple(accumulate(phase.rollouts or 0 for phase in self.internal))

    @property
    def layers(self) -> tuple[int, ...]:
        """Known layers whose internal policies are optimised, in order."""
        return tuple(phase.layer for phase in self.internal if isinstance(phase.layer, int))

    @property
    def phases(self) -> list[dict[str, Any]]:
        """The internal phases as the setting ``phases`` takes them (JSON-able)."""
        return [asdict(phase) for phase in self.internal]

    @classmethod
    def of(cls, phases: Sequence[dict[str, Any]]) -> Self:
        """The schedule of a value of the setting ``phases``."""
        return cls(tuple(Phase(**phase) for phase in phases))

    def with_layer(self, layer: int) -> Self:
        """This schedule with every ``auto`` replaced by a layer."""
        return type(self)(tuple(replace(p, layer=layer) if p.layer == "auto" else p for p in self.internal))

    def ended_before(self, rollout: int) -> Self:
        """This schedule cut off: ``rollout`` is the first rollout batch of the full policy."""
        spans = zip(self.internal, (0, *self.ends), self.ends, strict=False)
        return type(self)(tuple(replace(p, rollouts=min(end, rollout) - at) for p, at, end in spans if at < rollout))


def alignment_problems(schedule: Schedule, generate_every: int, accumulation: int, epoch: int = 0) -> list[str]:
    """One message per end of a phase that falls inside an update, which would then mix two policies.

    ``epoch`` is the number of micro-batches in one pass over the data, or 0: its last update is short.
    """
    problems, step = [], accumulation // math.gcd(accumulation, generate_every)
    for end in schedule.ends:
        at = end * generate_every
        offset = at % epoch if epoch else at
        if offset % accumulation:
            within = f" (micro-batch {offset} of a pass over the data, which has {epoch})" if offset != at else ""
            problems.append(
                f"after {end} rollout batches x {generate_every} micro-batches = {at}{within} the phase would switch "
                f"inside an update of {accumulation} accumulated micro-batches; make internal_steps (or a phase's "
                f"rollouts) a multiple of {step}, or steps_per_generation a multiple of gradient_accumulation_steps"
            )
    return problems


def as_int(value: Any) -> Any:
    """A whole number written as text (as command lines do) as an int; anything else unchanged."""
    try:
        return int(value) if isinstance(value, str) else value
    except ValueError:
        return value


def is_whole(value: Any, low: int = 1) -> bool:
    """Whether a value is an int, not a bool, from ``low``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


class _Given(BaseModel, extra="forbid", strict=True):
    layer: Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], BeforeValidator(as_int)]
    rollouts: int = Field(ge=1)
    weight: float = Field(1.0, gt=0, le=1)


_PHASES = TypeAdapter(Annotated[list[_Given], Field(min_length=1)])


def parse_phases(value: Any) -> tuple[list[dict[str, Any]] | None, list[str]]:
    """The setting ``phases`` as a list of complete mappings, and what is wrong with it."""
    if value is None:
        return None, []
    try:
        phases = _PHASES.validate_python(json.loads(value) if isinstance(value, str) else value)
        return [dict(phase) for phase in phases], []
    except (ValueError, RecursionError):
        wanted = "{layer: from 1 or auto, rollouts: from 1, weight: above 0 to 1}"
        return None, [f"phases must be a list of {wanted}, not {shown(value)}"]
