"""Settings that would silently compute something else in an internal phase: each is refused with one clear line.

Read from TRL 1.16's ``GRPOTrainer``; nothing here imports it. In an internal phase the log-probabilities and entropies
that the loss sees are those of the internal policy, so every term built from them must be meant for it. The ratio is
(token or sequence level, any clipped surrogate); what follows is not.
"""

from __future__ import annotations

import os
from typing import Any, Literal

# loss types whose only use of log-probabilities is the ratio (cispo: also the score function of the same policy)
RATIO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo")


Engine = Literal["one", "ddp", "fsdp1", "fsdp2", "deepspeed"]


def engine(args: Any) -> Engine:
    """What spreads the model: asked for in the settings, or by ``accelerate launch`` through its environment."""

    def launched(name: str) -> bool:
        return os.environ.get(name, "").lower() in ("1", "true")

    if args.deepspeed is not None or launched("ACCELERATE_USE_DEEPSPEED"):
        return "deepspeed"
    if args.fsdp:
        return "fsdp1" if int((args.fsdp_config or {}).get("version", 2)) == 1 else "fsdp2"
    if launched("ACCELERATE_USE_FSDP"):
        return "fsdp2" if os.environ.get("FSDP_VERSION", "1") == "2" else "fsdp1"
    return "ddp" if args.world_size > 1 else "one"


def guard_hazards(args: Any) -> list[str]:
    """Problems of ``internal_steps: auto``, which keeps weights to go back to."""
    if engine(args) not in ("deepspeed", "fsdp1"):
        return []
    return ["internal_steps auto keeps weights, which DeepSpeed and FSDP1 spread; use FSDP2, or give a number"]


def hazards(args: Any) -> list[str]:
    """Problems of a `BuPOConfig` whose schedule has an internal phase; one line each."""
    found = []
    if args.beta != 0.0:
        found.append(
            f"beta {args.beta} adds a penalty between the internal policy and the full reference model, which is the "
            "KL of neither; set beta to 0 or internal_steps to 0"
        )
    if args.entropy_coef != 0.0 or args.use_adaptive_entropy:
        found.append(
            "entropy_coef / use_adaptive_entropy would act on the internal policy's entropy and carry that over the "
            "switch; set entropy_coef to 0 and use_adaptive_entropy to false, or internal_steps to 0"
        )
    if args.top_entropy_quantile < 1.0:
        found.append(
            f"top_entropy_quantile {args.top_entropy_quantile} would choose tokens by the internal policy's entropy; "
            "set it to 1.0 or internal_steps to 0"
        )
    if args.loss_type not in RATIO_LOSSES:
        found.append(
            f"loss_type {args.loss_type!r} mixes the ratio with other weights; with an internal phase use one of "
            f"{', '.join(RATIO_LOSSES)}"
        )
    if args.off_policy_mask_threshold is not None:
        found.append(
            "off_policy_mask_threshold would drop samples by the internal policy's drift (and compare it with the "
            "sampler's log-probabilities under vLLM); leave it unset or set internal_steps to 0"
        )
    if args.use_liger_kernel:
        found.append("use_liger_kernel replaces layer forwards that early exit relies on; leave it off")
    if args.torch_compile:
        found.append("torch_compile would keep the graph of one phase for the other; leave it off")
    if args.ddp_find_unused_parameters is False:
        found.append(
            "ddp_find_unused_parameters false leaves gradients unsynchronised in the internal phase, where upper "
            "layers are unused; set it to true"
        )
    if args.ddp_static_graph:
        found.append("ddp_static_graph cannot hold: the graph changes when the internal phase ends; leave it unset")
    if engine(args) == "deepspeed" and args.weight_decay != 0.0:
        found.append(
            f"weight_decay {args.weight_decay} would shrink the layers that the internal phase does not use, because "
            "DeepSpeed gives them gradients of zero; set it to 0, or use FSDP2 or DDP"
        )
    if (
        engine(args) == "ddp"
        and args.gradient_checkpointing
        and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    ):
        found.append(
            "reentrant gradient checkpointing does not work with DDP and unused parameters (the internal phase has "
            "them); set use_reentrant to false in gradient_checkpointing_kwargs"
        )
    return found
