"""Trackers: what they get, read back from TensorBoard's event files; the entropy flow; gradient norms by group."""

from __future__ import annotations

import importlib.util
import json
import math
import struct

import pytest

from bupo.cli import main
from bupo.errors import InputError
from bupo.train import diagnostics
from bupo.train.callbacks import LogWriter
from bupo.train.diagnostics import GradientNorms, parameter_groups
from tests.cli.test_cli_train import recipe, rows, untimed  # noqa: F401  (one is a fixture)
from tests.support.tiny import tiny_model
from tests.support.training import make_trainer


def train(*arguments):
    return main(["train", *map(str, arguments)])


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


def test_tensorboard_gets_curves_and_the_entropy_flow(capsys, tmp_path, recipe):  # noqa: F811
    pytest.importorskip("tensorboard")
    folder = tmp_path / "run"
    assert train(recipe(report_to=["tensorboard"], flow_every=2), "--output", folder) == 0
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


def test_watching_changes_nothing(tmp_path, recipe, capsys):  # noqa: F811
    """The same weights and log with and without figures."""
    for name, every in (("plain", 0), ("watched", 1)):
        assert train(recipe(flow_every=every), "--output", tmp_path / name) == 0
    assert untimed(tmp_path / "plain") == untimed(tmp_path / "watched")
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


def test_a_model_that_cannot_be_analysed_ends_the_figures_not_the_run(tmp_path, recipe, monkeypatch, capsys):  # noqa: F811
    def refuse(*_, **__):
        raise InputError("this stream cannot be read")

    monkeypatch.setattr(diagnostics, "analyze_responses", refuse)
    assert train(recipe(flow_every=1), "--output", tmp_path / "run") == 0
    assert capsys.readouterr().err.count("no entropy flow: this stream cannot be read") == 1


def test_trackers_are_checked_before_anything_starts(tmp_path, recipe, capsys, monkeypatch):  # noqa: F811
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a))
    assert train(recipe(report_to=["wandb"]), "--output", tmp_path / "run") == 2
    message = "report_to wandb: the package is not installed (pip install wandb, or leave it out)"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("shown", [True, False])
def test_several_log_lines_per_rollout_batch(tmp_path, shown):
    """``logging_steps: 1`` used to show lines such as "rollout None/2  None"."""
    lines = []
    trainer = make_trainer(tmp_path, internal_steps=1, logging_steps=1)
    log = LogWriter(tmp_path / "log.jsonl", trainer, show=lines.append if shown else None, rollouts=2)
    trainer.add_callback(log)
    trainer.train()
    assert [(r["rollout"], r["phase"], r["layer"]) for r in rows(tmp_path)] == [(1, "internal", 2)] * 4 + [
        (2, "full", None)
    ] * 4
    assert [line.split("  ")[:2] for line in lines] == (
        [["rollout 1/2", "internal l=2"], ["rollout 2/2", "full"]] if shown else []
    )
