"""``bupo report``: analyses, training runs and evaluations on one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bupo.errors import InputError

HELP = """Put analyses, training runs and evaluations on one self-contained HTML page.

Each argument is a folder (or file) written by `bupo analyze`, `train`, `eval` or `compare`; what it holds is found out.
Evaluations are compared in pairs on the problems they share. Write NAME=PATH to give one another name.

Examples:

  bupo report runs/look --output look.html

  bupo report start=eval/base grpo=eval/grpo bupo=eval/bupo runs/grpo runs/bupo --output report.html
"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("report", help=HELP)(report)


def report(
    paths: Annotated[list[str], typer.Argument(help="Folders or files, each PATH or NAME=PATH.", metavar="PATH...")],
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Internal policies report",
    overwrite: Annotated[bool, typer.Option(help="Replace --output if it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print verdict and comparisons as JSON.")] = False,
) -> None:
    if output.is_dir():
        raise InputError(f"output {output} is a folder; name a file such as {output / 'report.html'}")
    if output.exists() and not overwrite:
        raise InputError(f"output {output} is already there; choose another or pass --overwrite")

    from bupo.report.collect import collect

    material = collect(paths)

    from bupo.report.html import write_report
    from bupo.report.verdict import verdict

    try:
        write_report(output, title=title, **vars(material))
    except OSError as error:
        raise InputError(f"output {output} cannot be written: {error.strerror or error}") from None
    judged = verdict(material.evaluations, material.comparisons)
    if as_json:
        shown = {
            "output": str(output),
            "headline": judged.headline,
            "tone": judged.tone,
            "lines": judged.lines,
            "comparisons": material.comparisons,
            "notes": material.notes,
        }
        typer.echo(json.dumps(shown, ensure_ascii=False))
        return
    if material.evaluations:
        typer.echo(judged.headline)
    counts = [
        (len(material.analyses), "analysis", "analyses"),
        (len(material.runs), "training run", "training runs"),
        (len(material.evaluations), "evaluation", "evaluations"),
        (len(material.inside), "comparison of models", "comparisons of models"),
        (sum(len(item["samples"]) for item in material.tokens), "explored response", "explored responses"),
    ]
    typer.echo(f"wrote {output}: " + ", ".join(f"{n} {one if n == 1 else many}" for n, one, many in counts if n))
