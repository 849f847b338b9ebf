"""Generates problems: the built-in arithmetic and the tasks of reasoning-gym, whose answers are also scored here."""

import dataclasses
import random
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import yaml

from bupo.data import arithmetic
from bupo.errors import InputError, nearest

BUILT_IN = ("arithmetic", "arithmetic-hard")
TAGGED_INSTRUCTION = "Please reason step by step, and put your final answer within <answer> </answer> tags."
_TEST_SEED_OFFSET = 1_000_003  # generated test problems never share a seed with generated training problems


def generate(spec: str, split: str, size: int, seed: int) -> list[dict[str, Any]]:
    """Generate ``size`` rows with ``id``, ``prompt``, ``answer`` and, for reasoning-gym, ``metadata``.

    ``spec`` is one of `BUILT_IN`, or ``reasoning_gym/NAME`` followed by the task's options as ``/key=value`` (YAML).
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
        raise InputError(f"reasoning_gym has no task {name!r}{nearest(name, names)}; it has {len(names)}")
    task_seed = seed + (_TEST_SEED_OFFSET if split == "test" else 0)
    state = random.getstate()  # some tasks draw from the global generator
    random.seed(task_seed)
    try:
        settings = {key: yaml.safe_load(value) for key, _, value in (change.partition("=") for change in changes)}
        task = reasoning_gym.create_dataset(name, size=size, seed=task_seed, **settings)
        entries = [task[index] for index in range(size)]
    except (AssertionError, ValueError, TypeError, yaml.YAMLError) as error:  # the task's own checks
        options = {option.name for option in dataclasses.fields(DATASETS[name][1])} - {"size", "seed"}
        remedy = f"write /key=value with one of {', '.join(sorted(options))}"
        raise InputError(f"{spec}: the task refuses these options: {' '.join(str(error).split())}; {remedy}") from error
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


@cache
def gym_task(name: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1, seed=0)


def score(task: str, entry: Any, answer: str) -> tuple[float, str]:
    """Return the task's own score, and the status that follows from it."""
    if len(answer) > 100_000 or re.search(r"__\w+__", answer):  # some scorers evaluate expressions
        return 0.0, "unparsable"
    reward = float(gym_task(task).score_answer(answer=answer, entry=entry))
    return reward, "correct" if reward >= 0.99 else "wrong"
