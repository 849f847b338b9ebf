"""``bupo analyze``: the entropies of every internal policy of a model, its regions and its boundary layer."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bupo.cli import options
from bupo.errors import InputError
from bupo.run_folder import LENS_CARD, claim, describe_run, write_json

# Keys of analysis.json that the printed JSON leaves out.
_LONG = ("sites", "standard_errors", "entropy_change", "residual_cosine", "statistics")


def analyze(
    context: typer.Context,
    model: options.Model,
    output: options.Output,
    dataset: options.Dataset = None,
    responses: options.Responses = None,
    split: Annotated[str | None, typer.Option(help="Split of the dataset.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of problems, or of rows of --responses, to use.")] = 20,
    samples: options.Samples = 1,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = 1.0,
    template: options.Template = "auto",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Analyse so many random tokens. Default: all.")] = None,
    statistics: Annotated[
        str, typer.Option(help="More means per site, separated by commas: logprob, rank, varentropy, kl, topK (top5).")
    ] = "",
    per_token: Annotated[bool, typer.Option("--per-token", help="Write tokens' values to per_token.parquet.")] = False,
    explore: Annotated[int, typer.Option(min=0, help="Number of responses for the report's token explorer.")] = 0,
    lens: Annotated[
        str | None, typer.Option(help="Lenses, separated by commas: raw, norm, ridge, folders. Default: raw,ridge.")
    ] = None,
    choice: Annotated[bool, typer.Option(help="Measure each layer's agreement with the output, and its knee.")] = True,
    choice_tokens: Annotated[
        int | None, typer.Option(min=1, help="Number of tokens to measure it on. Default: 1/16 of all, 128 to 512.")
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of padded tokens per forward pass.")] = 2048,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure a model's internal policies and name the layer to train first.

    Reads the residual stream at every layer by the logit lens without the final norm, softmax(H E_u^T), averages the
    entropies over the tokens of the model's own responses, and writes analysis.json and its figures.

    Examples:
      bupo analyze --model small --dataset arithmetic --output runs/look
      bupo analyze --model Qwen/Qwen3-4B --dataset HuggingFaceH4/MATH-500 --limit 20 --output runs/qwen3
      bupo analyze --model models/smollm2 --responses responses.jsonl --max-tokens 5000 --output runs/smollm2
      bupo analyze --model models/smollm2 --responses R.jsonl --lens raw,norm,ridge,runs/lens --output runs/lenses

      accelerate launch --num_processes 8 -m bupo analyze --model Qwen/Qwen3-8B --responses R.jsonl --output runs/q
    """
    rank, processes = options.launched_processes()
    options.check_source(context, dataset, responses)
    for option, value in (("--choice-tokens", choice_tokens), ("--lens", lens)):
        if value is not None and not choice:
            raise InputError(f"{option} has no effect with --no-choice; leave out one of them")
    if per_token and processes > 1:
        raise InputError("--per-token writes one file in one process; leave out --per-token or the launcher")
    if device is not None and ":" in device and processes > 1:
        raise InputError(f"--device {device} names one device for {processes} processes; write {device.split(':')[0]}")
    claim(output, overwrite=overwrite)

    from bupo.lens.analyze import AnalysisOptions, analyze_rollouts, statistic_columns
    from bupo.lens.maps import LEAST_PROMPTS, PLAIN
    from bupo.lens.tokens import ParquetTokenWriter, explore_rollouts
    from bupo.models.load import model_revision
    from bupo.report.analysis_figures import write_analysis_figures

    started, names = time.monotonic(), options.split_names(statistics)
    statistic_columns(names)  # wrong arguments are found before the model is loaded
    lenses = options.split_names("raw,ridge" if lens is None else lens)
    for name in lenses or [""]:
        if name not in (*PLAIN, "ridge") and not (Path(name) / LENS_CARD).is_file():
            raise InputError(f"unknown lens {name!r}; use raw, norm, ridge, or a folder that bupo lens wrote")
    with options.Progress(not as_json and rank == 0) as progress:
        loaded, tokenizer, rollouts = options.load_with_responses(context.params, progress)
        if lens is None and choice and len({tuple(rollout.prompt_ids) for rollout in rollouts}) < LEAST_PROMPTS:
            lenses = list(PLAIN)
            progress.print(f"read through raw and norm: a ridge lens needs responses to {LEAST_PROMPTS} prompts")
        writer = ParquetTokenWriter(output) if per_token else None
        details = AnalysisOptions(model, choice, choice_tokens, lenses, on_tokens=writer, progress=progress.move)
        settings: dict[str, Any] = {"max_tokens": max_tokens, "batch_tokens": batch_tokens, "seed": seed}
        settings |= {"statistics": names, "share": processes > 1, "options": details}
        result = analyze_rollouts(loaded, rollouts, **settings)
        if rank > 0:
            return
        explored = rollouts[:explore]
        tokens = explore_rollouts(loaded, explored, tokenizer.decode, progress=progress.move) if explored else None

    write_json(output / "analysis.json", result)  # first: where JSON cannot hold it (NaN), nothing else is left behind
    for name in ("responses.jsonl", "tokens.json", "per_token.parquet"):  # of a run that is replaced
        (output / name).unlink(missing_ok=True)
    if responses is None:
        options.write_responses(output, rollouts)
    if tokens is not None:
        write_json(output / "tokens.json", tokens)
    if writer is not None:
        writer.close(output / "per_token.parquet")
    figures = write_analysis_figures(result, output)
    about: dict[str, Any] = {"seed": seed, "processes": processes, "model_revision": model_revision(loaded)}
    about["seconds"] = round(time.monotonic() - started, 1)
    write_json(output / "run.json", describe_run("analyze", context.params, **about))
    if as_json:
        short = {k: v for k, v in result.items() if not k.startswith(_LONG) and k != "layer_choice"}
        short |= {"output": str(output), "layer": result["boundary_layer"], "reason": result["boundary_reason"]}
        chosen = result.get("layer_choice", {})
        short |= {key: chosen[key] for key in ("recommendation", "criteria", "knees") if key in chosen}
        typer.echo(json.dumps(short, ensure_ascii=False))
    else:
        _print(result)
        typer.echo(f"wrote {output}/analysis.json and {len(figures)} figure files")


def _print(result: dict[str, Any]) -> None:
    """Print the entropies per layer and the answer: the boundary layer or why there is none, then the candidate."""
    sites, change, choice = result["sites"], result["entropy_change"], result.get("layer_choice", {})
    layers = range(1, result["layers"] + 1)
    regions = {layer: name for name, span in result["regions"].items() if span for layer in range(span[0], span[1] + 1)}
    columns = {
        "layer": [str(layer) for layer in layers],
        **{f"H {name}": [f"{h:.3f}" for h in sites[f"{name.lower()}_out"]] for name in ("layer", "attn", "FFN")},
        **{f"Δ {name}": [f"{d:+.3f}" for d in change[name.lower()]] for name in ("attn", "FFN")},
        "region": [regions.get(n, "") + " <- boundary" * (n == result["boundary_layer"]) for n in layers],
    }
    read = f"{result['samples']} responses, {result['tokens']} tokens"
    title = f"{result['model']}: {read}; H: entropy, nats; Δ: its change"
    options.print_table(title, columns, left="region")
    if lenses := [lens for lens in choice.get("curves", {}) if lens != "raw"]:
        title = f"through lenses, {choice['tokens']} tokens of {choice['responses']} responses; KL: from the output"
        options.print_table(title, options.lens_columns(choice, lenses))
    console = Console()
    if sampling := result.get("sampling"):
        used, total = sampling["tokens_used"], sampling["tokens_of_responses"]
        console.print(f"read {used} of {total} response tokens, drawn at random")
    found = [("boundary layer", {"layer": result["boundary_layer"], "reason": result["boundary_reason"]})]
    found += [(f"candidate, the knee of agreement ({lens})", c) for lens, c in choice.get("knees", {}).items()]
    for name, answer in found:
        error = answer.get("standard_error")
        place = f"layer {answer['layer']}" + ("" if error is None else f" ± {error:.1f}") + ":"
        console.print(f"{name}: {'none, because' if answer['layer'] is None else place} {answer['reason']}.")
