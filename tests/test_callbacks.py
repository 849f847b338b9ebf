"""Readings in other trainers: the same weights as without them, in the log, in trackers, in files and in the report."""

import copy
import json
from functools import partial

import pytest
import torch
from transformers import TrainerCallback

from bupo.callbacks import LayerReadings
from bupo.cli import main
from bupo.errors import InputError
from bupo.lens.analyze import AnalysisOptions, analyze_rollouts
from bupo.lens.compare import compare_models, measure_layers
from bupo.run_folder import read_json
from tests.support.lens import pairs, random_lens
from tests.support.other_trainers import KINDS, trainer_of, two_processes
from tests.support.processes import launch
from tests.support.tiny import tiny_model
from tests.support.training import same_weights, weights
from tests.support.zoo_checks import stream
from tests.train.test_diagnostics import events

QUANTITIES = ("entropy", "ffn_entropy_change", "kl", "top1", "drift")


def train(kind, folder, callbacks=(), **changes):
    trainer = trainer_of(kind, folder, callbacks, **changes)
    trainer.train()
    return trainer


def rows(trainer):
    """The rows of the readings, and the others without what depends on time."""
    log = [{k: v for k, v in row.items() if "runtime" not in k and "second" not in k and "time" not in k}
           for row in trainer.state.log_history]  # fmt: skip
    return [row for row in log if "layer_kl/01" in row], [row for row in log if "layer_kl/01" not in row]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
def test_readings_are_logged_and_change_nothing(kind, lora, tmp_path):
    """Under gradient checkpointing and dropout, which draws random numbers at every update."""
    plain = train(kind, tmp_path / "plain", lora=lora)
    watched = train(kind, tmp_path / "watched", [LayerReadings(pairs(), every=2)], lora=lora)
    assert same_weights(weights(plain.model), weights(watched.model))
    read, others = rows(watched)
    assert others == rows(plain)[1]
    assert [row["step"] for row in read] == [0, 2, 3]  # at the start, every second update, at the end
    folder = tmp_path / "watched" / "layer_readings"
    for row in read:
        name = f"after-{row['step']:04d}.json"
        analysis, inside = read_json(folder / "analysis" / name), read_json(folder / "inside" / name)
        curves = analysis["layer_choice"]["curves"]["norm"]
        wanted = [analysis["sites"]["layer_out"], analysis["entropy_change"]["ffn"], curves["kl"], curves["top1"]]
        for quantity, values in zip(QUANTITIES, [*wanted, inside["drift"]["mean"]], strict=True):
            assert [row[f"layer_{quantity}/{n:02d}"] for n in range(1, 5)] == values
    assert all(read[0][f"layer_drift/{n:02d}"] == 0 < read[-1][f"layer_drift/{n:02d}"] for n in range(1, 5))
    # the last reading is what the finished model gives
    options = AnalysisOptions(layer_choice=True, choice_tokens=256, lenses=["norm"])
    again = analyze_rollouts(watched.model, pairs(), max_tokens=256, options=options)
    assert read_json(folder / "analysis.json") == {**json.loads(json.dumps(again)), "updates": 3}


@pytest.mark.slow
def test_two_processes_train_the_same_with_readings(tmp_path):
    launch(2, two_processes, tmp_path)
    for kind in KINDS:
        first, second = (json.loads((tmp_path / f"{kind}-{rank}.json").read_text()) for rank in range(2))
        assert first["same"] is second["same"] is True
        assert first["read"] == second["read"]
        assert [row["step"] for row in first["read"]] == [0, 2, 3]


def test_a_tracker_and_the_report_get_every_layer(tmp_path):
    pytest.importorskip("tensorboard")
    trainer = trainer_of("sft", tmp_path, [LayerReadings(pairs(), every=2)], report_to=["tensorboard"])
    trainer.train()
    (folder,) = (tmp_path / "runs").iterdir()
    found, (read, _) = events(folder), rows(trainer)
    for quantity in QUANTITIES:
        for tag in (f"layer_{quantity}/{n:02d}" for n in range(1, 5)):
            assert found[f"train/{tag}"] == [(row["step"], pytest.approx(row[tag], rel=1e-5)) for row in read]
    page = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "layer_readings"), "--output", str(page)]) == 0
    for shown in ("What training did inside", "Drift of the states since the start", "Agreement with the output"):
        assert shown in page.read_text()


def test_a_resumed_run_reads_on_from_its_start(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    readings = partial(LayerReadings, pairs(), every=1, lens=random_lens(), layer=3)
    train("trainer", tmp_path / "whole", [readings()], **settings)
    train("trainer", tmp_path / "again", [readings()], **settings)
    again = tmp_path / "again" / "layer_readings"
    (again / "inside" / "after-0009.json").write_text("of a run that was given up")
    rest = trainer_of("trainer", tmp_path / "again", [readings()], **settings)
    rest.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-2"))
    whole = tmp_path / "whole" / "layer_readings"
    names = sorted(p.relative_to(whole) for p in whole.rglob("*.*") if p.name != "run.json")
    assert names == sorted(p.relative_to(again) for p in again.rglob("*.*") if p.name != "run.json")
    assert all((whole / name).read_bytes() == (again / name).read_bytes() for name in names)
    other = trainer_of("trainer", tmp_path / "again", [LayerReadings(pairs()[:2], layer=3)], **settings)
    with pytest.raises(InputError, match="holds readings of other responses"):
        other.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-2"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"layer": 5}, "layer 5 does not exist"), ({"layer": 0}, "layer 0 does not exist"),
     ({"responses": "nowhere.jsonl"}, "nowhere.jsonl"), ({"responses": [([1], [97])]}, "token id 97"),
     ({"lens": "nowhere"}, "nowhere holds no lens"), ({"every": 0}, "every must be a whole number of at least 1")],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_before_the_first_update(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train("trainer", tmp_path, [LayerReadings(**{"responses": pairs(), **changes})])
    assert not (tmp_path / "layer_readings").exists()


class Spoil(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step == 1:
            model.lm_head.weight.data.fill_(float("nan"))


def test_a_model_that_breaks_ends_the_readings_not_the_run(tmp_path):
    with pytest.warns(UserWarning, match="no more layer readings after update 2: .*non-finite"):
        trainer = train("trainer", tmp_path, [Spoil(), LayerReadings(pairs(), every=2)])
    assert trainer.state.global_step == 3
    assert [row["step"] for row in rows(trainer)[0]] == [0]


def test_drift_is_one_minus_the_cosine_of_the_same_token():
    model = tiny_model(spread=3.0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight.mul_(2)
    measured = [(name, measure_layers(one, pairs(), 1, keep_states=True)) for name, one in (("a", model), ("b", other))]
    same, changed = (item["drift"] for item in compare_models(measured)["models"])
    assert same["mean"] == same["standard_error"] == [0, 0, 0, 0]
    states = []
    for one in (model, other):
        ids = [(torch.tensor([[*p.prompt_ids, *p.response_ids]]), len(p.prompt_ids) - 1) for p in pairs()]
        parts = [torch.stack(stream(one, row)["layer"])[:, 0, first:-1] for row, first in ids]
        states.append(torch.cat(parts, dim=1).double())
    wanted = (1 - torch.cosine_similarity(*states, dim=-1)).mean(-1)
    assert changed["mean"] == pytest.approx(wanted.tolist(), abs=1e-5)
    assert changed["mean"][:2] == [0, 0] < changed["mean"][2:]
