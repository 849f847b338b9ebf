"""``bupo eval``: measure a model on benchmarks."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from bupo.cli import options
from bupo.errors import ConfigError


def evaluate(
    context: typer.Context,
    model: options.OptionalModel = None,
    tasks: Annotated[str | None, typer.Option("--tasks", "--dataset", help="Tasks, separated by commas.")] = None,
    output: options.OptionalOutput = None,
    k: Annotated[int | None, typer.Option("--k", min=1, help="K of Avg@K. Default: 16, for AIME 32.")] = None,
    n: Annotated[int | None, typer.Option("--samples", "--n", min=1, help="Responses per problem. Default: K.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of problems per task.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with local files of the benchmarks.")] = None,
    template: options.OptionalTemplate = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = 1.0,
    top_p: Annotated[float, typer.Option(help="Probability mass of nucleus sampling.")] = 1.0,
    seed: options.Seed = 0,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Batch size for generation. Changing it changes the responses for a given seed.")
    ] = 64,
    engine: Annotated[str, typer.Option(help="auto (vLLM where it is installed), transformers or vllm.")] = "auto",
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    internal_layer: Annotated[int | None, typer.Option(min=1, help="Sample from this layer's policy (from 1).")] = None,
    internal_lens: Annotated[str, typer.Option(metavar="raw|norm|FOLDER", help="Lens that reads that layer.")] = "raw",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Evaluate part I of N of each task; the last part merges all.")
    ] = None,
    regrade: Annotated[Path | None, typer.Option(help="Folder of a finished evaluation to grade again.")] = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure a model: Avg@K and unbiased Pass@K with confidence intervals.

    Tasks: math500, amc23, aime24, aime25, minerva, olympiadbench, arithmetic, arithmetic-hard, reasoning_gym/NAME,
    a .jsonl/.json/.parquet file, or a hub dataset. The defaults are the paper's protocol: temperature 1, top-p 1,
    Avg@16 (Avg@32 for AIME). An interrupted evaluation continues when the same command is run again.

    Examples:
      bupo eval --model small --tasks arithmetic --k 8 --limit 100 --output runs/start
      bupo eval --model Qwen/Qwen3-4B --tasks math500,amc23,aime24,aime25 --template qwen3-no-thinking --output runs/q
      bupo eval --model small --tasks arithmetic --internal-layer 4 --internal-lens runs/lens --output runs/layer4
      bupo eval --regrade runs/start
      bupo eval --model Qwen/Qwen3-4B --tasks math500 --output runs/qwen3 --shard 1/2   (2/2 on another GPU)
    """
    passed = options.passed(context)
    log = partial(typer.echo, err=True)
    options.refuse_launcher("bupo eval", "start one process per GPU with --shard 1/n to n/n")
    if regrade is not None:
        options.refuse(passed - {"regrade", "as_json"}, "--regrade", "it grades the saved responses in place")
        from bupo.evaluate.responses import regrade as grade_again

        _show(grade_again(regrade, log=log), regrade, as_json)
        return
    if model is None or tasks is None or output is None:
        missing = ", ".join(f"--{name}" for name in ("model", "tasks", "output") if not context.params[name])
        raise ConfigError(f"bupo eval needs {missing} (or --regrade DIR)")

    options.check_revision(context)
    from bupo.evaluate import run
    from bupo.evaluate.config import EvalConfig, fingerprint
    from bupo.models.load import resolve_model

    chosen = run.choose_engine(engine, internal_layer=internal_layer)
    if chosen == "vllm":
        options.refuse(passed & {"device", "batch_size"}, "vLLM", "it uses the GPUs it sees and sizes its own batches")
    fields = {field.name for field in dataclasses.fields(EvalConfig)} & context.params.keys()
    settings = {name: context.params[name] for name in fields}
    settings |= {"tasks": tuple(options.split_names(tasks)), "engine": chosen, "data_dir": data_dir and str(data_dir)}
    config = EvalConfig(**settings, fingerprint=fingerprint(Path(resolve_model(model))))
    load = partial(run.load_engine, config, device=device, trust_remote_code=trust_remote_code)
    with options.Progress() as bars:
        results = run.evaluate(config, load, output, overwrite=overwrite, log=log, on_progress=bars.move)
    _show(results, output, as_json)


def _show(results: dict[str, Any], folder: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(results))
        return
    from bupo.evaluate.metrics import summary_lines

    typer.echo("\n".join(summary_lines(results)))
    typer.echo(f"results: {folder / 'results.json'}   responses: {folder / 'responses.parquet'}")
