"""The rows of a sweep: a file with one line of JSON per finished run, read, checked and appended to."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bupo.errors import InputError, describe

ROWS_FILE = "runs.jsonl"
START = "start"  # the arm that is not trained
Row = dict[str, Any]
Rows = dict[str, dict[int, Row]]  # by arm, then by seed


class _Task(BaseModel):
    model_config = ConfigDict(strict=True)
    samples: int = Field(ge=1)
    correct: str  # the number of correct samples of each problem, separated by spaces

    @model_validator(mode="after")
    def _counts(self) -> Self:
        counts = self.correct.split()
        if not counts or not all(count.isdecimal() and int(count) <= self.samples for count in counts):
            raise ValueError(f"correct must hold a number from 0 to {self.samples} for each problem")
        return self


class _Row(BaseModel):
    model_config = ConfigDict(strict=True)
    arm: str = Field(min_length=1)
    seed: int
    changes: dict[str, Any]
    tasks: dict[str, _Task] = Field(min_length=1)
    update_seconds: float | None = Field(None, ge=0, allow_inf_nan=False)
    curves: dict[str, list[Annotated[float, Field(allow_inf_nan=False)] | None]] = {}


def is_rows(path: Path) -> bool:
    """Whether the first line of a file is the row of a sweep, not that of a training log."""
    with path.open("rb") as stream:
        return b'"arm"' in stream.readline()


def read_rows(path: Path) -> Rows:
    """The rows of a file, or of a sweep's folder; `InputError` names the line of what is not a row.

    A last line without an end, of a sweep that was killed while it wrote, is left out.
    """
    path = path / ROWS_FILE if path.is_dir() else path
    try:
        *lines, cut = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read; name the rows or the folder of a sweep: {error}") from None
    rows: Rows = {}
    for number, line in enumerate([*lines, *([cut] if _whole(cut) else [])], 1):
        try:
            row = json.loads(line)
            _Row.model_validate(row)
        except ValidationError as error:
            item = error.errors()[0]
            name = ".".join(map(str, item["loc"])) or "the row"
            said = f"{name}: {item['msg'].removeprefix('Value error, ')}"
            text = said if item["type"] == "value_error" else describe(name, [item], _Row.model_fields)
            raise InputError(f"{path}, line {number} is not the row of a sweep: {text}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}") from None
        own = rows.setdefault(row["arm"], {})
        if row["seed"] in own:
            raise InputError(f"{path}, line {number} repeats arm {row['arm']}, seed {row['seed']}; remove one of them")
        own[row["seed"]] = row
    return rows


def append_row(path: Path, row: Row) -> None:
    """Append one line; what a write that failed or was killed left behind the last whole line is cut off before."""
    line = json.dumps(row, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=str) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as stream:
        stream.seek(0)
        text = stream.read()
        rest = text[text.rfind(b"\n") + 1 :]
        if rest and _whole(rest.decode("utf-8", "replace")):
            line = "\n" + line
        elif rest:
            stream.truncate(len(text) - len(rest))
        stream.write(line.encode())
        stream.flush()
        os.fsync(stream.fileno())


def _whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def rounded(value: Any) -> Any:
    """Numbers, also in sequences and mappings, with four decimals."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value
