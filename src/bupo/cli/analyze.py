"""``bupo analyze``: the entropies of every internal policy of a model, its regions and its boundary layer."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bupo.cli import options
from bupo.errors import InputError
from bupo.run_folder import claim, describe_run, write_json, write_text

# Keys of analysis.json that the printed JSON leaves out.
_LONG = ("sites", "standard_errors", "entropy_change", "residual_cosine", "statistics")


def analyze(
    context: typer.Context,
    model: options.Model,
    output: options.Output,
    dataset: Annotated[str | None, typer.Option(help="Problems to respond to: a task, a file, or a hub id.")] = None,
    responses: Annotated[
        Path | None, typer.Option(help="Responses to analyse instead: rows with prompt(_ids) and response(_ids).")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of the dataset.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of problems, or of rows of --responses, to use.")] = 20,
    samples: Annotated[int, typer.Option(min=1, help="Number of responses to generate per problem.")] = 1,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = 1.0,
    template: options.Template = "auto",
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Analyse this many random response tokens. Default: all of them.")
    ] = None,
    statistics: Annotated[
        str, typer.Option(help="More means per site, separated by commas: logprob, rank, varentropy, kl, topK (top5).")
    ] = "",
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Also write the values of every token and site to per_token.parquet.")
    ] = False,
    explore: Annotated[
        int, typer.Option(min=0, help="Number of responses to write to tokens.json for the report's token explorer.")
    ] = 0,
    choice: Annotated[bool, typer.Option(help="Measure each layer's agreement with the output, and its knee.")] = True,
    choice_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Number of tokens to measure it on. Default: 1/16 of all, within 128 to 512."),
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

      accelerate launch --num_processes 8 -m bupo analyze --model Qwen/Qwen3-8B --responses R.jsonl --output runs/q
    """
    rank, processes = options.launched_processes()
    if (dataset is None) == (responses is None):
        raise InputError("pass either --dataset (responses are generated) or --responses FILE, not both")
    if responses is not None and not responses.is_file():
        raise InputError(f"responses file {responses} does not exist")
    if choice_tokens is not None and not choice:
        raise InputError("--choice-tokens has no effect with --no-choice; leave out one of them")
    if per_token and processes > 1:
        raise InputError("--per-token writes one file in one process; leave out --per-token or the launcher")
    if device is not None and ":" in device and processes > 1:
        raise InputError(f"--device {device} names one device for {processes} processes; write {device.split(':')[0]}")
    claim(output, overwrite=overwrite)

    from accelerate.utils import broadcast_object_list

    from bupo.data.problems import load_problems
    from bupo.data.rollouts import read_responses
    from bupo.lens.analyze import AnalysisOptions, analyze_rollouts, statistic_columns
    from bupo.lens.tokens import ParquetTokenWriter, explore_rollouts
    from bupo.models.load import join_processes, load_model, model_revision
    from bupo.report.analysis_figures import write_analysis_figures

    started, names = time.monotonic(), options.split_names(statistics)
    statistic_columns(names)  # wrong arguments are found before the model is loaded
    problems = load_problems(dataset, split=split, limit=limit, seed=seed) if dataset is not None else []
    source: dict[str, Any] = {"device": device, "revision": revision, "trust_remote_code": trust_remote_code}
    if processes > 1:  # each process has a device of its own, of the type that was asked for
        own = join_processes(cpu=device == "cpu").device
        if device not in (None, own.type):
            raise InputError(f"--device {device} is not available to launched processes; they run on {own.type}")
        source["device"] = str(own)
    with options.Progress(not as_json and rank == 0) as progress:
        progress.print(f"loading {model}", markup=False, highlight=False)
        loaded, tokenizer = load_model(model, dtype="fitting" if dtype == "auto" else dtype, **source)
        if responses is not None:
            rollouts = read_responses(responses, tokenizer, template)[:limit]
        else:
            rollouts = _generate(loaded, tokenizer, problems, progress, context.params) if rank == 0 else []
            rollouts = rollouts if processes == 1 else broadcast_object_list([rollouts])[0]
        writer = ParquetTokenWriter(output) if per_token else None
        details = AnalysisOptions(model, choice, choice_tokens, on_tokens=writer, progress=progress.move)
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
        columns = ("problem_id", "sample", "prompt", "response", "prompt_ids", "response_ids")
        rows = ({c: getattr(rollout, c) for c in columns} for rollout in rollouts)
        write_text(output / "responses.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if tokens is not None:
        write_json(output / "tokens.json", tokens)
    if writer is not None:
        writer.close(output / "per_token.parquet")
    figures = write_analysis_figures(result, output)
    config = {name: str(v) if isinstance(v, Path) else v for name, v in context.params.items()}
    about: dict[str, Any] = {"seed": seed, "processes": processes, "model_revision": model_revision(loaded)}
    about["seconds"] = round(time.monotonic() - started, 1)
    write_json(output / "run.json", describe_run("analyze", config, **about))
    if as_json:
        short = {k: v for k, v in result.items() if not k.startswith(_LONG) and k != "layer_choice"}
        short |= {"output": str(output), "layer": result["boundary_layer"], "reason": result["boundary_reason"]}
        short |= {k: v for k, v in result.get("layer_choice", {}).items() if k in ("recommendation", "criteria")}
        typer.echo(json.dumps(short, ensure_ascii=False))
    else:
        _print(result)
        typer.echo(f"wrote {output}/analysis.json and {len(figures)} figure files")


def _generate(model: Any, tokenizer: Any, problems: Any, progress: options.Progress, config: Mapping[str, Any]) -> Any:
    """Sample the model's own responses to the problems, of at most 512 tokens where the user names no number."""
    from bupo.data.prompts import prompt_ids
    from bupo.data.rollouts import Rollout
    from bupo.evaluate.engines import Sampling, response_limit
    from bupo.evaluate.hf_engine import sample
    from bupo.models.layout import context_length

    prompts = [prompt_ids(p.prompt, tokenizer, config["template"]) for p in problems]
    tokens = response_limit(prompts, context_length(model.config), config["max_new_tokens"], 512)
    sampling = Sampling(tokens, config["temperature"], seed=config["seed"])
    bar = partial(progress.move, "generating responses")
    sampled = sample(model, tokenizer, prompts, sampling, samples=config["samples"], on_progress=bar)
    return [
        Rollout(prompt, list(ids), problem.prompt, tokenizer.decode(ids, skip_special_tokens=True), problem.id, number)
        for problem, prompt, responses in zip(problems, prompts, sampled, strict=True)
        for number, ids in enumerate(responses)
    ]


def _print(result: dict[str, Any]) -> None:
    """Print the entropies per layer and the answer: the boundary layer or why there is none, then the candidate."""
    sites, change, choice = result["sites"], result["entropy_change"], result.get("layer_choice", {})
    layers = range(1, result["layers"] + 1)
    regions = {layer: name for name, span in result["regions"].items() if span for layer in range(span[0], span[1] + 1)}
    columns = {
        "layer": [str(layer) for layer in layers],
        **{f"H {name}": [f"{h:.3f}" for h in sites[f"{name.lower()}_out"]] for name in ("layer", "attn", "FFN")},
        **{f"Δ {name}": [f"{d:+.3f}" for d in change[name.lower()]] for name in ("attn", "FFN")},
        "top-1": [f"{100 * share:.0f} %" for share in choice.get("curves", {}).get("norm", {}).get("top1", [])],
        "region": [regions.get(n, "") + " <- boundary" * (n == result["boundary_layer"]) for n in layers],
    }
    read = f"{result['samples']} responses, {result['tokens']} tokens"
    title = f"{result['model']}: {read}; H: entropy, nats; Δ: its change"
    options.print_table(title, {name: cells for name, cells in columns.items() if cells}, left="region")
    console = Console()
    if sampling := result.get("sampling"):
        used, total = sampling["tokens_used"], sampling["tokens_of_responses"]
        console.print(f"read {used} of {total} response tokens, drawn at random")
    found = [("boundary layer", {"layer": result["boundary_layer"], "reason": result["boundary_reason"]})]
    found += [("candidate, the knee of agreement", c) for c in choice.get("criteria", []) if c["name"] == "knee"]
    for name, answer in found:
        error = answer.get("standard_error")
        place = f"layer {answer['layer']}" + ("" if error is None else f" ± {error:.1f}") + ":"
        console.print(f"{name}: {'none, because' if answer['layer'] is None else place} {answer['reason']}.")
