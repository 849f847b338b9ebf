"""Grids: the arms and seeds of a sweep, read from YAML and checked before anything is trained."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from bupo.errors import ConfigError, InputError, describe, nearest, shown
from bupo.recipe import Text, override, read_recipe
from bupo.sweep.rows import START, Rows
from bupo.train.build import check_recipe

_STRICT = ConfigDict(frozen=True, strict=True, extra="forbid")
_OF_SWEEP = {"model", "revision", "output", "overwrite", "json", "shard", "regrade"}  # options of `bupo eval`


def seeds_of(value: Any) -> list[int]:
    """Seeds from a list, or from text such as ``0-9`` or ``0,1,5-7``."""
    parts = [value] if type(value) is int else value.split(",") if isinstance(value, str) else value
    found: list[int] = []
    for part in parts if isinstance(parts, list) else ():
        span = re.fullmatch(r"\s*(\d{1,10})\s*(?:-\s*(\d{1,10})\s*)?", str(part))
        found += range(int(span[1]), min(int(span[2] or span[1]), int(span[1]) + 10_000) + 1) if span else [-1]
    if not found or min(found) < 0 or max(found) >= 2**32 or len(set(found)) < len(found):
        raise PydanticCustomError("seeds", "different whole numbers, such as [0, 1, 2] or 0-9")
    return found


Seeds = Annotated[list[int], BeforeValidator(seeds_of)]


def _name(value: Any) -> Any:
    """The name of an arm, which names folders and stands in lists with commas."""
    if not re.fullmatch(r"[\w+=@%-][\w+=@%.-]*", str(value)):
        raise PydanticCustomError("name", "a name of letters, digits and + - = @ % . _")
    return value


class Arm(BaseModel):
    """Changes to the recipe, and the seeds of an arm that does not run all of them."""

    model_config = ConfigDict(**{**_STRICT, "extra": "allow"})
    seeds: Seeds | None = None


Name = Annotated[str, BeforeValidator(_name)]


class Grid(BaseModel):
    """What a sweep runs: every arm with each of its seeds. Without ``start``, the model before training is not one."""

    model_config = _STRICT
    recipe: Text = Field(description="Recipe, relative to the grid's folder or the working directory.")
    arms: dict[Name, Annotated[Arm, BeforeValidator(lambda arm: {} if arm is None else arm)]] = Field(min_length=1)
    seeds: Seeds
    evaluate: dict[str, str | int | float | bool] = Field(description="Options of `bupo eval`, without their dashes.")
    base: dict[str, Any] = Field({}, description="Changes to the recipe that all arms share.")
    order: list[str] = Field([], description="The arms that run first.")

    def runs(self) -> list[tuple[str, int]]:
        """The arms and seeds in the order in which they run: by seed, then by arm."""
        names = [*self.order, *(name for name in self.arms if name not in self.order)]
        own = {name: self.arms[name].seeds or self.seeds for name in names}
        every = sorted({seed for seeds in own.values() for seed in seeds}, key=lambda s: (s not in self.seeds, s))
        return [(name, seed) for seed in every for name in names if seed in own[name]]

    def changes(self, arm: str) -> dict[str, Any]:
        """What an arm changes in the recipe."""
        return {**self.base, **(self.arms[arm].model_extra or {})}

    def recipe_of(self, arm: str, **more: Any) -> dict[str, Any]:
        """The recipe of an arm; ``more`` are keys that its changes replace."""
        changes = {**more, **self.changes(arm)}
        texts = (f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in changes.items())
        return override(read_recipe(self.recipe), texts)

    def evaluation(self) -> list[str]:
        """The options of `bupo eval`, with its sampling seed: the same for all runs, so that they can be paired."""
        options = {f"--{name}": value for name, value in {"seed": 0, **self.evaluate}.items() if value is not False}
        return [part for name, value in options.items() for part in ((name,) if value is True else (name, str(value)))]


def read_grid(path: Path) -> Grid:
    """The grid in a file, its recipes checked, too; `ConfigError` names everything that is wrong."""
    raw = read_recipe(path, "grid")
    try:
        grid = Grid.model_validate(raw)
    except ValidationError as error:
        groups: dict[str, list[Any]] = {}
        for item in error.errors():
            groups.setdefault(".".join(str(part) for part in item["loc"] if part != "[key]"), []).append(item)
        raise ConfigError([f"{path}: {describe(n, items, Grid.model_fields)}" for n, items in groups.items()]) from None
    found = next((p for p in (path.parent / grid.recipe, Path(grid.recipe)) if p.is_file()), None)
    if found is None:
        raise InputError(f"{path}: recipe {grid.recipe} is neither in {path.parent} nor in the working directory")
    grid = grid.model_copy(update={"recipe": str(found)})
    problems: dict[str, list[str]] = {}
    for name in grid.evaluate.keys() & _OF_SWEEP:
        problems[f"evaluate.{name} is set by the sweep; leave it out"] = []
    for name in grid.order:
        if name not in grid.arms:
            problems[f"order names {name}, which is no arm{nearest(name, grid.arms)}"] = []
    for arm in grid.arms:
        if arm == START and grid.arms[arm].model_extra:
            problems["arm start is the model before training; of the keys, it takes seeds only"] = []
        elif "seed" in grid.changes(arm):
            problems.setdefault("seed is set by the sweep, from seeds; leave it out", []).append(arm)
        else:
            try:
                check_recipe(grid.recipe_of(arm))
            except ConfigError as error:
                for problem in error.problems:
                    problems.setdefault(problem, []).append(arm)
    texts = [
        f"arm {', '.join(arms)}: {text}" if 0 < len(arms) < len(grid.arms) else text for text, arms in problems.items()
    ]
    if texts:
        raise ConfigError([f"{path}: {text}" for text in texts])
    return grid


def pending(grid: Grid, rows: Rows, only: Sequence[str] | None, seeds: Sequence[int] | None) -> list[tuple[str, int]]:
    """The runs without a row, in order; `InputError` if their arm has rows that were made with other changes."""
    every, done = grid.runs(), changed(grid, rows)
    if unknown := [arm for arm in only or () if arm not in grid.arms]:
        raise InputError(f"--only names {unknown[0]}, which is not in the grid{nearest(unknown[0], grid.arms)}")
    if missing := set(seeds or ()) - {seed for _, seed in every}:
        raise InputError(f"--seeds names {min(missing)}, which is not in the grid; add it to the grid's seeds")
    wanted = [(arm, seed) for arm, seed in every if arm in (only or [arm]) and seed in (seeds or [seed])]
    runs = [(arm, seed) for arm, seed in wanted if seed not in rows.get(arm, {})]
    for arm, _ in runs:
        if arm in done:
            raise InputError(f"{done[arm]}; name the arm differently, or write the rows to another file")
    return runs


def changed(grid: Grid, rows: Rows) -> dict[str, str]:
    """The arms with rows that were made with other settings than the grid's, and one that differs."""
    found = {}
    for arm, seed in grid.runs():
        row = rows.get(arm, {}).get(seed, {})
        if "evaluate" not in row:  # there is none, or it is older than this comparison
            continue
        now, then = _settings(arm, grid.changes(arm), grid.evaluate), _settings(arm, row["changes"], row["evaluate"])
        for key in {**then, **now}:
            values = [shown(part[key]) if key in part else "not set" for part in (then, now)]
            if values[0] != values[1]:
                found[arm] = f"arm {arm}, seed {seed} was run with {key} {values[0]}, in the grid it is {values[1]}"
    return found


def _settings(arm: str, changes: dict[str, Any], evaluate: dict[str, Any]) -> dict[str, Any]:
    """What a run depends on, as JSON holds it; training settings do not matter to the model before training."""
    own = {} if arm == START else changes
    return json.loads(json.dumps({**own, **{f"evaluate.{k}": v for k, v in evaluate.items()}}, default=str))
