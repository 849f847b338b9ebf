"""What a user can fix: every error here is shown as one line, without a traceback (unless ``--debug``)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class BupoError(Exception):
    """Base of all errors whose message tells a person what was wrong and what to do."""


class InputError(BupoError, ValueError):
    """A wrong value, file or model was given; the message names the valid range or the remedy."""


class ConfigError(InputError):
    """One or several settings are wrong together.

    All problems are collected and raised at once, so that a user fixes a recipe in one pass.
    """

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("; ".join(self.problems))


class TrainingStopped(BupoError):
    """Training cannot continue; the message names the update and what to try."""


def out_of_memory(error: BaseException) -> str | None:
    """Whose memory was exhausted, ``accelerator`` or ``host``; None if it was another error."""
    text = str(error).lower()
    if "out of memory" in text:
        return "accelerator"
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "cannot allocate memory" in text:
        return "host"
    return None


# -- sentences about settings ------------------------------------------------------------------------------------------

_EXPECTED = (  # pydantic's words, and ours
    ("greater than or equal to", "at least"),
    ("less than or equal to", "at most"),
    ("greater than", "above"),
    ("less than", "below"),
    ("a valid integer", "a whole number"),
    ("a valid string", "text"),
    ("a valid boolean", "true or false"),
    ("a valid dictionary", "a mapping"),
    ("a valid ", "a "),
)


def describe(name: str, errors: Iterable[Mapping[str, Any]], valid: Iterable[str] = ()) -> str:
    """One sentence about the setting ``name`` from pydantic's errors about it (one for each member of a union).

    Args:
        valid: the names that an unknown key, or a mapping in its place, may have.
    """
    expected: list[str] = []
    for error in errors:
        text = error["msg"].removeprefix("Input should be ").replace("'", "")
        if error["type"] == "missing" or error["input"] == "":
            return f"{name} is missing"
        if error["type"] == "extra_forbidden":
            return f"unknown key {name}{nearest(name.split('.')[-1], valid)}"
        if error["type"] == "string_pattern_mismatch":
            text = "'answer' or module:function"
        elif error["type"] == "model_type":
            text = f"a mapping with {', '.join(valid)}"
        elif error["type"] == "literal_error" and " or " in text:
            text = f"one of {text}"
        for theirs, ours in _EXPECTED:
            text = text.replace(theirs, ours)
        expected.append(text)
    value = repr(error["input"])
    return f"{name} must be {either(dict.fromkeys(expected))}, not {value if len(value) < 80 else value[:77] + '...'}"


def nearest(name: str, valid: Iterable[str]) -> str:
    """`` (did you mean x?)`` for the nearest valid name; the valid names if none is near and they are few."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f" (did you mean {close[0]}?)"
    return f" (valid: {', '.join(names)})" if len(names) <= 40 else ""


def either(options: Iterable[Any]) -> str:
    """``a, b or c``."""
    *first, last = map(str, options)
    return f"{', '.join(first)} or {last}" if first else last
