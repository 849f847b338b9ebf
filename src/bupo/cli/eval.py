"""`bupo eval`: measure a model on benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HELP = """Measure a model: Avg@K and unbiased Pass@K with confidence intervals.

Tasks: math500, amc23, aime24, aime25, minerva, olympiadbench, arithmetic, arithmetic-hard, reasoning_gym/NAME, a
.jsonl/.json/.parquet file, or a hub dataset. The defaults are the paper's protocol: temperature 1, top-p 1, Avg@16
(Avg@32 for AIME). A run that was stopped goes on when it is started again with the same settings.

Examples:

  bupo eval --model small --tasks arithmetic --k 8 --limit 100 --output runs/start

  bupo eval --model Qwen/Qwen3-4B --tasks math500,amc23,aime24,aime25 --template qwen3-no-thinking --output runs/qwen3

  bupo eval --model small --tasks arithmetic --internal-layer 4 --output runs/layer4

  bupo eval --regrade runs/start

  bupo eval --model Qwen/Qwen3-4B --harness gpqa,mmlu-pro,arc,bbh --output runs/qwen3-other
"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("eval", help=HELP)(evaluate)


def evaluate(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Hub id, model folder, or 'small' (shipped).")] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", "--dataset", help="Tasks, separated by commas.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for results and responses.")] = None,
    k: Annotated[int | None, typer.Option("--k", help="K of Avg@K; by task: 16, AIME 32.")] = None,
    n: Annotated[int | None, typer.Option("--n", help="Samples a problem, for Pass@K; K by default.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many problems of each task.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with local files of the benchmarks.")] = None,
    template: Annotated[
        str | None, typer.Option(help="auto, raw, chat, qwen-math, qwen3-no-thinking or octothinker.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest response; the task's by default, or what the context leaves.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy decoding.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling, and of generated problems.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Responses made at a time (belongs to the seed).")] = 64,
    engine: Annotated[
        str, typer.Option(help="auto (vLLM where it is installed), transformers, continuous or vllm.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (as stored; float32 on a CPU without 16-bit units), float32, bfloat16 or float16.")
    ] = "auto",
    device: Annotated[str | None, typer.Option(help="Torch device; the accelerator if there is one.")] = None,
    internal_layer: Annotated[
        int | None, typer.Option(help="Sample from this layer's internal policy (counted from 1).")
    ] = None,
    internal_norm: Annotated[bool, typer.Option(help="Read it through the final norm.")] = False,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that the model's repository brings.")] = False,
    regrade: Annotated[Path | None, typer.Option(help="Grade a finished evaluation's responses again.")] = None,
    harness: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness: gpqa, mmlu-pro, arc, bbh, humaneval, or its names."),
    ] = None,
    harness_tasks: Annotated[Path | None, typer.Option(help="Folder with further task files for --harness.")] = None,
    unsafe_code: Annotated[bool, typer.Option(help="Let harness tasks run code that the model wrote.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace what the output folder holds.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    import sys

    from bupo.errors import ConfigError

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    if regrade is not None:
        _refuse(given - {"regrade", "json_output"}, "--regrade", "it grades the kept responses in place")
        from bupo.evaluate.run import regrade as grade_again

        _show(grade_again(regrade, say=say), regrade, json_output)
        return
    if harness is not None:
        _refuse(given - _WITH_HARNESS, "--harness", "the harness has its own prompts and way to sample")
        if template not in (None, "auto", "chat", "raw"):
            raise ConfigError(f"--harness takes no --template {template}; raw or chat, the model's own")
    else:
        _refuse(given & {"harness_tasks", "unsafe_code"}, "an evaluation without --harness", "")
    wanted = (("--model", model), ("--tasks", tasks or harness), ("--output", output))
    missing = [name for name, value in wanted if not value]
    if missing:
        raise ConfigError(f"bupo eval needs {', '.join(missing)} (or --regrade DIR)")
    assert model is not None
    assert output is not None
    if harness is not None:
        from bupo.evaluate.harness import run_harness

        found = run_harness(
            model,
            _names(harness),
            output,
            limit=limit,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            seed=seed,
            chat=template != "raw",
            task_folder=harness_tasks,
            unsafe_code=unsafe_code,
            revision=revision,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
        )
        _show_harness(found, output, json_output)
        return
    assert tasks is not None

    from bupo.evaluate.engines import choose_engine
    from bupo.evaluate.run import EvalConfig
    from bupo.evaluate.run import evaluate as run
    from bupo.evaluate.store import fingerprint
    from bupo.models.load import resolve_model

    chosen = choose_engine(engine, internal_layer=internal_layer)
    if chosen == "vllm":
        _refuse(given & {"device", "batch_size"}, "vLLM", "it uses the GPUs it sees and sizes its own batches")
    path = resolve_model(model)
    config = EvalConfig(
        model=model,
        tasks=tuple(_names(tasks)),
        k=k,
        n=n,
        limit=limit,
        data_dir=str(data_dir) if data_dir else None,
        template=template,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        engine=chosen,
        dtype=dtype,
        internal_layer=internal_layer,
        internal_norm=internal_norm,
        revision=revision,
        fingerprint=fingerprint(Path(path)),
    )
    config.check_output(output, overwrite=overwrite)

    from bupo.evaluate.load import load_engine

    made, tokenizer, describe = load_engine(config, device=device, trust_remote_code=trust_remote_code)
    with _Progress() as progress:
        results = run(
            config, made, tokenizer, output, overwrite=overwrite, describe=describe, say=say, track=progress.track
        )
    _show(results, output, json_output)


_WITH_HARNESS = {
    "model", "output", "harness", "harness_tasks", "unsafe_code", "limit", "batch_size", "dtype", "device", "seed",
    "template", "revision", "trust_remote_code", "overwrite", "json_output",
}  # fmt: skip


def _refuse(names: set[str], what: str, because: str) -> None:
    """Options that would have no effect are an error."""
    from bupo.errors import ConfigError

    if names:
        shown = ", ".join("--" + name.replace("_", "-") for name in sorted(names))
        raise ConfigError(f"{what} takes no {shown}" + (f": {because}" if because else ""))


class _Progress:
    """One bar a task on the terminal."""

    def __enter__(self) -> _Progress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=Console(stderr=True))
        self._known: dict = {}
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def track(self, task: str, done: int, total: int) -> None:
        if task not in self._known:
            self._known[task] = self._bars.add_task(task, total=total)
        self._bars.update(self._known[task], completed=done)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _show_harness(results: dict, folder: Path, as_json: bool) -> None:
    import json

    from bupo.evaluate.harness import RESULTS, summary_lines

    print(json.dumps(results) if as_json else "\n".join([*summary_lines(results), f"results: {folder / RESULTS}"]))


def _show(results: dict, folder: Path, as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps(results))
        return
    from bupo.evaluate.results import summary_lines

    print("\n".join(summary_lines(results)))
    print(f"results: {folder / 'results.json'}   responses: {folder / 'responses.parquet'}")
