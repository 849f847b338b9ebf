"""``bupo train``: BuPO or plain GRPO from a recipe."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from bupo.errors import InputError

HELP = """Train a model with BuPO (internal policy first, then the full policy) or plain GRPO.

RECIPE is a YAML file (see recipes/); --set changes any of its keys, and the options below change the common ones.
The output folder gets run.json, log.jsonl, checkpoints/ and model/. Ctrl-C ends the rollout batch, saves, and says how
to go on.

Examples:

  bupo train recipes/small.yaml --output runs/bupo

  bupo train recipes/small.yaml --output runs/grpo --internal-steps 0

  bupo train recipes/qwen3-4b.yaml --output runs/q --internal-layer auto --set trl.epsilon_high=0.28

  bupo train --resume --output runs/bupo
"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("train", help=HELP)(train)


def train(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe; with --resume the run's own is used.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the run.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key (a dot leads into a mapping).")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub id, model folder, or 'small' (shipped).")] = None,
    dataset: Annotated[str | None, typer.Option(help="Problems to train on.")] = None,
    rollouts: Annotated[int | None, typer.Option(help="Rollout batches in all.")] = None,
    internal_layer: Annotated[str | None, typer.Option(help="Layer l (from 1), or auto: the boundary layer.")] = None,
    internal_steps: Annotated[
        str | None, typer.Option(help="s_inter: rollout batches on the internal policy; 0 is plain GRPO; or auto.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of problems, order and sampling.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> int:
    from bupo.recipe import parse, read_recipe
    from bupo.schema import override
    from bupo.train.checkpoint import saved_recipe

    if output is None:
        raise InputError("--output is missing: name the folder of the run")
    if recipe is None and not resume:
        raise InputError("name a recipe, for instance: bupo train recipes/small.yaml --output runs/first")
    raw = saved_recipe(output) if recipe is None else override(read_recipe(recipe), changes or [])
    options = {
        "model": model,
        "dataset": dataset,
        "rollouts": rollouts,
        "internal_layer": _number_or_text(internal_layer),
        "internal_steps": _number_or_text(internal_steps),
        "seed": seed,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if recipe is None and (given or changes):
        raise InputError("a resumed run keeps its recipe: --resume without RECIPE takes no other settings")
    asked = parse({**raw, **given})

    _quiet()
    from bupo.train.run import train as run

    main = int(os.environ.get("RANK", "0")) == 0

    def say(text: str) -> None:
        if main:
            print(text, file=sys.stderr, flush=True)

    summary = run(asked, output, resume=resume, overwrite=overwrite, say=say, draw=_draw_flow)
    if main:
        _draw_inside(output, say)
        print(json.dumps(summary) if as_json else _text(summary))
    return 130 if summary["interrupted"] else 0


def _draw_flow(analysis: Mapping[str, Any], folder: Path, name: str) -> Path:
    """Draw an analysis; the trainer itself knows no figures."""
    from bupo.report.analysis_figures import entropy_flow
    from bupo.report.style import save

    return save(entropy_flow(analysis), folder, name)[0]


def _draw_inside(output: Path, say: Callable[[str], None]) -> None:
    """What training did inside, where the recipe asked for readings, as ``inside/inside.png`` and ``.svg``."""
    from bupo.report.inside_figures import write_training_figure

    if (figure := write_training_figure(Path(output))) is not None:
        say(f"wrote {figure}")


def _number_or_text(given: str | None) -> int | str | None:
    return int(given) if given is not None and given.lstrip("-").isdigit() else given


def _text(summary: dict[str, Any]) -> str:
    if summary["interrupted"]:
        return (
            f"stopped after rollout batch {summary['rollouts']}; checkpoint saved. "
            f"Go on with: bupo train --resume --output {summary['output']}"
        )
    first, last = summary["reward_first"], summary["reward_last"]
    rewards = f", reward {first:.3f} -> {last:.3f}" if first is not None and last is not None else ""
    return f"{summary['rollouts']} rollout batches in {summary['seconds']:.0f} s{rewards}; model in {summary['model']}"


def _quiet() -> None:
    """No telemetry, and no library bars or notices between our lines."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
