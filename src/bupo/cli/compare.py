"""``bupo compare``: what training did inside a model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from bupo.cli import options
from bupo.errors import InputError

HELP = """Compare states of a model (before, during and after training) on the same responses, layer by layer.

The first model is the baseline. Measures the cosine between the states of the chosen layer and of the others, the
entropy of every layer's policy, the full policy's perplexity on the responses, and the KL divergence from the chosen
layer's policy to the later ones. Each model is a hub id, a model folder, a folder written by `bupo train`, or 'small';
NAME=MODEL names it.

Examples:

  bupo compare start=small runs/grpo runs/bupo --responses runs/look/responses.jsonl --layer 4 --output runs/inside

  bupo compare small runs/bupo/checkpoints/checkpoint-40 runs/bupo --responses R.jsonl --output runs/over-time
"""


def compare(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(help="Two or more models, MODEL or NAME=MODEL.", metavar="A B...")],
    responses: Annotated[Path, typer.Option(help="Rows with prompt(_ids) and response(_ids), read by all models.")],
    output: options.Output,
    layer: Annotated[
        int | None, typer.Option(min=1, help="Layer to compare (from 1). Default: the one that a training run trained.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of rows of --responses to use.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Number of response tokens to draw, the same per model.")] = 1024,
    template: options.Template = "auto",
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    seed: options.Seed = 0,
    trust_remote_code: options.TrustRemoteCode = False,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    options.refuse_launcher("bupo compare", "start it without a launcher")
    named = [_split(model) for model in models]
    names = [name for name, _ in named]
    if len(models) < 2:
        raise InputError("name two or more models to compare, the baseline first")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two models are named {repeated[0]}; write NAME=MODEL")
    if not responses.is_file():
        raise InputError(f"responses file {responses} does not exist")
    chosen = layer or _trained_layer([model for _, model in named])

    from bupo.run_folder import claim, describe_run, write_json

    folder, started = claim(output, overwrite=overwrite), time.monotonic()
    with (
        options.on_interrupt("Nothing was written; the same command starts again from the beginning."),
        options.Progress(not as_json) as progress,
    ):
        from bupo.data.rollouts import read_responses
        from bupo.lens.compare import compare_models, measure_layers
        from bupo.models.load import load_model, model_revision, resolve_model
        from bupo.report.inside_figures import write_comparison_figure

        weights = [resolve_model(_weights(model)) for _, model in named]  # all of them exist before one is loaded
        options.quiet_libraries()
        measured, revisions, rollouts = [], {}, None
        for name, path in zip(names, weights, strict=True):
            loaded, tokenizer = load_model(
                path,
                dtype="fitting" if dtype == "auto" else dtype,
                device=device,
                trust_remote_code=trust_remote_code,
            )
            if rollouts is None:  # rows without token ids are tokenized by the baseline's tokenizer
                rollouts = read_responses(responses, tokenizer, template)[:limit]
            bar = progress.bar(f"reading {name}", tokens)
            measured.append((name, measure_layers(loaded, rollouts, chosen, tokens=tokens, seed=seed, progress=bar)))
            revisions[name] = model_revision(loaded)
            del loaded
        result = compare_models(measured)
        write_json(folder / "compare.json", result)
        figures = write_comparison_figure(result, folder)
        config = {k: str(v) if isinstance(v, Path) else v for k, v in context.params.items() if k not in _NOT_CONFIG}
        config |= {"models": dict(named), "layer": chosen}
        seconds = round(time.monotonic() - started, 1)
        run = describe_run("compare", config, seed=seed, model_revision=revisions, seconds=seconds)
        write_json(folder / "run.json", run)
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        _print(result)
        typer.echo(f"wrote {folder}/compare.json and {len(figures)} figure files")


_NOT_CONFIG = ("output", "overwrite", "as_json", "seed", "trust_remote_code")


def _split(argument: str) -> tuple[str, str]:
    """The name and the model of an argument; the name defaults to the folder's."""
    name, equals, model = argument.partition("=")
    if equals and name and model and not Path(argument).exists():
        return name, model
    path = Path(argument)
    short = path.name if path.name != "model" else f"{path.parent.name}/model"
    return (short if path.exists() else argument), argument


def _weights(model: str) -> str:
    """The folder with the weights, where ``model`` is a training run's folder."""
    folder = Path(model) / "model"
    return str(folder) if folder.is_dir() and not (Path(model) / "config.json").exists() else model


def _trained_layer(models: list[str]) -> int:
    """The layer that the training runs among the models trained first."""
    layers = set()
    for model in models:
        try:
            run = json.loads((Path(model) / "run.json").read_text(encoding="utf-8"))
            trained, steps = (run.get("result") or {}).get("internal_layer"), run["config"].get("internal_steps")
        except (OSError, ValueError, AttributeError, KeyError):
            continue
        if isinstance(trained, int) and steps:
            layers.add(trained)
    if not layers:
        raise InputError("none of the models is a training run with an internal layer; choose one with --layer")
    if len(layers) > 1:
        raise InputError(f"these runs trained layers {', '.join(map(str, sorted(layers)))}; choose one with --layer")
    return layers.pop()


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    layer, layers = result["layer"], result["layers"]
    table = Table(title=f"{result['samples']} responses, {result['tokens']} tokens; standard errors in brackets")
    heads = (f"H(layer {layer})", f"cos(H^{layer}, H^{layers})", f"KL(layer {layer} || output)")
    for name in ("model", "perplexity", *heads):
        table.add_column(name, justify="left" if name == "model" else "right")
    for item in result["models"]:
        cells = [(item["perplexity"]["value"], item["perplexity"]["standard_error"])]
        for key, place in (("entropy", layer - 1), ("cosine_of_layer", -1), ("divergence", -1)):
            cells.append((item[key]["mean"][place], item[key]["standard_error"][place]))
        table.add_row(item["name"], *(f"{v:.3f}" + ("" if e is None else f" ({e:.3f})") for v, e in cells))
    Console().print(table)
