"""TRL settings that would compute something else in an internal phase, and settings that do not fit a model or dataset.

In an internal phase the loss sees the log-probabilities and entropies of the internal policy. The clipped ratio is
meant for them (at token or sequence level); the terms refused here are not. Read from TRL 1.16's ``GRPOTrainer``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from bupo.models.internal_policy import check_layer
from bupo.models.layout import find_layout

# losses that use log-probabilities in the ratio only (cispo also as the score function of the same policy)
RATIO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo")


def engine(args: Any) -> Literal["one", "ddp", "fsdp1", "fsdp2", "deepspeed"]:
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


def failed(checks: Mapping[str, Any]) -> list[str]:
    """The messages whose condition is true."""
    return [message for message, wrong in checks.items() if wrong]


def unsupported_settings(args: Any) -> list[str]:
    """Problems of a `BuPOConfig` that has an internal phase, one message each."""
    kind = engine(args)
    reentrant = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    return failed({
        "internal_steps auto keeps weights, which DeepSpeed and FSDP1 shard; use FSDP2, or set a number": args.guarded
        and kind in ("deepspeed", "fsdp1"),
        f"beta {args.beta} would penalise the distance from the internal policy to the full reference model, which "
        "is the KL divergence of neither; set beta to 0 or internal_steps to 0": args.beta != 0.0,
        "entropy_coef and use_adaptive_entropy would act on the internal policy's entropy; set entropy_coef to 0 and "
        "use_adaptive_entropy to false, or internal_steps to 0": args.entropy_coef != 0.0 or args.use_adaptive_entropy,
        f"top_entropy_quantile {args.top_entropy_quantile} would choose tokens by the internal policy's entropy; set "
        "it to 1.0 or internal_steps to 0": args.top_entropy_quantile < 1.0,
        f"loss_type {args.loss_type!r} mixes the ratio with other weights; an internal phase needs one of "
        f"{', '.join(RATIO_LOSSES)}": args.loss_type not in RATIO_LOSSES,
        "off_policy_mask_threshold would drop samples by the internal policy's drift; leave it unset or set "
        "internal_steps to 0": args.off_policy_mask_threshold is not None,
        "use_liger_kernel replaces forwards that the internal policy relies on; leave it off": args.use_liger_kernel,
        "torch_compile would keep the graph of one phase for the other; leave it off": args.torch_compile,
        "ddp_find_unused_parameters false leaves gradients unsynchronised in an internal phase, which does not use the "
        "upper layers; set it to true": args.ddp_find_unused_parameters is False,
        "ddp_static_graph fails when the graph changes at the end of the phase; leave it unset": args.ddp_static_graph,
        f"weight_decay {args.weight_decay} would shrink the layers that an internal phase does not use, because "
        "DeepSpeed gives them gradients of zero; set it to 0, or use FSDP2 or DDP": kind == "deepspeed"
        and args.weight_decay != 0.0,
        "reentrant gradient checkpointing does not work with DDP and unused parameters, which an internal phase has; "
        "set use_reentrant to false in gradient_checkpointing_kwargs": kind == "ddp" and reentrant,
    })  # fmt: skip


def model_problems(trainer: Any) -> list[str]:
    """Problems of a trainer's settings with its model, optimizer and dataset."""
    args, schedule, model = trainer.args, trainer.schedule, trainer.model
    frozen, above = args.frozen_layers, args.upper_learning_rate_above
    named = [("frozen_layers", frozen), ("upper_learning_rate_above", above)]
    named += [("internal_layer", layer) for layer in schedule.layers]
    n_layers = find_layout(model).n_layers if any(layer is not None for _, layer in named) else None
    problems = []
    for name, layer in named:
        try:
            if layer is not None and n_layers is not None:
                check_layer(n_layers, layer)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    foreign = trainer.optimizer is not None or (plugin is not None and "optimizer" in plugin.deepspeed_config)
    cast_to = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    casts = args.use_transformers_continuous_batching and cast_to is not None
    problems += failed({
        f"upper_learning_rate_above: no layer is above {n_layers}; set a lower one": above and above == n_layers,
        "upper_learning_rate_scale needs the trainer's own optimizer; do not pass one, and leave the optimizer out of "
        "DeepSpeed's configuration": above and foreign,
        "internal phases and estimator ppo support text models only, and this model takes images": trainer._is_vlm
        and (schedule.internal or args.estimator == "ppo"),
        f"use_transformers_continuous_batching would turn the trained weights to {cast_to} for good (TRL casts the "
        f"model to sample); load it with dtype {cast_to}, or set precision float32": casts
        and any(str(p.dtype) != f"torch.{cast_to}" for p in model.parameters()),
    })  # fmt: skip
    if trainer.micro_batches_per_epoch != 0:
        return problems + trainer.alignment_problems(schedule)
    prompts = len(trainer.train_dataset)
    return [
        *problems,
        f"the dataset has {prompts} prompts, fewer than the {args.prompts_per_rollout} of a rollout batch",
    ]
