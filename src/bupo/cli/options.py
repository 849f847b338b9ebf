"""What commands share: their options (each declared once), bars, tables, responses, and the launcher's processes."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import rich.progress
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
from rich.table import Table

from bupo.errors import InputError
from bupo.run_folder import write_text


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def _known_template(value: str | None) -> str | None:
    from bupo.data.prompts import TEMPLATES

    if value is not None and value not in TEMPLATES:
        raise InputError(f"unknown template {value!r}; use one of {', '.join(TEMPLATES)}")
    return value


_MODEL = typer.Option(help="Hub id, model folder, or 'small' (shipped with bupo).")
_OUTPUT = typer.Option("--output", "-o", help="Folder for the results.")
# numpy takes no larger seed
_SEED = typer.Option(min=0, max=2**32 - 1, help="Random seed for problem selection and sampling.")
_TEMPLATE = typer.Option(
    callback=_known_template, help="Prompt template: auto, raw, chat, qwen-math, qwen3-no-thinking or octothinker."
)
_DTYPE_HELP = "float32, bfloat16, float16, or auto: the checkpoint's dtype where the device computes in it natively."

Model = Annotated[str, _MODEL]
OptionalModel = Annotated[str | None, _MODEL]
Output = Annotated[Path, _OUTPUT]
OptionalOutput = Annotated[Path | None, _OUTPUT]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the results in --output.")]
Dtype = Annotated[str, typer.Option(help=_DTYPE_HELP)]
Device = Annotated[str | None, typer.Option(help="Torch device. Default: the accelerator, if there is one.")]
Seed = Annotated[int, _SEED]
OptionalSeed = Annotated[int | None, _SEED]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub model: a branch, tag or commit.")]
_TRUST = typer.Option("--trust-remote-code", help="Run the Python code in the model's repository.")
TrustRemoteCode = Annotated[bool, _TRUST]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Template = Annotated[str, _TEMPLATE]
OptionalTemplate = Annotated[str | None, _TEMPLATE]
Temperature = Annotated[float, typer.Option(min=0.0, callback=_finite, help="Sampling temperature; 0 is greedy.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Maximum number of tokens per response.")]
Dataset = Annotated[str | None, typer.Option(help="Problems to respond to: a task, a file, or a hub id.")]
Responses = Annotated[Path | None, typer.Option(help="Responses instead: rows with prompt(_ids) and response(_ids).")]
Samples = Annotated[int, typer.Option(min=1, help="Number of responses to generate per problem.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; dots reach into nested keys."),
]


class Progress(rich.progress.Progress):
    """Progress bars and messages on standard error, or none; standard output is left to the result."""

    def __init__(self, enabled: bool = True):
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        super().__init__(*columns, console=Console(stderr=True, quiet=not enabled), disable=not enabled)

    def move(self, name: str, done: int, total: int) -> None:
        """Move the bar called ``name``, which is added on first use."""
        known = [task.id for task in self.tasks if task.description == name]
        self.update(known[0] if known else self.add_task(name), completed=done, total=total)


def print_table(title: str, columns: Mapping[str, Sequence[str]], left: str = "") -> None:
    """Print columns of cells under their names, right-aligned but for the column ``left``."""
    table = Table(title=title)
    for name, cells in columns.items():
        width = None if name == left else max(map(len, (name, *cells)))  # only the column `left` is wrapped
        table.add_column(name, justify="left" if name == left else "right", min_width=width)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    console = Console()
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=1000)).minimum)
    console.print(table)


def lens_columns(readings: Mapping[str, Any], lenses: Sequence[str]) -> dict[str, list[str]]:
    """Columns of a table over layers: entropy, KL with its standard error, and top-1 agreement through each lens."""
    columns = {"layer": [str(layer) for layer, _ in enumerate(readings["curves"][lenses[0]]["kl"], start=1)]}
    for lens in lenses:
        curves, errors, name = readings["curves"][lens], readings["standard_errors"][lens]["kl"], Path(lens).name
        columns[f"H {name}"] = [f"{value:.2f}" for value in curves["entropy"]]
        kl = zip(curves["kl"], errors, strict=True)
        columns[f"KL {name}"] = [f"{value:.2f}" + ("" if error is None else f"±{error:.2f}") for value, error in kl]
        columns[f"top-1 {name}"] = [f"{100 * share:.0f} %" for share in curves["top1"]]
    return columns


def check_revision(context: typer.Context) -> None:
    """Raise `InputError` for a revision of a model that does not come from the hub."""
    name = context.params["model"]
    if name == "small" or Path(name).expanduser().exists():
        refuse(passed(context) & {"revision"}, f"model {name}", "it is not on the hub")


def launched_processes() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun or `accelerate launch` set them; else (0, 1)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def refuse_launcher(command: str, instead: str) -> None:
    """Raise `InputError` if a launcher started several processes, which would all write the same folder."""
    _, processes = launched_processes()
    if processes > 1:
        raise InputError(f"{command} runs in one process, but the launcher started {processes}; {instead}")


def passed(context: typer.Context) -> set[str]:
    """The parameters that stand on the command line."""
    return {n for n in context.params if getattr(context.get_parameter_source(n), "name", "") == "COMMANDLINE"}


def refuse(names: set[str], what: str, reason: str) -> None:
    """Options that would have no effect are an error."""
    if names:
        shown = ", ".join("--" + name.replace("_", "-") for name in sorted(names))
        raise InputError(f"{what} takes no {shown}: {reason}")


def check_source(context: typer.Context, dataset: str | None, responses: Path | None) -> None:
    """Raise `InputError` unless there is exactly one of the two, the file exists, and every option has an effect."""
    if (dataset is None) == (responses is None):
        raise InputError("pass either --dataset (responses are generated) or --responses FILE, not both")
    if responses is not None and not responses.is_file():
        raise InputError(f"responses file {responses} does not exist")
    check_revision(context)
    if responses is not None:
        unused = passed(context) & {"split", "samples", "max_new_tokens", "temperature"}
        refuse(unused, "--responses", "no responses are generated")
    elif Path(dataset or "").expanduser().is_file():
        refuse(passed(context) & {"split"}, f"the file {dataset}", "it has no splits")


def load_with_responses(config: Mapping[str, Any], progress: Progress) -> tuple[Any, Any, list[Any]]:
    """The model, its tokenizer, and the responses that the options name, the same on all processes of a launcher."""
    from accelerate.utils import broadcast_object_list

    from bupo.data.problems import load_problems
    from bupo.data.rollouts import read_responses
    from bupo.models.load import join_processes, load_model

    dataset, limit, (rank, processes) = config["dataset"], config["limit"], launched_processes()
    problems = load_problems(dataset, split=config["split"], limit=limit, seed=config["seed"]) if dataset else []
    source = {name: config[name] for name in ("device", "revision", "trust_remote_code")}
    if processes > 1:  # each process has a device of its own, of the type that was asked for
        own = join_processes(cpu=source["device"] == "cpu").device
        if source["device"] not in (None, own.type):
            raise InputError(f"--device {source['device']} is not available: launched processes run on {own.type}")
        source["device"] = str(own)
    progress.print(f"loading {config['model']}", markup=False, highlight=False)
    dtype = "fitting" if config["dtype"] == "auto" else config["dtype"]
    model, tokenizer = load_model(config["model"], dtype=dtype, **source)
    if config["responses"] is not None:
        return model, tokenizer, read_responses(config["responses"], tokenizer, config["template"])[:limit]
    rollouts = _generate(model, tokenizer, problems, progress, config) if problems and rank == 0 else []
    return model, tokenizer, rollouts if processes == 1 else broadcast_object_list([rollouts])[0]


def _generate(model: Any, tokenizer: Any, problems: Any, progress: Progress, config: Mapping[str, Any]) -> Any:
    """Sample the model's own responses to the problems, of at most 512 tokens where the user names no number."""
    from bupo.data.prompts import prompts_of
    from bupo.data.rollouts import Rollout
    from bupo.evaluate.engines import Sampling, response_limit
    from bupo.evaluate.hf_engine import sample
    from bupo.models.layout import context_length, vocabulary_size

    prompts = prompts_of(problems, tokenizer, config["template"], vocabulary_size(model))
    tokens = response_limit(prompts, context_length(model.config), config["max_new_tokens"], 512)
    sampling = Sampling(tokens, config["temperature"], seed=config["seed"])
    bar = partial(progress.move, "generating responses")
    sampled = sample(model, tokenizer, prompts, sampling, samples=config["samples"], on_progress=bar)
    return [
        Rollout(prompt, list(ids), problem.prompt, tokenizer.decode(ids, skip_special_tokens=True), problem.id, number)
        for problem, prompt, responses in zip(problems, prompts, sampled, strict=True)
        for number, ids in enumerate(responses)
    ]


def write_responses(folder: Path, rollouts: Sequence[Any]) -> None:
    """Write sampled responses to ``responses.jsonl``, in a form that --responses reads."""
    columns = ("problem_id", "sample", "prompt", "response", "prompt_ids", "response_ids")
    rows = ({column: getattr(rollout, column) for column in columns} for rollout in rollouts)
    write_text(folder / "responses.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def split_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
