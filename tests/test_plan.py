"""`bupo plan` against what is counted by other means: parameters, bytes that live, operations."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bupo.cli import main
from bupo.errors import ConfigError, InputError
from bupo.plan import simulate
from bupo.plan.devices import find_device
from bupo.plan.estimate import Question, make_plan
from bupo.plan.measure import measure
from bupo.plan.shape import read_config, read_shape
from bupo.plan.simulate import LiveBytes, Settings, simulate_rollout, simulate_update
from bupo.plan.work import forward_flops
from bupo.recipe import read_recipe
from bupo.train.build import check_recipe
from tests.support.tiny import tiny_config, tiny_model

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
F32 = torch.float32
SETTINGS = Settings(F32, F32, 2, 5, 11, 4, checkpointing=False, accumulates=True, triton=False)
RECIPE = {
    "model": "none",
    "dataset": "arithmetic",
    "rollouts": 6,
    "prompts_per_rollout": 4,
    "samples_per_prompt": 4,
    "updates_per_rollout": 2,
    "micro_batch": 2,
    "max_prompt_length": 5,
    "max_completion_length": 11,
    "internal_layer": 2,
    "internal_steps": 2,
}


def shape_of(**changes):
    config = tiny_config(**changes)
    return read_shape(config, "tiny", "here")


# -- parameters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("Qwen/Qwen3-4B", 4_022_468_096),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("OctoThinker/OctoThinker-3B-Hybrid-Base", 3_212_749_824),  # Llama-3.2-3B's
        ("OctoThinker/OctoThinker-8B-Hybrid-Base", 8_030_261_248),  # Llama-3.1-8B's
    ],
)
def test_the_recipes_models_have_their_published_sizes(name, total):
    config, source = read_config(name)
    assert "ships" in source
    assert read_shape(config, name, source).total == total


@pytest.mark.parametrize("tied", [True, False])
def test_groups_add_up_to_a_real_models_parameters(tied):
    model = tiny_model("qwen3", tie_word_embeddings=tied)
    shape = shape_of(tie_word_embeddings=tied)
    assert shape.total == sum(p.numel() for p in model.parameters())
    assert shape.layers == tuple(sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)
    assert shape.embedding == 97 * 32
    assert shape.head == (0 if tied else 97 * 32)


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_live_bytes_counts_what_lives():
    before = torch.zeros(100)
    track = LiveBytes()
    track.ignore(before)
    with track:
        a = before + 1  # 400
        b = a.view(10, 10)  # shares
        c = torch.cat([a, a])  # 800
        assert track.now == 1200
        del a, c
        assert track.now == 400
        b.add_(1)
        assert (track.now, track.restart(), track.peak) == (400, 1200, 400)


@pytest.mark.parametrize(("layers", "whole", "checkpointing"), [(2, False, False), (3, True, True)])
def test_fake_tensors_live_as_real_ones_do(layers, whole, checkpointing, monkeypatch):
    """The same pass on real tensors, counted by the same means."""
    settings = Settings(F32, F32, 2, 5, 11, 4, checkpointing=checkpointing, accumulates=True, triton=False)
    config = tiny_config("qwen3")
    fake = simulate_update(config, layers, settings, whole=whole)

    @contextmanager
    def real_model(config, dtype=F32):
        from transformers import AutoModelForCausalLM

        yield AutoModelForCausalLM.from_config(config, dtype=dtype)

    monkeypatch.setattr(simulate, "fake_model", real_model)
    real = simulate_update(config, layers, settings, whole=whole)
    assert (fake.gradients, fake.trained) == (real.gradients, real.trained)
    for name in ("kept", "scoring", "forward", "head", "backward"):  # kernels' own small workspaces differ
        assert getattr(fake, name) == pytest.approx(getattr(real, name), rel=0.02), name


def test_checkpointing_keeps_one_state_a_layer():
    settings = Settings(F32, F32, 2, 5, 11, 4, checkpointing=True, accumulates=True, triton=False)
    two, three = (simulate_update(tiny_config(), n, settings, whole=False).kept for n in (2, 3))
    assert three - two == 2 * 16 * 32 * 4  # B x T x d x 4 bytes


def test_gradients_are_those_of_what_is_trained():
    shape = shape_of(tie_word_embeddings=False)
    internal = simulate_update(shape.config, 2, SETTINGS, whole=False)
    full = simulate_update(shape.config, 4, SETTINGS, whole=True)
    assert internal.trained == shape.embedding + shape.head + sum(shape.layers[:2])
    assert full.trained == shape.total
    assert (internal.gradients, full.gradients) == (4 * internal.trained, 4 * full.trained)
    adapted = Settings(F32, F32, 2, 5, 11, 4, True, True, False, lora=(3, "all-linear"))
    linear = sum(3 * sum(m.weight.shape) for m in tiny_model().model.layers.modules() if hasattr(m, "in_features"))
    assert simulate_update(shape.config, 4, adapted, whole=True).trained == linear


def test_a_straight_line_over_the_layers_is_what_all_layers_take(monkeypatch):
    config = tiny_config(num_hidden_layers=6)
    monkeypatch.setattr(simulate, "PROBED", (2, 3))
    line = simulate_update(config, 6, SETTINGS, whole=True), simulate_rollout(config, 6, SETTINGS)
    monkeypatch.setattr(simulate, "PROBED", (2, 6))
    exact = simulate_update(config, 6, SETTINGS, whole=True), simulate_rollout(config, 6, SETTINGS)
    assert line[0].peak == pytest.approx(exact[0].peak, rel=0.02)
    assert (line[1].cache, line[1].last, line[1].peak) == (exact[1].cache, exact[1].last, exact[1].peak)
    assert (line[0].kept, line[0].gradients, line[0].scoring) == (
        exact[0].kept,
        exact[0].gradients,
        exact[0].scoring,
    )


def test_the_cache_of_a_generation():
    found = simulate_rollout(tiny_config(), 4, SETTINGS)
    assert found.cache_per_token == 2 * 4 * 2 * 8 * 4  # keys and values, layers, heads, head size, bytes
    assert found.cache == found.cache_per_token * 4 * 16
    assert found.last >= found.cache


# -- operations --------------------------------------------------------------------------------------------------------


def test_operations_of_a_pass_are_those_of_its_products():
    shape = shape_of()
    model = tiny_model("qwen3")  # eager attention: every product is one that the counter sees
    for layers in (2, 4):
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            small = tiny_model("qwen3", num_hidden_layers=layers) if layers < 4 else model
            small.model(input_ids=torch.zeros(1, 16, dtype=torch.long))
        assert counter.get_total_flops() == forward_flops(shape, layers, 16)


def test_the_plan_of_a_recipe_adds_up():
    recipe, shape = check_recipe(RECIPE), shape_of()
    made = make_plan(recipe, shape, Question(find_device("cpu")))
    json.dumps(made)
    assert made["tokens"] == {"rollout": 16 * 11, "run": 16 * 11 * 6}
    assert made["batch"]["accumulation"] == 4
    seconds = made["seconds"]
    assert seconds["run"] == pytest.approx(
        2 * seconds["internal"]["rollout_batch"] + 4 * seconds["full"]["rollout_batch"]
    )
    assert 0 < made["phase1"]["update_flops"] < 1
    assert 0 < made["phase1"]["update_memory"] < 1
    deeper = make_plan(check_recipe({**RECIPE, "internal_layer": 3}), shape, Question(find_device("cpu")))
    assert made["phase1"]["update_flops"] < deeper["phase1"]["update_flops"] < 1
    plain = make_plan(check_recipe({**RECIPE, "internal_steps": 0}), shape, Question(find_device("cpu")))
    assert plain["phase1"] is None
    assert "internal" not in plain["memory"]
    assert plain["memory"]["full"] == made["memory"]["full"]
    phase = {"layer": RECIPE["internal_layer"], "rollouts": RECIPE["internal_steps"], "weight": 0.5}
    joined = check_recipe({**RECIPE, "internal_layer": None, "internal_steps": None, "phases": [phase]})
    joint = make_plan(joined, shape, Question(find_device("cpu")))
    both = made["flops"]["updates_internal"] + made["flops"]["updates_full"]
    assert joint["flops"]["updates_internal"] == both
    assert joint["memory"]["internal"]["update"] > made["memory"]["full"]["update"]
    assert made["notes"] == []
    for change, word in (({"estimator": "ppo"}, "critic"), ({"internal_steps": "auto"}, "host's memory")):
        assert word in make_plan(check_recipe({**RECIPE, **change}), shape, Question(find_device("cpu")))["notes"][0]
    faster = make_plan(recipe, shape, Question(find_device("cpu", flops=1e15)))
    assert faster["seconds"]["full"]["updates"] < seconds["full"]["updates"]


def test_sharding_shares_what_it_says():
    recipe, shape = check_recipe(RECIPE), shape_of()
    memory = {
        kind: make_plan(recipe, shape, Question(find_device("cpu"), 2, kind))["memory"]
        for kind in ("ddp", "zero2", "zero3", "fsdp2")
    }
    whole = shape.total * 4
    assert memory["ddp"]["weights"] == memory["zero2"]["weights"] == whole
    assert memory["fsdp2"]["weights"] == memory["zero3"]["weights"] == whole // 2
    assert memory["zero2"]["full"]["optimizer"] * 2 == memory["ddp"]["full"]["optimizer"] == 2 * whole
    with pytest.raises(ConfigError, match="unknown sharding 'fsdp'"):
        make_plan(recipe, shape, Question(find_device("cpu"), 2, "fsdp"))
    with pytest.raises(ConfigError, match="do not split over 3 processes"):
        make_plan(recipe, shape, Question(find_device("cpu"), 3))


def test_layers_can_be_timed():
    speeds = measure(shape_of(), SETTINGS, device="cpu", repeats=1)
    assert speeds.update.at(4) > 0
    assert speeds.optimizer > 0
    made = make_plan(check_recipe(RECIPE), shape_of(), Question(find_device("cpu")), speeds)
    assert made["seconds"]["measured"]
    assert made["seconds"]["run"] > 0


# -- the command -------------------------------------------------------------------------------------------------------


def test_lora_on_24_gb_fits_where_all_weights_do_not(capsys):
    path = RECIPES / "qwen3-4b-lora-24gb.yaml"
    assert main(["plan", str(path), "--device", "rtx4090", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["memory"]["fits"]
    assert made["model"]["internal_layer"] == read_recipe(path)["internal_layer"]
    cache = 36 * 2 * 8 * 128 * 2  # layers, keys and values, heads, head size, bfloat16
    assert made["memory"]["rollout"]["cache"] == cache * 32 * (512 + 1536)


def test_the_text_says_what_is_needed_and_why(capsys, tiny_folder, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(RECIPE))
    assert main(["plan", str(path), "--config-from", str(tiny_folder), "--memory", "0.00001", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out
    total = sum(p.numel() for p in tiny_model("qwen3").parameters())
    assert f"= {total:,}" in out
    assert "AdamW's two moments" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "unknown device 'tpu'; one of cpu, a100"),
        (["--sharding", "fsdp2"], "--sharding needs --processes 2 or more"),
        (["--measure", "--flops", "1e12"], "leave --flops and --processes out"),
        (["--measure", "--set", "trl.use_vllm=true"], "add --set trl.use_vllm=false"),
        (["--flops", "0"], "--flops must be above 0"),
        (["--explain", "--json"], "either --explain or --json"),
        (["--set", "internal_layer=9"], "layer 9 does not exist: this model has layers 1 to 4"),
        (["--set", "micro_batch=3"], "no multiple of micro_batch 3"),
    ],
)
def test_wrong_questions(capsys, tiny_folder, tmp_path, arguments, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(RECIPE))
    assert main(["plan", str(path), "--config-from", str(tiny_folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_no_configuration(tmp_path):
    with pytest.raises(InputError, match=r"name a folder or config\.json with --config-from"):
        read_config("someone/no-such-model")
    with pytest.raises(InputError, match=r"there is no config\.json"):
        read_config("small", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="is no configuration of a model"):
        read_config("small", tmp_path)
