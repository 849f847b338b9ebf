"""``bupo``: its commands, and errors as one line and an exit code. Only the command that runs imports torch."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from inspect import cleandoc
from shutil import get_terminal_size
from typing import Annotated, Any

import typer

from bupo.cli import analyze, compare, demo, doctor, eval, lens, plan, power, report, sweep, train
from bupo.errors import BupoError
from bupo.run_folder import versions

# in narrow terminals, rich's boxes cut the names of options
_SHAPE: Any = {"no_args_is_help": True, "rich_markup_mode": "rich" if get_terminal_size().columns >= 80 else None}
app = typer.Typer(
    name="bupo",
    help="See the internal policies of language models, train them bottom-up, and measure whether it helped.",
    epilog="Add --debug to any command to see the traceback of an error.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    **_SHAPE,
)
_lenses = typer.Typer(help="Fit, load and show lenses, which map every layer to the output.", **_SHAPE)
app.add_typer(_lenses, name="lens")
_COMMANDS = (analyze.analyze, plan.plan, train.train, eval.evaluate, compare.compare, sweep.sweep, power.power,
             report.report, demo.demo, doctor.doctor)  # fmt: skip
for command in (*_COMMANDS, lens.fit, lens.load, lens.show):
    # named like its file; neighbouring lines of a help text are joined, so each example becomes a paragraph
    text = cleandoc(command.__doc__ or "").replace("\n  bupo", "\n\n  bupo")
    group, name = (app, command.__module__.split(".")[-1]) if command in _COMMANDS else (_lenses, command.__name__)
    group.command(name, help=text)(command)
# telemetry off, and the bars and notices of libraries, which would tear our own lines
_QUIET = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
os.environ.update({**_QUIET, "TRANSFORMERS_VERBOSITY": "error", **os.environ})
warnings.formatwarning = lambda message, *place, **more: f"bupo: warning: {message}\n"  # no lines of our source
_AGAIN = "Nothing was written; the same command starts again from the beginning."
_SAVED = "Responses so far are saved; the same command continues."
_INTERRUPTED = {"analyze": _AGAIN, "compare": _AGAIN, "lens": _AGAIN, "eval": _SAVED, "plan": "", "power": ""}
_INTERRUPTED |= {"report": "Nothing was written.", "demo": "With --overwrite, it starts again."}


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"bupo {versions().get('bupo', 'unknown')}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for errors a user can fix, 130 when interrupted.

    ``--debug`` may stand anywhere before a ``--``; it shows the traceback of an error.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]
    arguments = [a for a in arguments[:end] if a != "--debug"] + arguments[end:]
    try:
        result = app(args=arguments, standalone_mode=False)
        if result == 130 and arguments[0] in _INTERRUPTED:  # typer's code for Ctrl-C
            print(f"bupo: interrupted. {_INTERRUPTED[arguments[0]]}".rstrip(), file=sys.stderr)
        return result if isinstance(result, int) else 0
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error of click, which prints itself
            error.show()
            return int(error.exit_code)
        text = str(error) if isinstance(error, BupoError) else ""
        if isinstance(error, OSError) and (error.filename is not None or error.errno == errno.ENOSPC):
            text = f"{error.filename or ''}: {error.strerror}".removeprefix(": ")
        if debug or not text:
            raise
        print(f"bupo: error: {' '.join(text.split())}", file=sys.stderr)
        return 2
