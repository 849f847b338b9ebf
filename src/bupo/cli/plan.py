"""``bupo plan``: whether a recipe fits in memory, and roughly how long it takes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from bupo.cli import options
from bupo.errors import ConfigError, gib


def plan(
    recipe: Annotated[Path, typer.Argument(help="Recipe.")],
    changes: options.Changes = None,
    config_from: Annotated[Path | None, typer.Option(help="Folder of the model's config.json, or the file.")] = None,
    device: Annotated[str, typer.Option(help="cpu, a100, h100, h200, l4, rtx3090 or rtx4090.")] = "cpu",
    processes: Annotated[int, typer.Option(min=1, help="Number of processes, each on a device of its own.")] = 1,
    sharding: Annotated[str | None, typer.Option(help="With --processes: ddp (default), fsdp2, zero2, zero3.")] = None,
    flops: Annotated[float | None, typer.Option(help="FLOP/s that one device reaches in training.")] = None,
    memory: Annotated[float | None, typer.Option(help="Usable memory of one device in GiB.")] = None,
    prompt_length: Annotated[int | None, typer.Option(min=1, help="Padded length of prompts in tokens.")] = None,
    response_length: Annotated[int | None, typer.Option(min=1, help="Padded length of responses in tokens.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Estimate memory and time of a recipe from its model's configuration; no weights are loaded.

    Prompts and responses are assumed to have the recipe's maximum lengths, which gives the memory that you need and the
    longest time. Times are rough: counted operations over 40 % of what the device can do at best (cpu: measured here).

    Examples:
      bupo plan recipes/small.yaml
      bupo plan recipes/qwen3-4b.yaml --device h100 --processes 8 --sharding fsdp2
      bupo plan recipes/mine.yaml --config-from models/mine --set micro_batch=4 --json
    """
    from bupo.plan import PlanRequest, find_device, make_plan
    from bupo.recipe import override, read_recipe
    from bupo.train.build import check_recipe

    if sharding is not None and processes == 1:
        raise ConfigError("--sharding needs --processes 2 or more")
    where, lengths = find_device(device, flops, memory), (prompt_length, response_length)
    request = PlanRequest(where, processes, sharding or "ddp", *lengths, config_from)
    estimate = make_plan(check_recipe(override(read_recipe(recipe), changes or []), processes), request)
    print(json.dumps({"schema": 1, "recipe": str(recipe), **estimate}) if as_json else "\n".join(_table(estimate)))


def _table(plan: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a plan, at most 100 columns wide."""
    model, batch, memory, seconds, device = (plan[key] for key in ("model", "batch", "memory", "seconds", "device"))
    phases = list(memory["peak_above_weights"])
    yield f"{model['name']}: {model['parameters']['total']:,} parameters in {model['layers']} layers"
    yield f"configuration: {model['source']}"
    yield f"{plan['processes']} x {device['name']}" + (f" ({plan['sharding']})" if plan["sharding"] else "")
    yield f"prompts of {batch['prompt']:,} and responses of {batch['response']:,} tokens, padding included"
    yield "\n" + _row("memory per process", "update", "scoring", "sampling")
    for name in phases:
        sizes = (memory[name].get(part) for part in ("update", "scoring", "rollout"))
        yield _row(f"  {name} phase", *("vLLM" if size is None else gib(size) for size in sizes))
    yield f"  weights alone: {gib(memory['weights'])}; reserved by vLLM: {gib(memory['rollout']['reserved'])}"
    yield f"  largest: {gib(memory['needed'])}, in {memory['peak_in']}"
    if memory["fits"] is not None:
        remedy = "" if memory["fits"] else "; lower micro_batch or lengths, use lora, or shard with fsdp2"
        yield f"  {'fits' if memory['fits'] else 'DOES NOT FIT'} in {gib(device['memory'])}{remedy}"
    yield "\n" + _row("time per rollout batch", "sampling", "scoring", "updates", "total")
    for name in phases:
        parts = (seconds[name][part] for part in ("generation", "scoring", "updates", "rollout_batch"))
        yield _row(f"  {name} phase", *map(_duration, parts))
    rate = f"{device['flops']:.1e} FLOP/s per device"
    yield f"  all {batch['rollouts']} rollout batches: roughly {_duration(seconds['run'])}, at {rate}"
    if plan["phase1"]:
        yield f"\nan internal update takes {plan['phase1']['update_flops']:.0%} of a full update's operations"
    for note in plan["notes"]:
        yield f"note: {note}"


def _row(name: str, *cells: str) -> str:
    return f"{name:<26}" + "".join(f"{cell:>12}" for cell in cells)


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"
