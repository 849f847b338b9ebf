"""Comparison methods: frozen lower layers, and a smaller learning rate for upper layers."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from bupo.errors import ConfigError
from bupo.train.trainer import BuPOTrainer
from tests.support.tiny import tiny_model
from tests.support.training import (
    above,
    config,
    make_trainer,
    moved,
    prompts,
    resumed,
    tiny_tokenizer,
    trained,
    weights,
)

SCALED = {"upper_learning_rate_scale": 0.1, "upper_learning_rate_above": 2}


def lower(name, layer):
    return any(f"layers.{k}." in name for k in range(layer))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_layers_and_nothing_else_stay(tmp_path, tied, checkpointing):
    model = tiny_model("qwen3", spread=3.0, tie_word_embeddings=tied)
    settings = {"frozen_layers": 2, "max_steps": 4, "weight_decay": 0.1, "gradient_checkpointing": checkpointing}
    trainer = make_trainer(tmp_path, model=model, **settings)
    before = weights(trainer.model)
    trainer.train()
    assert moved(before, weights(trainer.model)) == {name for name in before if not lower(name, 2)}
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for n, p in trainer.model.named_parameters() if not lower(n, 2)}


def test_frozen_layers_below_an_internal_phase_and_with_lora(tmp_path):
    trainer = make_trainer(tmp_path, frozen_layers=1, internal_layer=3, internal_steps=1, max_steps=4)
    before = weights(trainer.model)
    trainer.train()
    reached = {name for name in before if not lower(name, 1) and not above(name, 3)}
    assert moved(before, weights(trainer.model)) == reached
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trainer = make_trainer(tmp_path, frozen_layers=3, peft_config=lora, max_steps=4)
    before = weights(trainer.model)
    trainer.train()
    adapters = {name for name in before if "lora" in name and "layers.3." in name}
    assert moved(before, weights(trainer.model)) == adapters


class FirstUpdate(TrainerCallback):
    """The step of every parameter in the first update."""

    steps = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.steps is None:
            self.start = weights(model)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.steps is None:
            self.steps = {name: value - self.start[name] for name, value in weights(model).items()}


def test_upper_layers_take_steps_of_the_scaled_length(tmp_path):
    plain, scaled = FirstUpdate(), FirstUpdate()
    trained(tmp_path / "plain", max_steps=4, callbacks=[plain], weight_decay=0.1)
    trained(tmp_path / "scaled", max_steps=4, callbacks=[scaled], weight_decay=0.1, **SCALED)
    assert sum(above(name, 2) for name in plain.steps) == 2 * 11 + 1
    for name, step in plain.steps.items():  # steps are differences of float32 weights about 1
        expected = 0.1 * step if above(name, 2) else step
        torch.testing.assert_close(scaled.steps[name], expected, rtol=1e-2, atol=2e-6, msg=name)


def test_groups_keep_their_options_and_follow_the_learning_rate_schedule(tmp_path):
    settings = {"lr_scheduler_type": "linear", "learning_rate": 1e-3, "logging_steps": 1, "weight_decay": 0.1}
    trainer = trained(tmp_path, **settings, **SCALED)
    groups = trainer.optimizer.param_groups
    assert [g["initial_lr"] for g in groups] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0, 0.1, 0.0]
    assert sum(len(g["params"]) for g in groups) == len(list(trainer.model.parameters()))
    shown = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert shown[0] == pytest.approx(1e-3)  # the unscaled one
    assert all(g["lr"] == g["initial_lr"] * groups[0]["lr"] / 1e-3 for g in groups)


@pytest.mark.parametrize(
    "settings", [{**SCALED, "frozen_layers": 1}, {**SCALED, "frozen_layers": 3, "internal_steps": 0}]
)
def test_a_resumed_comparison(tmp_path, settings):
    settings = {"internal_steps": 1, "updates_per_rollout": 2, "max_steps": 6, **settings}
    settings |= {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    whole = trained(tmp_path, **settings)
    resumed(tmp_path / "rest", whole, 2, **settings)
    other = make_trainer(tmp_path, **{**settings, "frozen_layers": 2, "internal_steps": 0})
    with pytest.raises(ConfigError, match="frozen_layers was"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_parameter_groups_need_the_trainers_own_optimizer(tmp_path):
    model = tiny_model("qwen3", spread=3.0)
    data = {"train_dataset": prompts(), "processing_class": tiny_tokenizer()}
    optimizers = (torch.optim.SGD(model.parameters(), lr=1e-3), None)
    with pytest.raises(ConfigError, match="trainer's own optimizer; do not pass one"):
        BuPOTrainer(model, lambda **_: [], config(tmp_path, **SCALED), optimizers=optimizers, **data)
