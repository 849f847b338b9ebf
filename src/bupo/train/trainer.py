"""Trains a model by Bottom-up Policy Optimization (arXiv 2512.19673), on TRL's GRPO trainer [Eq. 9]."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import utils as trl_utils

from bupo.errors import ConfigError, TrainingStopped
from bupo.models.internal_policy import internal_policy
from bupo.models.layout import find_layout
from bupo.models.load import check_files
from bupo.models.padding import aligned, padding_changes
from bupo.train.advantages import PPO, outcome_advantages, total_rewards
from bupo.train.checkpoint import Checkpointer
from bupo.train.config import BuPOConfig, engine, model_problems
from bupo.train.diagnostics import LayerChoice, choose_layer
from bupo.train.guard import PhaseMonitor
from bupo.train.images import image_fields
from bupo.train.layers import freeze, layer_problems
from bupo.train.lora import upcast_adapters
from bupo.train.paper import PAPER
from bupo.train.phase_lens import PhaseLens
from bupo.train.rewards import checked
from bupo.train.schedule import FULL, Phase, Schedule, alignment_problems
from bupo.train.tiles import narrow_tiles

add_fused_lm_head = trl_utils.add_fused_lm_head  # for those who time or measure the head
_RENAMED = ("entropy", "clip_ratio", "cispo_clip_ratio")  # metrics of the loss that belong to the policy in the ratio


class BuPOTrainer(GRPOTrainer):
    """`GRPOTrainer` whose importance ratio follows a schedule of internal policies.

    In an internal phase, log-probabilities are scored inside `internal_policy`, so that the clipped surrogate is that
    of ``softmax(H^l E_u^T)``. Samples, rewards and advantages always come from the full policy. Outside internal
    phases, losses are TRL's bit for bit. Additional metrics are ``phase`` (1 internal, 2 full), ``rollout`` (from 1),
    and the internal policy's ``internal/entropy`` and ``internal/clip_ratio/*``.

    Raises `ConfigError` if the settings do not fit the model or the data, and `TrainingStopped` at a loss or gradient
    that is not finite, before the weights are updated with it, or if ``internal_layer: auto`` finds no layer.
    """

    _tag_names = ["trl", "bupo"]  # noqa: RUF012  (as TRL declares it)
    _name = "BuPO"
    _paper = PAPER
    args: BuPOConfig
    model: Any  # the parent types it as possibly absent
    processing_class: Any
    reward_funcs: Any
    train_dataset: Any
    _logs: dict[str, Any]

    def __init__(self, model: Any, reward_funcs: Any = None, args: BuPOConfig | None = None, *more: Any, **kwargs: Any):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = BuPOConfig(f"{name.split('/')[-1] or 'model'}-BuPO")
        if not isinstance(args, BuPOConfig):
            raise ConfigError(f"BuPOTrainer needs a BuPOConfig, not {type(args).__name__}")
        self.schedule = args.schedule()
        self.phase = self._scored = FULL  # of the current rollout batch, and the policy that is scored right now
        self.phase_end: dict[str, Any] | None = None  # when and why the guard ended the internal phase
        self.auto_layer: LayerChoice | None = None  # what `internal_layer: auto` found
        self.on_rollout: list[Callable[[dict[str, Any], int], None]] = []  # called with each batch and its number
        self.rewards: Any = None  # of the last rollout batch, (N, functions), of all processes
        self.sampler: Any = None  # of the training data
        self.unclipped_norm: Any = None  # of the last update's gradient
        self.sampling_seconds = 0.0  # of sampling and rewards since the last log line
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        if isinstance(model, str):  # loaded by TRL, which gives tensors that the files lack random values
            check_files(self.model, model, args.model_init_kwargs)
        split = engine(args) not in ("one", "ddp")  # such a model is not measured
        self.aligned = not self._is_vlm and (split or padding_changes(self.model))
        if problems := model_problems(self):
            raise ConfigError(problems)
        upcast_adapters(self.model)
        self.critic = PPO(self.model, args, self.accelerator, self._is_vlm) if args.estimator == "ppo" else None
        freeze(self.model, args)
        self.monitor, self.lens = PhaseMonitor(self), PhaseLens(self)
        self.checkpointer = Checkpointer(self)
        self.add_callback(self.checkpointer)

    @property
    def rollout(self) -> int:
        """The rollout batch that the next micro-batch belongs to, counted from 0."""
        return self._step // self.args.generate_every

    @property
    def between_rollouts(self) -> bool:
        """Whether every sample drawn so far has been consumed, so that a checkpoint loses none."""
        return self._step % self.args.generate_every == 0

    @property
    def micro_batches_per_epoch(self) -> int | None:
        """Micro-batches in one pass over the data (whole rollout batches only), or None for a stream."""
        if not hasattr(self.train_dataset, "__len__"):
            return None
        return len(self.train_dataset) // self.args.prompts_per_rollout * self.args.generate_every

    def alignment_problems(self, schedule: Schedule) -> list[str]:
        settings = self.args.generate_every, self.args.gradient_accumulation_steps
        return alignment_problems(schedule, *settings, self.micro_batches_per_epoch or 0)

    def position(self) -> str:
        """Where training is, for messages: update and rollout batch from 1, phase and layer."""
        phase = self.schedule.at(self.rollout)
        where = f"{phase.name} phase" + (f", layer {phase.layer}" if phase.layer else "")
        return f"update {self.state.global_step + 1} (rollout batch {self.rollout + 1}, {where})"

    @contextmanager
    def _scoring(self, phase: Phase) -> Iterator[None]:
        """Within this context log-probabilities and entropies are those of the phase's policy."""
        self._scored = phase
        try:
            yield
        finally:
            self._scored = FULL

    def _get_per_token_logps_and_entropies(self, model: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            if self.phase.layer is not None:  # else as TRL does it, bit for bit
                tokens = min(len(input_ids), self.args.per_device_train_batch_size) * input_ids.shape[1]
                stack.enter_context(narrow_tiles(trl_utils, input_ids.device, tokens))
            if isinstance(layer := self._scored.layer, int):
                how: dict[str, Any] = {"lens": self.lens.lens, "temperature": self.args.internal_temperature}
                stack.enter_context(internal_policy(self.accelerator.unwrap_model(model), layer, **how))
            model = aligned(model) if self.aligned else model
            return super()._get_per_token_logps_and_entropies(model, input_ids, *args, **kwargs)

    def score(self, batch: dict[str, Any], phase: Phase, *, compute_entropy: bool = False) -> tuple[Tensor, Any]:
        """Log-probabilities (B, T) of a batch's responses under the phase's policy, and entropies (B, T) or None."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        length, size = batch["completion_ids"].size(1), self.args.per_device_train_batch_size
        checkpointing = disable_gradient_checkpointing(self.model, cast(Any, self.args.gradient_checkpointing_kwargs))
        with torch.no_grad(), checkpointing, self._scoring(phase):
            wanted = (length, size, compute_entropy)
            return self._get_per_token_logps_and_entropies(self.model, ids, mask, *wanted, **image_fields(batch))[:2]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        if not self.model.training:  # evaluations are always the full policy's
            return super()._generate_and_score_completions(inputs)
        rollout, metrics = self.rollout, self._metrics["train"]
        self.phase = self.schedule.at(rollout)
        if self.phase is FULL:
            self.monitor.leave_phase()
        batch = self._sample(inputs, FULL) if self.phase is FULL else self._internal_batch(inputs)
        if self.critic is not None:
            for name, value in self.critic.learn(batch, self.position()).items():
                metrics[name].append(value)
        for callback in self.on_rollout:
            callback(batch, rollout)
        metrics["rollout"], metrics["phase"] = [float(rollout + 1)], [2.0 if self.phase.layer is None else 1.0]
        if self.phase.layer is not None and self.args.internal_temperature != 1.0:
            metrics["internal/temperature"] = [self.args.internal_temperature]
        return batch

    def _internal_batch(self, inputs: Any) -> dict[str, Any]:
        """A rollout batch of an internal phase, measured; or of the full policy, if the guard ends the phase here."""
        rollout, metrics = self.rollout, self._metrics["train"]
        logged = {name: list(values) for name, values in metrics.items()}
        self.lens.before_rollout(inputs)
        # TRL's old log-probabilities can be the internal policy's at once, unless the full policy's are needed too
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        at_once = self.phase.layer != "auto" and self.phase.weight == 1.0 and not corrected
        batch = self._sample(inputs, self.phase if at_once else FULL)
        if self.phase.layer == "auto":
            self._find_layer(batch)
        if not at_once and "old_per_token_logps" in batch:
            prefix = "" if self.phase.weight == 1.0 else "internal_"  # a joint phase needs both policies'
            batch[f"{prefix}old_per_token_logps"], _ = self.score(batch, self.phase)
        decision = self.monitor.before_updates(batch)
        if self.lens.fitted is not None:  # these samples are not those of the fit
            metrics["internal/lens_kl"] = list(metrics["internal/divergence"])
        ended = self.schedule.ended_before(rollout)
        if decision.action == "continue" or self.alignment_problems(ended):
            return batch
        self.schedule, self.phase = ended, FULL
        self.phase_end = {"rollouts": rollout, "action": decision.action, "reason": decision.reason}
        if decision.action == "restore":
            self.monitor.restore_best_weights()
            metrics.clear()
            metrics.update(logged)
            batch = self._sample(inputs, FULL)
        elif "old_per_token_logps" in batch:
            batch["old_per_token_logps"], _ = self.score(batch, FULL)
        batch.pop("internal_old_per_token_logps", None)
        metrics.pop("entropy", None)  # the loss logs it on every response
        self.monitor.leave_phase()
        return batch

    def _find_layer(self, batch: dict[str, Any]) -> None:
        """Replace ``auto`` in the schedule by the boundary layer found on this rollout batch."""
        self.auto_layer = choice = choose_layer(self.model, batch, self.accelerator)
        if choice.layer is None:
            raise TrainingStopped(choice.message)
        self.schedule = self.schedule.with_layer(choice.layer)
        self.phase = self.schedule.at(self.rollout)
        for problem in layer_problems(self.args, self.schedule, find_layout(self.model).n_layers):
            raise TrainingStopped(f"{choice.message}; {problem}")

    def _sample(self, inputs: Any, scored: Phase) -> dict[str, Any]:
        """A rollout batch of the full policy, with its old log-probabilities under the policy of ``scored``."""
        with self._scoring(scored):
            batch = super()._generate_and_score_completions(inputs)
        if self.args.estimator == "grpo":
            return batch
        rewards, size = total_rewards(self.rewards, self.reward_weights), len(batch["advantages"])
        mine = slice(self.accelerator.process_index * size, (self.accelerator.process_index + 1) * size)
        if self.critic is not None:
            batch["advantages"], means = self.critic.advantages(batch, rewards[mine])
            advantages = self.accelerator.gather(means)
        else:
            advantages = outcome_advantages(self.args.estimator, rewards, cast(int, self.num_generations))
            batch["advantages"] = advantages[mine]
        self._logs["advantages"].extend(advantages.tolist())  # the table holds one rollout batch: replaces TRL's
        return batch

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self._timed():
            return super()._generate(*args, **kwargs)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, *more: Any) -> Tensor:
        with self._timed(), checked(self, completions):
            self.rewards = super()._calculate_rewards(inputs, prompts, completions, *more)
        if self.model.training and self.rewards.isnan().all():
            raise TrainingStopped(f"no reward function gave any response a number in {self.position()}, only None")
        return self.rewards

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.sampling_seconds += (time.perf_counter() - started) * self.model.training  # not of evaluations

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        phase = self.phase if self.model.training else FULL
        if phase.layer is None:
            loss = super()._compute_loss(model, inputs)
        else:
            old = inputs.get("internal_old_per_token_logps", inputs.get("old_per_token_logps"))
            metrics, self._metrics["train"] = self._metrics["train"], defaultdict(list)
            with self._scoring(phase):
                loss = phase.weight * super()._compute_loss(model, {**inputs, "old_per_token_logps": old})
            internal, self._metrics["train"] = self._metrics["train"], metrics
            for name, values in internal.items():
                metrics[f"internal/{name}" if name.split("/")[0] in _RENAMED else name].extend(values)
            if phase.weight < 1.0:
                loss = loss + (1.0 - phase.weight) * super()._compute_loss(model, inputs)
        self._check_finite(loss, "loss")
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        self.unclipped_norm = norm = super()._clip_grad_norm(model)
        if norm is not None and not self.args.fp16:  # fp16 skips such updates by itself
            self._check_finite(norm, "gradient")
        return norm

    def _check_finite(self, value: Any, name: str) -> None:
        if not torch.as_tensor(value).isfinite():
            remedy = "Lower learning_rate or internal_steps and start from the last checkpoint"
            raise TrainingStopped(f"non-finite {name} in {self.position()}; no weight was updated with it. {remedy}")

    def create_optimizer(self, model: Any = None) -> Any:
        above, scale = self.args.upper_learning_rate_above, cast(float, self.args.upper_learning_rate_scale)
        new = self.optimizer is None
        optimizer: Any = super().create_optimizer(model)
        if new and above is not None:
            layout = find_layout(self.model if model is None else model)
            upper = {id(p) for part in (*layout.layers[above:], layout.final_norm) for p in part.parameters()}
            for group in list(optimizer.param_groups):  # they keep their places: the logged rate is the unscaled one
                moved = [p for p in group["params"] if id(p) in upper]
                group["params"] = [p for p in group["params"] if id(p) not in upper]
                if moved:
                    optimizer.add_param_group({**group, "params": moved, "lr": group["lr"] * scale})
        return optimizer

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self.sampler = super()._get_train_sampler(dataset)
        return self.sampler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        save = super()._save_checkpoint
        self.checkpointer.save(folder, lambda: save(model, trial))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.checkpointer.restore(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)
