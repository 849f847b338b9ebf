"""Trackers: what they get, read back from TensorBoard's event files; the entropy flow; gradient norms by group."""

from __future__ import annotations

import json
import math
import struct

import pytest
import torch
import yaml

from bupo.cli import main
from bupo.errors import InputError
from bupo.train import diagnostics
from bupo.train.diagnostics import GradientNorms, check_trackers, parameter_groups
from tests.cli.test_cli_train import RECIPE, rows
from tests.support.tiny import tiny_model
from tests.support.training import make_trainer


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    def write(**changes):
        data = tmp_path / "sums.jsonl"
        data.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(6)))
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"model": str(tiny_folder), "dataset": str(data), **RECIPE, **changes}))
        return str(path)

    return write


def events(folder):
    """Scalars and images by tag, straight from the records of the event files (length, checksum, protobuf)."""
    event_pb2 = pytest.importorskip("tensorboard.compat.proto.event_pb2")
    found: dict[str, list] = {}
    for path in folder.rglob("events.out.tfevents.*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                if kind == "image":
                    found.setdefault(value.tag, []).append((event.step, value.image))
                elif value.tag.startswith("train/"):
                    number = value.simple_value if kind == "simple_value" else value.tensor.float_val[0]
                    found.setdefault(value.tag, []).append((event.step, number))
    return found


def test_tensorboard_gets_curves_and_the_entropy_flow(capsys, tmp_path, recipe):
    pytest.importorskip("tensorboard")
    folder = tmp_path / "run"
    arguments = ["--set", "report_to=[tensorboard]", "--set", "flow_every=2", "--output", str(folder)]
    assert main(["train", recipe(), *arguments]) == 0
    log, found = rows(folder), events(folder / "tensorboard")
    # what is in the log is what the tracker shows, at the same updates
    for name, tag in (
        ("internal_entropy", "train/internal/entropy"),
        ("internal/clip_ratio/region_mean", "train/internal/clip_ratio/region_mean"),
        ("grad_norm/layers_to_l", "train/grad_norm/layers_to_l"),
    ):
        wanted = [(row["step"], row[name]) for row in log if row.get(name) is not None]
        assert [step for step, _ in found[tag]] == [step for step, _ in wanted]
        assert [v for _, v in found[tag]] == pytest.approx([v for _, v in wanted], rel=1e-5)
    assert len(found["train/internal/entropy"]) == 2
    # above l there is a gradient in the second phase only
    above = [row["grad_norm/layers_above_l"] for row in log]
    assert above[:2] == [0, 0]
    assert min(above[2:]) > 0
    # the figure of the first and the third rollout batch, before their updates
    images = found["internal/entropy_flow"]
    assert [step for step, _ in images] == [0, 4]
    assert all(image.width > 600 and image.encoded_image_string.startswith(b"\x89PNG") for _, image in images)
    names = sorted(path.name for path in (folder / "flow").iterdir())
    assert names == [f"rollout-000{n}.{kind}" for n in (1, 3) for kind in ("json", "png", "svg")]
    first = json.loads((folder / "flow" / "rollout-0001.json").read_text())
    assert first["rollout"] == 1
    assert len(first["sites"]["layer_out"]) == 4
    assert first["tokens"] > 0


def test_watching_changes_nothing(tmp_path, recipe, capsys):
    """The same weights and log with and without figures."""
    for name, more in (("plain", []), ("watched", ["--set", "flow_every=1"])):
        assert main(["train", recipe(), "--output", str(tmp_path / name), *more]) == 0
    kept = [
        [{k: v for k, v in row.items() if k not in ("seconds", "step_time")} for row in rows(tmp_path / name)]
        for name in ("plain", "watched")
    ]
    assert kept[0] == kept[1]
    assert len(list((tmp_path / "watched" / "flow").glob("*.json"))) == 4
    assert not (tmp_path / "plain" / "flow").exists()


def test_groups_are_all_trainable_parameters_once():
    for tied in (True, False):
        model = tiny_model("qwen3", tie_word_embeddings=tied)
        for layer in (None, 1, 4):
            groups = parameter_groups(model, layer)
            grouped = [id(p) for parameters in groups.values() for p in parameters]
            assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert set(groups) == {"embedding", "layers_to_l", "layers_above_l", "head"}
    assert groups["layers_above_l"] == []


def test_squares_add_up_to_the_gradient_norm_before_clipping(tmp_path):
    trainer = make_trainer(tmp_path, internal_steps=1, max_steps=4, updates_per_rollout=2, max_grad_norm=1e-3)
    trainer.add_callback(GradientNorms(trainer))
    seen = []
    trainer.log = lambda logs, *_: seen.append({**logs, **{k: v[:] for k, v in trainer._metrics["train"].items()}})
    trainer.train()
    checked = [row for row in seen if "grad_norm" in row]
    assert checked
    last = checked[-1]
    parts = {k: v[-1] for k, v in last.items() if k.startswith("grad_norm/")}
    assert set(parts) == {f"grad_norm/{n}" for n in ("embedding", "layers_to_l", "layers_above_l", "head")}
    assert math.sqrt(sum(v**2 for v in parts.values())) == pytest.approx(last["grad_norm"], rel=1e-4)
    assert last["grad_norm"] > 1e-3  # clipping acted


def test_what_cannot_be_analysed_ends_the_figures_not_the_run(tmp_path, recipe, monkeypatch, capsys):
    def refuse(*_, **__):
        raise InputError("this stream cannot be read")

    monkeypatch.setattr(diagnostics, "analyze_responses", refuse)
    assert main(["train", recipe(), "--output", str(tmp_path / "run"), "--set", "flow_every=1"]) == 0
    assert capsys.readouterr().err.count("no entropy flow: this stream cannot be read") == 1


def test_trackers_are_checked_before_anything_starts(tmp_path, recipe, capsys, monkeypatch):
    find = diagnostics.importlib.util.find_spec
    monkeypatch.setattr(
        diagnostics.importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a)
    )
    assert main(["train", recipe(report_to=["wandb"]), "--output", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "report_to wandb: the package is not installed (pip install wandb, or leave it out)" in err
    assert not (tmp_path / "run").exists()
    assert main(["train", recipe(report_to=["mlflow"]), "--output", str(tmp_path / "run")]) == 2
    assert "report_to must be one of tensorboard, trackio or wandb, not 'mlflow'" in capsys.readouterr().err
    check_trackers([])
    assert torch.is_grad_enabled()
