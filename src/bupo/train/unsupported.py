"""TRL settings that would compute something else in an internal phase, each refused with one message.

In an internal phase the loss sees the log-probabilities and entropies of the internal policy. The clipped ratio is
meant for them (at token or sequence level); the terms below are not. Read from TRL 1.16's ``GRPOTrainer``.
"""

from __future__ import annotations

import os
from typing import Any, Literal

from bupo.models.internal_policy import check_layer
from bupo.models.layout import n_layers
from bupo.train.layerwise import layerwise_problems

# losses that use log-probabilities in the ratio only (cispo also as the score function of the same policy)
RATIO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo")

Engine = Literal["one", "ddp", "fsdp1", "fsdp2", "deepspeed"]


def engine(args: Any) -> Engine:
    """What distributes the model, by the settings or by the environment that ``accelerate launch`` sets."""

    def launched(name: str) -> bool:
        return os.environ.get(name, "").lower() in ("1", "true")

    if args.deepspeed is not None or launched("ACCELERATE_USE_DEEPSPEED"):
        return "deepspeed"
    if args.fsdp:
        return "fsdp1" if int((args.fsdp_config or {}).get("version", 2)) == 1 else "fsdp2"
    if launched("ACCELERATE_USE_FSDP"):
        return "fsdp2" if os.environ.get("FSDP_VERSION", "1") == "2" else "fsdp1"
    return "ddp" if args.world_size > 1 else "one"


def unsupported_settings(args: Any) -> list[str]:
    """Problems of a `BuPOConfig` that has an internal phase, one message each."""
    adds_entropy = args.entropy_coef != 0.0 or args.use_adaptive_entropy
    distributed = engine(args)
    sharded = distributed in ("deepspeed", "fsdp1")
    reentrant = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    checks = [
        (
            args.guarded and sharded,
            "internal_steps auto keeps weights, which DeepSpeed and FSDP1 shard; use FSDP2, or set a number",
        ),
        (
            args.beta != 0.0,
            f"beta {args.beta} would penalise the distance from the internal policy to the full reference model, which "
            "is the KL divergence of neither; set beta to 0 or internal_steps to 0",
        ),
        (
            adds_entropy,
            "entropy_coef and use_adaptive_entropy would act on the internal policy's entropy and keep that state "
            "after the phase; set entropy_coef to 0 and use_adaptive_entropy to false, or internal_steps to 0",
        ),
        (
            args.top_entropy_quantile < 1.0,
            f"top_entropy_quantile {args.top_entropy_quantile} would choose tokens by the internal policy's entropy; "
            "set it to 1.0 or internal_steps to 0",
        ),
        (
            args.loss_type not in RATIO_LOSSES,
            f"loss_type {args.loss_type!r} mixes the ratio with other weights; an internal phase needs one of "
            f"{', '.join(RATIO_LOSSES)}",
        ),
        (
            args.off_policy_mask_threshold is not None,
            "off_policy_mask_threshold would drop samples by the internal policy's drift (under vLLM it would compare "
            "that with the sampler's log-probabilities); leave it unset or set internal_steps to 0",
        ),
        (args.use_liger_kernel, "use_liger_kernel replaces forwards that the internal policy relies on; leave it off"),
        (args.torch_compile, "torch_compile would keep the graph of one phase for the other; leave it off"),
        (
            args.ddp_find_unused_parameters is False,
            "ddp_find_unused_parameters false leaves gradients unsynchronised in an internal phase, which does not use "
            "the upper layers; set it to true",
        ),
        (
            args.ddp_static_graph,
            "ddp_static_graph fails when the internal phase ends and the graph changes; leave it unset",
        ),
        (
            distributed == "deepspeed" and args.weight_decay != 0.0,
            f"weight_decay {args.weight_decay} would shrink the layers that an internal phase does not use, because "
            "DeepSpeed gives them gradients of zero; set it to 0, or use FSDP2 or DDP",
        ),
        (
            distributed == "ddp" and reentrant,
            "reentrant gradient checkpointing does not work with DDP and unused parameters, which an internal phase "
            "has; set use_reentrant to false in gradient_checkpointing_kwargs",
        ),
    ]
    return [message for applies, message in checks if applies]


def model_problems(trainer: Any) -> list[str]:
    """Problems of a trainer's settings with its model, optimizer and dataset."""
    args, schedule, model = trainer.args, trainer.schedule, trainer.model
    problems = layerwise_problems(model, args)
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    foreign = trainer.optimizer is not None or (plugin is not None and "optimizer" in plugin.deepspeed_config)
    if args.upper_learning_rate_above is not None and foreign:
        problems.append(
            "upper_learning_rate_scale needs the trainer's own optimizer; do not pass one, and leave the optimizer out "
            "of DeepSpeed's configuration"
        )
    if trainer._is_vlm and (schedule.internal or args.estimator == "ppo"):
        problems.append("internal phases and estimator ppo support text models only, and this model takes images")
    for layer in schedule.layers:
        try:
            check_layer(n_layers(model), layer)
        except ValueError as error:
            problems.append(f"internal_layer: {error}")
    cast_to = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    casts = args.use_transformers_continuous_batching and cast_to is not None
    if casts and any(str(p.dtype) != f"torch.{cast_to}" for p in model.parameters()):
        problems.append(
            f"use_transformers_continuous_batching would turn the trained weights to {cast_to} for good (TRL casts the "
            f"model to sample); load it with dtype {cast_to}, or set precision float32"
        )
    if trainer.micro_batches_per_epoch == 0:
        problems.append(
            f"the dataset has {len(trainer.train_dataset)} prompts, fewer than the {args.prompts_per_rollout} of "
            "one rollout batch"
        )
        return problems
    return problems + trainer.alignment_problems(schedule)
