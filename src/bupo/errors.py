"""What a user can fix: every error here is shown as one line, without a traceback (unless ``--debug``)."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class BupoError(Exception):
    """Base of all errors whose message tells a person what was wrong and what to do."""


class InputError(BupoError, ValueError):
    """A wrong value, file or model was given; the message names the valid range or the remedy."""


class ConfigError(InputError):
    """One or several settings are wrong together; all are raised at once, so that a recipe is fixed in one pass."""

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
    return "host" if isinstance(error, MemoryError) or "t allocate memory" in text else None


def not_finite(error: BaseException) -> str | None:
    """A sentence if PyTorch could not sample because of infinite or undefined logits; None if it was another error."""
    remedy = "check the model's weights, or load it in float32"
    return f"the model's probabilities are not finite; {remedy}" if "probability tensor" in str(error) else None


_OURS = {  # words that replace pydantic's
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "above",
    "less than": "below",
    "a valid integer": "a whole number",
    "a valid string": "text",
    "a valid boolean": "true or false",
    "a valid dictionary": "a mapping",
    "a valid ": "a ",
    "Input should be ": "",
    "'": "",
}


def describe(name: str, errors: Iterable[Mapping[str, Any]], valid: Iterable[str] = ()) -> str:
    """One sentence from pydantic's errors about a setting; ``valid`` are the keys that may stand there, or in it."""
    expected: dict[str, None] = {}
    for error in errors:
        text, kind = error["msg"], error["type"]
        if kind == "missing" or error["input"] == "":
            return f"{name} is missing"
        if kind == "extra_forbidden":
            return f"unknown key {name}{nearest(name.split('.')[-1], valid)}"
        for theirs, ours in _OURS.items():
            text = text.replace(theirs, ours)
        if kind == "model_type":
            text = f"a mapping with {', '.join(valid)}"
        elif kind == "literal_error" and " or " in text:
            text = f"one of {text}"
        expected[text] = None
    return f"{name} must be {either(expected)}, not {shown(error['input'])}"


def shown(value: Any, length: int = 80) -> str:
    """A value as a message shows it: at most ``length`` characters, even where its ``repr`` fails (huge integers)."""
    try:
        text = repr(value)
    except Exception:  # of a user's class, whatever it raises
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= length else f"{text[: length - 3]}..."


def nearest(name: str, valid: Iterable[str]) -> str:
    """`` (did you mean x?)`` for the nearest valid name; the valid names if none is near and they are few."""
    names = list(valid)
    if close := difflib.get_close_matches(name, names, n=1):
        return f" (did you mean {close[0]}?)"
    return f" (valid: {', '.join(names)})" if len(names) <= 40 else ""


def either(options: Iterable[Any]) -> str:
    """``a, b or c``."""
    *first, last = map(str, options)
    return f"{', '.join(first)} or {last}" if first else last


def gib(size: float) -> str:
    """A number of bytes as a person reads it."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"
