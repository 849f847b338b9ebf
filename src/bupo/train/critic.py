"""PPO's critic: a copy of the policy's backbone with a scalar head, trained on the returns of every rollout batch.

The part of `BuPOTrainer` behind ``estimator: ppo`` (arXiv 1707.06347), as in verl, the paper's framework: values before
a rollout batch's updates, GAE, advantages whitened over its tokens, then the critic's updates (as many mini-batches
and passes as the policy's), then the policy's. The advantages depend on rewards and critic alone, never on the policy
in the ratio, and so serve every schedule of internal policies.

The critic learns what the policy learns when it is made (all weights, or its adapters) and its head. Every process
holds a whole one; gradients are summed over processes.

Shape legend: B responses of this process, T response tokens.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bupo.errors import BupoError, ConfigError
from bupo.models.layout import find_layout
from bupo.train.gae import clipped_value_loss, gae, outcome_rewards
from bupo.train.unsupported import engine

if TYPE_CHECKING:
    from trl import GRPOTrainer as _Parent
else:
    _Parent = object

WEIGHTS_FILE, OPTIMIZER_FILE = "critic.safetensors", "critic_optimizer.safetensors"
DEFAULTS = {"critic_learning_rate": 1e-5, "critic_clip": 0.5, "gae_gamma": 1.0, "gae_lambda": 1.0}


class CriticDiverged(BupoError):
    """The critic's loss is not finite; the message names the rollout batch and what to try."""


class Critic(nn.Module):
    """``V(s) = w . LN(H^L) + b``, starting as the policy's own states and a head of zeros."""

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
        read = states[:, -responses - 1 : -1].to(self.head.weight.dtype)
        return self.head(read)[..., 0].float()

    def learning(self) -> dict[str, nn.Parameter]:
        """What the critic trains, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def critic_problems(args: Any) -> list[str]:
    """What is wrong with the critic's settings."""
    if args.estimator != "ppo":
        return [
            f"{name} goes with estimator ppo, not {args.estimator}"
            for name, value in DEFAULTS.items()
            if getattr(args, name) != value
        ]
    found = []
    for name in ("critic_learning_rate", "critic_clip"):
        if not getattr(args, name) > 0:
            found.append(f"{name} must be above 0, not {getattr(args, name)}")
    for name in ("gae_gamma", "gae_lambda"):
        if not 0.0 <= getattr(args, name) <= 1.0:
            found.append(f"{name} must be from 0 to 1, not {getattr(args, name)}")
    if engine(args) not in ("one", "ddp"):
        found.append("estimator ppo holds a whole critic in every process, which FSDP and DeepSpeed would not split")
    if args.fp16:
        found.append("estimator ppo does not scale the critic's loss as fp16 needs; use bfloat16 or float32")
    if args.steps_per_generation % args.gradient_accumulation_steps:
        found.append(
            f"estimator ppo needs whole updates: steps_per_generation {args.steps_per_generation} is no multiple of "
            f"gradient_accumulation_steps {args.gradient_accumulation_steps}"
        )
    return found


class LearnsValues(_Parent):
    """What `BuPOTrainer` does with a critic."""

    if TYPE_CHECKING:  # of BuPOTrainer
        args: Any
        _rewards: Tensor

    critic: Critic | None = None
    critic_optimizer: torch.optim.Optimizer | None = None

    def _make_critic(self) -> None:
        if self.args.estimator != "ppo":
            return
        if self._is_vlm:
            raise ConfigError("estimator ppo reads text models; this one takes images")
        args = self.args
        critic = Critic(self.accelerator.unwrap_model(self.model)).to(self.accelerator.device)
        if args.gradient_checkpointing:
            critic.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        self.critic = critic.eval()
        self.critic_optimizer = torch.optim.AdamW(
            critic.learning().values(),
            lr=args.critic_learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )

    # -- advantages ------------------------------------------------------------------------------------------------

    def _values(self, batch: dict[str, Any], rows: slice = slice(None)) -> Tensor:
        """Values before each response token of these rows, (rows, T)."""
        assert self.critic is not None
        ids = torch.cat([batch["prompt_ids"][rows], batch["completion_ids"][rows]], dim=1)
        mask = torch.cat([batch["prompt_mask"][rows], batch["completion_mask"][rows]], dim=1)
        with self.accelerator.autocast():
            return self.critic(ids, mask, batch["completion_ids"].size(1))

    def _set_critic_advantages(self, batch: dict[str, Any], rewards: Tensor) -> Tensor:
        """Put whitened advantages (B, T) into the batch, and what the critic will learn from it.

        Args:
            rewards: of this process's responses, (B,); NaN for one that could not be scored: its tokens count nowhere.

        Returns: the mean advantage of each response (B,), for the log.
        """
        chosen = (batch["completion_mask"] * batch.get("tool_mask", 1)).float()
        mask = chosen * (~rewards.isnan()).float()[:, None]
        micro = self.args.per_device_train_batch_size
        with torch.no_grad():
            parts = [self._values(batch, slice(i, i + micro)) for i in range(0, len(rewards), micro)]
        values = torch.cat(parts)
        at_end = outcome_rewards(rewards.nan_to_num(nan=0.0).float(), chosen)
        advantages, returns = gae(at_end, values, mask, self.args.gae_gamma, self.args.gae_lambda)
        batch["advantages"] = self._whiten(advantages, mask)
        batch["critic"] = {"values": values, "returns": returns, "mask": mask}
        return (batch["advantages"] * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

    def _whiten(self, advantages: Tensor, mask: Tensor) -> Tensor:
        """Mean 0 and variance 1 over the tokens of the whole rollout batch, of all processes."""
        count, total = self._sums(mask, advantages * mask)
        mean = total / max(count, 1.0)
        (square,) = self._sums((advantages - mean) ** 2 * mask)
        deviation = (square / max(count - 1.0, 1.0) + 1e-8) ** 0.5
        return (advantages - mean) / deviation * mask

    def _sums(self, *values: Tensor) -> list[float]:
        """Sums over all elements and processes."""
        return self.accelerator.reduce(torch.stack([v.double().sum() for v in values]), reduction="sum").tolist()

    # -- learning --------------------------------------------------------------------------------------------------

    def _train_critic(self, batch: dict[str, Any]) -> None:
        """Take the rollout batch's updates of the critic: whole prompts in order, as many as the policy's updates."""
        known = batch.pop("critic", None)
        if known is None:
            return
        assert self.critic is not None
        self.critic.train()
        updates = self.args.steps_per_generation // self.args.gradient_accumulation_steps
        size = len(known["values"]) // updates
        found: dict[str, list[float]] = {"loss": [], "grad_norm": [], "clip_ratio": []}
        for _ in range(self.num_iterations):
            for start in range(0, updates * size, size):
                for name, value in self._update_critic(batch, known, start, start + size).items():
                    found[name].append(value)
        self.critic.eval()
        values, returns, mask = known["values"], known["returns"], known["mask"]
        count, error, square, total, value = self._sums(
            mask, (values - returns) ** 2 * mask, returns**2 * mask, returns * mask, values * mask
        )
        variance = square - total**2 / max(count, 1.0)
        metrics = self._metrics["train"]
        for name, numbers in found.items():
            metrics[f"critic/{name}"].append(sum(numbers) / len(numbers))
        metrics["critic/value"].append(value / max(count, 1.0))
        if variance > 0:  # 1: the values foretold every return; 0: no better than their mean
            metrics["critic/explained"].append(1.0 - error / variance)

    def _update_critic(
        self, batch: dict[str, Any], known: dict[str, Tensor], start: int, stop: int
    ) -> dict[str, float]:
        """One update on these rows: the token mean of the clipped value loss, over all processes."""
        assert self.critic is not None
        assert self.critic_optimizer is not None
        (tokens,) = self._sums(known["mask"][start:stop])
        micro = self.args.per_device_train_batch_size
        loss_sum = clipped_sum = torch.zeros((), dtype=torch.float64, device=known["values"].device)
        for first in range(start, stop, micro):
            rows = slice(first, min(first + micro, stop))
            old, returns, mask = known["values"][rows], known["returns"][rows], known["mask"][rows]
            values = self._values(batch, rows)
            loss = (clipped_value_loss(values, old, returns, self.args.critic_clip) * mask).sum() / max(tokens, 1.0)
            loss.backward()
            loss_sum = loss_sum + loss.detach().double()
            clipped_sum = clipped_sum + (((values.detach() - old).abs() > self.args.critic_clip) * mask).double().sum()
        learning = list(self.critic.learning().values())
        if self.accelerator.num_processes > 1:
            for parameter in learning:  # a process whose rows reach it less still takes part
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, reduction="sum")
        loss_value, clipped = self._sums(loss_sum, clipped_sum)
        limit = self.args.max_grad_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(learning, limit))
        if not (torch.isfinite(torch.tensor([loss_value, norm])).all()):
            rollout = self._step // self.args.generate_every + 1
            raise CriticDiverged(
                f"non-finite loss or gradient of the critic in rollout batch {rollout}; lower critic_learning_rate "
                "and start from the last checkpoint"
            )
        self.critic_optimizer.step()
        self.critic_optimizer.zero_grad(set_to_none=True)
        return {"loss": loss_value, "grad_norm": norm, "clip_ratio": clipped / max(tokens, 1.0)}

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _save_critic(self, folder: Path) -> None:
        if self.critic is None:
            return
        assert self.critic_optimizer is not None
        learning = self.critic.learning()
        save_file({name: p.detach().contiguous() for name, p in learning.items()}, folder / WEIGHTS_FILE)
        state = self.critic_optimizer.state
        moments = {f"{key}/{name}": v for name, p in learning.items() for key, v in state.get(p, {}).items()}
        save_file({name: value.contiguous() for name, value in moments.items()}, folder / OPTIMIZER_FILE)

    def _load_critic(self, folder: Path) -> None:
        if self.critic is None:
            return
        assert self.critic_optimizer is not None
        learning = self.critic.learning()
        saved = load_file(folder / WEIGHTS_FILE)
        with torch.no_grad():
            for name, parameter in learning.items():
                parameter.copy_(saved[name])
        state: dict[str, dict[str, Tensor]] = {name: {} for name in learning}
        for name, value in load_file(folder / OPTIMIZER_FILE).items():
            key, _, parameter_name = name.partition("/")
            state[parameter_name][key] = value
        whole = self.critic_optimizer.state_dict()
        whole["state"] = {i: state[name] for i, name in enumerate(learning) if state[name]}
        self.critic_optimizer.load_state_dict(whole)
