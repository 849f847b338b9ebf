"""Advantage estimators: what TRL offers by settings, and the three that it lacks as functions of the rewards.

All but ``ppo`` are outcome estimators: one advantage a response, the same for each of its tokens. They combine with any
schedule of internal policies, because advantages never depend on the policy in the ratio.

=====================  ===================================================================  ==================
name                   advantage of response i of its question's G                          beside
=====================  ===================================================================  ==================
grpo                   (r_i - mean_G) / (std_G + 1e-4)                                      TRL
dr_grpo                r_i - mean_G; loss divided by the longest length                     TRL
dapo                   as grpo; clip from 0.2 below to 0.28 above (no dynamic sampling)     TRL
rloo                   r_i - mean of the other G - 1                                        here
reinforce++            (r_i - mean_B) / (std_B + 1e-4) over the whole rollout batch B       here
reinforce++-baseline   a_i = r_i - mean_G, then (a_i - mean_B(a)) / (std_B(a) + 1e-4)       here
ppo                    generalised advantage estimation with a critic, whitened over tokens critic.py
=====================  ===================================================================  ==================

Sources: GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476), RLOO (2402.14740), REINFORCE++ (2501.03262),
PPO (1707.06347).
Means and deviations over B count responses, not tokens (some implementations weigh by length).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# by TRL's own settings; each name's values, and the value a field has when nobody set it
SETTINGS: dict[str, dict[str, tuple[Any, Any]]] = {
    "grpo": {},
    "dr_grpo": {"loss_type": ("dr_grpo", "dapo"), "scale_rewards": ("none", "group")},
    "dapo": {"epsilon_high": (0.28, None)},
    "rloo": {"scale_rewards": ("none", "group")},
    "reinforce++": {"scale_rewards": ("none", "group")},
    "reinforce++-baseline": {"scale_rewards": ("none", "group")},
    "ppo": {"scale_rewards": ("none", "group")},
}
NAMES = tuple(SETTINGS)
OWN = ("rloo", "reinforce++", "reinforce++-baseline")
_EPSILON = 1e-4  # as TRL's


def advantages(name: str, rewards: Tensor, group: int) -> Tensor:
    """Advantages of one rollout batch.

    Args:
        name: one of `OWN`.
        rewards: (N,), the responses of a question next to each other; NaN for one that could not be scored, which then
            counts in no mean and gets advantage 0.
        group: G, responses a question.

    Returns: (N,).
    """
    if name == "reinforce++":
        found = _normalised(rewards)
    else:
        grouped = rewards.view(-1, group)
        count = (~grouped.isnan()).sum(dim=1, keepdim=True)
        centred = grouped - grouped.nanmean(dim=1, keepdim=True)
        if name == "rloo":  # n / (n - 1) times the distance from the mean is the distance from the others' mean
            found = (centred * count / (count - 1).clamp(min=1)).flatten()
        elif name == "reinforce++-baseline":
            found = _normalised(centred.flatten())
        else:
            raise ValueError(f"unknown estimator {name!r}; one of {', '.join(OWN)}")
    return found.nan_to_num(nan=0.0)


def _normalised(values: Tensor) -> Tensor:
    known = values[~values.isnan()]
    deviation = known.std() if known.numel() > 1 else torch.zeros((), device=values.device)
    return (values - known.mean()) / (deviation + _EPSILON)


def apply_settings(args: Any, name: str) -> list[str]:
    """Set the fields that an estimator needs; problems where one was set to something else."""
    if name not in SETTINGS:
        return [f"estimator must be one of {', '.join(NAMES)}, not {name!r}"]
    problems = []
    for field, (wanted, untouched) in SETTINGS[name].items():
        value = getattr(args, field)
        value = {True: "group", False: "none"}.get(value, value) if field == "scale_rewards" else value
        if value == untouched:
            setattr(args, field, wanted)
        elif value != wanted and not (name == "dapo" and field == "epsilon_high"):
            problems.append(f"estimator {name} sets {field} to {wanted!r}; do not set it to {value!r}")
    if name in (*OWN, "ppo") and args.multi_objective_aggregation != "sum_then_normalize":
        problems.append(f"estimator {name} works on the weighted sum of the rewards; leave multi_objective_aggregation")
    return problems
