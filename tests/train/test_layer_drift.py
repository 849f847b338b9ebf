"""Readings while training goes on: they change nothing, a resumed run's are the undisturbed run's."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from bupo.cli import main
from bupo.data.rollouts import read_responses
from bupo.errors import InputError
from bupo.lens.compare import compare_models, measure_layers
from bupo.models.load import load_model
from bupo.report.inside_figures import training_figure
from bupo.report.results import TrainingReading, load_readings, read_json
from tests.cli.test_cli_train import RECIPE, rows
from tests.support.training import INTERRUPT_IN_ROLLOUT


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    def write(**changes):
        data = tmp_path / "sums.jsonl"
        data.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(6)))
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"model": str(tiny_folder), "dataset": str(data), **RECIPE, **changes}))
        return str(path)

    return write


def kept(folder):
    return [{k: v for k, v in row.items() if k not in ("seconds", "step_time")} for row in rows(folder)]


def test_readings_change_nothing_and_are_those_of_compare(tmp_path, recipe, tiny_folder, capsys):
    assert main(["train", recipe(), "--output", str(tmp_path / "plain")]) == 0
    watched = tmp_path / "watched"
    assert main(["train", recipe(inside_every=2), "--output", str(watched)]) == 0
    without = [{k: v for k, v in row.items() if not k.startswith("inside/")} for row in kept(watched)]
    assert without == kept(tmp_path / "plain")
    found = [read_json(path) for path in sorted((watched / "inside").glob("after-*.json"))]
    assert [reading["rollouts_done"] for reading in found] == [0, 2, 4]
    assert (watched / "inside" / "inside.png").stat().st_size > 10_000
    # the log has what the files have, in the rows of the rollout batches that began with a reading
    logged = {row["rollout"]: row["inside/perplexity"] for row in rows(watched) if row.get("inside/perplexity")}
    assert logged == {1: found[0]["perplexity"]["value"], 3: pytest.approx(found[1]["perplexity"]["value"])}
    # and `bupo compare` of the start and the final model says the same
    layer = found[0]["layer"]
    readings = []
    for name, path in (("start", tiny_folder), ("end", watched / "model")):
        model, tokenizer = load_model(str(path), dtype="float32", device="cpu")
        rollouts = read_responses(watched / "inside" / "responses.jsonl", tokenizer)
        readings.append((name, measure_layers(model, rollouts, layer, tokens=512)))
    item = compare_models(readings)["models"][1]
    for part in ("entropy", "divergence", "cosine_of_layer"):
        for kind in ("mean", "standard_error"):
            torch.testing.assert_close(
                torch.tensor(found[-1][part][kind]), torch.tensor(item[part][kind]), rtol=1e-4, atol=2e-5
            )
    assert found[-1]["change"]["perplexity_ratio"]["value"] == pytest.approx(
        item["change"]["perplexity_ratio"]["value"], rel=1e-4
    )
    assert found[0]["change"]["perplexity_ratio"] == {"value": 1.0, "standard_error": 0.0}


def test_a_resumed_run_reads_the_same(tmp_path, recipe, capsys):
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert main(["train", recipe(inside_every=1), "--output", str(whole)]) == 0
    INTERRUPT_IN_ROLLOUT[:] = [2, 0]
    stopped = recipe(inside_every=1, reward="tests.support.training:digits_then_interrupt")
    try:
        assert main(["train", stopped, "--output", str(again)]) == 130
    finally:
        INTERRUPT_IN_ROLLOUT[0] = 0
    assert not (again / "inside" / "after-0004.json").exists()
    assert main(["train", "--resume", "--output", str(again)]) == 0
    names = sorted(p.name for p in (whole / "inside").iterdir())
    assert names == sorted(p.name for p in (again / "inside").iterdir())
    for name in (name for name in names if name.endswith((".json", ".jsonl", ".npy"))):
        assert (whole / "inside" / name).read_bytes() == (again / "inside" / name).read_bytes(), name


def test_plain_grpo_is_read_at_a_layer_of_its_own(tmp_path, recipe, capsys):
    folder = tmp_path / "run"
    wanted = recipe(internal_layer=None, internal_steps=0, inside_every=4, inside_layer=1)
    assert main(["train", wanted, "--output", str(folder)]) == 0
    assert [(r.layer, r.rollouts_done) for r in load_readings(folder / "inside")] == [(1, 0), (1, 4)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"inside_layer": 2}, "inside_layer and inside_responses need inside_every"),
        ({"inside_every": 1, "internal_layer": None, "internal_steps": 0}, "inside_every needs a layer"),
        ({"inside_every": 1, "inside_layer": 9}, "layer 9 does not exist"),
        ({"inside_every": 1, "inside_responses": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_read_is_refused_before_anything_is_written(tmp_path, recipe, capsys, changes, says):
    folder = tmp_path / "run"
    assert main(["train", recipe(**changes), "--output", str(folder)]) == 2
    assert says in capsys.readouterr().err
    assert not folder.exists()


def test_the_report_shows_runs_over_training(tmp_path, recipe, capsys):
    for name, steps in (("bupo", 2), ("grpo", 0)):
        assert main(["train", recipe(inside_every=2, internal_steps=steps), "--output", str(tmp_path / name)]) == 0
    page = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "bupo"), str(tmp_path / "grpo"), "--output", str(page)]) == 0
    text = page.read_text()
    assert "What training did inside" in text
    assert "over the rollout batches of grpo, bupo" in text


def test_a_broken_reading_is_named(tmp_path):
    (tmp_path / "after-0001.json").write_text('{"schema": 2}')
    with pytest.raises(InputError, match=r"after-0001\.json is not a complete result"):
        load_readings(tmp_path)
    (tmp_path / "after-0001.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        load_readings(tmp_path)


def test_the_figure_averages_the_top_quarter():
    def reading(done: int) -> TrainingReading:
        numbers = {"mean": [0.1 * i for i in range(8)], "standard_error": [0.01] * 8}
        later = {"mean": [1.0] * 7, "standard_error": [0.1] * 7}
        content = {
            "schema": 1, "rollouts_done": done, "layer": 2, "layers": 8,
            "perplexity": {"value": 2.0, "standard_error": 0.1},
            "entropy": numbers, "cosine_of_layer": numbers, "divergence": later,
        }  # fmt: skip
        return TrainingReading.parse(content)

    figure = training_figure([("one", [reading(0), reading(4)], 2.0)])
    cosine, entropy, perplexity, divergence = figure.axes
    assert list(cosine.lines[0].get_ydata()) == pytest.approx([0.65, 0.65])  # layers 7 and 8
    assert list(entropy.lines[0].get_ydata()) == pytest.approx([0.1, 0.1])
    assert list(perplexity.lines[0].get_xdata()) == [0, 4]
    assert len(divergence.lines) == 3  # output, next layer, the switch
