"""From YAML to a frozen dataclass, every problem collected: safe reading, ``key=value`` changes, types and bounds.

A field's annotation is its type (``int | None``, ``Literal[...]``, a nested dataclass); `key` adds meaning and bounds.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any, Literal, TypeVar

import yaml

from bupo.errors import ConfigError, InputError

_T = TypeVar("_T")


def key(default: Any, text: str, *, low: float | None = None, above: float | None = None) -> Any:
    """A recipe key: its default, what it means, and its lower bound (inclusive ``low`` or exclusive ``above``)."""
    metadata = {"help": text, "low": low, "above": above}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class _Loader(yaml.SafeLoader):
    """Safe YAML that takes 1e-6 for a number and refuses a key given twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for name, _ in node.value:
        value = loader.construct_object(name)
        if value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {value!r} is given twice", name.start_mark)
        seen.add(value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def load_yaml(text: str, name: str) -> Any:
    """Parse YAML safely.

    Raises:
        InputError: it is not YAML; the message names the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise InputError(f"{name} is not valid YAML{where}: {getattr(error, 'problem', None) or error}") from error


def override(raw: Mapping[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """Apply ``key=value`` changes; the value is YAML, a dot leads into a mapping (``trl.epsilon_high=0.28``).

    Raises:
        ConfigError: a change is not of this form, or leads into something that is no mapping.
    """
    result = _deep_copy(raw)
    problems = []
    for change in changes:
        name, equals, text = change.partition("=")
        name = name.strip()
        if not equals or not name:
            problems.append(f"--set {change!r} is not of the form key=value")
            continue
        *path, last = name.split(".")
        place = result
        for part in path:
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
            if not isinstance(place, dict):
                problems.append(f"--set {name}: {part} is no mapping")
                break
        else:
            place[last] = load_yaml(text, f"--set {name}")
    if problems:
        raise ConfigError(problems)
    return result


def _deep_copy(value: Any) -> Any:
    return {k: _deep_copy(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def build(cls: type[_T], raw: Mapping[str, Any], problems: list[str], prefix: str = "") -> _T:
    """A dataclass from a mapping; what is wrong goes to ``problems`` and keeps its default."""
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in fields:
            problems.append(f"unknown key {prefix}{name}{nearest(str(name), fields)}")
            continue
        found = _convert(value, hints[name], f"{prefix}{name}", problems)
        if found is not _WRONG:
            _check_bounds(found, fields[name], f"{prefix}{name}", problems)
            values[name] = found
    return cls(**values)


_WRONG = object()


def _convert(value: Any, hint: Any, name: str, problems: list[str]) -> Any:
    """``value`` as one of the types that ``hint`` allows, or `_WRONG` after noting the problem."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return build(typing.cast(type, option), value, problems, f"{name}.")
        if typing.get_origin(option) is Literal and isinstance(value, str) and value in typing.get_args(option):
            return value
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if option in (str, bool, dict, list) and type(value) is option:
            return _deep_copy(value)
        if option is int and type(value) is int:
            return value
        if option is type(None) and value is None:
            return None
    expected = either([_describe(option) for option in options])
    problems.append(f"{name} must be {expected}, not {value!r}")
    return _WRONG


def _describe(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return "one of " + ", ".join(typing.get_args(option))
    if dataclasses.is_dataclass(option):
        return "a mapping with " + ", ".join(f.name for f in dataclasses.fields(option))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a mapping"}
    return {**names, list: "a list", type(None): "null"}[option]


def _check_bounds(value: Any, spec: dataclasses.Field, name: str, problems: list[str]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    low, above = spec.metadata.get("low"), spec.metadata.get("above")
    finite = value == value and abs(value) != float("inf")
    if not finite or (low is not None and value < low) or (above is not None and value <= above):
        bound = f"at least {low}" if low is not None else f"above {above}" if above is not None else "finite"
        problems.append(f"{name} must be {bound}, not {value}")


def nearest(name: str, valid: Iterable[str]) -> str:
    """`` (did you mean x?)`` for the nearest valid name, or the valid names where none is near."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f" (did you mean {close[0]}?)"
    return f" (valid: {', '.join(names)})" if len(names) <= 40 else ""


def either(options: list[Any]) -> str:
    """``a, b or c``."""
    texts = [str(option) for option in options]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
