"""What commands share: their options (each declared once), bars, tables, and the launcher's processes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import rich.progress
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
from rich.table import Table

from bupo.errors import InputError


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def _known_template(value: str | None) -> str | None:
    from bupo.data.prompts import TEMPLATES

    if value is not None and value not in TEMPLATES:
        raise InputError(f"unknown template {value!r}; use one of {', '.join(TEMPLATES)}")
    return value


_MODEL = typer.Option(help="Hub id, model folder, or 'small' (shipped with bupo).")
_OUTPUT = typer.Option("--output", "-o", help="Folder for the results.")
# numpy takes no larger seed
_SEED = typer.Option(min=0, max=2**32 - 1, help="Random seed for problem selection and sampling.")
_TEMPLATE = typer.Option(
    callback=_known_template, help="Prompt template: auto, raw, chat, qwen-math, qwen3-no-thinking or octothinker."
)
_DTYPE_HELP = "float32, bfloat16, float16, or auto: the checkpoint's dtype where the device computes in it natively."

Model = Annotated[str, _MODEL]
OptionalModel = Annotated[str | None, _MODEL]
Output = Annotated[Path, _OUTPUT]
OptionalOutput = Annotated[Path | None, _OUTPUT]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the results in --output.")]
Dtype = Annotated[str, typer.Option(help=_DTYPE_HELP)]
Device = Annotated[str | None, typer.Option(help="Torch device. Default: the accelerator, if there is one.")]
Seed = Annotated[int, _SEED]
OptionalSeed = Annotated[int | None, _SEED]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub model: a branch, tag or commit.")]
_TRUST = typer.Option("--trust-remote-code", help="Run the Python code in the model's repository.")
TrustRemoteCode = Annotated[bool, _TRUST]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Template = Annotated[str, _TEMPLATE]
OptionalTemplate = Annotated[str | None, _TEMPLATE]
Temperature = Annotated[float, typer.Option(min=0.0, callback=_finite, help="Sampling temperature; 0 is greedy.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Maximum number of tokens per response.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; dots reach into nested keys."),
]


class Progress(rich.progress.Progress):
    """Progress bars and messages on standard error, or none; standard output is left to the result."""

    def __init__(self, enabled: bool = True):
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        super().__init__(*columns, console=Console(stderr=True, quiet=not enabled), disable=not enabled)

    def move(self, name: str, done: int, total: int) -> None:
        """Move the bar called ``name``, which is added on first use."""
        known = [task.id for task in self.tasks if task.description == name]
        self.update(known[0] if known else self.add_task(name), completed=done, total=total)


def print_table(title: str, columns: Mapping[str, Sequence[str]], left: str) -> None:
    """Print columns of cells under their names, right-aligned but for the column ``left``."""
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="left" if name == left else "right", no_wrap=name != left)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    Console().print(table)


def launched_processes() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun or `accelerate launch` set them; else (0, 1)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def refuse_launcher(command: str, instead: str) -> None:
    """Raise `InputError` if a launcher started several processes, which would all write the same folder."""
    _, processes = launched_processes()
    if processes > 1:
        raise InputError(f"{command} runs in one process, but the launcher started {processes}; {instead}")


def split_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
