"""``bupo train``: BuPO or plain GRPO from a recipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from bupo.cli.options import (
    AsJson,
    Changes,
    OptionalModel,
    OptionalOutput,
    OptionalSeed,
    launched_processes,
    quiet_libraries,
)
from bupo.errors import InputError

HELP = """Train a model with BuPO (an internal policy first, then the full policy) or plain GRPO.

RECIPE is a YAML file (see recipes/). --set changes any of its keys, and the options below change the most common ones.
The output folder gets run.json, log.jsonl, checkpoints/ and model/. Ctrl-C finishes the rollout batch, saves, and
prints the command that continues the run.

Examples:

  bupo train recipes/small.yaml --output runs/bupo

  bupo train recipes/small.yaml --output runs/grpo --internal-steps 0

  bupo train recipes/qwen3-4b.yaml --output runs/q --internal-layer auto --set epsilon_high=0.28

  bupo train --resume --output runs/bupo
"""


def train(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe. --resume uses the recipe of the run.")] = None,
    output: OptionalOutput = None,
    changes: Changes = None,
    model: OptionalModel = None,
    dataset: Annotated[str | None, typer.Option(help="Problems to train on.")] = None,
    rollouts: Annotated[int | None, typer.Option(help="Number of rollout batches in the run.")] = None,
    internal_layer: Annotated[
        str | None, typer.Option(help="Layer of the internal policy, from 1, or auto for the boundary layer.")
    ] = None,
    internal_steps: Annotated[
        str | None,
        typer.Option(help="Number of rollout batches that train the internal policy; 0 is plain GRPO. Or auto."),
    ] = None,
    seed: OptionalSeed = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in --output.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --output.")] = False,
    as_json: AsJson = False,
) -> int:
    from bupo.recipe import override, read_recipe
    from bupo.run_folder import read_run

    options = {"model": model, "dataset": dataset, "rollouts": rollouts, "seed": seed}
    options |= {"internal_layer": _number_or_text(internal_layer), "internal_steps": _number_or_text(internal_steps)}
    options = {name: value for name, value in options.items() if value is not None}
    if output is None:
        raise InputError("--output is missing: name the folder of the run")
    if recipe is None and not resume:
        raise InputError("name a recipe, for instance: bupo train recipes/small.yaml --output runs/first")
    if recipe is None and (options or changes):
        raise InputError("a resumed run keeps its recipe: --resume without RECIPE takes no other settings")
    raw = read_run(output)["config"] if recipe is None else override(read_recipe(recipe), changes or [])

    quiet_libraries()
    from bupo.report.inside_figures import write_training_figure
    from bupo.train.build import check_recipe
    from bupo.train.run import train as run

    main = launched_processes()[0] == 0

    def say(text: str) -> None:
        if main:
            print(text, file=sys.stderr, flush=True)

    checked = check_recipe({**raw, **options})
    summary = run(checked, output, resume=resume, overwrite=overwrite, say=say, draw=_draw_flow)
    if main:
        if (figure := write_training_figure(output)) is not None:
            say(f"wrote {figure}")
        print(json.dumps(summary) if as_json else _text(summary))
    return 130 if summary["interrupted"] else 0


def _draw_flow(analysis: Mapping[str, Any], folder: Path, name: str) -> Path:
    """Draw an analysis; the trainer itself draws no figures."""
    from bupo.report.analysis_figures import entropy_flow
    from bupo.report.style import save

    return save(entropy_flow(analysis), folder, name)[0]


def _number_or_text(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.lstrip("-").isdecimal() else text


def _text(summary: dict[str, Any]) -> str:
    if summary["interrupted"]:
        return (
            f"stopped after rollout batch {summary['rollouts']}; checkpoint saved. "
            f"Continue with: bupo train --resume --output {summary['output']}"
        )
    first, last = summary["reward_first"], summary["reward_last"]
    rewards = f", reward {first:.3f} -> {last:.3f}" if first is not None and last is not None else ""
    return f"{summary['rollouts']} rollout batches in {summary['seconds']:.0f} s{rewards}; model in {summary['model']}"
