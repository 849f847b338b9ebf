"""``bupo compare``: what training did inside a model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from bupo.errors import InputError

HELP = """Compare states of a model (before, during, after training) on the same responses, layer by layer.

The first is the baseline. Reads the cosine of the chosen layer's states to the others', the entropy of every layer's
policy, the full policy's perplexity on the responses, and the divergence of the chosen layer's policy from the later
ones'. Each model is a hub id, a model folder, a folder written by `bupo train`, or 'small'; NAME=MODEL names it.

Examples:

  bupo compare start=small runs/grpo runs/bupo --responses runs/look/responses.jsonl --layer 4 --output runs/inside

  bupo compare small runs/bupo/checkpoints/checkpoint-40 runs/bupo --responses R.jsonl --output runs/over-time
"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("compare", help=HELP)(compare)


def compare(
    models: Annotated[list[str], typer.Argument(help="Two or more, each MODEL or NAME=MODEL.", metavar="A B...")],
    responses: Annotated[Path, typer.Option(help="Rows with prompt(_ids) and response(_ids), read by all models.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for compare.json and the figure.")],
    layer: Annotated[
        int | None, typer.Option(min=1, help="The layer l (from 1); by default the one that a training run trained.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows of --responses to use.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Response tokens to draw, the same ones for every model.")] = 1024,
    template: Annotated[str, typer.Option(help="Prompt template, for rows without ids.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Torch device; an accelerator if there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Of the tokens drawn.")] = 0,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the results in --output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    from bupo.run_folder import claim, describe_run, write_json

    if len(models) < 2:
        raise InputError("name two models or more to compare, the baseline first")
    named = [_split(model) for model in models]
    names = [name for name, _ in named]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two models are named {repeated[0]}; write NAME=MODEL")
    if not responses.is_file():
        raise InputError(f"responses file {responses} does not exist")
    trained = [found for _, model in named if (found := _trained_layer(model)) is not None]
    if layer is None and not trained:
        raise InputError("none of these is a training run with an internal layer; say which one with --layer")
    chosen = layer if layer is not None else trained[0]
    if layer is None and len(set(trained)) > 1:
        raise InputError(f"these runs trained layers {', '.join(map(str, sorted(set(trained))))}; choose with --layer")
    folder = claim(output, overwrite=overwrite)
    started = time.monotonic()

    from bupo.cli.options import Progress as _Progress
    from bupo.cli.options import quiet_libraries as _quiet_libraries

    _quiet_libraries()
    with _Progress(enabled=not as_json) as progress:
        from bupo.data.rollouts import read_responses
        from bupo.lens.compare import compare_models, measure_layers
        from bupo.models.load import load_model, model_revision

        readings, revisions, rollouts = [], {}, None
        for name, model in named:
            loaded, tokenizer = load_model(
                _weights(model),
                dtype="fitting" if dtype == "auto" else dtype,
                device=device,
                trust_remote_code=trust_remote_code,
            )
            if rollouts is None:  # the baseline's tokenizer; ids, where the rows have them, need none
                rollouts = read_responses(responses, tokenizer, template)[:limit]
            bar = progress.bar(f"reading {name}", tokens)
            readings.append((name, measure_layers(loaded, rollouts, chosen, tokens=tokens, seed=seed, progress=bar)))
            revisions[name] = model_revision(loaded)
            del loaded
        result = compare_models(readings)

    from bupo.report.inside import write_inside_figure

    folder.mkdir(parents=True, exist_ok=True)
    figures = write_inside_figure(result, folder)
    config: dict[str, Any] = {
        "models": dict(named), "responses": str(responses), "layer": chosen, "limit": limit, "tokens": tokens,
        "template": template, "dtype": dtype, "device": device,
    }  # fmt: skip
    seconds = round(time.monotonic() - started, 1)
    write_json(
        folder / "run.json", describe_run("compare", config, seed=seed, model_revision=revisions, seconds=seconds)
    )
    write_json(folder / "compare.json", result)
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        _print(result)
        typer.echo(f"wrote {folder}/compare.json and {len(figures)} figure files")


def _split(argument: str) -> tuple[str, str]:
    name, equals, model = argument.partition("=")
    if equals and name and model and not Path(argument).exists():
        return name, model
    path = Path(argument)
    # a run's or checkpoint's folder is named as the user sees it; what only says "model" takes its parent too
    short = path.name if path.name != "model" else f"{path.parent.name}/model"
    return (short if path.exists() else argument), argument


def _weights(model: str) -> str:
    """The folder with the weights, where a training run's is given."""
    inside = Path(model) / "model"
    return str(inside) if inside.is_dir() and not (Path(model) / "config.json").exists() else model


def _trained_layer(model: str) -> int | None:
    """The layer that a training run says it trained first."""
    run = Path(model) / "run.json"
    if not run.is_file():
        return None
    try:
        content = json.loads(run.read_text(encoding="utf-8"))
        found = (content.get("result") or {}).get("internal_layer")
        steps = (content.get("config") or {}).get("internal_steps")
    except (ValueError, AttributeError):
        return None
    return found if isinstance(found, int) and steps else None


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    layer, layers = result["layer"], result["layers"]
    console = Console()
    table = Table(title=f"{result['samples']} responses, {result['tokens']} tokens; standard errors in brackets")
    for name in (
        "model",
        "perplexity",
        f"H(layer {layer})",
        f"cos(H^{layer}, H^{layers})",
        f"KL(layer {layer} || output)",
    ):
        table.add_column(name, justify="left" if name == "model" else "right")
    for item in result["models"]:
        similar, divergence = item["cosine_of_layer"], item["divergence"]
        cells = [
            (item["perplexity"]["value"], item["perplexity"]["standard_error"]),
            (item["entropy"]["mean"][layer - 1], item["entropy"]["standard_error"][layer - 1]),
            (similar["mean"][-1], similar["standard_error"][-1]),
            (divergence["mean"][-1], divergence["standard_error"][-1]),
        ]
        table.add_row(item["name"], *(f"{value:.3f} ({error:.3f})" for value, error in cells))
    console.print(table)
