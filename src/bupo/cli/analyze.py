"""``bupo analyze``: the entropies of every internal policy of a model, its regions and its boundary layer."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bupo.cli.options import Progress as _Progress
from bupo.cli.options import quiet_libraries as _quiet_libraries
from bupo.errors import InputError

if TYPE_CHECKING:
    from bupo.data.rollouts import Rollout

HELP = """Measure a model's internal policies and name the layer to train first.

Reads the residual stream at every layer (softmax(H E_u^T), no final norm), averages the entropies over the tokens
of the model's own responses, and writes analysis.json and three figures.

Examples:

  bupo analyze --model small --dataset arithmetic --output runs/look

  bupo analyze --model Qwen/Qwen3-4B --dataset HuggingFaceH4/MATH-500 --limit 20 --output runs/qwen3

  bupo analyze --model models/smollm2 --responses responses.jsonl --output runs/smollm2 --max-tokens 2000

  accelerate launch --num_processes 8 -m bupo analyze --model Qwen/Qwen3-8B --responses R.jsonl --output runs/q
"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("analyze", help=HELP)(analyze)


def analyze(
    model: Annotated[str, typer.Option(help="Hub id, model folder, or 'small' (shipped).")],
    output: Annotated[Path, typer.Option(help="Folder for analysis.json and the figures.")],
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Problems to respond to: arithmetic, reasoning_gym/NAME, a .jsonl/.parquet file, or a hub id."
        ),
    ] = None,
    responses: Annotated[
        Path | None,
        typer.Option(help="Read responses instead of generating: rows with prompt(_ids) and response(_ids)."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of the dataset.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Problems (or rows of --responses) to use.")] = 20,
    samples: Annotated[int, typer.Option(min=1, help="Responses generated a problem.")] = 1,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest generated response (default: 512, or what the context leaves).")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature of the responses.")] = 1.0,
    template: Annotated[str, typer.Option(help="Prompt template: auto, raw, chat, qwen-math, ...")] = "auto",
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Number of response tokens to read, drawn at random. Default: all of them."),
    ] = None,
    statistics: Annotated[
        str,
        typer.Option(help="Further means a site, by commas: logprob, rank, varentropy, kl, topK (as top5)."),
    ] = "",
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Also write every token's values at every site, per_token.parquet.")
    ] = False,
    explore: Annotated[
        int, typer.Option(min=0, help="Also write tokens.json, the report's token explorer, for so many responses.")
    ] = 0,
    rule: Annotated[
        str,
        typer.Option(help="Whose layer is the answer: boundary (the paper's rule) or recommended (docs/analysis.md)."),
    ] = "boundary",
    choice: Annotated[
        bool, typer.Option(help="Compare every layer with the final policy on some tokens, and recommend a layer.")
    ] = True,
    choice_tokens: Annotated[
        int | None, typer.Option(min=1, help="So many random tokens for that (default: a sixteenth, 128 to 512).")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="float32, bfloat16, float16, or auto: the checkpoint's, where the device has units for it."),
    ] = "auto",
    device: Annotated[str | None, typer.Option(help="Torch device; an accelerator if there is one.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Most padded tokens in one forward.")] = 2048,
    seed: Annotated[int, typer.Option(help="Seed of problems and sampling.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Hub revision of the model.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the results in --output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    from bupo.run_folder import claim, describe_run, write_json

    config = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items() if k not in _IMPORTED}
    if (dataset is None) == (responses is None):
        raise InputError("pass either --dataset (responses are generated) or --responses FILE, not both")
    _check_choice(rule, choice, choice_tokens)
    folder = claim(output, overwrite=overwrite)
    if responses is not None and not responses.is_file():
        raise InputError(f"responses file {responses} does not exist")

    names = [name.strip() for name in statistics.split(",") if name.strip()]
    processes, process = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if per_token and processes > 1:
        raise InputError("--per-token writes one file and runs in one process; leave it or the launcher")

    started = time.monotonic()
    _quiet_libraries()
    with _Progress(enabled=not as_json and process == 0) as progress:
        from bupo.lens.analyze import AnalysisOptions, Statistics, analyze_rollouts, check_rollouts
        from bupo.models.load import load_model, model_revision

        Statistics(tuple(names))  # a wrong name is said before anything is loaded
        progress.log(f"loading {model}")
        loaded, tokenizer = load_model(
            model,
            dtype="fitting" if dtype == "auto" else dtype,
            device=_device(device, processes),
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        if responses is not None:
            from bupo.data.rollouts import read_responses

            rollouts = read_responses(responses, tokenizer, template)[:limit]
        else:
            assert dataset is not None
            rollouts = _generate(loaded, tokenizer, progress, config) if process == 0 else []
            if processes > 1:
                from accelerate.utils import broadcast_object_list

                rollouts = broadcast_object_list([rollouts])[0]
        check_rollouts(loaded, rollouts)
        table = None
        if per_token:
            from bupo.lens.tokens import ParquetTokenWriter

            table = ParquetTokenWriter(output)
        result = analyze_rollouts(
            loaded,
            rollouts,
            statistics=names,
            max_tokens=max_tokens,
            batch_tokens=batch_tokens,
            seed=seed,
            share=processes > 1,
            options=AnalysisOptions(model, choice, choice_tokens, table, progress.update),
        )
        tokens = None
        if explore and process == 0:
            from bupo.lens.tokens import explore_rollouts

            chosen = rollouts[:explore]
            tokens = explore_rollouts(loaded, chosen, tokenizer.decode, progress=progress.update)
    if process > 0:
        return

    run = describe_run(
        "analyze",
        config,
        seed=seed,
        processes=processes,
        model_revision=model_revision(loaded),
        seconds=round(time.monotonic() - started, 1),
    )
    folder.mkdir(parents=True, exist_ok=True)
    if responses is None:
        _write_responses(folder / "responses.jsonl", rollouts)
    from bupo.report.figures import write_analysis_figures

    figures = write_analysis_figures(result, folder)
    if responses is not None:  # of a run that this one replaces
        (folder / "responses.jsonl").unlink(missing_ok=True)
    (folder / "tokens.json").unlink(missing_ok=True)
    if tokens is not None:
        write_json(folder / "tokens.json", tokens)
    (folder / "per_token.parquet").unlink(missing_ok=True)
    if table is not None:
        table.close(folder / "per_token.parquet")
    write_json(folder / "run.json", run)
    write_json(folder / "analysis.json", result)
    if as_json:
        summary = {k: v for k, v in result.items() if k not in _LONG} | {"output": str(folder)}
        summary |= _answer(result, rule)
        typer.echo(json.dumps(summary, ensure_ascii=False))
    else:
        _print_summary(result, folder, len(figures), rule)


def _device(asked: str | None, processes: int) -> str | None:
    """The device of this process, where a launcher started several."""
    if processes == 1:
        return asked
    from bupo.models.processes import join_processes

    return asked or str(join_processes().device)


_IMPORTED = {"claim", "describe_run", "write_json"}
_LONG = {
    "sites",
    "standard_errors",
    "entropy_change",
    "entropy_change_standard_errors",
    "residual_cosine",
    "residual_cosine_standard_errors",
    "statistics",
    "statistics_standard_errors",
    "layer_choice",
}


def _generate(model: Any, tokenizer: Any, progress: _Progress, config: dict[str, Any]) -> list[Rollout]:
    """The model's own responses to the dataset's problems."""
    from bupo.data.problems import load_problems
    from bupo.data.prompts import prompt_ids
    from bupo.data.rollouts import Rollout
    from bupo.evaluate.hf_engine import sample
    from bupo.models.layout import context_length

    problems = load_problems(config["dataset"], split=config["split"], limit=config["limit"], seed=config["seed"])
    prompts = [prompt_ids(p.prompt, tokenizer, config["template"]) for p in problems]
    longest, room, most = max(map(len, prompts)), context_length(model.config), config["max_new_tokens"]
    if room is not None and longest + (most or 1) > room:
        raise InputError(
            f"the longest prompt ({longest} tokens) and --max-new-tokens {most or 1} exceed the model's context of "
            f"{room}; " + ("lower --max-new-tokens" if most else "choose other problems")
        )
    if most is None:
        most = 512 if room is None else min(512, room - longest)
    bar = progress.bar("generating responses", len(prompts) * config["samples"])
    made = sample(
        model,
        tokenizer,
        prompts,
        samples=config["samples"],
        max_new_tokens=most,
        temperature=config["temperature"],
        seed=config["seed"],
        progress=bar,
    )
    return [
        Rollout(
            prompt_ids=prompt,
            response_ids=list(response),
            prompt=problem.prompt,
            response=tokenizer.decode(response, skip_special_tokens=True),
            problem_id=problem.id,
            sample=number,
        )
        for problem, prompt, responses in zip(problems, prompts, made, strict=True)
        for number, response in enumerate(responses)
    ]


def _write_responses(path: Path, rollouts: list[Rollout]) -> None:
    from bupo.run_folder import write_text

    columns = ("problem_id", "sample", "prompt", "response", "prompt_ids", "response_ids")
    rows = [{c: getattr(r, c) for c in columns} for r in rollouts]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _check_choice(rule: str, choice: bool, tokens: int | None) -> None:
    if rule not in ("boundary", "recommended"):
        raise InputError(f"--rule must be boundary or recommended, not {rule!r}")
    if not choice and rule == "recommended":
        raise InputError("--rule recommended needs the layer choice; leave out --no-choice")
    if not choice and tokens is not None:
        raise InputError("--choice-tokens needs the layer choice; leave out --no-choice")


def _answer(result: dict[str, Any], rule: str) -> dict[str, Any]:
    """The part of the JSON summary that names a layer, with the evidence for it."""
    from bupo.lens.agreement import chosen_layer

    layer, reason = chosen_layer(result, rule)
    found: dict[str, Any] = {"rule": rule, "layer": layer, "reason": reason}
    if "layer_choice" in result:
        block = result["layer_choice"]
        found |= {k: block[k] for k in ("recommendation", "criteria")}
    return found


def _print_summary(result: dict[str, Any], folder: Path, figures: int, rule: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{result['model']}: {result['samples']} responses, {result['tokens']} tokens (nats)")
    for name in ("layer", "H(layer policy)", "H(attention)", "H(FFN)", "attention change", "FFN change", "region"):
        table.add_column(name, justify="left" if name == "region" else "right")
    regions = {k: v for k, v in result["regions"].items() if v}
    for i in range(result["layers"]):
        at = [result["sites"][s][i] for s in ("layer_out", "attn_out", "ffn_out")]
        change = [result["entropy_change"][c][i] for c in ("attn", "ffn")]
        region = next((k for k, (a, b) in regions.items() if a <= i + 1 <= b), "")
        mark = " <- boundary" if result["boundary_layer"] == i + 1 else ""
        table.add_row(str(i + 1), *(f"{v:.3f}" for v in at), *(f"{v:+.3f}" for v in change), region + mark)
    console.print(table)
    layer = result["boundary_layer"]
    console.print(f"boundary layer: {layer if layer is not None else 'none'}. {result['boundary_reason']}.")
    if sampling := result.get("sampling"):
        console.print(_sampling_line(sampling))
    if "layer_choice" in result:
        from bupo.cli.layer_choice import print_choice
        from bupo.lens.agreement import chosen_layer

        print_choice(console, result)
        layer, _ = chosen_layer(result, rule)
        console.print(f"answer (--rule {rule}): {'no layer' if layer is None else f'layer {layer}'}")
    console.print(f"wrote {folder}/analysis.json and {figures} figure files")


def _sampling_line(sampling: dict[str, Any]) -> str:
    return f"read {sampling['tokens_used']} of {sampling['tokens_of_responses']} response tokens, drawn at random"
