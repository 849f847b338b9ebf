"""Generates problems: the built-in arithmetic and the tasks of reasoning-gym."""

from __future__ import annotations

import dataclasses
import difflib
import random
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from bupo.data import arithmetic
from bupo.errors import InputError

BUILT_IN = ("arithmetic", "arithmetic-hard")
REASONING_GYM = "reasoning_gym/"
TAGGED_INSTRUCTION = "Please reason step by step, and put your final answer within <answer> </answer> tags."
_TEST_SEED_OFFSET = 1_000_003  # generated test problems never share a seed with generated training problems


def generate(spec: str, split: str, size: int, seed: int) -> list[dict[str, Any]]:
    """Generate ``size`` rows with ``id``, ``prompt``, ``answer`` and, for reasoning-gym, ``metadata``.

    ``spec`` is one of `BUILT_IN`, or ``reasoning_gym/NAME`` followed by the task's options as ``/key=value``. The
    splits ``train`` and ``test`` never overlap. Raises `InputError` for an unknown split, task or option, or if fewer
    than ``size`` different problems exist.
    """
    if split not in arithmetic.SPLITS:
        raise InputError(f"generated problems have the splits train and test, not {split!r}")
    if spec in BUILT_IN:
        return arithmetic.problems(size, seed=seed, split=split, level="hard" if "hard" in spec else "standard")
    import reasoning_gym  # takes a second, and few runs need it
    from reasoning_gym.factory import DATASETS

    name, *changes = spec.split("/")[1:]
    names = sorted(set(DATASETS) - {"composite"})
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3) or names[:3]
        raise InputError(f"reasoning_gym has no task {name!r}; did you mean {', '.join(near)}? ({len(names)} tasks)")
    options = _task_options(name, DATASETS[name][1], changes)
    task_seed = seed + (_TEST_SEED_OFFSET if split == "test" else 0)
    state = random.getstate()  # some tasks draw from the global generator
    random.seed(task_seed)
    try:
        task = reasoning_gym.create_dataset(name, size=size, seed=task_seed, **options)
        entries = [task[index] for index in range(size)]
    except (AssertionError, ValueError, TypeError) as error:  # the task's own checks
        raise InputError(f"{spec}: the task refuses these options ({' '.join(str(error).split())})") from error
    finally:
        random.setstate(state)
    instruction = {"role": "system", "content": TAGGED_INSTRUCTION}
    return [
        {
            "id": f"{spec}/{split}-{seed}-{index}",
            "prompt": [instruction, {"role": "user", "content": str(entry["question"])}],
            "answer": "" if entry["answer"] is None else str(entry["answer"]),
            "metadata": {"reasoning_gym": {"task": name, "entry": pack(entry)}},
        }
        for index, entry in enumerate(entries)
    ]


def _task_options(name: str, settings: Any, changes: Sequence[str]) -> dict[str, Any]:
    """Parse the ``key=value`` parts of a spec; values are YAML."""
    valid = {option.name for option in dataclasses.fields(settings)} - {"size", "seed"}
    options = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or key not in valid:
            names = ", ".join(sorted(valid))
            raise InputError(f"reasoning_gym/{name} has no option {change!r}; write /key=value with one of {names}")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"reasoning_gym/{name}: the value of {change!r} is not valid YAML") from error
    return options


def pack(value: Any) -> Any:
    """Encode a nested value as JSON types without losing tuples and non-string keys, which scorers depend on."""
    if isinstance(value, tuple):
        return {"__tuple__": [pack(item) for item in value]}
    if isinstance(value, list):
        return [pack(item) for item in value]
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value) and not {"__tuple__", "__items__"} & set(value):
            return {key: pack(item) for key, item in value.items()}
        return {"__items__": [[pack(key), pack(item)] for key, item in value.items()]}
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


def unpack(packed: dict[str, Any]) -> Any:
    """Invert `pack`, as the ``object_hook`` of a JSON decoder."""
    if "__tuple__" in packed:
        return tuple(packed["__tuple__"])
    return dict(packed["__items__"]) if "__items__" in packed else packed
