"""``bupo train``: BuPO or plain GRPO from a recipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from bupo.cli import options
from bupo.errors import InputError
from bupo.run_folder import read_run

_CONTINUE = "Continue with: bupo train --resume --output "
_AGAIN = "There is no checkpoint yet; start again with --overwrite --output "


def train(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe. --resume uses the recipe of the run.")] = None,
    output: options.OptionalOutput = None,
    changes: options.Changes = None,
    model: options.OptionalModel = None,
    dataset: Annotated[str | None, typer.Option(help="Problems to train on.")] = None,
    rollouts: Annotated[int | None, typer.Option(help="Number of rollout batches in the run.")] = None,
    internal_layer: Annotated[
        str | None, typer.Option(help="Layer of the internal policy, from 1, or auto for the boundary layer.")
    ] = None,
    internal_steps: Annotated[
        str | None,
        typer.Option(help="Number of rollout batches that train the internal policy; 0 is plain GRPO. Or auto."),
    ] = None,
    seed: options.OptionalSeed = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in --output.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --output.")] = False,
    as_json: options.AsJson = False,
) -> int:
    """Train a model with BuPO (an internal policy first, then the full policy) or plain GRPO.

    RECIPE is a YAML file (see recipes/). --set changes any of its keys, and the options below change the most given
    ones. The output folder gets run.json, log.jsonl, checkpoints/ and model/. Ctrl-C finishes the rollout batch, saves,
    and prints the command that continues the run.

    Examples:
      bupo train recipes/small.yaml --output runs/bupo
      bupo train recipes/small.yaml --output runs/grpo --internal-steps 0
      bupo train recipes/qwen3-4b.yaml --output runs/q --internal-layer auto --set epsilon_high=0.28
      bupo train --resume --output runs/bupo
    """
    from bupo.recipe import override, read_recipe

    given = {"model": model, "dataset": dataset, "rollouts": rollouts, "seed": seed}
    given = {name: value for name, value in given.items() if value is not None}
    # a number or auto, as YAML reads it
    internal = {"internal_layer": internal_layer, "internal_steps": internal_steps}
    changes = [*(changes or []), *(f"{name}={text}" for name, text in internal.items() if text is not None)]
    if output is None:
        raise InputError("--output is missing: name the folder of the run")
    if recipe is None and not resume:
        raise InputError("name a recipe, for instance: bupo train recipes/small.yaml --output runs/first")
    if recipe is None and (given or changes):
        raise InputError("a resumed run keeps its recipe: --resume without RECIPE takes no other settings")
    raw = override(read_recipe(recipe), changes) if recipe else read_run(output)["config"]

    from bupo.report.analysis_figures import entropy_flow
    from bupo.report.inside_figures import write_training_figure
    from bupo.report.style import save
    from bupo.train.build import check_recipe
    from bupo.train.run import train as run

    main = options.launched_processes()[0] == 0

    def say(text: str) -> None:
        if main:
            print(text, file=sys.stderr, flush=True)

    def draw(analysis: Mapping[str, Any], folder: Path, name: str) -> Path:
        return save(entropy_flow(analysis), folder, name)[0]

    try:
        summary = run(check_recipe({**raw, **given}), output, resume=resume, overwrite=overwrite, say=say, draw=draw)
    except KeyboardInterrupt:  # the second one: the first ends the run in order
        saved = any(Path(output, "checkpoints").glob("checkpoint-*"))
        say(f"bupo: interrupted. {_CONTINUE if saved else _AGAIN}{output}")
        raise
    if main:
        if (figure := write_training_figure(output)) is not None:
            say(f"wrote {figure}")
        print(json.dumps(summary) if as_json else _text(**summary))
    return 130 if summary["interrupted"] else 0


def _text(rollouts: int, reward_first: float | None, reward_last: float | None, **summary: Any) -> str:
    if summary["interrupted"]:
        then = f"{_CONTINUE}{summary['output']}"
        return f"stopped after rollout batch {rollouts}; checkpoint saved. {then}"
    rewards = "" if None in (reward_first, reward_last) else f", reward {reward_first:.3f} -> {reward_last:.3f}"
    return f"{rollouts} rollout batches in {summary['seconds']:.0f} s{rewards}; model in {summary['model']}"
