"""The typer application: collects the commands and turns errors into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated

import typer

from bupo.errors import BupoError

app = typer.Typer(
    name="bupo",
    help="See the internal policies of language models, train them bottom-up, and measure whether it helped.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# One file a command; a file registers itself through `register(app)`.
COMMANDS = ("analyze", "plan", "train", "eval", "compare", "report", "demo")


def _version(value: bool) -> None:
    if value:
        from bupo.run_folder import versions

        typer.echo(f"bupo {versions().get('bupo', 'unknown')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ["BUPO_DEBUG"] = "1"


for _name in COMMANDS:
    importlib.import_module(f"bupo.cli.{_name}").register(app)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code: 0, 2 for what a user can fix, 130 when interrupted.

    ``--debug`` is taken anywhere on the line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if debug:
        os.environ["BUPO_DEBUG"] = "1"
    try:
        result = app(args=arguments, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except BupoError as error:
        if debug:
            raise
        print(f"bupo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("bupo: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # click's usage errors know how to show themselves (and carry their exit code, 2)
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            return int(error.exit_code)
        raise
