"""Recipes: what a training run is told. Parsing needs no torch, and all problems of a recipe are reported together.

A recipe is a YAML mapping; its keys are the fields of `Recipe`. The batch arithmetic, for W processes::

    samples a rollout batch   S = prompts_per_rollout * samples_per_prompt
    samples an update         S / updates_per_rollout
    accumulation              S / (updates_per_rollout * micro_batch * W)     micro-batches an update, a process
    steps_per_generation      accumulation * updates_per_rollout              micro-batches a rollout batch, a process
    updates in all            rollouts * updates_per_rollout

Every division must come out even. With the paper's numbers (arXiv 2512.19673): 128 prompts x 8 samples = 1,024 samples
a rollout batch, 4 updates of 256 samples (32 prompts) each, and with micro_batch 8 on one process 32 micro-batches an
update. ``micro_batch`` changes memory and speed only: the loss is a sum over an update's tokens.
"""
# ruff: noqa: RUF009  (`key` is dataclasses.field with a meaning)

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bupo.errors import ConfigError, InputError
from bupo.schema import build, either, key, load_yaml

Template = Literal["auto", "raw", "chat", "qwen-math", "qwen3-no-thinking", "octothinker"]
Estimator = Literal["grpo", "rloo", "reinforce++", "reinforce++-baseline", "ppo"]
Precision = Literal["auto", "float32", "bfloat16"]

TRACKERS = ("tensorboard", "trackio", "wandb")
# trainer settings that a recipe has its own key for
_OWNED = {
    "output_dir": "--output",
    "max_steps": "rollouts",
    "num_train_epochs": "rollouts",
    "per_device_train_batch_size": "micro_batch",
    "per_device_eval_batch_size": "eval.samples",
    "gradient_accumulation_steps": "updates_per_rollout and micro_batch",
    "steps_per_generation": "updates_per_rollout and micro_batch",
    "generation_batch_size": "prompts_per_rollout",
    "updates_per_rollout": "updates_per_rollout",
    "num_generations": "samples_per_prompt",
    "num_generations_eval": "eval.samples",
    "max_completion_length": "max_completion_length",
    "learning_rate": "learning_rate",
    "temperature": "temperature",
    "internal_layer": "internal_layer",
    "internal_steps": "internal_steps",
    "internal_max_steps": "internal_max_steps",
    "internal_norm": "internal_norm",
    "internal_temperature": "internal_temperature",
    "phases": "phases",
    "estimator": "estimator",
    "frozen_layers": "frozen_layers",
    "critic_learning_rate": "critic_learning_rate",
    "critic_clip": "critic_clip",
    "gae_gamma": "gae_gamma",
    "gae_lambda": "gae_lambda",
    "upper_learning_rate_scale": "upper_learning_rate_scale",
    "upper_learning_rate_above": "upper_learning_rate_above",
    "gradient_checkpointing": "gradient_checkpointing",
    "seed": "seed",
    "bf16": "precision",
    "fp16": "precision",
    "save_strategy": "save_every",
    "save_steps": "save_every",
    "save_total_limit": "keep_checkpoints",
    "eval_strategy": "eval.every",
    "eval_steps": "eval.every",
    "model_init_kwargs": "model, dtype, revision",
    "report_to": "report_to",
    "resume_from_checkpoint": "--resume",
}


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters instead of all weights."""

    r: int = key(16, "rank", low=1)
    alpha: int = key(32, "scale of the adapters' output, over r", low=1)
    dropout: float = key(0.0, "dropout in front of the adapters", low=0)
    target_modules: str | list = key("all-linear", "module names, or all-linear (never the unembedding)")
    four_bit: bool = key(False, "hold the frozen weights in 4 bits, nf4 (QLoRA; needs bitsandbytes)")


@dataclass(frozen=True)
class Evaluation:
    """Rewards on held-out problems during training (a quick look; `bupo eval` measures)."""

    dataset: str = key("", "problems, as in the recipe's dataset")
    split: str | None = key("test", "split of a hub or generated dataset")
    limit: int = key(64, "problems", low=1)
    samples: int = key(1, "samples a problem", low=1)
    every: int = key(10, "rollout batches between two evaluations", low=1)


@dataclass(frozen=True)
class Recipe:
    """One training run. `parse` makes it from a mapping."""

    model: str = key("", "hub id, model folder, or small (shipped)")
    dataset: str = key("", "arithmetic, arithmetic-hard, reasoning_gym/NAME, a .jsonl/.json/.parquet file, or a hub id")
    split: str | None = key("train", "split of a hub or generated dataset")
    problems: int | None = key(
        None, "so many, drawn at random (default: all of a dataset; of a generated task one for every prompt)", low=1
    )
    template: Template = key("auto", "prompt template")
    reward: str = key("answer", "answer (1 if the last box is right, or the task's own score), or module:function")

    rollouts: int = key(300, "rollout batches in all (the paper's steps)", low=1)
    prompts_per_rollout: int = key(128, "different prompts in one rollout batch", low=1)
    samples_per_prompt: int = key(8, "responses sampled for each prompt (G)", low=2)
    updates_per_rollout: int = key(4, "optimizer updates a rollout batch", low=1)
    micro_batch: int = key(8, "responses in one forward and backward pass, a process", low=1)
    max_prompt_length: int = key(1024, "longer prompts are left out, tokens", low=1)
    max_completion_length: int = key(7168, "longest response, tokens", low=1)
    temperature: float = key(1.0, "of sampling, and of the log-probabilities", above=0)
    learning_rate: float = key(1e-6, "of AdamW, constant", above=0)

    internal_layer: int | str | None = key(None, "l of the internal policy, 1 to L, or auto: the boundary layer")
    internal_steps: int | Literal["auto"] | None = key(
        None, "s_inter: rollout batches on the internal policy; 0: plain GRPO, auto: until the guard ends them", low=0
    )
    internal_max_steps: int | None = key(None, "with auto: the most of them (default: a third of all)", low=1)
    internal_norm: bool = key(False, "read the internal policy through the final norm (ablation)")
    internal_temperature: float = key(1.0, "T of softmax(H^l E_u^T / T)", above=0)

    phases: list | None = key(None, "internal phases, [{layer, rollouts, weight}, ...], in place of one layer's steps")
    estimator: Estimator = key("grpo", "advantages: see bupo.train.advantages")

    critic_learning_rate: float = key(1e-5, "with ppo: the critic's", above=0)
    critic_clip: float = key(0.5, "with ppo: how far a value may move within a rollout batch", above=0)
    gae_gamma: float = key(1.0, "with ppo: discount a token, 0 to 1", low=0)
    gae_lambda: float = key(1.0, "with ppo: weight of whole returns, 0 to 1", low=0)
    frozen_layers: int | None = key(None, "layers 1 to this one keep their weights (comparison)", low=1)
    upper_learning_rate_scale: float | None = key(
        None, "factor on the learning rate of upper layers (comparison; the paper's 0.1)", above=0
    )
    upper_learning_rate_above: int | None = key(None, "the layer above which that factor acts", low=1)

    lora: Lora | None = key(None, "train adapters instead of all weights")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = key("float32", "of the weights in memory")
    precision: Precision = key("auto", "of the products: bfloat16 (mixed), float32; auto is bfloat16 on an accelerator")
    gradient_checkpointing: bool = key(True, "recompute activations: less memory, about a fifth slower")
    revision: str | None = key(None, "hub revision of the model")
    trust_remote_code: bool = key(False, "run code that comes with the model")
    seed: int = key(0, "of problems, order, sampling and adapters", low=0)
    save_every: int = key(10, "rollout batches between two checkpoints", low=1)
    keep_checkpoints: int | None = key(2, "newest checkpoints kept; null keeps all", low=2)
    eval: Evaluation | None = key(None, "evaluate during training")
    report_to: list = key([], "trackers that get every metric: tensorboard, trackio, wandb")
    flow_every: int = key(
        0, "rollout batches between two entropy-flow figures of the model in training; 0: none", low=0
    )
    inside_every: int = key(
        0, "rollout batches between two readings of what training does inside (`bupo compare`'s); 0: none", low=0
    )
    inside_layer: int | None = key(None, "the layer l they compare with the others (default: the internal one)", low=1)
    inside_responses: str | None = key(None, "responses that they read (default: the first rollout batch's)")
    trl: dict = key({}, "anything else of BuPOConfig, passed on as it is")

    # -- arithmetic ------------------------------------------------------------------------------------------------

    def samples_per_rollout(self) -> int:
        """S: responses in one rollout batch, over all processes."""
        return self.prompts_per_rollout * self.samples_per_prompt

    def total_updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.rollouts * self.updates_per_rollout * int(self.trl.get("num_iterations", 1))

    def trainer_settings(self, processes: int | None = None) -> dict[str, Any]:
        """Keyword arguments of `BuPOConfig` (but for the output folder and the precision, which need torch).

        Raises:
            ConfigError: the samples do not split evenly over ``processes`` (default: the launcher's WORLD_SIZE).
        """
        processes = int(os.environ.get("WORLD_SIZE", "1")) if processes is None else processes
        problems = batch_problems(self, processes)
        if problems:
            raise ConfigError(problems)
        settings: dict[str, Any] = {
            "num_generations": self.samples_per_prompt,
            "per_device_train_batch_size": self.micro_batch,
            "gradient_accumulation_steps": self.samples_per_rollout()
            // (self.updates_per_rollout * self.micro_batch * processes),
            "updates_per_rollout": self.updates_per_rollout,
            "max_steps": self.total_updates(),
            "max_completion_length": self.max_completion_length,
            "temperature": self.temperature,
            "learning_rate": self.learning_rate,
            "internal_layer": self.internal_layer,
            "internal_steps": self.internal_steps,
            "internal_max_steps": self.internal_max_steps,
            "internal_norm": self.internal_norm,
            "internal_temperature": self.internal_temperature,
            "phases": self.phases,
            "estimator": self.estimator,
            "frozen_layers": self.frozen_layers,
            "critic_learning_rate": self.critic_learning_rate,
            "critic_clip": self.critic_clip,
            "gae_gamma": self.gae_gamma,
            "gae_lambda": self.gae_lambda,
            "upper_learning_rate_scale": self.upper_learning_rate_scale,
            "upper_learning_rate_above": self.upper_learning_rate_above,
            "gradient_checkpointing": self.gradient_checkpointing,
            "seed": self.seed,
            "save_strategy": "steps",
            "save_steps": self.save_every * self.total_updates() // self.rollouts,
            "save_total_limit": self.keep_checkpoints,
            "report_to": list(self.report_to),
        }
        if self.eval is not None:
            samples = self.eval.samples
            settings |= {
                "eval_strategy": "steps",
                "eval_steps": self.eval.every * self.total_updates() // self.rollouts,
                "num_generations_eval": samples,
                "per_device_eval_batch_size": -(-self.micro_batch // samples) * samples,
            }
        return {**settings, **self.trl}

    def to_dict(self) -> dict[str, Any]:
        """The whole recipe, defaults filled in, as `parse` reads it."""
        return dataclasses.asdict(self)


def batch_problems(recipe: Recipe, processes: int) -> list[str]:
    """Why a rollout batch does not split evenly into updates, processes and micro-batches; empty if it does."""
    samples, updates, micro = recipe.samples_per_rollout(), recipe.updates_per_rollout, recipe.micro_batch
    made = f"prompts_per_rollout {recipe.prompts_per_rollout} x samples_per_prompt {recipe.samples_per_prompt}"
    if samples % updates:
        return [f"{made} = {samples} samples do not split into updates_per_rollout {updates} equal updates"]
    share, left = divmod(samples // updates, processes)
    each = f"{made} / updates_per_rollout {updates}" + (f" / {processes} processes" if processes > 1 else "")
    if left:
        return [f"{each}: {samples // updates} samples an update do not split over {processes} processes"]
    if share % micro:
        fitting = [m for m in range(1, share + 1) if share % m == 0]
        near = sorted(sorted(fitting, key=lambda m: abs(m - micro))[:4])
        return [f"{each} = {share} samples, no multiple of micro_batch {micro}; it could be {either(near)}"]
    return []


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping in a recipe file, unchecked.

    Raises:
        InputError: no such file, not YAML, or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        known = sorted(str(p) for p in Path("recipes").glob("*.yaml"))
        hint = f"; there are {', '.join(known)}" if known else ""
        raise InputError(f"recipe {path} does not exist{hint}")
    raw = load_yaml(path.read_text(encoding="utf-8"), f"recipe {path}")
    if not isinstance(raw, dict):
        raise InputError(f"recipe {path} must hold keys and values, such as 'model: small'")
    return raw


def parse(raw: Mapping[str, Any]) -> Recipe:
    """Check a recipe's mapping and fill in the defaults.

    Raises:
        ConfigError: with every problem found: unknown keys (with the nearest valid name), wrong types, values out of
            range, and settings that do not fit together.
    """
    problems: list[str] = []
    recipe = build(Recipe, raw, problems)
    problems = problems or _cross_problems(recipe)
    if problems:
        raise ConfigError(problems)
    return recipe


def _cross_problems(recipe: Recipe) -> list[str]:
    problems = [f"{name} is missing" for name in ("model", "dataset") if not getattr(recipe, name)]
    if recipe.eval is not None and not recipe.eval.dataset:
        problems.append("eval.dataset is missing")
    layer = recipe.internal_layer
    if isinstance(layer, str) and layer != "auto":
        problems.append(f"internal_layer must be a layer from 1 to L or auto, not {layer!r}")
    if isinstance(layer, int) and layer < 1:
        problems.append(f"internal_layer counts from 1, not {layer}")
    if recipe.internal_steps and layer is None:
        problems.append("internal_steps needs internal_layer: a layer from 1 to L, or auto")
    if (recipe.upper_learning_rate_scale is None) != (recipe.upper_learning_rate_above is None):
        problems.append("upper_learning_rate_scale and upper_learning_rate_above go together")
    if recipe.internal_steps and recipe.frozen_layers and isinstance(layer, int) and 1 <= layer <= recipe.frozen_layers:
        problems.append(
            f"frozen_layers {recipe.frozen_layers} leaves nothing of internal_layer {layer} to train; freeze fewer"
        )
    for name in ("internal_steps", "internal_max_steps"):
        steps = getattr(recipe, name)
        if isinstance(steps, int) and steps > recipe.rollouts:
            problems.append(f"{name} {steps} is more than rollouts {recipe.rollouts}")
    if not recipe.inside_every and (recipe.inside_layer is not None or recipe.inside_responses is not None):
        problems.append("inside_layer and inside_responses go with inside_every")
    known = recipe.inside_layer or isinstance(layer, int) or recipe.phases or recipe.internal_steps
    if recipe.inside_every and not known:
        problems.append("inside_every needs a layer to compare with the others: inside_layer, or an internal phase's")
    unknown = [name for name in recipe.report_to if name not in TRACKERS]
    problems += [f"report_to: unknown tracker {name!r}; one of {either(list(TRACKERS))}" for name in unknown]
    if recipe.reward != "answer" and not re.fullmatch(r"[\w.]+:\w+", recipe.reward):
        problems.append(f"reward must be answer or module:function, not {recipe.reward!r}")
    for name in recipe.trl:
        if name in _OWNED:
            problems.append(f"trl.{name} is set by the recipe's own key: {_OWNED[name]}")
    iterations = recipe.trl.get("num_iterations", 1)
    if type(iterations) is not int or iterations < 1:
        problems.append(f"trl.num_iterations must be a whole number from 1, not {iterations!r}")
    return problems + batch_problems(recipe, 1)
