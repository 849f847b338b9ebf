"""Checkpoints: saved between rollout batches, complete or not used, and exact when resumed."""

import json

import pytest
import torch

from bupo.errors import ConfigError, InputError
from bupo.train import trainer as trainer_module
from bupo.train.checkpoint import STATE_FILE, fill_optimizer_state, last_checkpoint, rotate, write_state
from bupo.train.diagnostics import LayerChoice
from tests.support.training import make_trainer, prompts, resumed, same_weights, trained, weights
from tests.support.zoo import zoo_model

SAVING = {"save_strategy": "steps", "save_steps": 2, "updates_per_rollout": 2}
RESUME = [
    {},
    {"gradient_accumulation_steps": 2, "num_iterations": 2, "updates_per_rollout": 2},
    {"lr_scheduler_type": "linear", "internal_lens": "norm"},
    {"internal_lens": "ridge", "internal_lens_tokens": 40, "internal_lens_refit": 2, "internal_steps": 3},
    {"phases": [{"layer": 1, "rollouts": 1, "weight": 0.5}, {"layer": 3, "rollouts": 1}], "internal_steps": None},
]


@pytest.mark.parametrize("settings", RESUME)
@pytest.mark.parametrize("at", [1, 2, 3], ids=["internal", "switch", "full"])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, settings, at):
    updates = 2 * settings.get("num_iterations", 1)
    settings = {**SAVING, "internal_steps": 2, "max_steps": 4 * updates, "save_steps": updates, **settings}
    # several passes over the data, begun before, with, or after the resumed run
    batch = 2 * settings.get("gradient_accumulation_steps", 1)
    data = prompts(batch * (3 if at < 3 else 2))
    whole = trained(tmp_path / "whole", train_dataset=data, **settings)
    resumed(tmp_path / "rest", whole, at * updates, train_dataset=data, **settings)


def test_a_resumed_run_keeps_the_layer_that_auto_found(tmp_path, monkeypatch):
    settings = {**SAVING, "internal_layer": "auto", "internal_steps": 3}
    monkeypatch.setattr(trainer_module, "choose_layer", lambda *_: LayerChoice(3, "because"))
    whole = trained(tmp_path, **settings)
    named = trained(tmp_path / "named", **{**settings, "internal_layer": 3})
    assert same_weights(weights(whole.model), weights(named.model))
    monkeypatch.setattr(trainer_module, "choose_layer", lambda *_: LayerChoice(1, "another"))
    assert resumed(tmp_path, whole, 2, **settings).schedule.layers == (3,)
    # the state of a finished run can be read without training
    finished = make_trainer(tmp_path, **settings)
    finished.checkpointer.restore(tmp_path / "checkpoint-8")
    assert (finished.schedule, finished.rollout) == (whole.schedule, 4)


def test_saves_move_to_the_end_of_the_rollout_batch(tmp_path):
    trained(tmp_path, internal_steps=1, max_steps=11, save_strategy="steps", save_steps=3)
    paths = {int(p.name.split("-")[1]): p for p in tmp_path.glob("checkpoint-*")}
    states = {number: json.loads((path / STATE_FILE).read_text()) for number, path in paths.items()}
    assert sorted(states) == [4, 8, 11]  # 11: the end of training, in the middle of a rollout batch
    assert {step: state["between_rollouts"] for step, state in states.items()} == {4: True, 8: True, 11: False}
    assert states[4]["phases"] == [{"layer": 2, "rollouts": 1, "weight": 1.0}]
    assert states[8]["micro_batch"] == 8
    again = make_trainer(tmp_path, internal_steps=1, max_steps=16)
    with pytest.raises(InputError, match="middle of a rollout batch"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-11"))


def test_incomplete_or_foreign_checkpoints_are_refused(tmp_path):
    settings = {"internal_steps": 1, "save_strategy": "steps", "save_steps": 4}
    trained(tmp_path, **settings)
    assert last_checkpoint(tmp_path).name == "checkpoint-8"
    (tmp_path / "checkpoint-8" / STATE_FILE).unlink()
    assert last_checkpoint(tmp_path).name == "checkpoint-4"
    assert last_checkpoint(tmp_path / "nothing") is None
    with pytest.raises(InputError, match="checkpoint-8 cannot be resumed"):
        make_trainer(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    other = make_trainer(tmp_path, **{**settings, "internal_steps": 2, "seed": 4, "gae_lambda": 1.0})
    with pytest.raises(ConfigError) as error:
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [problem.split(": ")[1].split(" was")[0] for problem in error.value.problems] == ["phases", "seed"]


def checkpoint(folder, number, complete=True):
    path = folder / f"checkpoint-{number}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text("weights")
    if complete:
        write_state(path, {"between_rollouts": True})
    return path


def numbers(folder):
    return sorted(int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*"))


def test_rotation_counts_updates_and_complete_checkpoints_only(tmp_path):
    checkpoint(tmp_path, 6, complete=False)  # killed while it was written or removed
    rotate(tmp_path, 2)
    assert numbers(tmp_path) == [6]  # without a complete checkpoint nothing is removed
    for number in (12, 8, 10, 4):  # times of change in another order than the updates
        checkpoint(tmp_path, number)
    checkpoint(tmp_path, 14, complete=False)  # being written
    rotate(tmp_path, 2)
    assert numbers(tmp_path) == [10, 12, 14]
    assert last_checkpoint(tmp_path).name == "checkpoint-12"
    rotate(tmp_path, 1, best=str(tmp_path / "checkpoint-10"))
    assert numbers(tmp_path) == [10, 12, 14]


def test_a_checkpoint_is_incomplete_as_soon_as_its_removal_begins(tmp_path, monkeypatch):
    for number in (2, 4):
        checkpoint(tmp_path, number)
    monkeypatch.setattr("bupo.train.checkpoint.shutil.rmtree", lambda *_, **__: None)  # as if killed there
    rotate(tmp_path, 1)
    assert numbers(tmp_path) == [2, 4]
    assert not (tmp_path / "checkpoint-2" / STATE_FILE).exists()


@pytest.mark.parametrize(
    "make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9)], ids=["adamw", "sgd"]
)
def test_filled_optimizer_state_changes_no_update(make):
    runs = []
    for fill in (False, True):
        torch.manual_seed(0)
        lower, upper = torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))
        optimizer = make([lower, upper])
        for step in range(4):
            optimizer.zero_grad()
            ((lower**2).sum() + ((upper**3).sum() if step >= 2 else 0)).backward()
            optimizer.step()
            if fill and step == 1:
                fill_optimizer_state(optimizer)
                assert optimizer.state[upper]
        runs.append((lower.detach(), upper.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_an_optimizer_with_other_shapes_is_refused():
    lower, upper = torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(3, 2))
    optimizer = torch.optim.Adafactor([lower, upper])
    lower.sum().backward()
    optimizer.step()
    with pytest.raises(ConfigError, match="needs AdamW or SGD: the state of Adafactor"):
        fill_optimizer_state(optimizer)


def test_weights_that_checkpoints_hold_under_other_names_are_loaded(tmp_path):
    """transformers saves experts one by one; its trainer would go on with those in memory."""
    settings = {"internal_steps": 1, "max_steps": 4, "updates_per_rollout": 2, "save_strategy": "steps"}
    settings |= {"save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "eval_dataset": prompts(4)}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "greater_is_better": True}
    settings |= {"per_device_eval_batch_size": 4}
    whole = trained(tmp_path / "whole", model=zoo_model("mixtral"), **settings)
    rest = make_trainer(tmp_path / "rest", model=zoo_model("mixtral", spread=2.0), **settings)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same_weights(weights(whole.model), weights(rest.model))
    best = type(whole.model).from_pretrained(whole.state.best_model_checkpoint)
    assert same_weights(weights(whole.model), weights(best))
