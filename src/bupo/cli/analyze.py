"""``bupo analyze``: the entropies of every internal policy of a model, its regions and its boundary layer."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bupo.cli import options
from bupo.errors import InputError

if TYPE_CHECKING:
    from bupo.data.problems import Problem
    from bupo.data.rollouts import Rollout

HELP = """Measure a model's internal policies and name the layer to train first.

Reads the residual stream at every layer by the logit lens without the final norm, softmax(H E_u^T), averages the
entropies over the tokens of the model's own responses, and writes analysis.json and its figures.

Examples:

  bupo analyze --model small --dataset arithmetic --output runs/look

  bupo analyze --model Qwen/Qwen3-4B --dataset HuggingFaceH4/MATH-500 --limit 20 --output runs/qwen3

  bupo analyze --model models/smollm2 --responses responses.jsonl --max-tokens 5000 --output runs/smollm2

  accelerate launch --num_processes 8 -m bupo analyze --model Qwen/Qwen3-8B --responses R.jsonl --output runs/q
"""
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
    config = {name: str(v) if isinstance(v, Path) else v for name, v in context.params.items()}
    names = options.split_names(statistics)
    rank, processes = options.launched_processes()
    _check(config, processes)

    from bupo.run_folder import claim, describe_run, write_json

    folder, started = claim(output, overwrite=overwrite), time.monotonic()
    with (
        options.on_interrupt("Nothing was written; the same command starts again from the beginning."),
        options.Progress(not as_json and rank == 0) as progress,
    ):
        from accelerate.utils import broadcast_object_list

        from bupo.data.rollouts import read_responses
        from bupo.lens.analyze import AnalysisOptions, Statistics, analyze_rollouts, check_rollouts
        from bupo.lens.tokens import ParquetTokenWriter, explore_rollouts
        from bupo.models.load import load_model, model_revision

        # wrong arguments are found before the model is loaded
        Statistics(tuple(names))
        problems = _problems(config) if dataset is not None else []
        options.quiet_libraries()
        progress.log(f"loading {model}")
        loaded, tokenizer = load_model(
            model,
            dtype="fitting" if dtype == "auto" else dtype,
            device=_device(device, processes),
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        if responses is not None:
            rollouts = read_responses(responses, tokenizer, template)[:limit]
        else:
            generated = _generate(loaded, tokenizer, problems, progress, config) if rank == 0 else []
            rollouts = generated if processes == 1 else broadcast_object_list([generated])[0]
        check_rollouts(loaded, rollouts)
        writer = ParquetTokenWriter(output) if per_token else None
        result = analyze_rollouts(
            loaded,
            rollouts,
            statistics=names,
            max_tokens=max_tokens,
            batch_tokens=batch_tokens,
            seed=seed,
            share=processes > 1,
            options=AnalysisOptions(model, choice, choice_tokens, writer, progress.update),
        )
        if rank > 0:
            return
        tokens = None
        if explore:
            tokens = explore_rollouts(loaded, rollouts[:explore], tokenizer.decode, progress=progress.update)
        figures = _write(folder, result, tokens, writer, rollouts if responses is None else None)
        about = {"seed": seed, "processes": processes, "model_revision": model_revision(loaded)}
        seconds = round(time.monotonic() - started, 1)
        write_json(folder / "run.json", describe_run("analyze", config, **about, seconds=seconds))
    if as_json:
        short = {k: v for k, v in result.items() if not k.startswith(_LONG) and k != "layer_choice"}
        answer = {"layer": result["boundary_layer"], "reason": result["boundary_reason"]}
        answer |= {k: v for k, v in result.get("layer_choice", {}).items() if k in ("recommendation", "criteria")}
        typer.echo(json.dumps({**short, "output": str(folder), **answer}, ensure_ascii=False))
    else:
        _print(result)
        typer.echo(f"wrote {folder}/analysis.json and {figures} figure files")


def _check(config: dict[str, Any], processes: int) -> None:
    if (config["dataset"] is None) == (config["responses"] is None):
        raise InputError("pass either --dataset (responses are generated) or --responses FILE, not both")
    if config["responses"] is not None and not Path(config["responses"]).is_file():
        raise InputError(f"responses file {config['responses']} does not exist")
    if not config["choice"] and config["choice_tokens"] is not None:
        raise InputError("--choice-tokens has no effect with --no-choice; leave out one of them")
    if config["per_token"] and processes > 1:
        raise InputError("--per-token writes one file in one process; leave out --per-token or the launcher")


def _device(device: str | None, processes: int) -> str | None:
    """The device of this process: with a launcher each process has its own, of the type that was asked for."""
    if processes == 1:
        return device
    from bupo.models.load import join_processes

    if device is not None and ":" in device:
        raise InputError(f"--device {device} names one device for {processes} processes; write {device.split(':')[0]}")
    own = join_processes(cpu=device == "cpu").device
    if device not in (None, own.type):
        raise InputError(f"--device {device} is not available to launched processes; they run on {own.type}")
    return str(own)


def _problems(config: dict[str, Any]) -> list[Problem]:
    from bupo.data.problems import load_problems

    return load_problems(config["dataset"], split=config["split"], limit=config["limit"], seed=config["seed"])


def _generate(
    model: Any, tokenizer: Any, problems: list[Problem], progress: options.Progress, config: dict[str, Any]
) -> list[Rollout]:
    """Sample the model's own responses to the problems."""
    from bupo.data.prompts import prompt_ids
    from bupo.data.rollouts import Rollout
    from bupo.evaluate.engines import Sampling
    from bupo.evaluate.hf_engine import sample
    from bupo.models.layout import context_length

    prompts = [prompt_ids(p.prompt, tokenizer, config["template"]) for p in problems]
    longest, context, tokens = max(map(len, prompts)), context_length(model.config), config["max_new_tokens"]
    if context is not None and longest + (tokens or 1) > context:
        raise InputError(
            f"the longest prompt ({longest} tokens) and --max-new-tokens {tokens or 1} exceed the model's context of "
            f"{context}; " + ("lower --max-new-tokens" if tokens else "choose other problems")
        )
    if tokens is None:
        tokens = 512 if context is None else min(512, context - longest)
    sampled = sample(
        model,
        tokenizer,
        prompts,
        Sampling(tokens, config["temperature"], seed=config["seed"]),
        samples=config["samples"],
        on_progress=progress.bar("generating responses", len(prompts) * config["samples"]),
    )
    return [
        Rollout(prompt, list(ids), problem.prompt, tokenizer.decode(ids, skip_special_tokens=True), problem.id, number)
        for problem, prompt, responses in zip(problems, prompts, sampled, strict=True)
        for number, ids in enumerate(responses)
    ]


def _write(folder: Path, result: dict[str, Any], tokens: Any, writer: Any, generated: list[Rollout] | None) -> int:
    """Write the results, remove those of the run that is replaced, and return the number of figure files.

    The JSON is written first: content that it cannot hold (NaN) must leave nothing else behind.
    """
    from bupo.report.analysis_figures import write_analysis_figures
    from bupo.run_folder import write_json, write_text

    write_json(folder / "analysis.json", result)
    for name in ("responses.jsonl", "tokens.json", "per_token.parquet"):
        (folder / name).unlink(missing_ok=True)
    if generated is not None:
        columns = ("problem_id", "sample", "prompt", "response", "prompt_ids", "response_ids")
        rows = [{c: getattr(r, c) for c in columns} for r in generated]
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(folder / "responses.jsonl", "".join(lines))
    if tokens is not None:
        write_json(folder / "tokens.json", tokens)
    if writer is not None:
        writer.close(folder / "per_token.parquet")
    return len(write_analysis_figures(result, folder))


def _print(result: dict[str, Any]) -> None:
    """Print the entropies per layer and the answer: the boundary layer or why there is none, then the candidate."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    title = (
        f"{result['model']}: {result['samples']} responses, {result['tokens']} tokens; H: entropy, nats; Δ: its change"
    )
    table = Table(title=title)
    columns = ["layer", "H layer", "H attn", "H FFN", "Δ attn", "Δ FFN", "region"]
    agreement = result.get("layer_choice", {}).get("curves", {}).get("norm", {}).get("top1")
    if agreement:
        columns.insert(6, "top-1")
    for name in columns:
        table.add_column(name, justify="left" if name == "region" else "right", no_wrap=True)
    regions = {name: span for name, span in result["regions"].items() if span}
    for i in range(result["layers"]):
        cells = [f"{result['sites'][site][i]:.3f}" for site in ("layer_out", "attn_out", "ffn_out")]
        cells += [f"{result['entropy_change'][module][i]:+.3f}" for module in ("attn", "ffn")]
        cells += [f"{100 * agreement[i]:.0f} %"] if agreement else []
        region = next((name for name, (first, last) in regions.items() if first <= i + 1 <= last), "")
        mark = " <- boundary" if result["boundary_layer"] == i + 1 else ""
        table.add_row(str(i + 1), *cells, region + mark)
    console.print(table)
    if sampling := result.get("sampling"):
        used, total = sampling["tokens_used"], sampling["tokens_of_responses"]
        console.print(f"read {used} of {total} response tokens, drawn at random")
    criteria = {criterion["name"]: criterion for criterion in result.get("layer_choice", {}).get("criteria", [])}
    boundary = {"layer": result["boundary_layer"], "reason": result["boundary_reason"]}
    for name, found in (("boundary layer", boundary), ("candidate, the knee of agreement", criteria.get("knee"))):
        if found is not None:
            error = found.get("standard_error")
            place = f"layer {found['layer']}" + ("" if error is None else f" ± {error:.1f}") + ":"
            console.print(f"{name}: {'none, because' if found['layer'] is None else place} {found['reason']}.")
