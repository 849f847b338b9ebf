"""``bupo report``: analyses, training runs, evaluations and comparisons on one page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bupo.cli import options
from bupo.errors import InputError
from bupo.run_folder import write_text


def report(
    paths: Annotated[list[str], typer.Argument(help="Folders or files, each PATH or NAME=PATH.", metavar="PATH...")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Page to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Internal policies report",
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Put analyses, training runs, evaluations and sweeps on one self-contained HTML page.

    Each argument is a folder (or file) written by `bupo analyze`, `train`, `eval`, `compare` or `sweep`.
    Evaluations are compared in pairs on the problems they share. Write NAME=PATH to choose another name.

    Examples:
      bupo report runs/look --output look.html
      bupo report start=eval/base grpo=eval/grpo bupo=eval/bupo runs/grpo runs/bupo --output report.html
    """
    if output.is_dir():
        raise InputError(f"output {output} is a folder; name a file such as {output / 'report.html'}")
    if output.exists() and not overwrite:
        raise InputError(f"output {output} already exists; choose another or pass --overwrite")
    data, shown = write_report(output, title, paths)
    if as_json:
        typer.echo(json.dumps({"output": str(output), **shown}, ensure_ascii=False))
        return
    if data.evaluations or data.sweeps:
        typer.echo(shown["headline"])
    counts = [
        (len(data.analyses), "analysis", "analyses"),
        (len(data.runs), "training run", "training runs"),
        (len(data.evaluations), "evaluation", "evaluations"),
        (len(data.comparisons), "comparison of models", "comparisons of models"),
        (len(data.sweeps), "sweep", "sweeps"),
        (sum(len(item.samples) for _, item in data.tokens), "explored response", "explored responses"),
    ]
    typer.echo(f"wrote {output}: " + ", ".join(f"{n} {one if n == 1 else many}" for n, one, many in counts if n))


def write_report(
    output: Path, title: str, paths: Sequence[str], notes: Sequence[str] = (), records: Sequence[str] = ()
) -> tuple[Any, dict[str, Any]]:
    """Write a page, with notes and records before those of its results; return its data, and what it concludes."""
    from bupo.report.page import collect, render

    data = collect(paths)
    data.notes[:0], data.records[:0] = notes, records
    write_text(output, render(title, data))
    shown = vars(data.conclusion)  # headline, tone and lines
    return data, {**shown, "comparisons": data.differences, "notes": data.notes}
