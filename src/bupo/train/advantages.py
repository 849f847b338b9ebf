"""Advantage estimators that TRL lacks, as functions of the rewards.

All but ``ppo`` give one advantage per response, the same for each of its tokens. Advantages never depend on the policy
in the ratio, so every estimator combines with every schedule.

=====================  ===================================================================  ===========
name                   advantage of response i, one of the G responses to its question       computed by
=====================  ===================================================================  ===========
grpo                   (r_i - mean_G) / (std_G + 1e-4)                                      TRL
rloo                   r_i - mean of the other G - 1                                        this module
reinforce++            (r_i - mean_B) / (std_B + 1e-4) over the whole rollout batch B       this module
reinforce++-baseline   a_i = r_i - mean_G, then (a_i - mean_B(a)) / (std_B(a) + 1e-4)       this module
ppo                    generalised advantage estimation with a critic, whitened over tokens critic.py
=====================  ===================================================================  ===========

Sources, in this order: arXiv 2402.03300, 2402.14740, 2501.03262 (both), 1707.06347. B counts responses, not tokens.
Dr. GRPO and DAPO are TRL settings: ``loss_type: dr_grpo`` with ``scale_rewards: none``, and ``epsilon_high: 0.28``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

COMPUTED_HERE = ("rloo", "reinforce++", "reinforce++-baseline")
ESTIMATORS = ("grpo", *COMPUTED_HERE, "ppo")


def total_rewards(per_function: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum (N,) of rewards (N, functions); NaN for a response that no function could score."""
    rewards = (per_function * weights.to(per_function.device)).nansum(dim=1)
    rewards[per_function.isnan().all(dim=1)] = torch.nan
    return rewards


def outcome_advantages(name: str, rewards: Tensor, group: int) -> Tensor:
    """Advantages (N,) of one rollout batch, whose ``rewards`` (N,) have the responses to one question side by side.

    A response with reward NaN could not be scored: it enters no mean and gets advantage 0.
    """
    grouped = rewards.view(-1, group)
    centred = grouped - grouped.nanmean(dim=1, keepdim=True)
    if name == "rloo":  # n / (n - 1) times the distance from the mean is the distance from the others' mean
        count = (~grouped.isnan()).sum(dim=1, keepdim=True)
        return (centred * count / (count - 1).clamp(min=1)).flatten().nan_to_num(nan=0.0)
    values = {"reinforce++": rewards, "reinforce++-baseline": centred.flatten()}[name]
    scored = values[~values.isnan()]
    deviation = scored.std() if scored.numel() > 1 else 0.0
    return ((values - scored.mean()) / (deviation + 1e-4)).nan_to_num(nan=0.0)  # 1e-4 as in TRL


def sums(accelerator: Any, *values: Tensor) -> list[float]:
    """The sum of each tensor over its elements and all processes, in float64."""
    return accelerator.reduce(torch.stack([v.double().sum() for v in values]), reduction="sum").tolist()
