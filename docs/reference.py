"""Writes docs/reference.md: every recipe key and every command option, from the code that declares them.

Command: ``python -m docs.reference`` from the repository root (`make figures` runs it too); ``--check`` reports whether
the page differs from the code, with exit code 1 where it does.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from pathlib import Path
from typing import Any

import click
import typer
from pydantic import BaseModel
from trl import GRPOConfig

from bupo.cli import app
from bupo.recipe import Recipe
from bupo.train.build import OWNED
from bupo.train.config import BuPOConfig
from bupo.train.effects import NEVER

PAGE = Path(__file__).with_name("reference.md")
HEAD = """# Reference

`python -m docs.reference` writes this page from the code; do not edit it.

## Recipe keys

A recipe is a YAML mapping. The keys of the first table are bupo's own. The second table lists the settings of
`BuPOConfig` beside TRL's, the third those of TRL's `GRPOConfig`. They are top-level keys too, or stand under `trl:`.
"""

TRL = """### Settings of TRL

TRL's documentation says what they do: [GRPOConfig](https://huggingface.co/docs/trl/grpo_trainer#trl.GRPOConfig), and
[TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments).

"""


def type_name(hint: Any) -> str:
    """A type as a user would write it."""
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Annotated:
        return type_name(typing.get_args(hint)[0])
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(type_name(option) for option in typing.get_args(hint))
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", dict: "mapping", list: "list"}
    origin = typing.get_origin(hint) or hint
    if isinstance(origin, type) and issubclass(origin, BaseModel):
        return "mapping"
    return names.get(origin, getattr(origin, "__name__", str(origin)))


def shown(value: Any) -> str:
    if value is None:
        return "null"
    if value == "":
        return "empty"
    return f"`{str(value).lower()}`" if isinstance(value, bool) else f"`{value}`"


def row(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |\n"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return row(*head) + row(*["---"] * len(head)) + "".join(row(*cells) for cells in rows) + "\n"


def model_rows(model: type[BaseModel], prefix: str = "") -> list[tuple[str, ...]]:
    """One row per key of a pydantic model, those of nested mappings after their own."""
    rows = []
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else shown(field.get_default(call_default_factory=True))
        rows.append((f"`{prefix}{name}`", type_name(field.annotation), default, field.description or ""))
        for option in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(option, type) and issubclass(option, BaseModel):
                rows += model_rows(option, f"{prefix}{name}.")
    return rows


def config_rows() -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """One row per setting that `BuPOConfig` adds to TRL's or gives another default, and one per other setting of TRL.

    The latter leave out what a recipe sets by keys of its own, and what it is refused because it has no effect.
    """
    inherited = {field.name: field for field in dataclasses.fields(GRPOConfig)}
    hints, own, others = typing.get_type_hints(BuPOConfig), [], []
    refused = {*OWNED, *Recipe.model_fields, *NEVER.split()}
    for field in dataclasses.fields(BuPOConfig):
        cells = (f"`{field.name}`", type_name(hints[field.name]), shown(default_of(field)))
        if field.name not in inherited or field.default != inherited[field.name].default:
            own.append((*cells, field.metadata.get("help", "")))
        elif field.name not in refused:
            others.append(cells)
    return own, sorted(others)


def default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def option_rows(command: click.Command) -> list[tuple[str, ...]]:
    """One row per argument and option of a command."""
    rows = []
    for parameter in command.params:
        if "--help" in parameter.opts:
            continue
        name = ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))
        if isinstance(parameter, click.Argument) or parameter.param_type_name == "argument":
            name = f"`{(parameter.name or '').upper()}`"
        default = "required" if parameter.required else shown(parameter.default) if parameter.default else ""
        rows.append((name, default, getattr(parameter, "help", None) or ""))
    return rows


def page() -> str:
    """The whole page."""
    text = HEAD + "\n" + table(("key", "type", "default", "meaning"), model_rows(Recipe))
    own, others = config_rows()
    text += "### Settings of `BuPOConfig`\n\n" + table(("key", "type", "default", "meaning"), own)
    text += TRL + table(("key", "type", "default"), others)
    text += "## Commands\n\n`bupo COMMAND --help` prints the same with examples.\n\n"
    group: Any = typer.main.get_command(app)
    commands = {
        " ".join(path): command
        for name, entry in group.commands.items()
        for path, command in [((name, sub), one) for sub, one in getattr(entry, "commands", {}).items()]
        or [((name,), entry)]
    }
    for name, command in commands.items():
        summary = (command.help or "").strip().split("\n\n")[0]
        text += f"### `bupo {name}`\n\n{' '.join(summary.split())}\n\n"
        text += table(("option", "default", "meaning"), option_rows(command))
    return text.rstrip() + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == page() else "docs/reference.md differs from the code")
    PAGE.write_text(page(), encoding="utf-8")
