"""``bupo lens``: maps from every layer to the output, fitted or published, and how well they read a model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bupo.cli import options
from bupo.errors import InputError
from bupo.run_folder import LENS_CARD, RUN_FILE, claim, describe_run, read_json, write_json

_UNUSED = {"split": None, "temperature": 1.0, "dataset": None, "limit": None}  # by commands without these options


def fit(
    context: typer.Context,
    model: options.Model,
    output: options.Output,
    dataset: options.Dataset = None,
    responses: options.Responses = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of problems (default: 100) or rows (all).")] = None,
    samples: options.Samples = 1,
    max_new_tokens: options.MaxNewTokens = None,
    template: options.Template = "auto",
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Fit a ridge lens: the affine map of each layer's states that comes closest to the last layer's.

    Takes one pass over the responses, which should have at least 8 times as many tokens as the model is wide.
    Responses to every fourth prompt are first left out, to choose the ridge factors and to measure the lens on.

    Examples:
      bupo lens fit --model small --dataset arithmetic --limit 200 --output runs/lens
      bupo lens fit --model models/smollm2 --responses responses.jsonl --output runs/lens
    """
    options.check_source(context, dataset, responses)
    claim(output, overwrite=overwrite)
    from bupo.lens.maps import TOKENS_PER_DIMENSION, Lens

    rank, processes = options.launched_processes()
    config = {**_UNUSED, **context.params, "limit": limit or (100 if dataset else None)}
    with options.Progress(not as_json and rank == 0) as progress:
        loaded, _, rollouts = options.load_with_responses(config, progress)
        lens = Lens.fit(loaded, rollouts, seed=seed, share=processes > 1, progress=progress.move)
        if (tokens := lens.card["tokens"]) < (wanted := TOKENS_PER_DIMENSION * lens.width):
            progress.print(f"{tokens} tokens are few for this model; fit on responses with {wanted} or more")
    lens.card["corpus"] = dataset or str(responses)
    if rank == 0:
        _save(lens, context, rollouts if dataset else [])
        show(output, as_json)


def load(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="FILE|FOLDER|HUB-ID", help="A published lens, or a saved one.")],
    model: options.Model,
    output: options.Output,
    responses: Annotated[Path | None, typer.Option(help="Responses it was not fitted on, to measure it on.")] = None,
    template: options.Template = "auto",
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Load a published lens, check that it belongs to the model, and save it in bupo's form.

    A Jacobian lens is a .pt file with one matrix per layer, a tuned lens a folder with params.pt and config.json. On
    the hub, name OWNER/REPOSITORY/PATH, with spaces/ in front for a space.

    Examples:
      bupo lens load Qwen3-4B_jacobian_lens.pt --model Qwen/Qwen3-4B --responses R.jsonl --output runs/jacobian
      bupo lens load spaces/AlignmentResearch/tuned-lens/lens/gpt2 --model gpt2 --output runs/tuned
    """
    options.refuse_launcher("bupo lens load", "start it without a launcher")
    if responses is None:
        options.check_revision(context)
        options.refuse(options.passed(context) & {"template"}, "bupo lens load without --responses", "nothing is read")
    else:
        options.check_source(context, None, responses)
    claim(output, overwrite=overwrite)
    from bupo.lens.maps import identity_of
    from bupo.lens.published import load_published

    lens = load_published(source)  # before the model: a wrong name is found at once
    with options.Progress(not as_json) as progress:
        loaded, _, rollouts = options.load_with_responses({**_UNUSED, **context.params}, progress)
        lens.check(loaded)
        lens.card.update(identity_of(loaded) | lens.card)
        if rollouts:
            lens.card["held_out"] = lens.measure(loaded, rollouts, seed=seed)
    _save(lens, context, [])
    show(output, as_json)


def show(
    folder: Annotated[Path, typer.Argument(help="Folder that bupo lens fit or load wrote.")],
    as_json: options.AsJson = False,
) -> None:
    """Show how well a lens reads held-out responses, layer by layer, and draw lens.png and lens.svg in its folder.

    Example:
      bupo lens show runs/lens
    """
    from bupo.report import style
    from bupo.report.analysis_figures import layer_choice
    from bupo.report.results import LensCard

    if not (folder / LENS_CARD).is_file():
        raise InputError(f"{folder} holds no lens; name a folder that bupo lens fit or bupo lens load wrote")
    card = read_json(folder / LENS_CARD)
    if held := LensCard.parse(card, folder / LENS_CARD).held_out:
        style.save(layer_choice(held), folder, "lens")
    if as_json:
        typer.echo(json.dumps(card, ensure_ascii=False))
    elif held is None:
        typer.echo(f"{folder} holds a {card['kind']} lens; pass --responses to bupo lens load to measure how it reads")
    else:
        title = f"{card['kind']} lens of {card['model']}, {held.tokens} tokens of {held.responses} held-out responses"
        options.print_table(title, options.lens_columns(card["held_out"], list(held.curves)))
        typer.echo(f"card: {folder / LENS_CARD}   figure: {folder / 'lens.svg'}")


def _save(lens: Any, context: typer.Context, rollouts: Sequence[Any]) -> None:
    """Write the lens, the responses it was fitted on where they were sampled, and the record of the command."""
    folder = context.params["output"]
    for kind in ("png", "svg"):  # of a lens that is replaced
        (folder / f"lens.{kind}").unlink(missing_ok=True)
    lens.save(folder)
    if rollouts:
        options.write_responses(folder, rollouts)
    write_json(folder / RUN_FILE, describe_run(f"lens {context.command.name}", context.params))
