"""The settings of BuPO beside TRL's: their only declaration, and their only checks (by TRL 1.16's ``GRPOTrainer``)."""
# ruff: noqa: RUF009  (`_setting` is dataclasses.field with a help text)

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from trl import GRPOConfig

from bupo.errors import ConfigError
from bupo.models.internal_policy import check_layer
from bupo.models.layout import find_layout
from bupo.models.load import check_group, use_cpus_without_accelerator
from bupo.models.padding import attends_only, padding_changes
from bupo.train.advantages import ESTIMATORS
from bupo.train.layers import FORMS, layer_problems, selects
from bupo.train.schedule import Schedule, alignment_problems, as_int, is_whole, parse_phases

# losses that use log-probabilities in the ratio only (cispo also as the score function of the same policy)
RATIO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo")
_UNSUPPORTED = {  # the value that an internal phase needs, and what another one does
    "beta": (0.0, "would penalise the distance from the internal policy to the full reference model"),
    "entropy_coef": (0.0, "would act on the internal policy's entropy"),
    "use_adaptive_entropy": (False, "would act on the internal policy's entropy"),
    "top_entropy_quantile": (1.0, "would choose tokens by the internal policy's entropy"),
    "off_policy_mask_threshold": (None, "would drop samples by the internal policy's drift"),
    "use_liger_kernel": (False, "replaces forwards that the internal policy relies on"),
    "torch_compile": (False, "would keep the graph of one phase for the other"),
    "ddp_find_unused_parameters": (True, "leaves gradients unsynchronised, as the upper layers are not used"),
}
_CRITIC = ("critic_learning_rate", "critic_clip", "gae_gamma", "gae_lambda")
_POSITIVE = ("internal_temperature", "temperature", "learning_rate", "upper_learning_rate_scale", *_CRITIC[:2])
_WHOLE = ("upper_learning_rate_above", "probe_samples", "internal_lens_tokens")


def _setting(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class BuPOConfig(GRPOConfig):
    """`GRPOConfig` with the internal phases; the defaults follow the set-up of arXiv 2512.19673.

    Unlike TRL's, ``updates_per_rollout`` is 4 (so that old log-probabilities and clipping matter), the learning rate is
    constant, and the trainer logs once per rollout batch; ``loss_type="dapo"`` is the paper's token mean. Raises
    `ConfigError` with every problem that the settings have.
    """

    phases: list | str | None = _setting(
        "Internal phases in order, as [{layer: l, rollouts: N, weight: w}, ...] (JSON on a command line). A weight "
        "below 1 adds the full policy's surrogate with weight 1 - w. Replaces internal_layer and internal_steps.",
    )
    internal_layer: int | str | None = _setting("Layer l of the internal policy (1 to L), or auto: the boundary layer.")
    internal_steps: int | str | None = _setting(
        "Number of rollout batches that optimise the internal policy (s_inter). 0 is plain GRPO, whatever the other "
        "internal settings are; 'auto' lets the phase guard end the phase.",
    )
    internal_max_steps: int | None = _setting("Limit of internal_steps 'auto'. Default: a third of the run.")
    internal_lens: str = _setting(
        "How the internal policy reads the layer: raw (as in the paper), norm (through the final norm, an ablation of "
        "the paper), ridge (through maps fitted before the first update), or the folder of a saved lens.",
        "raw",
    )
    internal_lens_tokens: int | None = _setting("Response tokens of a ridge fit. Default: 8 per dimension of a state.")
    internal_lens_refit: int = _setting("Rollout batches of a phase between two ridge fits; 0 fits once.", 0)
    internal_temperature: float = _setting("Temperature T of the internal policy softmax(H^l E_u^T / T).", 1.0)
    estimator: str = _setting(f"Advantage estimator, one of {', '.join(ESTIMATORS)}.", "grpo")
    critic_learning_rate: float = _setting("Constant learning rate of the critic (estimator ppo).", 1e-5)
    critic_clip: float = _setting("Largest change of a value within a rollout batch (estimator ppo).", 0.5)
    gae_gamma: float = _setting("Discount factor per token (estimator ppo).", 1.0)
    gae_lambda: float = _setting("Weight between one-step differences (0) and whole returns (1) (estimator ppo).", 1.0)
    trained_layers: int | str | list | None = _setting(
        f"Train these layers only, and nothing else of the model: {FORMS}. Default: all, and everything else.",
    )
    frozen_layers: int | str | list | None = _setting(
        "Freeze these layers, named as for trained_layers, and train the rest of the model; 1-4 is a comparison of the "
        "paper.",
    )
    upper_learning_rate_scale: float | None = _setting("Factor on the learning rate of upper layers and final norm.")
    upper_learning_rate_above: int | None = _setting("Layer (1 to L - 1) above which that factor applies.")
    updates_per_rollout: int | None = _setting(
        "Optimizer updates per rollout batch. Default: 4, unless steps_per_generation or generation_batch_size is set.",
    )
    probe_samples: int | None = _setting(
        "Responses per process on which the full policy is measured once per rollout batch of an internal phase. "
        "Default: one in eight, at least one micro-batch.",
    )
    lr_scheduler_type: str = _setting("Learning rate scheduler.", "constant")
    logging_steps: float = _setting("Number of updates between two log lines; 0 logs once per rollout batch.", 0)

    def __post_init__(self) -> None:
        self.internal_layer, self.internal_steps = as_int(self.internal_layer), as_int(self.internal_steps)
        self.phases, problems = parse_phases(self.phases)
        problems += self._set_updates_per_rollout() + self._set_estimator()
        if self.has_internal_phase and self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True  # an internal phase does not use the layers above l
        log_per_rollout = self.logging_steps == 0
        if log_per_rollout:
            self.logging_steps = 1
        use_cpus_without_accelerator()
        self.use_cpu = self.use_cpu or torch.backends.mps.is_available()  # as `accelerator` says
        super().__post_init__()
        check_group(self.world_size)
        if self.n_gpu > 1:
            text = "this process sees {} GPUs and trains on one; accelerate launch trains on all (docs/guide.md, Scale)"
            warnings.warn(text.format(self.n_gpu), stacklevel=3)
            self._n_gpu = 1  # with more, transformers would split batches over copies of the model (DataParallel)
        if log_per_rollout:
            self.logging_steps = max(1, self.generate_every // self.gradient_accumulation_steps)
        problems += self._problems()
        problems = problems or layer_problems(self, self.schedule())
        problems = problems or self._schedule_problems()
        if problems:
            raise ConfigError(problems)

    @property
    def generate_every(self) -> int:
        """Micro-batches that one rollout batch feeds."""
        return cast(int, self.steps_per_generation) * self.num_iterations

    @property
    def prompts_per_rollout(self) -> int:
        """Different prompts in one rollout batch, over all processes."""
        return cast(int, self.generation_batch_size) // cast(int, self.num_generations)

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
        rollouts = self.internal_max_steps if self.guarded else self.internal_steps
        if rollouts is None:  # a third of the run, in whole updates
            accumulation = self.gradient_accumulation_steps
            step = accumulation // math.gcd(accumulation, self.generate_every)
            rollouts = max(self.max_steps * accumulation // self.generate_every // 3 // step, 1) * step
        return Schedule.of([{"layer": self.internal_layer, "rollouts": rollouts}])

    def _set_updates_per_rollout(self) -> list[str]:
        if self.steps_per_generation is not None or self.generation_batch_size is not None:
            message = "set either updates_per_rollout or steps_per_generation / generation_batch_size, not both"
            return [] if self.updates_per_rollout is None else [message]
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
        scaled, other = self.scale_rewards not in ("none", False), self.multi_objective_aggregation
        wrong = failed({"scale_rewards": scaled, "multi_objective_aggregation": other != "sum_then_normalize"})
        return [f"estimator {self.estimator} works on the weighted sum of the rewards; leave {name}" for name in wrong]

    def _problems(self) -> list[str]:
        layer, steps, limit, auto = self.internal_layer, self.internal_steps, self.internal_max_steps, self.guarded
        counted = steps is None or auto or is_whole(steps, low=0)
        short = counted and steps  # the short form of one phase
        known = layer in (None, "auto") or is_whole(layer)
        limited = limit is None or steps == 0 or (auto and is_whole(limit))
        endless = auto and limit is None and self.max_steps <= 0
        half = (self.upper_learning_rate_scale is None) != (self.upper_learning_rate_above is None)
        one, refit = self.save_total_limit == 1, self.internal_lens_refit
        fits = self.internal_lens == "ridge" or (self.internal_lens_tokens is None and not refit)
        problems = failed({
            f"internal_steps must be a whole number of rollout batches from 0, or auto, not {steps!r}": not counted,
            "set either phases or internal_layer and internal_steps, not both": short and self.phases,
            "internal_steps needs internal_layer: a layer from 1 to L, or auto": short and layer is self.phases is None,
            f"internal_layer must be a layer from 1 to L, or auto, not {layer!r}": not known,
            "internal_max_steps must be a whole number from 1, and needs internal_steps auto": not limited,
            "internal_steps auto needs internal_max_steps, or max_steps to take a third of": endless,
            f"internal_lens_refit must be a whole number from 0, not {refit!r}": not is_whole(refit, low=0),
            "internal_lens_tokens and internal_lens_refit need internal_lens ridge": not fits,
            "save_total_limit must be at least 2, as the last checkpoint stays until the next one is complete": one,
            "upper_learning_rate_scale and upper_learning_rate_above need each other; set both or neither": half,
        })  # fmt: skip
        for name in _POSITIVE + _WHOLE:
            value, wanted = getattr(self, name), "whole number from 1" if name in _WHOLE else "number above 0"
            fits = is_whole(value) if name in _WHOLE else isinstance(value, (int, float)) and 0.0 < value < math.inf
            if not fits and not (value is None is getattr(BuPOConfig, name)):  # unless it may be left out
                problems.append(f"{name} must be a {wanted}, not {value!r}")
        if self.estimator != "ppo":
            changed = [name for name in _CRITIC if getattr(self, name) != getattr(BuPOConfig, name)]
            return problems + [f"{name} needs estimator ppo, not {self.estimator}" for name in changed]
        shares, sharded = [(name, getattr(self, name)) for name in _CRITIC[2:]], engine(self) not in ("one", "ddp")
        per_rollout, accumulation = cast(int, self.steps_per_generation), self.gradient_accumulation_steps
        return problems + failed({
            **{f"{n} must be between 0 and 1, not {x}": not 0 <= x <= 1 for n, x in shares},
            "estimator ppo keeps a whole critic on every process; it does not run under FSDP or DeepSpeed": sharded,
            "estimator ppo does not scale the critic's loss as fp16 needs; use bfloat16 or float32": self.fp16,
            f"estimator ppo needs whole updates: steps_per_generation {per_rollout} is not a multiple of "
            f"gradient_accumulation_steps {accumulation}": per_rollout % accumulation,
        })  # fmt: skip

    def _schedule_problems(self) -> list[str]:
        """What an internal phase does not allow; empty without one."""
        schedule, kind = self.schedule(), engine(self)
        if not schedule.internal:
            return []
        rollouts = math.ceil(self.max_steps * self.gradient_accumulation_steps / self.generate_every)
        end = schedule.ends[-1]
        checkpointing = cast(dict, self.gradient_checkpointing_kwargs or {})
        reentrant = self.gradient_checkpointing and checkpointing.get("use_reentrant")
        decays = kind == "deepspeed" and self.weight_decay != 0.0
        ridge = kind == "deepspeed" and self.internal_lens == "ridge"
        keeps = self.guarded and kind in ("deepspeed", "fsdp1")
        unsupported = [
            f"{name} {value} {why}; set it to {needed!r}, or internal_steps to 0"
            for name, (needed, why) in _UNSUPPORTED.items()
            if (value := getattr(self, name)) != needed
        ]
        return unsupported + failed({
            f"loss_type {self.loss_type!r} mixes the ratio with other weights; an internal phase needs one of "
            f"{', '.join(RATIO_LOSSES)}": self.loss_type not in RATIO_LOSSES,
            "ddp_static_graph fails when the graph changes between phases; leave it unset": self.ddp_static_graph,
            "internal_lens ridge cannot be fitted under DeepSpeed; use FSDP2 or DDP, or the folder of a lens": ridge,
            "internal_steps auto keeps weights, which DeepSpeed and FSDP1 shard; use FSDP2, or set a number": keeps,
            f"weight_decay {self.weight_decay} would shrink the layers that an internal phase does not use, because "
            "DeepSpeed gives them gradients of zero; set it to 0, or use FSDP2 or DDP": decays,
            "reentrant gradient checkpointing does not work with DDP and unused parameters, which an internal phase "
            "has; set use_reentrant to false in gradient_checkpointing_kwargs": kind == "ddp" and reentrant,
            f"the internal phases take {end} rollout batches, more than the {rollouts} of the run": 0 < rollouts < end,
        }) + alignment_problems(schedule, self.generate_every, self.gradient_accumulation_steps)  # fmt: skip


def failed(checks: Mapping[str, Any]) -> list[str]:
    """The messages whose condition is true."""
    return [message for message, wrong in checks.items() if wrong]


def engine(args: Any) -> Literal["one", "ddp", "fsdp1", "fsdp2", "deepspeed"]:
    """What distributes the model, by the settings or by the environment that ``accelerate launch`` sets."""
    launched = {k for k in ("DEEPSPEED", "FSDP") if os.environ.get(f"ACCELERATE_USE_{k}", "").lower() in ("1", "true")}
    if args.deepspeed is not None or "DEEPSPEED" in launched:
        return "deepspeed"
    if args.fsdp:
        return "fsdp1" if int((args.fsdp_config or {}).get("version", 2)) == 1 else "fsdp2"
    if "FSDP" in launched:
        return "fsdp2" if os.environ.get("FSDP_VERSION", "1") == "2" else "fsdp1"
    return "ddp" if args.world_size > 1 else "one"


def model_problems(trainer: Any) -> list[str]:
    """Problems of a trainer's settings with its model, optimizer and dataset."""
    args, schedule, model = trainer.args, trainer.schedule, trainer.model
    above, problems = args.upper_learning_rate_above, []
    named = [("upper_learning_rate_above", above)] if above else []
    named += [("internal_layer", layer) for layer in schedule.layers]
    depth = find_layout(model).n_layers if named or selects(args) else 0
    for name, layer in named:
        try:
            check_layer(depth, layer)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    problems += layer_problems(args, schedule, depth)
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    foreign = trainer.optimizer is not None or (plugin is not None and "optimizer" in plugin.deepspeed_config)
    cast_to = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    casts = args.use_transformers_continuous_batching and cast_to is not None
    casts = casts and any(str(p.dtype) != f"torch.{cast_to}" for p in model.parameters())
    samples = not (trainer._is_vlm or args.use_vllm or trainer.rollout_func or attends_only(model))
    samples, liger = samples and padding_changes(model, sampling=True), args.use_liger_kernel and padding_changes(model)
    fits = trainer.environment_factories is not None and schedule.internal and args.internal_lens == "ridge"
    problems += failed({
        f"upper_learning_rate_above: no layer is above {depth}; set a lower one": above and above == depth,
        "upper_learning_rate_scale needs the trainer's own optimizer; do not pass one, and leave the optimizer out of "
        "DeepSpeed's configuration": above and foreign,
        "internal_lens ridge samples its responses without environments; name the folder of a saved lens": fits,
        "this model takes the padding before shorter prompts for text when it samples; sample with use_vllm": samples,
        "use_liger_kernel scores prompts behind padding, which this model takes for text; leave it out": liger,
        f"use_transformers_continuous_batching would turn the trained weights to {cast_to} for good (TRL casts the "
        f"model to sample); load it with dtype {cast_to}, or set precision float32": casts,
    })  # fmt: skip
    if trainer.micro_batches_per_epoch != 0:
        return problems + trainer.alignment_problems(schedule)
    number, needed = len(trainer.train_dataset), args.prompts_per_rollout
    return [*problems, f"the dataset has {number} prompts, fewer than the {needed} of a rollout batch"]
