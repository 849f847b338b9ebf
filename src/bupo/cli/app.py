"""The typer application: lists the commands and turns errors into one line and an exit code."""

from __future__ import annotations

import errno
import sys
from typing import Annotated

import typer

from bupo.cli import analyze, compare, demo, eval, plan, report, train
from bupo.errors import BupoError

app = typer.Typer(
    name="bupo",
    help="See the internal policies of language models, train them bottom-up, and measure whether it helped.",
    epilog="Add --debug to any command to see the traceback of an error.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("analyze", help=analyze.HELP)(analyze.analyze)
app.command("plan", help=plan.HELP)(plan.plan)
app.command("train", help=train.HELP)(train.train)
app.command("eval", help=eval.HELP)(eval.evaluate)
app.command("compare", help=compare.HELP)(compare.compare)
app.command("report", help=report.HELP)(report.report)
app.command("demo", help=demo.HELP)(demo.demo)


def _version(value: bool) -> None:
    if value:
        from bupo.run_folder import versions

        typer.echo(f"bupo {versions().get('bupo', 'unknown')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Hold the options of ``bupo`` itself."""


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
        return result if isinstance(result, int) else 0
    except BupoError as error:
        if debug:
            raise
        print(f"bupo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        if debug or (error.filename is None and error.errno != errno.ENOSPC):
            raise
        place = "" if error.filename is None else f"{error.filename}: "
        print(f"bupo: error: {place}{error.strerror}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("bupo: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error of click, which prints itself
            error.show()
            return int(error.exit_code)
        raise
