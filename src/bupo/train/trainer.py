"""BuPO on TRL: the only file that touches TRL's trainer.

Bottom-up Policy Optimization (arXiv 2512.19673): for the first ``internal_steps`` rollout batches the ratio of the
clipped surrogate is that of the internal policy ``softmax(H^l E_u^T)`` (IPA, Eq. 9), afterwards that of the full policy
(GRPO, Eq. 3). Samples, rewards and advantages always come from the full policy. TRL scores through one function,
`_get_per_token_logps_and_entropies`; running that inside `internal_policy` is all that an internal phase changes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import utils as trl_utils

from bupo.errors import BupoError, ConfigError, InputError
from bupo.models.internal_policy import check_layer, internal_policy, n_layers
from bupo.train import advantages as estimators
from bupo.train.auto_layer import LayerChoice, choose_layer
from bupo.train.auto_temperature import FitsTemperatures
from bupo.train.callbacks import SaveBetweenRollouts
from bupo.train.critic import LearnsValues
from bupo.train.guard import PhaseGuard
from bupo.train.layerwise import LearnsLayerwise, frozen_problems
from bupo.train.lora import keep_adapters_precise
from bupo.train.resume import ResumesBetweenRollouts
from bupo.train.schedule import Schedule, Stage, alignment_problems
from bupo.train.settings import BuPOSettings
from bupo.train.tiles import narrow_tiles
from bupo.train.watch import WatchesInternalPhase

add_fused_lm_head = trl_utils.add_fused_lm_head  # for whoever times the head
_FULL = Stage()
_RENAMED = ("entropy", "clip_ratio", "cispo_clip_ratio")  # metrics of the loss that belong to the policy in the ratio


class TrainingStopped(BupoError):
    """Training cannot go on; the message names the step and what to try."""


@dataclass
class BuPOConfig(BuPOSettings, GRPOConfig):
    """`GRPOConfig` with the internal phase; defaults follow the paper's set-up.

    Other defaults than TRL's: ``updates_per_rollout`` 4 (so that old log-probabilities and clipping matter), constant
    learning rate, one log line a rollout batch. As in TRL: ``loss_type="dapo"``, the paper's token mean (a sum over the
    tokens of an update divided by the rollout batch's mean number of tokens an update, so that the split into
    micro-batches does not change the result), clip 0.2, no KL, no entropy bonus, temperature 1, group-scaled rewards,
    learning rate 1e-6, gradient clip 1.

    With a Mixture-of-Experts model the load-balancing loss of an internal phase covers the layers up to l.
    """


class BuPOTrainer(
    ResumesBetweenRollouts, WatchesInternalPhase, FitsTemperatures, LearnsLayerwise, LearnsValues, GRPOTrainer
):
    """`GRPOTrainer` whose ratio follows a schedule of internal policies.

    Takes what `GRPOTrainer` takes, with a `BuPOConfig`. Metrics: ``phase`` (1 internal, 2 full), ``rollout`` (from 1),
    ``internal/entropy`` and ``internal/clip_ratio/*`` of the internal policy; ``entropy``, ``reward`` and
    ``completions/*`` are always the full policy's. In an internal phase ``entropy`` (and, see `bupo.train.probe`,
    ``perplexity``, ``repetition`` and ``internal/divergence``) is measured once a rollout batch, before its updates,
    on ``probe_samples`` responses; ``internal/transfer`` is what the updates of the batch before did for the full
    policy (see `bupo.train.guard`). Where the guard ended the phase, ``phase_end`` says when and why.

    Raises:
        ConfigError: settings that do not fit together, a layer the model does not have, or too few prompts.
        TrainingStopped: a loss or gradient is not finite; ``internal_layer: auto`` finds no boundary layer.
    """

    _tag_names = ["trl", "bupo"]  # noqa: RUF012  (as TRL declares it)
    _name = "BuPO"
    _paper = {  # noqa: RUF012
        "title": "Bottom-up Policy Optimization: Your Language Model Policy Secretly Contains Internal Policies",
        "id": "2512.19673",
    }

    args: BuPOConfig
    model: Any  # set by the parent, which types it as perhaps absent
    train_dataset: Any
    _logs: dict[str, Any]

    def __init__(self, model: Any, reward_funcs: Any = None, args: BuPOConfig | None = None, **kwargs: Any):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = BuPOConfig(f"{name.split('/')[-1] or 'model'}-BuPO")
        if not isinstance(args, BuPOConfig):
            raise ConfigError(f"BuPOTrainer needs a BuPOConfig, not {type(args).__name__}")
        self._reading: Stage | None = None  # the internal policy that scoring reads, None: the full policy
        self._narrow = False  # whether the rollout batch belongs to an internal phase, see `bupo.train.tiles`
        self.schedule = args.schedule()
        self.on_rollout: list[Callable[[dict[str, Any], int], None]] = []  # called with each batch and its number
        self.unclipped_norm: Any = None  # of the last update's gradient
        self.guard = PhaseGuard() if args.internal_steps == "auto" else None
        super().__init__(model, reward_funcs, args, **kwargs)
        self._check_model_and_data()
        keep_adapters_precise(self.model)
        self._make_critic()
        self._freeze_layers()
        self.add_callback(SaveBetweenRollouts(self))

    def _check_model_and_data(self) -> None:
        problems = self._layerwise_problems()
        if self.schedule.layers and self._is_vlm:
            problems.append("internal phases are for text models; this one takes images")
        for layer in self.schedule.layers:
            if layer != "auto":
                try:
                    check_layer(n_layers(self.model), layer)
                except ValueError as error:
                    problems.append(f"internal_layer: {error}")
        cast_to = "bfloat16" if self.args.bf16 else "float16" if self.args.fp16 else None
        others = [p for p in self.model.parameters() if str(p.dtype) != f"torch.{cast_to}"]
        if self.args.use_transformers_continuous_batching and cast_to is not None and others:
            problems.append(
                f"use_transformers_continuous_batching would turn the weights in training to {cast_to} for good (TRL "
                f"casts the model to sample); load it with dtype {cast_to}, or set precision float32"
            )
        if self.micro_batches_per_epoch is not None:
            if self.micro_batches_per_epoch == 0:
                problems.append(
                    f"the dataset has {len(self.train_dataset)} prompts, fewer than the {self.prompts_per_rollout} of "
                    "one rollout batch"
                )
            else:
                problems += alignment_problems(
                    self.schedule,
                    self.args.generate_every,
                    self.args.gradient_accumulation_steps,
                    self.micro_batches_per_epoch,
                )
        if problems:
            raise ConfigError(problems)

    @property
    def micro_batches_per_epoch(self) -> int | None:
        """Micro-batches in one pass over the data (whole rollout batches only), or None for a stream."""
        if not hasattr(self.train_dataset, "__len__"):
            return None
        return len(self.train_dataset) // self.prompts_per_rollout * self.args.generate_every

    @property
    def prompts_per_rollout(self) -> int:
        """Different prompts in one rollout batch, over all processes."""
        return cast(int, self.args.generation_batch_size) // cast(int, self.num_generations)

    @property
    def between_rollouts(self) -> bool:
        """Whether every sample made so far has been consumed: the place to save."""
        return self._step % self.args.generate_every == 0

    # -- scoring -------------------------------------------------------------------------------------------------

    @contextmanager
    def _read(self, stage: Stage | None) -> Iterator[None]:
        """Within this context log-probabilities and entropies are those of the stage's internal policy."""
        self._reading = stage
        try:
            yield
        finally:
            self._reading = None

    def _get_per_token_logps_and_entropies(self, model: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        score = super()._get_per_token_logps_and_entropies
        if not self._narrow and self._reading is None:  # as TRL does it, to the last bit
            return score(model, input_ids, *args, **kwargs)
        tokens = min(len(input_ids), self.args.per_device_train_batch_size) * input_ids.shape[1]
        with ExitStack() as stack:
            stack.enter_context(narrow_tiles(trl_utils, input_ids.device, tokens))
            if self._reading is not None:
                inner = self.accelerator.unwrap_model(model)
                layer, temperature = cast(int, self._reading.layer), cast(float, self._reading.temperature)
                stack.enter_context(
                    internal_policy(inner, layer, norm=self.args.internal_norm, temperature=temperature)
                )
            return score(model, input_ids, *args, **kwargs)

    def _score(self, batch: dict[str, Any], *, compute_entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (B, T) and entropies (B, T) of a batch's responses, without gradient."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self._checkpointing):
            logps, entropies, _ = self._get_per_token_logps_and_entropies(
                self.model,
                ids,
                mask,
                batch["completion_ids"].size(1),
                batch_size=self.args.per_device_train_batch_size,
                compute_entropy=compute_entropy,
            )
        return logps, entropies

    @property
    def _checkpointing(self) -> dict[str, Any] | None:
        return cast("dict[str, Any] | None", self.args.gradient_checkpointing_kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        if not self.model.training:  # evaluation is always the full policy's
            return super()._generate_and_score_completions(inputs)
        rollout = self._step // self.args.generate_every
        stage = self.schedule.at(rollout)
        self._narrow = stage.layer is not None
        if not self._narrow:
            self._leave_internal_phase()
        transfer = self._transfer()
        before = {name: list(values) for name, values in self._metrics["train"].items()}
        batch, scored = self._sample(inputs, stage)
        if stage.layer == "auto":
            stage = self._resolve_auto_layer(batch)
        if stage.temperature == "auto":
            self._fit_temperatures(batch)
            stage = self.schedule.at(rollout)
        if stage.layer is not None:
            self._add_internal_scores(batch, stage, scored=scored)
            verdict = self._watch(batch, stage, transfer)
            ended = self._ended_at(rollout) if verdict.action != "continue" else None
            if ended is not None:
                self.schedule, stage, self._narrow = ended, _FULL, False
                self.phase_end = {"rollouts": rollout, "action": verdict.action, "reason": verdict.reason}
                batch = self._as_full(batch, inputs, restore=verdict.action == "restore", metrics=before)
        self._train_critic(batch)
        batch["stage"] = torch.tensor(self.schedule.index(rollout))  # 0-d, so that shuffling and splitting keep it
        for look in self.on_rollout:
            look(batch, rollout)
        metrics = self._metrics["train"]
        metrics["rollout"], metrics["phase"] = [float(rollout + 1)], [float(stage.number)]
        if stage.temperature != 1.0:
            metrics["internal/temperature"] = [cast(float, stage.temperature)]
        return batch

    def _sample(self, inputs: Any, stage: Stage) -> tuple[dict[str, Any], bool]:
        """A rollout batch of the full policy; and whether its old log-probabilities are the stage's already.

        TRL computes them, and they may be the internal policy's at once where nothing else needs the full ones.
        """
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        internal_only = stage.layer is not None and stage.resolved and stage.weight == 1.0 and not corrected
        with self._read(stage if internal_only else None):
            batch = super()._generate_and_score_completions(inputs)
        if self.args.estimator in (*estimators.OWN, "ppo"):
            self._set_advantages(batch)
        return batch, internal_only

    def _as_full(
        self, batch: dict[str, Any], inputs: Any, *, restore: bool, metrics: dict[str, list[float]]
    ) -> dict[str, Any]:
        """The rollout batch that a phase ended by the guard goes on with: this one scored anew, or a new one.

        After restoring weights the old samples and what was logged of them (all but ``metrics``) are dropped.
        """
        if restore:
            self._restore_kept()
            self._metrics["train"].clear()
            self._metrics["train"].update(metrics)
            batch, _ = self._sample(inputs, _FULL)
        elif "old_per_token_logps" in batch:
            batch["old_per_token_logps"], _ = self._score(batch)
        batch.pop("internal_old_per_token_logps", None)
        self._metrics["train"].pop("entropy", None)  # the loss measures it on every response
        self._leave_internal_phase()
        return batch

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards = super()._calculate_rewards(*args, **kwargs)  # (N, functions), of all processes
        return self._rewards

    def _set_advantages(self, batch: dict[str, Any]) -> None:
        """Replace TRL's advantages by those of an estimator that it lacks, (B,), or of the critic, (B, T)."""
        weights = self.reward_weights.to(self._rewards.device)
        rewards = (self._rewards * weights).nansum(dim=1)
        rewards[self._rewards.isnan().all(dim=1)] = torch.nan
        size = len(batch["advantages"])
        mine = slice(self.accelerator.process_index * size, (self.accelerator.process_index + 1) * size)
        if self.critic is not None:
            found = self.accelerator.gather(self._set_critic_advantages(batch, rewards[mine]))
        else:
            found = estimators.advantages(self.args.estimator, rewards, cast(int, self.num_generations))
            batch["advantages"] = found[mine]
        self._logs["advantages"].extend(found.tolist())  # pushes TRL's out of its table, which holds one rollout batch

    def _add_internal_scores(self, batch: dict[str, Any], stage: Stage, *, scored: bool) -> None:
        if not scored and "old_per_token_logps" in batch:
            key = "old_per_token_logps" if stage.weight == 1.0 else "internal_old_per_token_logps"
            with self._read(stage):
                batch[key], _ = self._score(batch)

    def _resolve_auto_layer(self, batch: dict[str, Any]) -> Stage:
        """Replace ``auto`` by the layer that the rule finds on this rollout batch; the first process decides."""
        try:
            found: list[Any] = [choose_layer(self.model, batch, rule=self.args.internal_rule)]
        except InputError as error:  # every process must reach the broadcast
            found = [LayerChoice(None, f"internal_layer auto: {error}")]
        broadcast_object_list(found, from_process=0)
        self.auto_layer = choice = found[0]
        if choice.layer is None:
            raise TrainingStopped(choice.message)
        self._set_layer(choice.layer)
        for problem in frozen_problems(self.args.frozen_layers, self.schedule):
            raise TrainingStopped(f"{choice.message}; {problem}")
        return self.schedule.at(0)

    def _set_layer(self, layer: int) -> None:
        stages = (replace(stage, layer=layer) if stage.layer == "auto" else stage for stage in self.schedule.stages)
        self.schedule = Schedule(tuple(stages))

    # -- loss ----------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        stage = self.schedule.stages[int(inputs["stage"])] if "stage" in inputs else _FULL
        loss: Tensor | float = 0.0
        if stage.layer is not None:
            old = inputs.get("internal_old_per_token_logps", inputs.get("old_per_token_logps"))
            with self._internal_metrics(), self._read(stage):
                loss = stage.weight * super()._compute_loss(model, {**inputs, "old_per_token_logps": old})
        if stage.layer is None:
            loss = super()._compute_loss(model, inputs)
        elif stage.weight < 1.0:
            loss = loss + (1.0 - stage.weight) * super()._compute_loss(model, inputs)
        assert isinstance(loss, Tensor)
        if not torch.isfinite(loss):
            raise TrainingStopped(self._not_finite("loss"))
        return loss

    @contextmanager
    def _internal_metrics(self) -> Iterator[None]:
        """Metrics of the loss computed within this context go by the internal policy's names."""
        kept = self._metrics["train"]
        new: defaultdict[str, list[float]] = defaultdict(list)
        self._metrics["train"] = new
        try:
            yield
        finally:
            self._metrics["train"] = kept
        for name, values in new.items():
            kept[f"internal/{name}" if name.split("/")[0] in _RENAMED else name].extend(values)

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        if norm is not None and not self.args.fp16 and not bool(torch.as_tensor(norm).isfinite()):
            raise TrainingStopped(self._not_finite("gradient"))  # before the weights are touched
        self.unclipped_norm = norm
        return norm

    def position(self) -> str:
        """Where training is, for messages: update and rollout batch from 1, phase and layer."""
        rollout = self._step // self.args.generate_every
        stage = self.schedule.at(rollout)
        where = f"{stage.phase} phase" + (f", layer {stage.layer}" if stage.layer else "")
        return f"update {self.state.global_step + 1} (rollout batch {rollout + 1}, {where})"

    def _not_finite(self, what: str) -> str:
        return (
            f"non-finite {what} in {self.position()}; the weights were not updated with it. Lower learning_rate or "
            "internal_steps and start from the last checkpoint"
        )
