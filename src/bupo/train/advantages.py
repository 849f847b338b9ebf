"""Advantage estimators that TRL lacks: functions of the rewards, and PPO with its critic.

All but ``ppo`` give one advantage per response, the same for each of its tokens. Advantages never depend on the policy
in the ratio, so every estimator combines with every schedule.

- ``grpo`` (by TRL): (r_i - mean_G) / (std_G + 1e-4), over the G responses to its question
- ``rloo``: r_i - mean of the other G - 1
- ``reinforce++``: (r_i - mean_B) / (std_B + 1e-4) over the whole rollout batch B
- ``reinforce++-baseline``: a_i = r_i - mean_G, then (a_i - mean_B(a)) / (std_B(a) + 1e-4)
- ``ppo``: generalised advantage estimation with a critic, whitened over tokens

Sources, in this order: arXiv 2402.03300, 2402.14740, 2501.03262 (both), 1707.06347. B counts responses, not tokens.
Dr. GRPO and DAPO are TRL settings: ``loss_type: dr_grpo`` with ``scale_rewards: none``, and ``epsilon_high: 0.28``.

Shapes: N responses of all processes, B of this one, T response tokens. ``mask`` (B, T) is 1 for tokens that the policy
chose, and 0 for padding and a tool's output, over which values and advantages are carried unchanged.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bupo.errors import TrainingStopped
from bupo.models.layout import find_layout, unwrap
from bupo.models.padding import from_left, to_left
from bupo.train.images import choose_rows, image_fields

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


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantages (arXiv 1506.02438) and returns, (B, T) each, 0 where the mask is 0; ``rewards`` are (B,).

    ``delta_t = r_t + gamma V_{t+1} - V_t`` and ``A_t = delta_t + gamma lam A_{t+1}``, with ``V = A = 0`` after the last
    token, which gets the reward (truncated or not). ``V_t`` is of the state before t; the return is ``A_t + V_t``.
    """
    next_value = carried = torch.zeros_like(values[:, 0])
    advantages = torch.zeros_like(values)
    for t in range(values.size(1) - 1, -1, -1):
        chosen = mask[:, t].bool()
        delta = rewards + gamma * next_value - values[:, t]
        rewards = torch.where(chosen, 0.0, rewards)
        carried = torch.where(chosen, delta + gamma * lam * carried, carried)
        next_value = torch.where(chosen, values[:, t], next_value)
        advantages[:, t] = torch.where(chosen, carried, 0.0)
    return advantages, (advantages + values) * mask


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """``max((V - R)^2, (clip(V, old - c, old + c) - R)^2) / 2`` for each token, as in verl and TRL."""
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


class Critic(nn.Module):
    """``V(s) = w . LN(H^L) + b``, a copy of the policy's backbone (and what encodes ``images``), a head of zeros."""

    def __init__(self, policy: nn.Module, images: bool = False):
        super().__init__()
        layout = find_layout(policy)
        self.backbone = copy.deepcopy(unwrap(policy).base_model if images else layout.backbone)
        self.head = nn.Linear(layout.unembedding.weight.shape[1], 1, device=layout.unembedding.weight.device)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, responses: int, **images: Tensor) -> Tensor:
        """Values of the states before each of the last ``responses`` tokens, (B, responses), float32."""
        ids, mask = (input_ids, attention_mask) if images else to_left(attention_mask, input_ids, attention_mask)
        states = self.backbone(input_ids=ids, attention_mask=mask, use_cache=False, **images).last_hidden_state
        states = states if images else from_left(attention_mask, states)
        return self.head(states[:, -responses - 1 : -1].to(self.head.weight.dtype))[..., 0].float()


class PPO:
    """Owns the critic and its optimizer; the trainer asks it for advantages and then lets it learn, as in verl.

    The critic trains what the policy trains when it is made (all weights, or the adapters) and its head. Every process
    holds a whole critic; gradients are summed.
    """

    def __init__(self, policy: nn.Module, args: Any, accelerator: Any, images: bool = False):
        self.args, self.accelerator = args, accelerator
        self.critic = Critic(policy, images).to(accelerator.device).eval()
        if args.gradient_checkpointing:
            self.critic.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        self.trained = {name: p for name, p in self.critic.named_parameters() if p.requires_grad}
        rate, betas = args.critic_learning_rate, (args.adam_beta1, args.adam_beta2)
        self.optimizer = torch.optim.AdamW(self.trained.values(), rate, betas, args.adam_epsilon, args.weight_decay)
        self.targets: dict[str, Tensor] = {}  # old values, returns and mask of the rollout batch, (B, T) each

    def values(self, batch: Mapping[str, Tensor], rows: slice = slice(None)) -> Tensor:
        """Values before each response token of these rows, (rows, T)."""
        part = choose_rows(batch, range(len(batch["prompt_ids"]))[rows])
        ids = torch.cat([part["prompt_ids"], part["completion_ids"]], dim=1)
        mask = torch.cat([part["prompt_mask"], part["completion_mask"]], dim=1)
        with self.accelerator.autocast():
            return self.critic(ids, mask, part["completion_ids"].size(1), **image_fields(part, counts=False))

    @torch.no_grad()
    def advantages(self, batch: Mapping[str, Tensor], rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages (B, T), whitened over the tokens of all processes, and their mean for each response (B,).

        The tokens of a response with reward NaN (it could not be scored) count nowhere. Keeps what `learn` needs.
        """
        mask = (batch["completion_mask"] * batch.get("tool_mask", 1) * ~rewards.isnan()[:, None]).float()
        micro = self.args.per_device_train_batch_size
        values = torch.cat([self.values(batch, slice(i, i + micro)) for i in range(0, len(rewards), micro)])
        raw, returns = gae(rewards.float(), values, mask, self.args.gae_gamma, self.args.gae_lambda)
        self.targets = {"values": values, "returns": returns, "mask": mask}
        count, total = sums(self.accelerator, mask, raw * mask)
        mean = total / max(count, 1.0)
        (square,) = sums(self.accelerator, (raw - mean) ** 2 * mask)
        advantages = (raw - mean) / (square / max(count - 1.0, 1.0) + 1e-8) ** 0.5 * mask
        return advantages, (advantages * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

    def learn(self, batch: Mapping[str, Tensor], position: str) -> dict[str, float]:
        """Train the critic on the rollout batch, as many updates as the policy takes; ``position`` is for an error."""
        updates = self.args.steps_per_generation // self.args.gradient_accumulation_steps
        size = len(self.targets["values"]) // updates  # whole prompts, in order
        parts = [slice(start, start + size) for start in range(0, updates * size, size)]
        self.critic.train()
        history = [self.update(batch, rows, position) for _ in range(self.args.num_iterations) for rows in parts]
        self.critic.eval()
        metrics = {f"critic/{name}": sum(update[name] for update in history) / len(history) for name in history[0]}
        values, returns, mask = self.targets.values()
        squares = (values - returns) ** 2 * mask, returns**2 * mask
        count, total, value, error, square = sums(self.accelerator, mask, returns * mask, values * mask, *squares)
        metrics["critic/value"] = value / max(count, 1.0)
        variance = square - total**2 / max(count, 1.0)
        if variance > 0:  # 1: the values predicted every return; 0: no better than the mean return
            metrics["critic/explained"] = 1.0 - error / variance
        return metrics

    def update(self, batch: Mapping[str, Tensor], rows: slice, position: str) -> dict[str, float]:
        """One update on these rows: the token mean of the clipped value loss, over all processes."""
        (tokens,) = sums(self.accelerator, self.targets["mask"][rows])
        micro, clip = self.args.per_device_train_batch_size, self.args.critic_clip
        losses, clipped = [], []
        for first in range(rows.start, rows.stop, micro):
            part = slice(first, min(first + micro, rows.stop))
            old, returns, mask = (target[part] for target in self.targets.values())
            values = self.values(batch, part)
            loss = (clipped_value_loss(values, old, returns, clip) * mask).sum() / max(tokens, 1.0)
            loss.backward()
            losses.append(loss.detach())
            clipped.append((((values.detach() - old).abs() > clip) * mask).sum())
        if self.accelerator.num_processes > 1:
            for parameter in self.trained.values():  # every process takes part, even if its rows do not reach this one
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, reduction="sum")
        loss_sum, clipped_sum = sums(self.accelerator, torch.stack(losses), torch.stack(clipped))
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.args.max_grad_norm or math.inf).item()
        if not math.isfinite(loss_sum + norm):
            remedy = "lower critic_learning_rate and start from the last checkpoint"
            raise TrainingStopped(f"non-finite loss or gradient of the critic in {position}; {remedy}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss_sum, "grad_norm": norm, "clip_ratio": clipped_sum / max(tokens, 1.0)}

    def state_dict(self) -> dict[str, Any]:
        if not self.accelerator.is_main_process:  # the same on every process
            return {}
        return {"weights": {n: p.detach() for n, p in self.trained.items()}, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
