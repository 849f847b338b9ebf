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

Sources: GRPO (arXiv 2402.03300), RLOO (2402.14740), REINFORCE++ (2501.03262), PPO (1707.06347). Means and deviations
over B count responses, not tokens (some implementations weigh them by length). Dr. GRPO and DAPO are TRL settings:
``loss_type: dr_grpo`` with ``scale_rewards: none``, and ``epsilon_high: 0.28``.
"""

from __future__ import annotations

import torch
from torch import Tensor

ESTIMATORS = ("grpo", "rloo", "reinforce++", "reinforce++-baseline", "ppo")
COMPUTED_HERE = ("rloo", "reinforce++", "reinforce++-baseline")
_EPSILON = 1e-4  # as in TRL


def total_rewards(per_function: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum (N,) of rewards (N, functions); NaN for a response that no function could score."""
    rewards = (per_function * weights.to(per_function.device)).nansum(dim=1)
    rewards[per_function.isnan().all(dim=1)] = torch.nan
    return rewards


def outcome_advantages(name: str, rewards: Tensor, group: int) -> Tensor:
    """Advantages of one rollout batch.

    Args:
        name: one of `COMPUTED_HERE`.
        rewards: (N,), the responses to one question next to each other. A response with reward NaN could not be scored:
            it enters no mean and gets advantage 0.
        group: G, the number of responses per question.

    Returns: advantages, (N,).
    """
    if name == "reinforce++":
        return _normalise(rewards).nan_to_num(nan=0.0)
    grouped = rewards.view(-1, group)
    count = (~grouped.isnan()).sum(dim=1, keepdim=True)
    centred = grouped - grouped.nanmean(dim=1, keepdim=True)
    if name == "rloo":  # n / (n - 1) times the distance from the mean is the distance from the others' mean
        return (centred * count / (count - 1).clamp(min=1)).flatten().nan_to_num(nan=0.0)
    if name == "reinforce++-baseline":
        return _normalise(centred.flatten()).nan_to_num(nan=0.0)
    raise ValueError(f"unknown estimator {name!r}; one of {', '.join(COMPUTED_HERE)}")


def _normalise(values: Tensor) -> Tensor:
    scored = values[~values.isnan()]
    deviation = scored.std() if scored.numel() > 1 else torch.zeros((), device=values.device)
    return (values - scored.mean()) / (deviation + _EPSILON)
