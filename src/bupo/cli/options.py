"""What several commands share: their options (each declared once), progress bars, and the launcher's processes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bupo.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import TaskID

LARGEST_SEED = 2**32 - 1  # numpy takes no larger one


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def _known_template(value: str | None) -> str | None:
    from bupo.data.prompts import TEMPLATES

    if value is not None and value not in TEMPLATES:
        raise InputError(f"unknown template {value!r}; use one of {', '.join(TEMPLATES)}")
    return value


_MODEL = typer.Option(help="Hub id, model folder, or 'small' (shipped with bupo).")
_MAX_NEW_TOKENS = typer.Option(min=1, help="Maximum number of tokens per response.")
_SEED = typer.Option(min=0, max=LARGEST_SEED, help="Random seed for problem selection and sampling.")

Model = Annotated[str, _MODEL]
OptionalModel = Annotated[str | None, _MODEL]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")]
OptionalOutput = Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the results.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the results in --output.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16, float16, or auto: the checkpoint's dtype where the device computes in it natively."
    ),
]
Device = Annotated[str | None, typer.Option(help="Torch device. Default: the accelerator, if there is one.")]
Seed = Annotated[int, _SEED]
OptionalSeed = Annotated[int | None, _SEED]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub model: a branch, tag or commit.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code in the model's repository.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_TEMPLATE = typer.Option(
    callback=_known_template, help="Prompt template: auto, raw, chat, qwen-math, qwen3-no-thinking or octothinker."
)
Template = Annotated[str, _TEMPLATE]
OptionalTemplate = Annotated[str | None, _TEMPLATE]
Temperature = Annotated[float, typer.Option(min=0.0, callback=_finite, help="Sampling temperature; 0 is greedy.")]
MaxNewTokens = Annotated[int | None, _MAX_NEW_TOKENS]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; dots reach into nested keys."),
]


class Progress:
    """Progress bars and messages on standard error; standard output is left to the result."""

    def __init__(self, enabled: bool = True):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Bars(*columns, console=Console(stderr=True), disable=not enabled)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def log(self, text: str) -> None:
        """Print a line above the bars, unless progress is disabled."""
        if not self._bars.disable:
            self._bars.console.print(text, markup=False, highlight=False)

    def update(self, name: str, done: int, total: int) -> None:
        """Move the bar called ``name``, which is added on first use."""
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total)
        self._bars.update(self._tasks[name], completed=done, total=total)

    def bar(self, name: str, total: int) -> Callable[..., None]:
        """Return a function of (steps done, total) that moves the bar called ``name``; the total may be left out."""
        return lambda done, of=total: self.update(name, done, of)


def quiet_libraries() -> None:
    """Switch off telemetry, and the bars and notices of libraries, which would tear our own lines."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def launched_processes() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun or `accelerate launch` set them; else (0, 1)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def refuse_launcher(command: str, instead: str) -> None:
    """Raise `InputError` if a launcher started several processes, which would all write the same folder."""
    _, processes = launched_processes()
    if processes > 1:
        raise InputError(f"{command} runs in one process, but the launcher started {processes}; {instead}")


@contextmanager
def on_interrupt(message: str) -> Iterator[None]:
    """End the command with ``message`` and exit code 130 on Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"bupo: interrupted. {message}", err=True)
        raise typer.Exit(130) from None


def split_names(text: str) -> list[str]:
    """The names in a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]
