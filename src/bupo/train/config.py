"""The settings of BuPO beside TRL's: their only declaration and their only checks."""
# ruff: noqa: RUF009  (`_setting` is dataclasses.field with a help text)

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, cast

from trl import GRPOConfig

from bupo.errors import ConfigError
from bupo.train.advantages import ESTIMATORS
from bupo.train.schedule import Schedule, alignment_problems, as_int, is_whole, parse_phases
from bupo.train.unsupported import engine, failed, unsupported_settings


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


_CRITIC = ("critic_learning_rate", "critic_clip", "gae_gamma", "gae_lambda")


@dataclass
class BuPOConfig(GRPOConfig):
    """`GRPOConfig` with the internal phases; the defaults follow the set-up of arXiv 2512.19673.

    Defaults that differ from TRL's: ``updates_per_rollout`` is 4 (so that old log-probabilities and clipping matter),
    the learning rate is constant, and the trainer logs once per rollout batch. As in TRL: ``loss_type="dapo"``, the
    paper's token mean (the split into micro-batches does not change the result), clip 0.2, no KL penalty, no entropy
    bonus, temperature 1, rewards scaled by group, learning rate 1e-6, gradient clip 1.

    The class parses with ``HfArgumentParser`` and ``TrlParser``. In a Mixture-of-Experts model the load-balancing loss
    of an internal phase covers the layers up to l.

    Raises:
        ConfigError: with every problem that the settings have.
    """

    phases: list | str | None = _setting(
        None,
        "Internal phases in order, as [{layer: l, rollouts: N, weight: w}, ...] (JSON on a command line). A weight "
        "below 1 adds the full policy's surrogate with weight 1 - w. Replaces internal_layer and internal_steps.",
    )
    internal_layer: int | str | None = _setting(
        None, "Layer l of the internal policy, from 1 to L, or 'auto' for the boundary layer."
    )
    internal_steps: int | str | None = _setting(
        None,
        "Number of rollout batches that optimise the internal policy (s_inter). 0 is plain GRPO, whatever the other "
        "internal settings are; 'auto' lets the phase guard end the phase.",
    )
    internal_max_steps: int | None = _setting(
        None, "Upper limit of internal_steps 'auto', in rollout batches. Default: a third of the run."
    )
    internal_norm: bool = _setting(False, "Apply the final norm inside the internal policy (an ablation of the paper).")
    internal_temperature: float = _setting(1.0, "Temperature T of the internal policy softmax(H^l E_u^T / T).")
    estimator: str = _setting("grpo", f"Advantage estimator, one of {', '.join(ESTIMATORS)}.")
    critic_learning_rate: float = _setting(1e-5, "Constant learning rate of the critic (estimator ppo).")
    critic_clip: float = _setting(0.5, "Largest change of a value within a rollout batch (estimator ppo).")
    gae_gamma: float = _setting(1.0, "Discount factor per token (estimator ppo).")
    gae_lambda: float = _setting(1.0, "Weight between one-step differences (0) and whole returns (1) (estimator ppo).")
    frozen_layers: int | None = _setting(None, "Freeze layers 1 to this one (a comparison of the paper).")
    upper_learning_rate_scale: float | None = _setting(
        None, "Factor on the learning rate of the layers above upper_learning_rate_above and the final norm."
    )
    upper_learning_rate_above: int | None = _setting(
        None, "Layer, from 1 to L - 1, above which upper_learning_rate_scale applies."
    )
    updates_per_rollout: int | None = _setting(
        None,
        "Optimizer updates per rollout batch. Default: 4, unless steps_per_generation or generation_batch_size is set.",
    )
    probe_samples: int | None = _setting(
        None,
        "Responses per process on which the full policy is measured once per rollout batch of an internal phase. "
        "Default: one in eight, at least one micro-batch.",
    )
    lr_scheduler_type: str = _setting("constant", "Learning rate scheduler.")
    logging_steps: float = _setting(0, "Number of updates between two log lines; 0 logs once per rollout batch.")

    def __post_init__(self) -> None:
        self.internal_layer, self.internal_steps = as_int(self.internal_layer), as_int(self.internal_steps)
        self.phases, problems = parse_phases(self.phases)
        problems += self._set_updates_per_rollout() + self._set_estimator()
        if self.has_internal_phase and self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True  # an internal phase does not use the layers above l
        log_per_rollout = self.logging_steps == 0
        if log_per_rollout:
            self.logging_steps = 1
        super().__post_init__()
        if log_per_rollout:
            self.logging_steps = max(1, self.generate_every // self.gradient_accumulation_steps)
        problems += self._problems()
        problems = problems or self._schedule_problems()
        if problems:
            raise ConfigError(problems)

    # -- what follows from the settings ------------------------------------------------------------------------------

    @property
    def generate_every(self) -> int:
        """Micro-batches that one rollout batch feeds."""
        assert self.steps_per_generation is not None
        return self.steps_per_generation * self.num_iterations

    @property
    def prompts_per_rollout(self) -> int:
        """Different prompts in one rollout batch, over all processes."""
        assert self.generation_batch_size is not None
        assert self.num_generations is not None
        return self.generation_batch_size // self.num_generations

    @property
    def has_internal_phase(self) -> bool:
        """Whether any rollout batch optimises an internal policy."""
        return bool(self.internal_steps or (self.phases and self.internal_steps is None))

    @property
    def guarded(self) -> bool:
        """Whether the phase guard may end the internal phase."""
        return self.internal_steps == "auto"

    def schedule(self) -> Schedule:
        """The schedule that these settings describe."""
        if not self.has_internal_phase:
            return Schedule()
        if isinstance(self.phases, list):
            return Schedule.of(self.phases)
        rollouts = self._longest_guarded_phase() if self.guarded else self.internal_steps
        return Schedule.of([{"layer": self.internal_layer, "rollouts": rollouts}])

    def _longest_guarded_phase(self) -> int:
        """``internal_max_steps``, or a third of the run, rounded to whole updates."""
        if self.internal_max_steps is not None:
            return self.internal_max_steps
        rollouts = self.max_steps * self.gradient_accumulation_steps // self.generate_every
        step = self.gradient_accumulation_steps // math.gcd(self.gradient_accumulation_steps, self.generate_every)
        return max(rollouts // 3 // step, 1) * step

    def _set_updates_per_rollout(self) -> list[str]:
        if self.steps_per_generation is not None or self.generation_batch_size is not None:
            if self.updates_per_rollout is None:
                return []
            return ["set either updates_per_rollout or steps_per_generation / generation_batch_size, not both"]
        updates = 4 if self.updates_per_rollout is None else self.updates_per_rollout
        self.steps_per_generation = max(updates, 1) * self.gradient_accumulation_steps
        return [] if updates >= 1 else [f"updates_per_rollout must be at least 1, not {updates}"]

    def _set_estimator(self) -> list[str]:
        """Switch off TRL's own scaling for the estimators that it does not have."""
        if self.estimator not in ESTIMATORS:
            return [f"estimator must be one of {', '.join(ESTIMATORS)}, not {self.estimator!r}"]
        if self.estimator == "grpo":
            return []
        if self.scale_rewards in ("group", True):
            self.scale_rewards = "none"
        allowed = {"scale_rewards": ("none", False), "multi_objective_aggregation": ("sum_then_normalize",)}
        return [
            f"estimator {self.estimator} works on the weighted sum of the rewards; leave {name}"
            for name, values in allowed.items()
            if getattr(self, name) not in values
        ]

    # -- checks ------------------------------------------------------------------------------------------------------

    def _problems(self) -> list[str]:
        """What is wrong with single settings."""
        layer, steps, limit = self.internal_layer, self.internal_steps, self.internal_max_steps
        counted = steps is None or self.guarded or is_whole(steps, low=0)
        short = counted and steps  # the short form of one phase
        scale, above = self.upper_learning_rate_scale, self.upper_learning_rate_above
        problems = failed({
            f"internal_steps must be a whole number of rollout batches from 0, or auto, not {steps!r}": not counted,
            "set either phases or internal_layer and internal_steps, not both": short and self.phases,
            "internal_steps needs internal_layer: a layer from 1 to L, or auto": short and layer is self.phases is None,
            f"internal_layer must be a layer from 1 to L, or auto, not {layer!r}": layer not in (None, "auto")
            and not is_whole(layer),
            "internal_max_steps must be a whole number from 1, and needs internal_steps auto": steps != 0
            and limit is not None
            and not (self.guarded and is_whole(limit)),
            "internal_steps auto needs internal_max_steps, or max_steps to take a third of": self.guarded
            and limit is None
            and self.max_steps <= 0,
            "save_total_limit 1 leaves no complete checkpoint while the next is written; use at least 2": (
                self.save_total_limit == 1
            ),
            "upper_learning_rate_scale and upper_learning_rate_above need each other; set both or neither": (
                (scale is None) != (above is None)
            ),
        })  # fmt: skip
        for name in ("internal_temperature", "temperature", "learning_rate", "upper_learning_rate_scale"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and 0.0 < value < math.inf
            if not number and not (value is None and name == "upper_learning_rate_scale"):
                problems.append(f"{name} must be a number above 0, not {value!r}")
        for name in ("frozen_layers", "upper_learning_rate_above", "probe_samples"):
            if (value := getattr(self, name)) is not None and not is_whole(value):
                problems.append(f"{name} must be a whole number from 1, not {value!r}")
        return problems + self._critic_problems()

    def _critic_problems(self) -> list[str]:
        values = [(name, getattr(self, name)) for name in _CRITIC]
        if self.estimator != "ppo":
            default = {f.name: f.default for f in fields(self)}
            changed = [name for name, value in values if value != default[name]]
            return [f"{name} needs estimator ppo, not {self.estimator}" for name in changed]
        steps, accumulation = cast(int, self.steps_per_generation), self.gradient_accumulation_steps
        return failed({
            **{f"{name} must be above 0, not {value}": not value > 0 for name, value in values[:2]},
            **{f"{name} must be between 0 and 1, not {value}": not 0 <= value <= 1 for name, value in values[2:]},
            "estimator ppo keeps a whole critic on every process; it does not run under FSDP or DeepSpeed": (
                engine(self) not in ("one", "ddp")
            ),
            "estimator ppo does not scale the critic's loss as fp16 needs; use bfloat16 or float32": self.fp16,
            f"estimator ppo needs whole updates: steps_per_generation {steps} is not a multiple of "
            f"gradient_accumulation_steps {accumulation}": steps % accumulation,
        })  # fmt: skip

    def _schedule_problems(self) -> list[str]:
        """What an internal phase does not allow; empty without one."""
        schedule = self.schedule()
        if not schedule.internal:
            return []
        problems = frozen_problems(self.frozen_layers, schedule) + unsupported_settings(self)
        rollouts = math.ceil(self.max_steps * self.gradient_accumulation_steps / self.generate_every)
        if self.max_steps > 0 and schedule.ends[-1] > rollouts:
            problems.append(
                f"the internal phases take {schedule.ends[-1]} rollout batches, more than the {rollouts} of the run"
            )
        return problems + alignment_problems(schedule, self.generate_every, self.gradient_accumulation_steps)


def frozen_problems(frozen: int | None, schedule: Schedule) -> list[str]:
    """One message per internal policy whose layers are all frozen."""
    return [
        f"frozen_layers {frozen} freezes every layer of the internal policy of layer {layer}; freeze fewer layers, or "
        "set internal_steps to 0"
        for layer in schedule.layers
        if frozen is not None and layer <= frozen
    ]
