"""QLoRA: a tiny model in 4 bits, adapters up to the layer in phase 1, all of them in phase 2, and what is saved."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from bupo.errors import ConfigError
from bupo.recipe import read_recipe
from bupo.train import lora, run
from bupo.train.build import build, check_recipe
from bupo.train.lora import upcast_adapters
from tests.cli.test_cli_train import write_recipe
from tests.support.training import Gradients

here = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    short = {"model": str(tiny_folder), "rollouts": 2, "internal_steps": 1, "lora": {"r": 2, "four_bit": True}}
    return lambda **changes: check_recipe(read_recipe(write_recipe(tmp_path, **short, **changes)))


def packed(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}


@here
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True, "estimator": "ppo"}], ids=["grpo", "ppo"])
def test_both_phases_train_adapters_over_four_bits(tmp_path, recipe, monkeypatch, changes):
    built = []

    def keep(*args):
        trainer = build(*args)
        seen = Gradients()
        trainer.add_callback(seen)
        built.extend([trainer, seen, packed(trainer.model)])
        return trainer

    monkeypatch.setattr(run, "build", keep)
    summary = run.train(recipe(**changes), tmp_path / "run", say=lambda line: None)
    trainer, seen, before = built
    assert len(before) == 7 * len(trainer.model.base_model.model.model.layers)
    assert len(seen.updates) == 4
    for number, names in enumerate(seen.updates):
        assert all("lora_" in n for n in names)
        assert {int(n.split("layers.")[1][0]) for n in names} == set(range(2 if number < 2 else 4)), number
    assert summary["updates"] == 4
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    assert not getattr(whole, "is_loaded_in_4bit", False)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@here
def test_the_saved_model_is_the_policy_that_was_trained(tmp_path, recipe):
    settings = recipe()
    trainer = build(settings, tmp_path / "run", lambda line: None)
    trainer.model.eval()
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapters = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {p.dtype for p in adapters} == {torch.float32}
    weights = packed(trainer.model)
    ids = torch.randint(3, 20, (2, 6))
    with torch.no_grad():
        expected = trainer.model(ids).logits
        with trainer.model.disable_adapter():
            assert not torch.allclose(trainer.model(ids).logits, expected, rtol=1e-2)
    assert all(torch.equal(weights[n], p) for n, p in packed(trainer.model).items())
    run.save_final(trainer, settings, tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, expected, rtol=1e-3, atol=1e-4)


def test_without_bitsandbytes_one_line_says_what_to_do(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lora.four_bit needs bitsandbytes, .*pip install bitsandbytes"):
        build(recipe(), tmp_path / "run", lambda line: None)


@pytest.mark.parametrize("launcher", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_split_weights_are_refused(recipe, monkeypatch, launcher):
    """Also where the launcher splits them, and the recipe says nothing of it."""
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: True)
    four_bit = recipe()
    alone = SimpleNamespace(deepspeed=None, fsdp=None, fsdp_config=None, world_size=1, bf16=False)
    assert lora.load_in_4bit(four_bit, alone)["quantization_config"].load_in_4bit
    with pytest.raises(ConfigError, match="FSDP and DeepSpeed"):
        lora.load_in_4bit(four_bit, SimpleNamespace(**{**vars(alone), "fsdp": "full_shard"}))
    monkeypatch.setenv(launcher, "true")
    with pytest.raises(ConfigError, match="FSDP and DeepSpeed"):
        lora.load_in_4bit(four_bit, alone)


def test_only_adapters_over_packed_weights_are_widened():
    model = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    upcast_adapters(model)
    assert model.weight.dtype == torch.bfloat16
    model.is_loaded_in_4bit = True
    model.bias.requires_grad_(False)
    upcast_adapters(model)
    assert (model.weight.dtype, model.bias.dtype) == (torch.float32, torch.bfloat16)
