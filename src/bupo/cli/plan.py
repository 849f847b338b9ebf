"""``bupo plan``: what a recipe will take, before it takes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

HELP = """Estimate memory and time of a recipe from its model's configuration; no weights are loaded.

Lengths are the recipe's longest, so that memory is what you must have and time the most it can take; responses are
shorter as a rule: give their length in padded tokens with --response-length.

Devices: cpu (this machine), a100, h100, h200, l4, rtx3090, rtx4090; --flops and --memory put your figures in place of
ours. --measure times some layers of the model on this machine.

Examples:

  bupo plan recipes/small.yaml --measure

  bupo plan recipes/qwen3-4b.yaml --device h100 --processes 8 --sharding fsdp2 --explain

  bupo plan recipes/qwen3-4b-lora-24gb.yaml --device rtx4090

  bupo plan recipes/mine.yaml --config-from models/mine --set micro_batch=4 --json
"""


def plan(
    recipe: Annotated[Path, typer.Argument(help="Recipe.")],
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key.")] = None,
    config_from: Annotated[Path | None, typer.Option(help="Folder of the model's config.json, or the file.")] = None,
    device: Annotated[str, typer.Option(help="cpu, a100, h100, h200, l4, rtx3090 or rtx4090.")] = "cpu",
    processes: Annotated[int, typer.Option(min=1, help="Processes, one device each.")] = 1,
    sharding: Annotated[str | None, typer.Option(help="With --processes: ddp (default), fsdp2, zero2, zero3.")] = None,
    flops: Annotated[float | None, typer.Option(help="Achieved FLOP/s of a device.")] = None,
    memory: Annotated[float | None, typer.Option(help="Memory of a device, GiB.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time some layers here.")] = False,
    prompt_length: Annotated[int | None, typer.Option(min=1, help="Tokens of a padded prompt.")] = None,
    response_length: Annotated[int | None, typer.Option(min=1, help="Tokens of a padded response.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print every formula with its numbers.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    from bupo.errors import ConfigError
    from bupo.plan.devices import find_device
    from bupo.recipe import override, read_recipe
    from bupo.train.build import check_recipe

    asked = check_recipe(override(read_recipe(recipe), changes or []))
    machine = find_device(device, flops, memory)
    if sharding is not None and processes == 1:
        raise ConfigError("--sharding needs --processes 2 or more")
    if measure and (flops is not None or processes > 1):
        raise ConfigError("--measure times one process here; leave --flops and --processes out")
    if explain and as_json:
        raise ConfigError("give either --explain or --json")

    if measure and asked.trl.get("use_vllm"):
        raise ConfigError("--measure times generation by transformers; add --set trl.use_vllm=false to plan with that")

    import torch

    from bupo.plan.estimate import Question, make_plan, settings_of
    from bupo.plan.measure import measure as time_layers
    from bupo.plan.shape import read_config, read_shape
    from bupo.plan.text import explanation, summary

    if measure and machine.accelerator != torch.accelerator.is_available():
        raise ConfigError(f"--measure times this machine, which is not --device {device}")
    config, source = read_config(asked.model, config_from, revision=asked.revision)
    shape = read_shape(config, asked.model, source)
    question = Question(machine, processes, sharding or "ddp", prompt_length, response_length)
    speeds = None
    if measure:
        speeds = time_layers(shape, settings_of(asked, question), device="cuda" if machine.accelerator else "cpu")
    made = make_plan(asked, shape, question, speeds)
    print(json.dumps({"schema": 1, "recipe": str(recipe), **made}) if as_json else summary(made))
    if explain:
        print("\n" + explanation(made))
