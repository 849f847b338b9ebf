"""``bupo train``: BuPO or plain GRPO from a recipe."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from bupo.cli import options
from bupo.errors import InputError
from bupo.run_folder import claim, read_run

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
    check: Annotated[
        bool | None, typer.Option("--check/--no-check", help="Try the run only, or begin it untried. Default: both.")
    ] = None,
    as_json: options.AsJson = False,
) -> int:
    """Train a model with BuPO (an internal policy first, then the full policy) or plain GRPO.

    RECIPE is a YAML file (see recipes/). --set changes any of its keys, and the options below change the most given
    ones. The output folder gets run.json, log.jsonl, checkpoints/ and model/. Ctrl-C finishes the rollout batch, saves,
    and prints the command that continues the run. Before the first update the longest batch goes through an update, and
    two groups are sampled: a run that does not fit in memory stops, one that may teach nothing gets a warning. --check
    does this alone and prints what it finds; the exit code is 2 if the run cannot work.

    Examples:
      bupo train recipes/small.yaml --check
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
    if check and resume:
        raise InputError("--check tries a run before its first update; leave out --resume")
    if output is None and not check:
        raise InputError("--output is missing: name the folder of the run")
    if recipe is None and not resume:
        raise InputError("name a recipe, for instance: bupo train recipes/small.yaml --output runs/first")
    if recipe is None and (given or changes):
        raise InputError("a resumed run keeps its recipe: --resume without RECIPE takes no other settings")
    raw = override(read_recipe(recipe), changes) if recipe else read_run(str(output))["config"]

    from bupo.report.analysis_figures import entropy_flow
    from bupo.report.inside_figures import write_training_figure
    from bupo.report.style import save
    from bupo.train.build import check_recipe
    from bupo.train.run import train as run
    from bupo.train.run import try_out

    main = options.launched_processes()[0] == 0

    def say(text: str) -> None:
        if main:
            print(text, file=sys.stderr, flush=True)

    def draw(analysis: Mapping[str, Any], folder: Path, name: str) -> Path:
        return save(entropy_flow(analysis), folder, name)[0]

    settings = check_recipe({**raw, **given})
    if check:
        if output is not None:
            claim(output, overwrite=overwrite)
        found = try_out(settings, say)
        if main:
            print(json.dumps(found) if as_json else "\n".join(_findings(settings, **found)))
        return 2 if found["problems"] else 0
    assert output is not None
    try:
        begin: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "check": check is None}
        summary = run(settings, output, **begin, say=say, draw=draw)
    except KeyboardInterrupt:  # the second one: the first ends the run in order
        saved = any(Path(output, "checkpoints").glob("checkpoint-*"))
        say(f"bupo: interrupted. {_CONTINUE if saved else _AGAIN}{output}")
        raise
    if main:
        if (figure := write_training_figure(output)) is not None:
            say(f"wrote {figure}")
        print(json.dumps(summary) if as_json else _text(**summary))
    return 130 if summary["interrupted"] else 0


def _findings(recipe: Any, schedule: str, prompts: int, memory: list[Any], **found: Any) -> Iterator[str]:
    """What `bupo.train.check.examine` found, line by line."""
    from bupo.train.check import in_memory

    yield f"{schedule}; {prompts} prompts"
    yield from (in_memory(tried, recipe) for tried in memory)
    if (sampled := found["sampled"]) is not None:
        limit, stopped = recipe.max_completion_length, sampled["stopped_at"]
        cut_off = f"{sampled['cut_off']:.0%} cut off at {stopped or limit} tokens" + " by the check" * bool(stopped)
        answers = "" if sampled["no_answer"] is None else f", {sampled['no_answer']:.0%} without a readable answer"
        reward = "none" if sampled["reward"] is None else f"{sampled['reward']:.3f}"
        spreads = " and ".join(f"{spread:.3g}" for spread in sampled["spreads"])
        yield f"{sampled['responses']} responses to {sampled['prompts']} prompts: {cut_off}{answers}"
        yield f"mean reward {reward}; largest minus smallest reward in each group: {spreads}"
    for kind in ("notes", "warnings", "problems"):
        yield from (f"{kind[:-1]}: {line}" for line in found[kind])


def _text(rollouts: int, reward_first: float | None, reward_last: float | None, **summary: Any) -> str:
    if summary["interrupted"]:
        then = f"{_CONTINUE}{summary['output']}"
        return f"stopped after rollout batch {rollouts}; checkpoint saved. {then}"
    rewards = "" if None in (reward_first, reward_last) else f", reward {reward_first:.3f} -> {reward_last:.3f}"
    return f"{rollouts} rollout batches in {summary['seconds']:.0f} s{rewards}; model in {summary['model']}"
