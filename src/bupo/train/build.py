"""From a recipe to a trainer: model, tokenizer, problems, reward and settings, checked before anything is written."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback

from bupo.data.problems import Problem, load_problems
from bupo.data.prompts import training_rows
from bupo.errors import BupoError, ConfigError
from bupo.models.layout import context_length
from bupo.models.load import load_model
from bupo.recipe import Recipe
from bupo.schema import nearest
from bupo.train.config import BuPOConfig
from bupo.train.diagnostics import check_trackers
from bupo.train.lora import four_bit, lora_config
from bupo.train.rewards import make_reward
from bupo.train.trainer import BuPOTrainer


def build(
    recipe: Recipe, folder: Path, say: Callable[[str], None] = print
) -> tuple[BuPOTrainer, Any, Callable[..., list[float | None]]]:
    """The trainer of a recipe, its tokenizer and its reward function, ready to train.

    Raises:
        InputError, ConfigError: the recipe does not fit the model, the data or this machine.
    """
    check_trackers(recipe.report_to)
    settings = _settings(recipe, folder)
    problems = _problems(recipe)
    model, tokenizer = load_model(
        recipe.model,
        dtype=recipe.dtype,
        device="cpu",  # the trainer places it
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
        **(four_bit(recipe, settings) if recipe.lora is not None and recipe.lora.four_bit else {}),
    )
    tokenizer.padding_side = "left"
    room = context_length(model.config)
    if room is not None and recipe.max_prompt_length + recipe.max_completion_length > room:
        raise ConfigError(
            f"max_prompt_length {recipe.max_prompt_length} + max_completion_length {recipe.max_completion_length} "
            f"exceed the model's context of {room} tokens; lower them"
        )
    rows, dropped = training_rows(problems, tokenizer, recipe.template, recipe.max_prompt_length)
    if dropped:
        say(f"{dropped} of {len(problems)} prompts are longer than {recipe.max_prompt_length} tokens and left out")
    held_out: list[dict[str, Any]] = []
    if recipe.eval is not None:
        more = load_problems(recipe.eval.dataset, split=recipe.eval.split, limit=recipe.eval.limit, seed=recipe.seed)
        found, _ = training_rows(more, tokenizer, recipe.template, recipe.max_prompt_length)
        held_out = [{**row, "problem": row["problem"] + len(problems)} for row in found]
        problems = [*problems, *more]
    reward = make_reward(recipe.reward, problems)
    try:
        trainer = BuPOTrainer(
            model,
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(held_out) if held_out else None,
            processing_class=tokenizer,
            peft_config=lora_config(recipe),
        )
    except BupoError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # TRL's and PEFT's own checks
        raise ConfigError(_one_line(error)) from error
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer, tokenizer, reward


def _settings(recipe: Recipe, folder: Path) -> BuPOConfig:
    wanted = recipe.trainer_settings()
    valid = {f.name for f in dataclasses.fields(BuPOConfig) if f.init}
    unknown = [f"unknown key trl.{name}{nearest(name, valid)}" for name in recipe.trl if name not in valid]
    if unknown:
        raise ConfigError(unknown)
    accelerator = torch.accelerator.is_available()
    here = {
        "output_dir": str(folder / "checkpoints"),
        "bf16": recipe.precision == "bfloat16" or (recipe.precision == "auto" and accelerator),
        "dataloader_pin_memory": accelerator,
        "disable_tqdm": True,
    }
    try:
        return BuPOConfig(**{**here, **wanted})
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:  # TRL's and transformers' own checks
        raise ConfigError(_one_line(error)) from error


def _problems(recipe: Recipe) -> list[Problem]:
    """All of a file or hub dataset, or a random ``problems`` of them; of a generated task as many as asked for."""
    generated = recipe.dataset.startswith(("arithmetic", "reasoning_gym/")) and not Path(recipe.dataset).exists()
    if generated:
        wanted = recipe.problems or recipe.rollouts * recipe.prompts_per_rollout
        return load_problems(recipe.dataset, split=recipe.split, limit=wanted, seed=recipe.seed)
    problems = load_problems(recipe.dataset, split=recipe.split)
    if recipe.problems is None or recipe.problems >= len(problems):
        return problems
    chosen = sorted(random.Random(recipe.seed).sample(range(len(problems)), recipe.problems))
    return [problems[i] for i in chosen]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
