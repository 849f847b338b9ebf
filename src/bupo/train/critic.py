"""PPO's advantages (arXiv 1707.06347): a critic, trained on the returns of every rollout batch.

As in verl, the paper's framework: values before a rollout batch's updates, GAE, advantages whitened over its tokens,
then the critic's updates (as many mini-batches and passes as the policy's), then the policy's. The advantages depend on
rewards and critic alone, never on the policy in the ratio, so they serve every schedule.

The critic trains what the policy trains when it is made (all weights, or the adapters) and its head. Every process
holds a whole critic; gradients are summed over processes.

Shapes: B responses of this process, T response tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bupo.errors import TrainingStopped
from bupo.models.layout import find_layout
from bupo.train.gae import clipped_value_loss, gae, rewards_at_last_token


class Critic(nn.Module):
    """``V(s) = w . LN(H^L) + b``, a copy of the policy's backbone with a head of zeros."""

    def __init__(self, policy: nn.Module):
        super().__init__()
        layout = find_layout(policy)
        self.backbone = copy.deepcopy(layout.backbone)
        weight = layout.final_norm.weight if hasattr(layout.final_norm, "weight") else layout.unembedding.weight
        self.head = nn.Linear(layout.unembedding.weight.shape[1], 1, device=weight.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, responses: int) -> Tensor:
        """Values of the states before each of the last ``responses`` tokens, (B, responses), float32."""
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return self.head(states[:, -responses - 1 : -1].to(self.head.weight.dtype))[..., 0].float()

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


class PPO:
    """Owns the critic and its optimizer; the trainer asks it for advantages and then lets it learn."""

    def __init__(self, policy: nn.Module, args: Any, accelerator: Any):
        self.args, self.accelerator = args, accelerator
        self.critic = Critic(policy).to(accelerator.device).eval()
        if args.gradient_checkpointing:
            self.critic.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(
            self.critic.trained().values(),
            lr=args.critic_learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        self.targets: dict[str, Tensor] = {}  # old values, returns and mask of the rollout batch, (B, T) each

    def values(self, batch: Mapping[str, Tensor], rows: slice = slice(None)) -> Tensor:
        """Values before each response token of these rows, (rows, T)."""
        ids = torch.cat([batch["prompt_ids"][rows], batch["completion_ids"][rows]], dim=1)
        mask = torch.cat([batch["prompt_mask"][rows], batch["completion_mask"][rows]], dim=1)
        with self.accelerator.autocast():
            return self.critic(ids, mask, batch["completion_ids"].size(1))

    @torch.no_grad()
    def advantages(self, batch: Mapping[str, Tensor], rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages, whitened over the tokens of the rollout batch of all processes; keeps what `learn` needs.

        Args:
            rewards: of this process's responses, (B,). The tokens of a response with reward NaN (it could not be
                scored) count nowhere.

        Returns: advantages (B, T), and their mean for each response (B,).
        """
        chosen = (batch["completion_mask"] * batch.get("tool_mask", 1)).float()
        mask = chosen * (~rewards.isnan()).float()[:, None]
        micro = self.args.per_device_train_batch_size
        values = torch.cat([self.values(batch, slice(i, i + micro)) for i in range(0, len(rewards), micro)])
        token_rewards = rewards_at_last_token(rewards.nan_to_num(nan=0.0).float(), chosen)
        raw, returns = gae(token_rewards, values, mask, self.args.gae_gamma, self.args.gae_lambda)
        self.targets = {"values": values, "returns": returns, "mask": mask}
        advantages = self._whiten(raw, mask)
        return advantages, (advantages * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

    def _whiten(self, advantages: Tensor, mask: Tensor) -> Tensor:
        count, total = self._sums(mask, advantages * mask)
        mean = total / max(count, 1.0)
        (square,) = self._sums((advantages - mean) ** 2 * mask)
        deviation = (square / max(count - 1.0, 1.0) + 1e-8) ** 0.5
        return (advantages - mean) / deviation * mask

    def _sums(self, *values: Tensor) -> list[float]:
        """Sums over all elements and processes."""
        return self.accelerator.reduce(torch.stack([v.double().sum() for v in values]), reduction="sum").tolist()

    def learn(self, batch: Mapping[str, Tensor], position: str) -> dict[str, float]:
        """Train the critic on the rollout batch: whole prompts in order, as many updates as the policy takes.

        Args:
            position: where training is, for an error message.

        Returns: metrics by name.

        Raises:
            TrainingStopped: the loss or the gradient is not finite; the weights were not updated with it.
        """
        self.critic.train()
        updates = self.args.steps_per_generation // self.args.gradient_accumulation_steps
        size = len(self.targets["values"]) // updates
        history: dict[str, list[float]] = {"loss": [], "grad_norm": [], "clip_ratio": []}
        for _ in range(self.args.num_iterations):
            for start in range(0, updates * size, size):
                for name, value in self.update(batch, slice(start, start + size), position).items():
                    history[name].append(value)
        self.critic.eval()
        values, returns, mask = (self.targets[name] for name in ("values", "returns", "mask"))
        count, error, square, total, value = self._sums(
            mask, (values - returns) ** 2 * mask, returns**2 * mask, returns * mask, values * mask
        )
        metrics = {f"critic/{name}": sum(numbers) / len(numbers) for name, numbers in history.items()}
        metrics["critic/value"] = value / max(count, 1.0)
        variance = square - total**2 / max(count, 1.0)
        if variance > 0:  # 1: the values predicted every return; 0: no better than the mean return
            metrics["critic/explained"] = 1.0 - error / variance
        return metrics

    def update(self, batch: Mapping[str, Tensor], rows: slice, position: str) -> dict[str, float]:
        """One update on these rows: the token mean of the clipped value loss, over all processes."""
        (tokens,) = self._sums(self.targets["mask"][rows])
        micro, clip = self.args.per_device_train_batch_size, self.args.critic_clip
        loss_sum = clipped_sum = torch.zeros((), dtype=torch.float64, device=self.targets["values"].device)
        for first in range(rows.start, rows.stop, micro):
            part = slice(first, min(first + micro, rows.stop))
            old, returns, mask = (self.targets[name][part] for name in ("values", "returns", "mask"))
            values = self.values(batch, part)
            loss = (clipped_value_loss(values, old, returns, clip) * mask).sum() / max(tokens, 1.0)
            loss.backward()
            loss_sum = loss_sum + loss.detach().double()
            clipped_sum = clipped_sum + (((values.detach() - old).abs() > clip) * mask).double().sum()
        trained = list(self.critic.trained().values())
        if self.accelerator.num_processes > 1:
            for parameter in trained:  # every process takes part, even if its rows do not reach this parameter
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, reduction="sum")
        loss_value, clipped = self._sums(loss_sum, clipped_sum)
        norm = float(torch.nn.utils.clip_grad_norm_(trained, self.args.max_grad_norm or float("inf")))
        if not torch.isfinite(torch.tensor([loss_value, norm])).all():
            raise TrainingStopped(
                f"non-finite loss or gradient of the critic in {position}; lower critic_learning_rate and start from "
                "the last checkpoint"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss_value, "grad_norm": norm, "clip_ratio": clipped / max(tokens, 1.0)}

    def state_dict(self) -> dict[str, Any]:
        """Trained weights and optimizer state, on the main process (they are the same on every process)."""
        if not self.accelerator.is_main_process:
            return {}
        weights = {name: p.detach() for name, p in self.critic.trained().items()}
        return {"weights": weights, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state_dict` of the main process."""
        with torch.no_grad():
            for name, parameter in self.critic.trained().items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
