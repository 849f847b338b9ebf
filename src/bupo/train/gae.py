"""Generalised advantage estimation over response tokens (arXiv 1506.02438), and PPO's value loss.

Shapes: B responses, T response tokens. ``mask`` (B, T) is 1 for tokens that the policy chose, and 0 for padding and for
the output of a tool, over which values and advantages are carried unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns.

    ``delta_t = r_t + gamma V_{t+1} - V_t`` and ``A_t = delta_t + gamma lam A_{t+1}``, with ``V = A = 0`` after the last
    token (a truncated response ends there too). The return is ``A_t + V_t``.

    Args:
        rewards: reward of each token, (B, T).
        values: ``V_t`` of the state before each token, (B, T).
        gamma: discount factor per token.
        lam: weight between one-step differences (0) and whole returns (1).

    Returns: two (B, T) tensors, 0 where the mask is 0.
    """
    next_value = torch.zeros_like(values[:, 0])
    carried = torch.zeros_like(next_value)
    advantages = torch.zeros_like(values)
    for t in range(values.size(1) - 1, -1, -1):
        chosen = mask[:, t].bool()
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        carried = torch.where(chosen, delta + gamma * lam * carried, carried)
        next_value = torch.where(chosen, values[:, t], next_value)
        advantages[:, t] = torch.where(chosen, carried, 0.0)
    return advantages, (advantages + values) * mask


def rewards_at_last_token(rewards: Tensor, mask: Tensor) -> Tensor:
    """The reward of each response (B,) at the last token that the policy chose, (B, T)."""
    positions = torch.arange(1, mask.size(1) + 1, device=mask.device)
    last = (positions * mask.bool()).argmax(dim=1, keepdim=True)
    placed = torch.zeros(mask.shape, dtype=rewards.dtype, device=rewards.device)
    return placed.scatter(1, last, rewards[:, None]) * mask


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """``max((V - R)^2, (clip(V, old - c, old + c) - R)^2) / 2`` for each token, as in verl and TRL."""
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)
