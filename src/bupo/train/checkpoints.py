"""What a checkpoint must hold beside the library's files, so that a resumed run equals the uninterrupted one.

``bupo_state.json`` is written last and atomically: a checkpoint without it is incomplete and never picked up. It
holds the micro-batch counter, the schedule with its resolved layer, and the batch arithmetic, which must not change.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from bupo.errors import ConfigError, InputError
from bupo.run_folder import RUN_FILE, write_json

STATE_FILE = "bupo_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def begin(checkpoint: str | Path) -> None:
    """Remove what an earlier attempt left where a checkpoint is about to be written; its mark of completeness first."""
    path = Path(checkpoint)
    (path / STATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def write_state(checkpoint: str | Path, state: dict[str, Any]) -> None:
    """Mark a checkpoint as complete, after everything else in it has reached the disk."""
    for path in Path(checkpoint).rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    write_json(Path(checkpoint) / STATE_FILE, {"schema": 1, **state})


def rotate(folder: str | Path, keep: int, protected: Collection[str] = ()) -> None:
    """Remove all but the newest ``keep`` complete checkpoints, and incomplete ones older than the newest.

    By number of updates, not by time stamp: removing a checkpoint that is killed half-way makes the folder look new. A
    checkpoint loses its mark of completeness first, so that what is left of it is never picked up.

    Args:
        protected: paths that stay in any case.
    """
    found = _numbered(folder)
    complete = [(number, path) for number, path in found if (path / STATE_FILE).is_file()]
    if not complete:
        return
    stay = {path for _, path in complete[-keep:]} | {Path(path) for path in protected}
    for number, path in found:
        if number < complete[-1][0] and path not in stay:
            begin(path)


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
    complete = [path for _, path in _numbered(folder) if (path / STATE_FILE).is_file()]
    return complete[-1] if complete else None


def _numbered(folder: str | Path) -> list[tuple[int, Path]]:
    """Checkpoint folders by number of updates, complete or not."""
    names = ((_NAME.fullmatch(path.name), path) for path in Path(folder).glob("checkpoint-*"))
    return sorted((int(name.group(1)), path) for name, path in names if name)


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
