"""From a recipe to a trainer: settings, problems, model, tokenizer and reward, checked before anything is written."""

import dataclasses
import importlib.util
import inspect
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, get_type_hints

import torch
from datasets import Dataset
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import PrinterCallback, ProgressCallback

from bupo.data.problems import Problem, load_problems
from bupo.data.prompts import training_rows
from bupo.errors import BupoError, ConfigError, describe, nearest, out_of_memory
from bupo.models.layout import context_length, vocabulary_size
from bupo.models.load import WRAPPERS, accelerator, load_model
from bupo.recipe import Recipe, validate
from bupo.run_folder import RUN_FILE
from bupo.train.config import BuPOConfig
from bupo.train.diagnostics import Diagnostics, Draw
from bupo.train.effects import without_effect
from bupo.train.lora import SOURCE, check_lora, load_in_4bit, lora_config
from bupo.train.rewards import Reward, make_rewards
from bupo.train.trainer import BuPOTrainer

# trainer settings that follow from keys of the recipe
_OWNED_BY = {
    "--output": "output_dir",
    "rollouts": "max_steps num_train_epochs",
    "micro_batch": "per_device_train_batch_size",
    "updates_per_rollout and micro_batch": "gradient_accumulation_steps steps_per_generation",
    "prompts_per_rollout": "generation_batch_size",
    "samples_per_prompt": "num_generations",
    "reward": "reward_weights",
    "eval.samples": "per_device_eval_batch_size num_generations_eval",
    "eval.every": "eval_strategy eval_steps",
    "save_every": "save_strategy save_steps",
    "keep_checkpoints": "save_total_limit",
    "precision": "bf16 fp16",
    "model, dtype and revision": "model_init_kwargs",
    "--resume": "resume_from_checkpoint",
    "template": "chat_template_kwargs",
}
OWNED = {name: key for key, names in _OWNED_BY.items() for name in names.split()}
_SHOWN = {"learning_rate", "temperature", "gradient_checkpointing"}  # in a run's record, beside BuPO's own settings
_CONTEXT = {"eval", "inside_every", "report_to"}  # keys of a recipe that settings of the trainer need
_STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
_BATCH = ("prompts_per_rollout ", "samples_per_prompt ", "updates_per_rollout ", "micro_batch ")
_ANY_BATCH = {"per_device_train_batch_size": 2, "num_generations": 2, "updates_per_rollout": 1, "max_steps": 10**6}


def check_recipe(raw: Mapping[str, Any], processes: int | None = None) -> Recipe:
    """The recipe in a mapping with every default filled in, those of `BuPOConfig`'s own settings too.

    Raises `ConfigError` with every problem found, of the recipe, the trainer's settings, and samples that do not split
    over ``processes`` (see `Recipe.trainer_settings`).
    """
    recipe, problems = validate(raw)
    values = recipe.model_dump()
    for name, problem in _trainer_problems(recipe):
        (values["trl"] if name.startswith("trl.") else values).pop(name.removeprefix("trl."))
        problems.append(problem)
    recipe = Recipe.model_validate(values)
    try:
        settings = recipe.trainer_settings(processes)
    except ConfigError as error:
        settings = {**recipe.trainer, **_ANY_BATCH}
        problems += [] if any(problem.startswith(_BATCH) for problem in problems) else error.problems
    try:
        trainer_config(recipe, Path(), {**settings, "bf16": False})  # `build` checks this machine
    except ConfigError as error:
        problems += error.problems
    defaults = {f.name: f.default for f in dataclasses.fields(BuPOConfig)} | {"eval": None, "inside_every": 0}
    given = recipe.trainer | recipe.model_dump(include=_CONTEXT)
    problems = problems or without_effect(given, defaults | {"report_to": []})
    local = [("revision", recipe.model, bool(recipe.revision)), ("split", recipe.dataset, recipe.split != "train")]
    if recipe.eval is not None:
        local += [("eval.split", recipe.eval.dataset, recipe.eval.split != "test")]
    files = [(name, where) for name, where, given in local if given and (where == "small" or Path(where).exists())]
    problems += [f"{name} has no effect, as {where} is not on the hub; leave it out" for name, where in files]
    if problems:
        raise ConfigError(problems)
    return _with_defaults(recipe)


def _trainer_problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys with wrong settings of the trainer (``trl.`` before those that stand there), and what is wrong with them."""
    types: dict[str, Any] = get_type_hints(BuPOConfig) | {"fsdp": bool | str | None}  # annotated too narrowly
    fields, extras = {f.name for f in dataclasses.fields(BuPOConfig) if f.init}, recipe.model_extra or {}
    for key, value in {**extras, **{f"trl.{name}": value for name, value in recipe.trl.items()}}.items():
        name = key.removeprefix("trl.")
        if name in OWNED or name in Recipe.model_fields:
            yield key, f"{key} is set by the recipe's own key: {OWNED.get(name, name)}"
        elif name not in fields:
            valid = fields - OWNED.keys() | (set() if key != name else Recipe.model_fields.keys())
            yield key, f"unknown key {key}{nearest(name, sorted(valid))}"
        elif key != name and name in extras:
            yield key, f"{name} is given twice, as a key of the recipe and under trl; keep one of them"
        elif name == "remove_unused_columns" and value:
            yield key, f"{key} would drop the column from which rewards are computed; leave it out"
        elif name == "num_iterations" and not (type(value) is int and value >= 1):
            yield key, f"{key} must be a whole number from 1, not {value!r}"
        else:
            try:
                TypeAdapter(types[name], config=_STRICT).validate_python(value)
                json.dumps(value, allow_nan=False)
            except ValidationError as error:
                yield key, describe(key, [{**item, "input": value} for item in error.errors()])
            except (ValueError, TypeError) as error:
                yield key, f"{key} holds a value that {RUN_FILE} cannot hold: {error}"


def _with_defaults(recipe: Recipe) -> Recipe:
    """The recipe with BuPO's own settings and some of TRL's as keys, so that a record of it says what was trained."""
    names = (_SHOWN | inspect.get_annotations(BuPOConfig).keys()) - Recipe.model_fields.keys()
    values, trl, shown = recipe.model_dump(), dict(recipe.trl), {}
    for field in dataclasses.fields(BuPOConfig):
        if field.name in names:
            shown[field.name] = values.pop(field.name, trl.pop(field.name, field.default))
    if shown["internal_steps"] is None and not shown["phases"]:
        shown["internal_steps"] = 0
    return Recipe.model_validate({**values, **shown, "trl": trl})


def trainer_config(recipe: Recipe, folder: Path, settings: Mapping[str, Any] | None = None) -> BuPOConfig:
    """The settings for a run in ``folder`` on this machine; ``settings`` replace ``recipe.trainer_settings()``.

    Raises `ConfigError` if the settings do not fit together; `BuPOConfig` decides.
    """
    there = accelerator() is not None
    emulated = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    machine: dict[str, Any] = {
        "output_dir": str(folder / "checkpoints"),
        "bf16": recipe.precision == "bfloat16" or (recipe.precision == "auto" and there and not emulated),
        "dataloader_pin_memory": there,
        "disable_tqdm": True,
    }
    if recipe.trainer.get("push_to_hub"):
        machine |= {"hub_model_id": folder.absolute().name, "hub_strategy": "end"}
    if recipe.trainer.get("beta"):  # TRL loads the reference model, which must be the one that is trained
        source = {"revision": recipe.revision, "trust_remote_code": recipe.trust_remote_code}
        machine["model_init_kwargs"] = {**source, "key_mapping": {WRAPPERS: r"\1"}}
    with as_config_error():
        return BuPOConfig(**{**machine, **(recipe.trainer_settings() if settings is None else settings)})


@contextmanager
def as_config_error(applies: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Within this context the checks of TRL, transformers and PEFT raise `ConfigError`, where it ``applies``."""
    try:
        yield
    except Exception as error:  # of many kinds
        if isinstance(error, BupoError) or out_of_memory(error) is not None or not applies():
            raise
        kind = "" if isinstance(error, (ValueError, TypeError, ImportError)) else f"{type(error).__name__}: "
        raise ConfigError(f"{kind}{error}") from error


def build(recipe: Recipe, folder: Path, say: Callable[[str], None] = print, draw: Draw | None = None) -> BuPOTrainer:
    """The trainer of a recipe, ready to train; the caller closes its rewards.

    Raises `InputError`, and leaves ``folder`` as it was, if the recipe does not fit the model, the data or the machine.
    """
    problem = "report_to {0}: the package is not installed (pip install {0}, or leave it out)"
    if missing := [problem.format(name) for name in recipe.report_to if importlib.util.find_spec(name) is None]:
        raise ConfigError(missing)
    settings, problems = trainer_config(recipe, folder), _problems(recipe)
    source = recipe.model_dump(include=SOURCE) | load_in_4bit(recipe, settings)
    model, tokenizer = load_model(recipe.model, device="cpu", **source)  # the trainer moves it
    tokenizer.padding_side, vocabulary = "left", vocabulary_size(model)
    if (pad := tokenizer.pad_token_id) is None or (vocabulary is not None and pad >= vocabulary):
        has = "no padding and no end-of-sequence token" if pad is None else f"the padding token {pad}, which is"
        wanted = "" if pad is None else f" outside the model's vocabulary of {vocabulary}"
        raise ConfigError(f"the tokenizer has {has}{wanted}; set pad_token or eos_token in its tokenizer_config.json")
    room, longest = context_length(model.config), recipe.max_prompt_length + recipe.max_completion_length
    if room is not None and longest > room:
        raise ConfigError(
            f"max_prompt_length {recipe.max_prompt_length} + max_completion_length {recipe.max_completion_length} "
            f"exceed the model's context of {room} tokens; lower them"
        )
    rows, dropped = training_rows(problems, tokenizer, recipe.template, recipe.max_prompt_length, vocabulary)
    if dropped:
        say(f"left out {dropped} of {len(problems)} prompts, which have more than {recipe.max_prompt_length} tokens")
    data, held_out = Dataset.from_list(rows), None
    if (held := recipe.eval) is not None:
        more = load_problems(held.dataset, split=held.split, limit=held.limit, seed=recipe.seed)
        fitting, _ = training_rows(more, tokenizer, recipe.template, recipe.max_prompt_length, vocabulary)
        held_out = Dataset.from_list([{**row, "problem": row["problem"] + len(problems)} for row in fitting])
        problems = [*problems, *more]
    rewards = make_rewards(recipe.rewards, problems)
    made = [folder / "checkpoints", *([] if folder.is_dir() else [folder])]  # by the trainer
    try:
        with as_config_error():
            trainer = BuPOTrainer(model, rewards, settings, data, held_out, tokenizer, peft_config=lora_config(recipe))
        check_lora(trainer.model)
        diagnostics = Diagnostics(recipe, trainer, folder, say, draw)
    except BaseException:
        for path in made:
            with suppress(OSError):  # not empty, or not there
                path.rmdir()
        raise
    trainer.on_rollout.append(diagnostics)
    trainer.add_callback(diagnostics)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _problems(recipe: Recipe) -> list[Problem]:
    """The whole dataset or a random part of it; as many problems as there are prompts for a generated task."""
    if recipe.dataset.startswith(("arithmetic", "reasoning_gym/")) and not Path(recipe.dataset).exists():
        number = recipe.problems or recipe.rollouts * recipe.prompts_per_rollout
        return load_problems(recipe.dataset, split=recipe.split, limit=number, seed=recipe.seed)
    problems = load_problems(recipe.dataset, split=recipe.split)
    number = min(recipe.problems or len(problems), len(problems))
    return [problems[i] for i in sorted(random.Random(recipe.seed).sample(range(len(problems)), number))]


@contextmanager
def closing_rewards(rewards: Iterable[Reward]) -> Iterator[None]:
    """Close the rewards at the end of this context."""
    with ExitStack() as stack:
        for reward in rewards:
            stack.callback(reward.close)
        yield
