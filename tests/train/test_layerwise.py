"""Comparison methods: frozen lower layers, and a smaller learning rate for upper layers."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from bupo.errors import ConfigError
from bupo.train import trainer as trainer_module
from bupo.train.auto_layer import LayerChoice
from bupo.train.build import check_recipe
from bupo.train.layerwise import split_groups
from bupo.train.trainer import BuPOTrainer, TrainingStopped
from tests.support.tiny import tiny_model
from tests.support.training import config, losses, make_trainer, prompts, same_weights, tiny_tokenizer, weights

L = 4
SCALED = {"upper_learning_rate_scale": 0.1, "upper_learning_rate_above": 2}


def lower(name, layer):
    return any(f"layers.{k}." in name for k in range(layer))


def upper(name, layer):
    return any(f"layers.{k}." in name for k in range(layer, L)) or name.endswith("model.norm.weight")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_layers_and_nothing_else_stay(tmp_path, tied, checkpointing):
    model = tiny_model("qwen3", spread=3.0, tie_word_embeddings=tied)
    trainer = make_trainer(
        tmp_path, model=model, frozen_layers=2, max_steps=4, weight_decay=0.1, gradient_checkpointing=checkpointing
    )
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    for name in before:
        assert torch.equal(before[name], after[name]) == lower(name, 2), name
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for n, p in trainer.model.named_parameters() if not lower(n, 2)}


def test_frozen_layers_below_an_internal_phase(tmp_path):
    trainer = make_trainer(tmp_path, frozen_layers=1, internal_layer=3, internal_steps=1, max_steps=4)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if not lower(name, 1) and not upper(name, 3)}


def test_with_lora_the_adapters_of_those_layers_are_frozen(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trainer = make_trainer(tmp_path, frozen_layers=3, peft_config=lora, max_steps=4)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "lora" in name and "layers.3." in name}


class FirstUpdate(TrainerCallback):
    """The step of every parameter in the first update, and its gradient."""

    def __init__(self):
        self.found = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.found is None:
            self.start = weights(model)
            self.found = {}

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.found:
            self.found = {name: value - self.start[name] for name, value in weights(model).items()}


def test_upper_layers_take_steps_of_the_scaled_length(tmp_path):
    found = []
    for name, settings in (("plain", {}), ("scaled", SCALED)):
        seen = FirstUpdate()
        make_trainer(tmp_path / name, max_steps=4, callbacks=[seen], weight_decay=0.1, **settings).train()
        found.append(seen.found)
    plain, scaled = found
    assert sum(upper(name, 2) for name in plain) == 2 * 11 + 1
    for name, step in plain.items():  # steps are differences of float32 weights about 1
        expected = 0.1 * step if upper(name, 2) else step
        torch.testing.assert_close(scaled[name], expected, rtol=1e-2, atol=2e-6, msg=name)


def test_the_scale_follows_the_schedule_of_the_learning_rate(tmp_path):
    trainer = make_trainer(tmp_path, lr_scheduler_type="linear", learning_rate=1e-3, logging_steps=1, **SCALED)
    trainer.train()
    groups = trainer.optimizer.param_groups
    assert [g["initial_lr"] for g in groups] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
    shown = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert shown[0] == pytest.approx(1e-3)  # the unscaled one
    assert all(g["lr"] == g["initial_lr"] * groups[0]["lr"] / 1e-3 for g in groups)


@pytest.mark.parametrize(
    "settings", [SCALED, {"frozen_layers": 1}, {**SCALED, "frozen_layers": 3, "internal_steps": 0}]
)
def test_a_resumed_comparison(tmp_path, settings):
    settings = {"internal_steps": 1, "updates_per_rollout": 2, "max_steps": 6, **settings}
    settings |= {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    rest = make_trainer(tmp_path, model=tiny_model("qwen3", seed=9), **settings)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(whole) == losses(rest)
    assert same_weights(weights(whole.model), weights(rest.model))
    other = make_trainer(tmp_path, **{**settings, "frozen_layers": 2, "internal_steps": 0})
    with pytest.raises(ConfigError, match="frozen_layers was"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_splitting_groups_keeps_every_parameter_once_and_every_option():
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(4)]
    groups = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.5, 0.6))
    split_groups(optimizer, {id(parameters[1]), id(parameters[2]), id(parameters[3])}, 0.25)
    where = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert [where[id(p)]["lr"] for p in parameters] == [1.0, 0.25, 0.25, 0.25]
    assert [where[id(p)]["weight_decay"] for p in parameters] == [0.1, 0.1, 0.0, 0.0]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 4
    assert all(g["betas"] == (0.5, 0.6) for g in optimizer.param_groups)


WRONG = [
    ({"frozen_layers": 0}, "frozen_layers must be a layer from 1"),
    ({"frozen_layers": True}, "frozen_layers must be a layer from 1"),
    ({"upper_learning_rate_scale": 0.1}, "go together"),
    ({"upper_learning_rate_above": 2}, "go together"),
    ({"upper_learning_rate_scale": 0.0, "upper_learning_rate_above": 2}, "above 0"),
    ({"frozen_layers": 2, "internal_steps": 1}, "frozen_layers 2 freezes all of the internal policy of layer 2"),
    ({"frozen_layers": 3, "internal_layer": None, "internal_ladder": [[2, 1], [4, 1]]}, "internal policy of layer 2"),
]


@pytest.mark.parametrize(("settings", "part"), WRONG)
def test_wrong_settings(tmp_path, settings, part):
    with pytest.raises(ConfigError, match=part):
        config(tmp_path, **settings)


MODEL = [
    ({"frozen_layers": 5, "internal_steps": 0}, "frozen_layers: layer 5 does not exist: this model has layers 1 to 4"),
    ({"upper_learning_rate_scale": 0.1, "upper_learning_rate_above": 9}, "upper_learning_rate_above: layer 9"),
    ({"upper_learning_rate_scale": 0.1, "upper_learning_rate_above": 4}, "no layer above 4; give at most 3"),
]


@pytest.mark.parametrize(("settings", "part"), MODEL)
def test_settings_that_do_not_fit_the_model(tmp_path, settings, part):
    with pytest.raises(ConfigError, match=part):
        make_trainer(tmp_path, **settings)


def test_parameter_groups_need_the_trainers_own_optimizer(tmp_path):
    model = tiny_model("qwen3", spread=3.0)
    given = (torch.optim.SGD(model.parameters(), lr=1e-3), None)
    args = config(tmp_path, **SCALED)
    with pytest.raises(ConfigError, match="trainer's own optimizer; pass none"):
        BuPOTrainer(
            model, lambda **_: [], args, train_dataset=prompts(), processing_class=tiny_tokenizer(), optimizers=given
        )


def test_a_layer_found_by_analysis_that_is_frozen_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "choose_layer", lambda model, batch, rule: LayerChoice(2, "boundary layer 2"))
    trainer = make_trainer(tmp_path, internal_layer="auto", internal_steps=1, frozen_layers=2)
    with pytest.raises(TrainingStopped, match="boundary layer 2; frozen_layers 2 freezes all"):
        trainer.train()


def test_recipes():
    base = {"model": "small", "dataset": "arithmetic"}
    recipe = check_recipe({**base, "frozen_layers": 6, **SCALED})
    assert {k: recipe.trainer_settings(1)[k] for k in ("frozen_layers", *SCALED)} == {"frozen_layers": 6, **SCALED}
    with pytest.raises(ConfigError, match="go together"):
        check_recipe({**base, "upper_learning_rate_scale": 0.1})
    with pytest.raises(ConfigError, match="leaves nothing of internal_layer 3"):
        check_recipe({**base, "frozen_layers": 3, "internal_layer": 3, "internal_steps": 2})
