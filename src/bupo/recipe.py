"""Recipes: the settings of a training run, read from YAML and checked without importing torch.

Keys that are no field of `Recipe` are fields of `BuPOConfig` (`bupo.train.build.check_recipe` checks both).
"""

import copy
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from bupo.errors import ConfigError, InputError, describe, either

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Precision = Literal["auto", "float32", "bfloat16"]
Template = Literal["auto", "raw", "chat", "qwen-math", "qwen3-no-thinking", "octothinker"]
Tracker = Literal["tensorboard", "trackio", "wandb"]
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Interval = Annotated[int, Field(ge=0, le=10_000_000)]
_STRICT = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
_REWARDS = "answer, boxed-string, module:function, a list of different ones, or a mapping to weights, not all of them 0"


def _known_rewards(value: Any) -> Any:
    """The value of ``reward`` as it is; an error for unknown names, repeated ones, and weights that leave nothing."""
    names = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, dict)) else []
    weights = list(value.values()) if isinstance(value, dict) else [1]
    known = all(isinstance(name, str) and re.fullmatch(r"answer|boxed-string|[\w.]+:\w+", name) for name in names)
    numbers = all(type(weight) in (int, float) and abs(weight) <= 1e6 for weight in weights)  # not NaN
    if not (names and known and len(set(names)) == len(names) and numbers and any(weights)):
        raise PydanticCustomError("reward", "{known}", {"known": _REWARDS})
    return value


Reward = Annotated[str | list[str] | dict[str, float], BeforeValidator(_known_rewards)]


class Lora(BaseModel):
    """Low-rank adapters, trained instead of all weights."""

    model_config = _STRICT
    r: Count = Field(16, description="Rank of the adapters.")
    alpha: Count = Field(32, description="Scale of the adapters: their output is multiplied by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout rate in front of the adapters.")
    target_modules: str | list[str] = Field("all-linear", description="Modules that get adapters, as PEFT takes them.")
    four_bit: bool = Field(False, description="Hold the frozen weights in 4 bits (nf4, QLoRA). Needs bitsandbytes.")


class Evaluation(BaseModel):
    """Mean reward on held-out problems during training, for orientation; `bupo eval` measures properly."""

    model_config = _STRICT
    dataset: Text = Field(description="Held-out problems, named as in the recipe's dataset.")
    split: str | None = Field("test", description="Split of a hub or generated dataset.")
    limit: Count = Field(64, description="Number of problems.")
    samples: Count = Field(1, description="Number of responses per problem.")
    every: Count = Field(10, description="Number of rollout batches between two evaluations.")


class Recipe(BaseModel):
    """One training run. Keys beside the declared ones are settings of the trainer (`trainer`)."""

    model_config = ConfigDict(**{**_STRICT, "extra": "allow"})
    model: Text = Field(description="Hub id, model folder, or 'small' (shipped with bupo).")
    dataset: Text = Field(description="arithmetic, arithmetic-hard, reasoning_gym/NAME, a file of rows, or a hub id.")
    split: str | None = Field("train", description="Split of a hub or generated dataset.")
    problems: Count | None = Field(None, description="Number of problems. Default: all, or one per generated prompt.")
    template: Template = Field("auto", description="Prompt template. 'auto' is the model's chat template, if any.")
    reward: Reward = Field("answer", description=f"One of {_REWARDS}.")
    rollouts: Count = Field(300, description="Number of rollout batches in the run (the paper's steps).")
    prompts_per_rollout: Count = Field(128, description="Number of different prompts per rollout batch.")
    samples_per_prompt: int = Field(8, ge=2, le=10**7, description="Number of responses sampled per prompt (G).")
    updates_per_rollout: Count = Field(4, description="Number of optimizer updates per rollout batch.")
    micro_batch: Count = Field(8, description="Number of responses per forward and backward pass on one process.")
    max_prompt_length: Count = Field(1024, description="Prompts with more tokens than this are left out.")
    max_completion_length: Count = Field(7168, description="Maximum number of tokens per response.")
    lora: Lora | None = Field(None, description="Train low-rank adapters instead of all weights.")
    dtype: Dtype = Field("float32", description="Dtype of the weights in memory. 'auto' keeps the checkpoint's.")
    precision: Precision = Field("auto", description="Dtype of products. 'auto': bfloat16 on accelerators with it.")
    revision: str | None = Field(None, description="Revision of a hub model: a branch, tag or commit.")
    trust_remote_code: bool = Field(False, description="Run the Python code in the model's repository.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of problem selection, shuffling, sampling, new adapters.")
    save_every: Count = Field(10, description="Number of rollout batches between two checkpoints.")
    keep_checkpoints: int | None = Field(2, ge=2, description="Number of newest checkpoints kept. null keeps all.")
    eval: Evaluation | None = Field(None, description="Evaluate on held-out problems during training.")
    report_to: list[Tracker] = Field([], description="Trackers that get all metrics.")
    flow_every: Interval = Field(0, description="Number of rollout batches between two entropy-flow figures; 0: none.")
    inside_every: Interval = Field(0, description="Rollout batches between two `bupo compare` measurements; 0: none.")
    inside_layer: Count | None = Field(None, description="Layer compared with the others. Default: the phase's.")
    inside_responses: str | None = Field(None, description="Responses file to measure. Default: the first batch's.")
    trl: dict[str, Any] = Field({}, description="Further settings of the trainer, under TRL's names.")

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # settings of the trainer

    @property
    def trainer(self) -> dict[str, Any]:
        """Settings of the trainer: the keys that are not declared here, and those under ``trl``."""
        return {**self.trl, **(self.model_extra or {})}

    @property
    def rewards(self) -> dict[str, float]:
        """The weight of each reward."""
        names = [self.reward] if isinstance(self.reward, str) else self.reward
        return dict(names) if isinstance(names, dict) else dict.fromkeys(names, 1.0)

    def updates(self, rollouts: int) -> int:
        """Number of optimizer updates that ``rollouts`` rollout batches make."""
        return rollouts * self.updates_per_rollout * int(self.trainer.get("num_iterations", 1))

    def trainer_settings(self, processes: int | None = None) -> dict[str, Any]:
        """Keyword arguments of `BuPOConfig`, except those that need torch (the output folder and the precision)."""
        processes = int(os.environ.get("WORLD_SIZE", "1")) if processes is None else processes
        settings: dict[str, Any] = {
            "num_generations": self.samples_per_prompt,
            "per_device_train_batch_size": self.micro_batch,
            "gradient_accumulation_steps": self._accumulation(processes),
            "updates_per_rollout": self.updates_per_rollout,
            "max_steps": self.updates(self.rollouts),
            "max_completion_length": self.max_completion_length,
            "seed": self.seed,
            "reward_weights": list(self.rewards.values()),
            "save_strategy": "steps",
            "save_steps": self.updates(self.save_every),
            "save_total_limit": self.keep_checkpoints,
            "report_to": list(self.report_to),
        }
        if (evaluation := self.eval) is not None:
            settings |= {
                "eval_strategy": "steps",
                "eval_steps": self.updates(evaluation.every),
                "num_generations_eval": evaluation.samples,
                "per_device_eval_batch_size": math.ceil(self.micro_batch / evaluation.samples) * evaluation.samples,
            }
        return {**settings, **self.trainer}

    def _accumulation(self, processes: int) -> int:
        """Number of micro-batches per update and process, or `ConfigError` if a rollout batch does not split evenly."""
        samples, updates = self.prompts_per_rollout * self.samples_per_prompt, self.updates_per_rollout
        (share, left), micro = divmod(samples, updates * processes), self.micro_batch
        product = f"prompts_per_rollout {self.prompts_per_rollout} x samples_per_prompt {self.samples_per_prompt}"
        product += f" / updates_per_rollout {updates}" + (f" / {processes} processes" if processes > 1 else "")
        if left:
            raise ConfigError(f"{product}: {samples} samples do not split evenly")
        if share % micro:
            near = sorted((n for n in range(1, 2 * micro) if share % n == 0), key=lambda n: abs(n - micro))
            fits = either(sorted(near[:4]))
            raise ConfigError(f"{product} = {share} samples, not a multiple of micro_batch {micro}; it could be {fits}")
        return share // micro


def validate(raw: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
    """The recipe in a mapping, and what is wrong with its declared keys; a wrong key has its default in the recipe."""
    nested: dict[str, type[BaseModel]] = {"lora": Lora, "eval": Evaluation}
    errors: dict[str, list[Any]] = {}
    try:
        json.dumps(raw, ensure_ascii=False, skipkeys=True, default=str).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ConfigError(f"the recipe holds {half!a}, half a character (an unpaired surrogate); remove it") from error
    except (ValueError, RecursionError):  # said below for each key
        pass
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        for item in error.errors():
            depth = 2 if item["loc"][0] in nested else 1
            errors.setdefault(".".join(map(str, item["loc"][:depth])), []).append(item)
        wrong = {name.split(".")[0] for name in errors}
        recipe = Recipe.model_validate({"model": "?", "dataset": "?"} | {k: raw[k] for k in raw if str(k) not in wrong})
    fields = {name: nested.get(name.split(".")[0], Recipe).model_fields for name in errors}
    problems = [describe(name, items, fields[name]) for name, items in errors.items()]
    if not recipe.inside_every and (recipe.inside_layer is not None or recipe.inside_responses is not None):
        problems.append("inside_layer and inside_responses need inside_every")
    layer = recipe.inside_layer or recipe.trainer.get("internal_layer") or recipe.trainer.get("phases")
    if recipe.inside_every and not layer:
        problems.append("inside_every needs a layer to compare with the others: set inside_layer or internal_layer")
    return recipe, problems


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-6 is a number and a key may be given only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for name, _ in node.value:
            if name.tag == "tag:yaml.org,2002:merge":  # <<: *other
                continue
            if (key := self.construct_object(name, deep=True)) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", name.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=True)


_FLOAT = re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def load_yaml(text: str, name: str) -> Any:
    """Parse YAML safely; `InputError` names the line of a mistake."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        reason = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "problem", None) or error
        raise InputError(f"{name} is not valid YAML{where}: {reason}") from error


def read_recipe(path: str | Path, what: str = "recipe") -> dict[str, Any]:
    """The mapping in a recipe file, unchecked; `InputError` if there is none, or not in YAML and UTF-8."""
    path = Path(path)
    if not path.is_file():
        shipped = sorted(map(str, Path("recipes").glob("*.yaml"))) if what == "recipe" else []
        raise InputError(f"{what} {path} does not exist" + (f"; there are {', '.join(shipped)}" if shipped else ""))
    try:
        raw = load_yaml(path.read_text(encoding="utf-8-sig"), f"{what} {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} {path} cannot be read as text in UTF-8: {error}") from error
    if not isinstance(raw, dict):
        example = "model: small" if what == "recipe" else "seeds: 0-4"
        raise InputError(f"{what} {path} must hold keys and values, such as '{example}'")
    return raw


def override(raw: Mapping[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """Apply ``key=value`` changes; the value is YAML, and dots reach into nested keys (``trl.epsilon_high=0.28``)."""
    result, problems = copy.deepcopy(dict(raw)), []
    for change in changes:
        name, equals, text = (part.strip() for part in change.partition("="))
        *path, last = name.split(".")
        place: Any = result
        for part in path:
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
            if not isinstance(place, dict):
                problems.append(f"--set {name}: {part} is not a mapping")
                break
        else:
            if equals and last:
                place[last] = load_yaml(text, f"--set {name}")
            else:
                problems.append(f"--set {change!r} is not of the form key=value")
    if problems:
        raise ConfigError(problems)
    return result
