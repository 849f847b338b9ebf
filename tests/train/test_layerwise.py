"""Comparison methods: frozen lower layers, and a smaller learning rate for upper layers."""

import pytest
import torch
from peft import LoraConfig

from tests.support.tiny import tiny_model
from tests.support.training import LORA, L, above, make_trainer, moved, resumed, trained, weights

SCALED = {"upper_learning_rate_scale": 0.1, "upper_learning_rate_above": 2}


def lower(name, layer):
    return any(f"layers.{k}." in name for k in range(layer))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_layers_and_nothing_else_stay(tmp_path, tied, checkpointing):
    model = tiny_model("qwen3", spread=3.0, tie_word_embeddings=tied)
    settings = {"frozen_layers": "1-2", "max_steps": 4, "weight_decay": 0.1, "gradient_checkpointing": checkpointing}
    trainer = make_trainer(tmp_path, model=model, **settings)
    before = weights(trainer.model)
    trainer.train()
    assert moved(before, weights(trainer.model)) == {name for name in before if not lower(name, 2)}
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for n, p in trainer.model.named_parameters() if not lower(n, 2)}


def test_frozen_layers_below_an_internal_phase_and_with_lora(tmp_path):
    for settings, reached in (
        (
            {"frozen_layers": [1], "internal_layer": 3, "internal_steps": 1},
            lambda n: not lower(n, 1) and not above(n, 3),
        ),
        ({"frozen_layers": "1-3", "peft_config": LORA}, lambda n: "lora" in n and "layers.3." in n),
    ):
        trainer = make_trainer(tmp_path, max_steps=4, **settings)
        before = weights(trainer.model)
        trainer.train()
        assert moved(before, weights(trainer.model)) == {name for name in before if reached(name)}


@pytest.mark.parametrize(
    ("value", "layers"), [(3, {3}), ("3", {3}), ("2-3", {2, 3}), ([1, "4"], {1, 4}), ("middle-third", {2})]
)
def test_selected_layers_and_nothing_else_are_trained(tmp_path, value, layers):
    model, reached = tiny_model("qwen3", spread=3.0), []
    trainer = make_trainer(tmp_path, model=model, trained_layers=value, max_steps=4, weight_decay=0.1, internal_steps=0)
    watch = [
        layer.register_forward_hook(lambda m, i, o: reached.append(o.requires_grad)) for layer in model.model.layers
    ]
    before, inside = weights(trainer.model), [f"layers.{number - 1}." for number in layers]
    trainer.train()
    [hook.remove() for hook in watch]
    assert moved(before, weights(trainer.model)) == {name for name in before if any(part in name for part in inside)}
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for n, p in trainer.model.named_parameters() if any(part in n for part in inside)}
    assert reached[-L:] == [number >= min(layers) for number in range(1, L + 1)]  # the backward pass stops below


@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "down_proj"]])
def test_selected_layers_alone_get_adapters(tmp_path, target):
    """With the backward pass of checkpointed layers too, and in a model whose adapters are merged."""
    lora = LoraConfig(r=2, target_modules=target, init_lora_weights=False)
    settings = {"trained_layers": "2-3", "gradient_checkpointing": True, "max_steps": 4, "internal_layer": 3}
    model, reached = tiny_model("qwen3", spread=3.0), []
    trainer = make_trainer(tmp_path, model=model, peft_config=lora, internal_steps=1, **settings)
    model.model.layers[0].register_forward_hook(lambda m, i, o: reached.append(o.requires_grad))
    before = weights(trainer.model)
    assert {name.split("layers.")[-1][0] for name in before if "lora" in name} == {"1", "2"}
    trainer.train()
    assert moved(before, weights(trainer.model)) == {name for name in before if "lora" in name}
    assert not any(reached)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        torch.testing.assert_close(trainer.model.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_upper_layers_take_steps_of_the_scaled_length(tmp_path):
    start = weights(tiny_model("qwen3", spread=3.0))
    one_update = {"max_steps": 1, "weight_decay": 0.1, "learning_rate": 1e-2}
    plain, scaled = (weights(trained(tmp_path, **one_update, **more).model) for more in ({}, SCALED))
    assert sum(above(name, 2) for name in start) == 2 * 11 + 1
    for name, value in start.items():  # steps are differences of float32 weights about 1
        expected = (0.1 if above(name, 2) else 1.0) * (plain[name] - value)
        torch.testing.assert_close(scaled[name] - value, expected, rtol=1e-2, atol=2e-6, msg=name)


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
    "more", [{"frozen_layers": [1]}, {"frozen_layers": "1-3", "internal_steps": 0}, {"trained_layers": "1,3"}]
)
def test_a_resumed_comparison(tmp_path, more):
    settings = {"internal_steps": 1, "updates_per_rollout": 2, "max_steps": 6, **SCALED, **more}
    settings |= {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    resumed(tmp_path / "rest", trained(tmp_path, **settings), 2, **settings)
