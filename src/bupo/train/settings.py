"""The settings of BuPO beside the trainer's own: fields, defaults and checks, without touching TRL.

`trainer.BuPOConfig` joins them with TRL's ``GRPOConfig``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from bupo.errors import ConfigError
from bupo.lens.agreement import RULES
from bupo.train import advantages as estimators
from bupo.train import layerwise
from bupo.train.critic import DEFAULTS as CRITIC
from bupo.train.critic import critic_problems
from bupo.train.schedule import Schedule, alignment_problems, ladder, ladder_problems, two_phase
from bupo.train.unsupported import guard_hazards, hazards

if TYPE_CHECKING:
    from trl import GRPOConfig as _Parent
else:
    _Parent = object


@dataclass
class BuPOSettings(_Parent):
    """Fields that `BuPOConfig` adds to TRL's, other defaults, and the checks of both together."""

    internal_layer: int | str | None = field(
        default=None, metadata={"help": "Layer l of the internal policy, 1 to L, or 'auto': the boundary layer."}
    )
    internal_rule: str = field(
        default="boundary",
        metadata={"help": "Which layer 'auto' takes: 'boundary' (the paper's rule) or 'recommended'."},
    )
    internal_steps: int | str = field(
        default=0,
        metadata={
            "help": "s_inter: rollout batches trained on the internal policy; 0 is plain GRPO, 'auto' lets the phase "
            "guard end the phase."
        },
    )
    internal_max_steps: int | None = field(
        default=None,
        metadata={"help": "With internal_steps 'auto': the most rollout batches (default: a third of the run's)."},
    )
    internal_norm: bool = field(
        default=False, metadata={"help": "Read the internal policy through the final norm (the paper's ablation)."}
    )
    internal_temperature: float | str = field(
        default=1.0,
        metadata={
            "help": "T of the internal policy softmax(H^l E_u^T / T), or 'auto': fitted on the first rollout batch."
        },
    )
    internal_weight: float = field(
        default=1.0,
        metadata={
            "help": "Share of the internal policy's surrogate while internal_steps last; below 1 the rest is the full "
            "policy's (joint objective)."
        },
    )
    internal_ladder: list | None = field(
        default=None,
        metadata={"help": "Several layers one after the other, as [[layer, rollout batches], ...], instead of one."},
    )
    estimator: str = field(default="grpo", metadata={"help": f"Advantage estimator: {', '.join(estimators.NAMES)}."})
    critic_learning_rate: float = field(
        default=CRITIC["critic_learning_rate"], metadata={"help": "With estimator ppo: the critic's, constant."}
    )
    critic_clip: float = field(
        default=CRITIC["critic_clip"],
        metadata={"help": "With estimator ppo: how far a value may move from its old one within a rollout batch."},
    )
    gae_gamma: float = field(default=CRITIC["gae_gamma"], metadata={"help": "With estimator ppo: discount a token."})
    gae_lambda: float = field(
        default=CRITIC["gae_lambda"],
        metadata={"help": "With estimator ppo: 1 weighs whole returns, 0 one-step differences of values."},
    )
    frozen_layers: int | None = field(
        default=None, metadata={"help": "Layers 1 to this one keep their weights (the paper's comparison)."}
    )
    upper_learning_rate_scale: float | None = field(
        default=None,
        metadata={"help": "Factor on the learning rate of layers above upper_learning_rate_above and the final norm."},
    )
    upper_learning_rate_above: int | None = field(
        default=None, metadata={"help": "The layer, 1 to L - 1, above which upper_learning_rate_scale acts."}
    )
    updates_per_rollout: int | None = field(
        default=None,
        metadata={"help": "Updates a rollout batch (4 unless steps_per_generation or generation_batch_size is given)."},
    )
    probe_samples: int | None = field(
        default=None,
        metadata={
            "help": "Responses a process on which the full policy is measured once a rollout batch of the internal "
            "phase (default: an eighth of them, at least one micro-batch)."
        },
    )
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The scheduler type to use."})
    logging_steps: float = field(default=0, metadata={"help": "Updates between two log lines; 0: a rollout batch."})

    def __post_init__(self) -> None:
        problems = []
        own_size = self.steps_per_generation is not None or self.generation_batch_size is not None
        if own_size and self.updates_per_rollout is not None:
            problems.append("give either updates_per_rollout or steps_per_generation / generation_batch_size, not both")
        elif not own_size:
            updates = 4 if self.updates_per_rollout is None else self.updates_per_rollout
            if updates < 1:
                problems.append(f"updates_per_rollout must be at least 1, not {updates}")
            self.steps_per_generation = max(updates, 1) * self.gradient_accumulation_steps
        once_a_rollout = self.logging_steps == 0
        if once_a_rollout:
            self.logging_steps = 1
        problems += estimators.apply_settings(self, self.estimator)
        if (self.internal_steps or self.internal_ladder) and self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True  # upper layers are unused in the internal phase
        super().__post_init__()
        if once_a_rollout:
            self.logging_steps = max(1, self.generate_every // self.gradient_accumulation_steps)
        problems += self._problems()
        if problems:
            raise ConfigError(problems)

    @property
    def generate_every(self) -> int:
        """Micro-batches that one rollout batch feeds."""
        assert self.steps_per_generation is not None
        return self.steps_per_generation * self.num_iterations

    def schedule(self) -> Schedule:
        """The stages these settings ask for."""
        reading = (self.internal_weight, cast(Any, self.internal_temperature))
        if self.internal_ladder:
            return ladder([(layer, rollouts) for layer, rollouts in self.internal_ladder], *reading)
        return two_phase(cast(Any, self.internal_layer), self._internal_rollouts(), *reading)

    def _internal_rollouts(self) -> int:
        """Rollout batches of the internal phase, or the most that the guard may let it have."""
        if self.internal_steps != "auto":
            return cast(int, self.internal_steps)
        if self.internal_max_steps is not None:
            return self.internal_max_steps
        rollouts = self.max_steps * self.gradient_accumulation_steps // self.generate_every
        together = self.gradient_accumulation_steps // math.gcd(self.gradient_accumulation_steps, self.generate_every)
        return max(rollouts // 3 // together, 1) * together  # whole updates

    def _problems(self) -> list[str]:
        found = []
        guarded = self.internal_steps == "auto"
        if not guarded and not _whole(self.internal_steps, 0):
            found.append(f"internal_steps counts rollout batches: a whole number from 0, not {self.internal_steps!r}")
        elif self.internal_steps and self.internal_layer is None:
            found.append("internal_steps needs internal_layer: a layer from 1 to L, or auto")
        if self.internal_layer not in (None, "auto") and not _whole(self.internal_layer, 1):
            found.append(f"internal_layer must be a layer from 1 to L or auto, not {self.internal_layer!r}")
        if self.internal_rule not in RULES:
            found.append(f"internal_rule must be {' or '.join(RULES)}, not {self.internal_rule!r}")
        elif self.internal_rule != "boundary" and self.internal_layer != "auto":
            found.append("internal_rule goes with internal_layer auto")
        if self.internal_max_steps is not None and not (guarded and _whole(self.internal_max_steps, 1)):
            found.append("internal_max_steps is a whole number from 1 and goes with internal_steps auto")
        if guarded and self.internal_max_steps is None and self.max_steps <= 0:
            found.append("internal_steps auto needs internal_max_steps, or max_steps to take a third of")
        if guarded:
            found += guard_hazards(self)
        if self.internal_ladder is not None:
            found += ladder_problems(self.internal_ladder)
            if self.internal_steps or self.internal_layer is not None:
                found.append("give either internal_ladder or internal_layer and internal_steps, not both")
        if not 0.0 < self.internal_weight <= 1.0:
            found.append(f"internal_weight must be above 0 and at most 1, not {self.internal_weight}")
        if self.internal_temperature != "auto" and not _positive(self.internal_temperature):
            found.append(f"internal_temperature must be a number above 0 or auto, not {self.internal_temperature!r}")
        elif self.internal_temperature != 1.0 and not (self.internal_steps or self.internal_ladder):
            found.append("internal_temperature is that of an internal phase; set internal_steps, or leave it at 1")
        if self.probe_samples is not None and self.probe_samples < 1:
            found.append(f"probe_samples must be at least 1, not {self.probe_samples}")
        if self.save_total_limit == 1:
            found.append("save_total_limit 1 leaves no complete checkpoint while the next is written; use at least 2")
        found += critic_problems(self)
        found += layerwise.problems_of_settings(self, None if found else self.schedule())
        if found or not self.schedule().switches:
            return found
        found += hazards(self)
        return found + alignment_problems(self.schedule(), self.generate_every, self.gradient_accumulation_steps)


def _whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 < value < math.inf
