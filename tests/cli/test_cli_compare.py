"""`bupo compare` as a user runs it, and its figure."""

import json

import pytest

from bupo.lens.compare import compare_models, measure_layers
from bupo.models.load import load_model
from bupo.report.inside_figures import comparison_figure
from bupo.report.results import Comparison
from tests.support.lens import moved, pairs
from tests.support.tiny import tiny_model


def test_as_a_user_runs_it(bupo, tmp_path, responses, tiny_folder):
    model, tokenizer = load_model(str(tiny_folder))
    trained, out, page = tmp_path / "run", tmp_path / "out", tmp_path / "page.html"
    moved(model).save_pretrained(trained / "model")
    tokenizer.save_pretrained(trained / "model")
    run = {"config": {"internal_steps": 3}, "result": {"internal_layer": 2}}
    (trained / "run.json").write_text(json.dumps(run))
    code, text, _ = bupo("compare", f"start={tiny_folder}", trained, "--responses", responses, "--output", out)
    assert code == 0
    assert "H(layer 2)" in " ".join(text.split())
    result = json.loads((out / "compare.json").read_text())
    assert [m["name"] for m in result["models"]] == ["start", "run"]
    assert result["layer"] == 2  # what the run trained
    assert {p.name for p in out.iterdir()} == {"compare.json", "inside.png", "inside.svg", "run.json"}
    assert bupo("report", out, "--output", page)[0] == 0
    assert "What training did inside" in page.read_text()
    assert "fig-inside1" in page.read_text()


@pytest.mark.parametrize(
    ("models", "options", "words"),
    [
        (["small"], ["--internal-layer", "2"], "two or more models"),
        (["small", "small"], ["--layer", "2"], "two models are named small"),
        (["small", "a=small"], [], "choose one with --layer"),
        (["small", "a=small"], ["--layer", "9"], "layer 9 does not exist"),
        (["small", "a=nowhere"], ["--layer", "2"], "nowhere"),
    ],
)
def test_wrong_arguments_are_refused(refused, tmp_path, responses, models, options, words):
    assert words in refused("compare", *models, "--responses", responses, *options, output=tmp_path / "out")


def test_many_models_are_drawn():
    model, rollouts = tiny_model(spread=3.0), pairs()
    readings = [(f"state {i} <b>", measure_layers(moved(model, 0.1 * i), rollouts, 2)) for i in range(7)]
    figure = comparison_figure(Comparison.parse(compare_models(readings)))
    assert len(figure.axes) == 4
