"""`bupo compare` as a user runs it, and its figure."""

from __future__ import annotations

import json

import pytest

from bupo.cli import main
from bupo.errors import InputError
from bupo.lens.compare import compare_models, measure_layers
from bupo.models.load import load_model
from bupo.report.inside_figures import comparison_figure
from bupo.report.results import Comparison
from tests.lens.test_compare import moved
from tests.support.lens import pairs
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_folder):
    """The tiny model, a training run's folder with a changed copy of it, and responses."""
    folder = tmp_path_factory.mktemp("compare")
    model, tokenizer = load_model(str(tiny_folder))
    trained = folder / "run"
    moved(model).save_pretrained(trained / "model")
    tokenizer.save_pretrained(trained / "model")
    run = {"config": {"internal_steps": 3}, "result": {"internal_layer": 2}}
    (trained / "run.json").write_text(json.dumps(run))
    rows = [{"prompt_ids": [5, 6, 7], "response_ids": [8, 9, 10, 11]}, {"prompt_ids": [7], "response_ids": [9, 2]}]
    (folder / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(capsys, *arguments):
    code = main(["compare", *map(str, arguments)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_as_a_user_runs_it(capsys, tmp_path, folders, tiny_folder):
    out = tmp_path / "out"
    code, text, _ = run(
        capsys, f"start={tiny_folder}", folders / "run", "--responses", folders / "r.jsonl", "--output", out
    )
    assert code == 0
    assert "H(layer 2)" in " ".join(text.split())
    result = json.loads((out / "compare.json").read_text())
    assert [m["name"] for m in result["models"]] == ["start", "run"]
    assert result["layer"] == 2  # what the run trained
    assert {p.name for p in out.iterdir()} == {"compare.json", "inside.png", "inside.svg", "run.json"}
    page = tmp_path / "page.html"
    assert main(["report", str(out), "--output", str(page)]) == 0
    text = page.read_text()
    assert "What training did inside" in text
    assert "fig-inside1" in text


@pytest.mark.parametrize(
    ("models", "options", "words"),
    [
        (["small"], ["--layer", "2"], "two or more models"),
        (["small", "small"], ["--layer", "2"], "two models are named small"),
        (["small", "a=small"], [], "choose one with --layer"),
        (["small", "a=small"], ["--layer", "9"], "layer 9 does not exist"),
        (["small", "a=nowhere"], ["--layer", "2"], "nowhere"),
    ],
)
def test_wrong_arguments_are_refused(capsys, tmp_path, folders, models, options, words):
    out = tmp_path / "out"
    code, _, error = run(capsys, *models, "--responses", folders / "r.jsonl", "--output", out, *options)
    assert code == 2
    assert words in error
    assert not out.exists()


def test_many_models_are_drawn_and_nonsense_is_refused():
    model, rollouts = tiny_model(spread=3.0), pairs()
    readings = [(f"state {i} <b>", measure_layers(moved(model, 0.1 * i), rollouts, 2)) for i in range(7)]
    figure = comparison_figure(Comparison.parse(compare_models(readings)))
    assert len(figure.axes) == 4
    with pytest.raises(InputError, match="not a complete result of bupo compare"):
        Comparison.parse({"schema": 1})
