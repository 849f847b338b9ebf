"""Readings of `bupo compare` during training: they change nothing, and a resumed run's are the undisturbed run's."""

from __future__ import annotations

import pytest
import torch

from bupo.cli import main
from bupo.data.rollouts import read_responses
from bupo.lens.compare import compare_models, measure_layers
from bupo.models.load import load_model
from bupo.report.results import read_json
from tests.cli.test_cli_train import recipe, rows, untimed  # noqa: F401  (one is a fixture)
from tests.support.training import INTERRUPT_IN_ROLLOUT


def train(*arguments):
    return main(["train", *map(str, arguments)])


def readings(folder):
    return [read_json(path) for path in sorted((folder / "inside").glob("after-*.json"))]


def test_readings_change_nothing_and_are_those_of_compare(tmp_path, recipe, tiny_folder, capsys):  # noqa: F811
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    assert train(recipe(), "--output", plain) == 0
    assert train(recipe(inside_every=2), "--output", watched) == 0
    without = [{k: v for k, v in row.items() if not k.startswith("inside/")} for row in untimed(watched)]
    assert without == untimed(plain)
    found = readings(watched)
    assert [reading["rollouts_done"] for reading in found] == [0, 2, 4]
    # the log has what the files have, in the rows of the rollout batches that began with a reading
    logged = {row["rollout"]: row["inside/perplexity"] for row in rows(watched) if row.get("inside/perplexity")}
    assert logged == {1: found[0]["perplexity"]["value"], 3: pytest.approx(found[1]["perplexity"]["value"])}
    # `bupo compare` of the start and the final model measures the same
    measured = []
    for name, path in (("start", tiny_folder), ("end", watched / "model")):
        model, tokenizer = load_model(str(path), dtype="float32", device="cpu")
        responses = read_responses(watched / "inside" / "responses.jsonl", tokenizer)
        measured.append((name, measure_layers(model, responses, found[0]["layer"], tokens=512)))
    item = compare_models(measured)["models"][1]
    for part in ("entropy", "divergence", "cosine_of_layer"):
        for kind in ("mean", "standard_error"):
            ours, theirs = (torch.tensor(one[part][kind]) for one in (found[-1], item))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    ratios = [one["change"]["perplexity_ratio"]["value"] for one in (found[-1], item)]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-4)
    assert found[0]["change"]["perplexity_ratio"] == {"value": 1.0, "standard_error": 0.0}
    page = tmp_path / "report.html"
    assert main(["report", str(watched), "--output", str(page)]) == 0
    assert "What training did inside" in page.read_text()


def test_a_resumed_run_reads_the_same(tmp_path, recipe, capsys):  # noqa: F811
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert train(recipe(inside_every=1), "--output", whole) == 0
    INTERRUPT_IN_ROLLOUT[:] = [2, 0]
    stopped = recipe(inside_every=1, reward="tests.support.training:digits_then_interrupt")
    try:
        assert train(stopped, "--output", again) == 130
    finally:
        INTERRUPT_IN_ROLLOUT[0] = 0
    assert not (again / "inside" / "after-0004.json").exists()
    assert train("--resume", "--output", again) == 0
    names = sorted(p.name for p in (whole / "inside").iterdir())
    assert names == sorted(p.name for p in (again / "inside").iterdir())
    for name in (name for name in names if name.endswith((".json", ".jsonl", ".npy"))):
        assert (whole / "inside" / name).read_bytes() == (again / "inside" / name).read_bytes(), name


def test_plain_grpo_is_read_at_a_layer_of_its_own(tmp_path, recipe, capsys):  # noqa: F811
    changes = {"internal_layer": None, "internal_steps": 0, "inside_every": 4, "inside_layer": 1}
    assert train(recipe(**changes), "--output", tmp_path / "run") == 0
    assert [(r["layer"], r["rollouts_done"]) for r in readings(tmp_path / "run")] == [(1, 0), (1, 4)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inside_layer": 2}, "inside_layer and inside_responses need inside_every"),
        ({"inside_every": 1, "internal_layer": None, "internal_steps": 0}, "inside_every needs a layer"),
        ({"inside_every": 1, "inside_layer": 9}, "layer 9 does not exist"),
        ({"inside_every": 1, "inside_responses": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_read_is_refused_before_anything_is_written(tmp_path, recipe, capsys, changes, message):  # noqa: F811
    assert train(recipe(**changes), "--output", tmp_path / "run") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
