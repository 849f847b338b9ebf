"""What a run shows beside its log: trackers, the entropy flow, gradient norms by group, and readings of its inside."""

import importlib.util
import math

import pytest
import torch

from bupo.cli import main
from bupo.data.rollouts import read_responses
from bupo.errors import InputError
from bupo.lens.compare import compare_models, measure_layers
from bupo.models.load import load_model
from bupo.run_folder import read_json
from bupo.train import diagnostics
from bupo.train.diagnostics import parameter_groups
from tests.cli.test_cli_train import recipe, rows  # noqa: F401  (one is a fixture)
from tests.support.tiny import tiny_model
from tests.support.training import INTERRUPT_IN_ROLLOUT


@pytest.fixture
def train(tmp_path, recipe):  # noqa: F811
    """Train a recipe with changes in a folder of this name; the folder."""

    def train(name, *, code=0, **changes):
        arguments = ["--resume"] if changes.pop("resume", False) else [str(recipe(**changes))]
        assert main(["train", *arguments, "--output", str(tmp_path / name)]) == code
        return tmp_path / name

    return train


def events(folder):
    """Scalars and images by tag, with the step of each."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = module.EventAccumulator(str(folder), {"scalars": 0, "images": 0}).Reload()
    scalars = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    return scalars | {tag: [(e.step, e) for e in read.Images(tag)] for tag in read.Tags()["images"]}


def readings(folder):
    return [read_json(path) for path in sorted((folder / "inside").glob("after-*.json"))]


def test_tensorboard_gets_curves_and_the_entropy_flow(train, capsys):
    pytest.importorskip("tensorboard")
    settings = {"report_to": ["tensorboard"], "flow_every": 2, "trl": {"logging_steps": 1, "max_grad_norm": 1e-3}}
    folder = train("run", **settings)
    log, found = rows(folder), events(folder / "tensorboard")
    # several rows per rollout batch; its line is shown once (``logging_steps: 1`` used to show "rollout None/2  None")
    batches = [(1, "internal", 2), (2, "internal", 2), (3, "full", None), (4, "full", None)]
    assert [(r["rollout"], r["phase"], r["layer"]) for r in log] == [batch for batch in batches for _ in range(2)]
    shown = [line.split("  ")[:2] for line in capsys.readouterr().err.splitlines() if line.startswith("rollout")]
    assert shown == [[f"rollout {n}/4", f"{phase} l=2" if layer else phase] for n, phase, layer in batches]
    # what is in the log is what the tracker shows, at the same updates
    for name in ("internal/entropy", "internal/clip_ratio/region_mean", "grad_norm/layers_to_l"):
        column = {"internal/entropy": "internal_entropy"}.get(name, name)
        wanted = [(row["step"], row[column]) for row in log if row.get(column) is not None]
        assert [step for step, _ in found[f"train/{name}"]] == [step for step, _ in wanted]
        assert [v for _, v in found[f"train/{name}"]] == pytest.approx([v for _, v in wanted], rel=1e-5)
    assert len(found["train/internal/entropy"]) == 4
    # squares add up to the gradient norm before clipping, which acted; above l there is a gradient after the phase only
    for row in log:
        parts = [row[f"grad_norm/{part}"] for part in ("embedding", "layers_to_l", "layers_above_l", "head")]
        assert math.hypot(*parts) == pytest.approx(row["grad_norm"], rel=1e-4)
        assert row["grad_norm"] > 1e-3
        assert (row["grad_norm/layers_above_l"] > 0) == (row["phase"] == "full")
    # the figure of the first and the third rollout batch, before their updates
    images = found["internal/entropy_flow"]
    assert [step for step, _ in images] == [0, 4]
    assert all(image.width > 600 and image.encoded_image_string.startswith(b"\x89PNG") for _, image in images)
    names = sorted(path.name for path in (folder / "flow").iterdir())
    assert names == [f"rollout-000{n}.{kind}" for n in (1, 3) for kind in ("json", "png", "svg")]
    first = read_json(folder / "flow" / "rollout-0001.json")
    assert (first["rollout"], len(first["sites"]["layer_out"]), first["tokens"] > 0) == (1, 4, True)


def test_groups_are_all_trainable_parameters_once():
    for tied in (True, False):
        model = tiny_model("qwen3", tie_word_embeddings=tied)
        for layer in (None, 1, 4):
            groups = parameter_groups(model, layer)
            grouped = [id(p) for parameters in groups.values() for p in parameters]
            assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert set(groups) == {"embedding", "layers_to_l", "layers_above_l", "head"}
    assert groups["layers_above_l"] == []


def test_readings_change_nothing_and_are_those_of_compare(train, tiny_folder, tmp_path):
    plain, watched = train("plain"), train("watched", inside_every=2, flow_every=1)
    without = [{k: v for k, v in row.items() if not k.startswith("inside/")} for row in rows(watched)]
    assert without == rows(plain)
    assert len(list((watched / "flow").glob("*.json"))) == 4
    assert not (plain / "flow").exists()
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


@pytest.mark.slow
def test_a_resumed_run_reads_the_same(train):
    whole = train("whole", inside_every=1)
    INTERRUPT_IN_ROLLOUT[:] = [2, 0]
    try:
        again = train("again", code=130, inside_every=1, reward="tests.support.training:digits_then_interrupt")
    finally:
        INTERRUPT_IN_ROLLOUT[0] = 0
    assert not (again / "inside" / "after-0004.json").exists()
    train("again", resume=True)
    names = sorted(p.name for p in (whole / "inside").iterdir())
    assert names == sorted(p.name for p in (again / "inside").iterdir())
    for name in (name for name in names if name.endswith((".json", ".jsonl", ".npy"))):
        assert (whole / "inside" / name).read_bytes() == (again / "inside" / name).read_bytes(), name


def test_a_model_that_cannot_be_read_ends_the_readings_not_the_run(train, monkeypatch, capsys):
    def refuse(*_, **__):
        raise InputError("this stream cannot be read")

    monkeypatch.setattr(diagnostics, "analyze_responses", refuse)
    changes = {"internal_layer": None, "internal_steps": 0, "inside_every": 4, "inside_layer": 1}  # plain GRPO
    folder = train("run", flow_every=1, **changes)
    assert capsys.readouterr().err.count("no entropy flow: this stream cannot be read") == 1
    assert [(r["layer"], r["rollouts_done"]) for r in readings(folder)] == [(1, 0), (1, 4)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inside_every": 1, "inside_layer": 9}, "layer 9 does not exist"),
        ({"inside_every": 1, "inside_responses": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"report_to": ["wandb"]}, "wandb: the package is not installed (pip install wandb, or leave it out)"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_anything_is_written(train, monkeypatch, capsys, changes, message):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a))
    assert not train("run", code=2, **changes).exists()
    assert message in capsys.readouterr().err
