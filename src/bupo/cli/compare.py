"""``bupo compare``: what training did inside a model."""

import json
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from bupo.cli import options
from bupo.errors import InputError
from bupo.run_folder import claim, describe_run, read_run, write_json


def compare(
    models: Annotated[list[str], typer.Argument(help="Two or more models, MODEL or NAME=MODEL.", metavar="A B...")],
    responses: Annotated[Path, typer.Option(help="Rows with prompt(_ids) and response(_ids), read by all models.")],
    output: options.Output,
    layer: Annotated[
        int | None,
        typer.Option("--internal-layer", "--layer", min=1, help="Layer to compare, from 1. Default: the one trained."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of rows of --responses to use.")] = 64,
    tokens: Annotated[
        int, typer.Option("--max-tokens", "--tokens", min=1, help="Response tokens to draw, the same per model.")
    ] = 1024,
    template: options.Template = "auto",
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    seed: options.Seed = 0,
    trust_remote_code: options.TrustRemoteCode = False,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Compare states of a model (before, during and after training) on the same responses, layer by layer.

    The first model is the baseline. Measures the cosine between the states of the chosen layer and of the others,
    the entropy of every layer's policy, the full policy's perplexity on the responses, and the KL divergence from the
    chosen layer's policy to the later ones. Each model is a hub id, a model folder, a folder written by `bupo train`,
    or 'small'; NAME=MODEL names it.

    Examples:
      bupo compare start=small runs/grpo runs/bupo --responses R.jsonl --internal-layer 4 --output runs/inside
      bupo compare small runs/bupo/checkpoints/checkpoint-40 runs/bupo --responses R.jsonl --output runs/over-time
    """
    options.refuse_launcher("bupo compare", "start it without a launcher")
    names, sources, weights = zip(*map(_split, models), strict=True)
    if len(models) < 2:
        raise InputError("name two or more models to compare, the baseline first")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two models are named {repeated[0]}; write NAME=MODEL")
    if not responses.is_file():
        raise InputError(f"responses file {responses} does not exist")
    chosen = layer or _trained_layer(sources)
    claim(output, overwrite=overwrite)

    from bupo.data.rollouts import read_responses
    from bupo.lens.compare import compare_models, measure_layers
    from bupo.models.load import load_model, model_revision, resolve_model
    from bupo.report.inside_figures import comparison_figure
    from bupo.report.results import Comparison
    from bupo.report.style import save

    started, measured, revisions, rollouts = time.monotonic(), [], {}, None
    paths = [resolve_model(path) for path in weights]  # all of them exist before one is loaded
    wanted: dict[str, Any] = {"dtype": "fitting" if dtype == "auto" else dtype, "device": device}
    with options.Progress(not as_json) as progress:
        for name, path in zip(names, paths, strict=True):
            loaded, tokenizer = load_model(path, trust_remote_code=trust_remote_code, **wanted)
            # rows without token ids are tokenized by the baseline's tokenizer
            rollouts = rollouts or read_responses(responses, tokenizer, template)[:limit]
            bar = partial(progress.move, f"reading {name}")
            measured.append((name, measure_layers(loaded, rollouts, chosen, tokens=tokens, seed=seed, progress=bar)))
            revisions[name] = model_revision(loaded)
            del loaded
    result = compare_models(measured)
    write_json(output / "compare.json", result)
    figures = save(comparison_figure(Comparison.parse(result)), output, "inside")
    config = {"models": dict(zip(names, sources, strict=True)), "responses": str(responses), "layer": chosen}
    config |= {"limit": limit, "tokens": tokens, "template": template, "dtype": dtype, "device": device}
    about = {"seed": seed, "model_revision": revisions, "seconds": round(time.monotonic() - started, 1)}
    write_json(output / "run.json", describe_run("compare", config, **about))
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        _print(result)
        typer.echo(f"wrote {output}/compare.json and {len(figures)} figure files")


def _split(argument: str) -> tuple[str, str, str]:
    """An argument's name (by default the folder's), its model, and where the weights are (of a run, in ``model/``)."""
    name, equals, model = argument.partition("=")
    path = Path(argument)
    if path.exists() or not (equals and name and model):
        name = argument if not path.exists() else path.name if path.name != "model" else f"{path.parent.name}/model"
        model = argument
    weights = Path(model, "model")
    return name, model, str(weights) if weights.is_dir() and not Path(model, "config.json").exists() else model


def _trained_layer(models: Iterable[str]) -> int:
    """The layer that the training runs among the models trained first."""
    layers: set[int] = set()
    for model in models:
        with suppress(InputError):  # not a training run
            run = read_run(model)
            trained = (run.get("result") or {}).get("internal_layer")
            layers |= {trained} if trained and run["config"].get("internal_steps") else set()
    found = sorted(layers)
    if len(found) != 1:
        none = "none of the models is a training run with an internal layer"
        several = f"these runs trained layers {', '.join(map(str, found))}"
        raise InputError(f"{several if found else none}; choose one with --layer")
    return found[0]


def _print(result: dict[str, Any]) -> None:
    def cell(value: float, standard_error: float | None) -> str:
        return f"{value:.3f}" + ("" if standard_error is None else f" ({standard_error:.3f})")

    def cells(key: str, place: int) -> list[str]:
        return [cell(item[key]["mean"][place], item[key]["standard_error"][place]) for item in models]

    layer, layers, models = result["layer"], result["layers"], result["models"]
    columns = {
        "model": [item["name"] for item in models],
        "perplexity": [cell(**item["perplexity"]) for item in models],
        f"H(layer {layer})": cells("entropy", layer - 1),
        f"cos(H^{layer}, H^{layers})": cells("cosine_of_layer", -1),
        f"KL(layer {layer} || output)": cells("divergence", -1),
    }
    title = f"{result['samples']} responses, {result['tokens']} tokens; standard errors in brackets"
    options.print_table(title, columns, left="model")
