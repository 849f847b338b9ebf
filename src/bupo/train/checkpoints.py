"""What a checkpoint must hold beside the library's files, so that a resumed run equals the uninterrupted one.

``bupo_state.json`` is written last and atomically: a checkpoint without it is incomplete and never picked up. It
holds the micro-batch counter, the schedule with its resolved layer, and the batch arithmetic, which must not change.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bupo.errors import ConfigError, InputError
from bupo.rundir import RUN_FILE, write_json

STATE_FILE = "bupo_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def write_state(checkpoint: str | Path, state: dict[str, Any]) -> None:
    """Mark a checkpoint as complete."""
    write_json(Path(checkpoint) / STATE_FILE, {"schema": 1, **state})


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """The state of a complete checkpoint.

    Raises:
        InputError: the folder or its state file is missing or damaged.
    """
    path = Path(checkpoint) / STATE_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"checkpoint {checkpoint} cannot be resumed: {STATE_FILE} is missing or damaged (it was not written by "
            "bupo train, or not to its end); choose another checkpoint"
        ) from error


def last_checkpoint(folder: str | Path) -> Path | None:
    """The complete checkpoint with the most updates below ``folder``, or None."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        name = _NAME.fullmatch(path.name)
        if name and (path / STATE_FILE).is_file():
            found.append((int(name.group(1)), path))
    return max(found)[1] if found else None


def check_resumable(checkpoint: str | Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to continue a run under other settings, or from the middle of a rollout batch.

    Args:
        saved, current: settings that must agree; only keys of ``current`` are compared.
    """
    if not saved.get("between_rollouts", False):
        raise InputError(
            f"checkpoint {checkpoint} was saved in the middle of a rollout batch, whose samples are gone; resume from "
            "an earlier checkpoint"
        )
    differing = [
        f"{key} was {saved.get(key)!r} and is now {value!r}"
        for key, value in current.items()
        if saved.get(key) != value
    ]
    if differing:
        raise ConfigError([f"checkpoint {checkpoint} belongs to other settings: {line}" for line in differing])


def saved_recipe(folder: str | Path) -> dict[str, Any]:
    """The resolved recipe that a run's folder was made with.

    Raises:
        InputError: the folder holds no run.
    """
    path = Path(folder) / RUN_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} holds no training run to resume: {RUN_FILE} is missing or damaged") from error
