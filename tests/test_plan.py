"""`bupo plan` against what is counted by other means: parameters, operations, bytes alive in a real update."""

import json
import sys
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from bupo import plan as plan_module
from bupo.cli import main
from bupo.models.fake import describe_model, read_config
from bupo.models.internal_policy import internal_policy
from bupo.plan import PlanRequest, find_device, make_plan
from bupo.train import footprint
from bupo.train.build import check_recipe
from bupo.train.footprint import BytesAlive, Workload, count_rollout, count_update
from bupo.train.layers import Selection
from bupo.train.tiles import narrow_tiles
from bupo.train.trainer import add_fused_lm_head, trl_utils
from tests.support.tiny import tiny_config, tiny_model

WORK = Workload(torch.float32, torch.float32, 2, 5, 11, 4, checkpointing=False, accumulates=True, triton=False)
CONFIG = tiny_config(num_hidden_layers=2, tie_word_embeddings=False)
BATCH = {"prompts_per_rollout": 4, "samples_per_prompt": 4, "updates_per_rollout": 2, "micro_batch": 2}
PHASE = {"internal_layer": 1, "internal_steps": 2}
LENGTHS = {"max_prompt_length": 5, "max_completion_length": 11}
RECIPE = {"model": "none", "dataset": "arithmetic", "rollouts": 6, **PHASE, **BATCH, **LENGTHS}


@pytest.fixture(autouse=True, scope="module")
def counted_once():
    """What one test has counted is not counted again for another, which would take a minute in all."""
    known, here = {}, sys.modules[__name__]

    def keeping(count):
        def kept(config, depth, work, **how):
            key = (count, config.to_json_string(), depth, repr(work), repr(how), footprint._over_layers)
            if key not in known:
                known[key] = count(config, depth, work, **how)
            return dict(known[key])

        return kept

    with pytest.MonkeyPatch.context() as patch:
        for count in (count_update, count_rollout):
            for module in (here, plan_module):
                patch.setattr(module, count.__name__, keeping(count))
        yield


def full(depth=2, config=CONFIG, **changes):
    return count_update(config, depth, replace(WORK, **changes), internal=False, narrow=False)


def internal(depth, **changes):
    return count_update(CONFIG, depth, replace(WORK, **changes), internal=True, narrow=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the configuration of a model of 2 layers and a recipe."""
    folder = tmp_path_factory.mktemp("plan")
    CONFIG.save_pretrained(folder)
    (folder / "recipe.yaml").write_text(json.dumps({**RECIPE, "precision": "bfloat16"}))
    for kind in ("empty", "t5", "no_such"):
        (folder / kind).mkdir()
        (folder / kind / "config.json").write_text("{}" if kind == "empty" else json.dumps({"model_type": kind}))
    return folder


@pytest.fixture
def plan(folder):
    def make(request=None, **changes):
        known = {"device": find_device("cpu", flops=1e12), "config_from": folder, **(request or {})}
        return make_plan(check_recipe({**RECIPE, **changes}), PlanRequest(**known))

    return make


def test_shipped_configurations_have_the_published_sizes():
    """The OctoThinker models are Llama-3.2-3B and Llama-3.1-8B."""
    sizes = {"Qwen/Qwen3-4B": 4_022_468_096, "Qwen/Qwen3-8B": 8_190_735_360}
    octothinker = {"3B": 3_212_749_824, "8B": 8_030_261_248}
    sizes |= {f"OctoThinker/OctoThinker-{size}-Hybrid-Base": total for size, total in octothinker.items()}
    for name, total in sizes.items():
        config, source = read_config(name)
        assert "shipped" in source
        assert describe_model(config)["parameters"]["total"] == total


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_a_real_models(tied):
    model = tiny_model("qwen3", tie_word_embeddings=tied)
    size = describe_model(model.config)["parameters"]
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    assert size["total"] == sum(p.numel() for p in model.parameters())
    assert (size["layers"], size["largest_layer"]) == (sum(layers), layers[0])
    assert (size["embedding"], size["head"]) == (97 * 32, 0 if tied else 97 * 32)


def test_the_trained_parameters_are_those_below_the_layer_the_adapters_or_all():
    size = describe_model(CONFIG)["parameters"]
    layer = size["largest_layer"]
    assert internal(1)["trained"] == 2 * 97 * 32 + layer
    assert (full()["trained"], full()["gradients"]) == (size["total"], 4 * size["total"])
    assert full(selection=Selection(frozenset({2}), outside=True))["trained"] == size["total"] - layer
    lora = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    linear = [m for m in tiny_model(num_hidden_layers=2).model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert full(lora=lora, checkpointing=True)["trained"] == sum(3 * sum(m.weight.shape) for m in linear)


def test_operations_are_those_of_the_matrix_products():
    layer = 32 * (32 + 16 + 16 + 32 + 3 * 48)  # q, k, v, o and the FFN's three matrices
    body, head = 2 * 32 * layer + 4 * 2 * 16**2 * 32, 2 * 2 * 15 * 97 * 32  # two sequences of 16 tokens
    counts = [internal(1), internal(2), full()]
    for depth, count in zip((1, 2, 2), counts, strict=True):
        assert count["scoring_flops"] == depth * body + head
        assert count["update_flops"] == 3 * depth * body + 4 * head  # the head makes its logits again
    assert counts[0]["update"] < counts[1]["update"] < counts[2]["update"] < 1.05 * counts[1]["update"]


def test_checkpointing_keeps_one_state_per_layer():
    one, two = (internal(n, checkpointing=True)["kept"] for n in (1, 2))
    assert two - one == 2 * 16 * 32 * 4  # B x T x d x 4 bytes


@pytest.mark.parametrize("windows", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_deep_models_are_counted_from_shallow_ones(monkeypatch, windows):
    """Layers of a kind add the same: full attention, or in two of three layers a window of 8 tokens."""
    config = tiny_config(num_hidden_layers=6 if windows else 5, use_sliding_window=windows, sliding_window=8)
    if windows:
        config.layer_types = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    depth, tokens = config.num_hidden_layers, 4 * 8 + 2 * 16 if windows else 5 * 16  # in the caches of all layers
    selection = None if windows else Selection(frozenset({2, 4}), outside=False)
    line, rollout = full(depth, config, selection=selection), count_rollout(config, depth, WORK)
    monkeypatch.setattr(footprint, "_over_layers", lambda count, config, trained: count(deepcopy(config), trained))
    assert line == full(depth, config, selection=selection)
    whole = count_rollout(config, depth, WORK)
    assert whole["cache"] == rollout["cache"] == 2 * 2 * 8 * 4 * 4 * tokens  # 2 heads of size 8, 4 bytes, 4 responses
    assert rollout["peak"] == pytest.approx(whole["peak"], rel=0.1 if windows else 0)
    assert whole["peak"] >= whole["cache"]


def test_selected_layers_save_moments_gradients_and_the_backward_pass_below():
    """Layer 2 of 3: the products that remain. How deep models are counted is tested above."""
    config, selection = tiny_config(num_hidden_layers=3), Selection(frozenset({2}), outside=False)
    counted = full(3, config, selection=selection)
    assert counted["trained"] == describe_model(config)["parameters"]["largest_layer"]
    products, attention, head = 2 * 32 * 32 * (32 + 16 + 16 + 32 + 3 * 48), 4 * 2 * 16**2 * 32, 2 * 2 * 15 * 97 * 32
    inputs, weights = 2 * (products + 2 * attention), products  # of the backward pass, which ends in layer 2
    assert counted["update_flops"] == 3 * (products + attention) + inputs + weights + 3 * head


@pytest.mark.parametrize(("layer", "checkpointing"), [(1, False), (None, True)])
def test_bytes_are_those_of_a_real_update_with_trls_head(layer, checkpointing):
    """Real tensors, TRL's own head: within 5 %, which is what vectors of one number per token take."""
    config = tiny_config("qwen3", num_hidden_layers=2, vocab_size=33_000)
    work = replace(WORK, prompt=32, response=32, checkpointing=checkpointing)
    counted = count_update(config, layer or 2, work, internal=layer is not None, narrow=layer is not None)
    model = AutoModelForCausalLM.from_config(config).train()
    add_fused_lm_head(model, temperature=1.0, outputs=("log_probs",))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(3, 33_000, (2, 64))
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": (torch.arange(64) > 4).long().expand(2, 64)}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with BytesAlive(model, *inputs.values()) as tracker:
        if layer is None:
            loss = model(**inputs, fused_lm_head=True).log_probs.sum()
        else:
            with internal_policy(model, layer), narrow_tiles(trl_utils, ids.device, ids.numel()):
                loss = model(**inputs, fused_lm_head=True).log_probs.sum()
        loss.backward()
    assert counted["update"] == pytest.approx(tracker.alive("peak"), rel=0.05)


def test_a_plan_adds_up(plan):
    made = plan()
    assert made["batch"] == {"samples": 16, "prompt": 5, "response": 11, "rollouts": 6, "internal_rollouts": 2}
    memory, seconds = made["memory"], made["seconds"]
    held = memory["weights"] + memory["process"] + memory["full"]["optimizer"]
    assert memory["full"]["update"] == held + int(1.15 * memory["full"]["update_beside_weights"])
    assert memory["needed"] == memory["peak"] == max(memory["full"][part] for part in ("update", "scoring", "rollout"))
    phases = 2 * seconds["internal"]["rollout_batch"] + 4 * seconds["full"]["rollout_batch"]
    assert seconds["run"] == pytest.approx(phases)
    assert 0 < made["phase1"]["update_flops"] < 1


def test_every_phase_of_a_recipe_is_planned(plan):
    phases = [{"layer": 1, "rollouts": 1}, {"layer": 2, "rollouts": 2, "weight": 0.5}]
    made = plan(phases=phases, internal_layer=None, internal_steps=None, estimator="ppo")
    assert made["batch"]["internal_rollouts"] == 3
    memory, flops = made["memory"], made["flops"]
    assert memory["internal"]["update"] < memory["full"]["update"] < memory["internal_2"]["update"]  # a joint phase
    assert flops["updates_internal"] < flops["updates_full"] < flops["updates_internal_2"]
    assert memory["critic"] == 4 * memory["weights"]


def test_sharding_four_bits_and_vllm_change_the_memory(plan):
    device = find_device("H100")
    sharded = {n: plan({"processes": 2, "sharding": n}, internal_steps=0)["memory"] for n in ("ddp", "fsdp2")}
    assert sharded["fsdp2"]["weights"] == sharded["ddp"]["weights"] // 2
    assert sharded["fsdp2"]["full"]["optimizer"] == sharded["ddp"]["full"]["optimizer"] // 2
    lora = {"lora": {"r": 2, "four_bit": True}, "dtype": "bfloat16", "trl": {"use_vllm": True}}
    packed = plan({"device": device}, internal_steps=0, **lora)["memory"]
    assert packed["weights"] < sharded["ddp"]["weights"] / 3
    assert packed["needed"] - packed["peak"] == int(0.3 * device.memory)


def test_the_command(capsys, folder):
    known = ["plan", str(folder / "recipe.yaml"), "--config-from", str(folder), "--device", "RTX4090"]
    changes = ["--set", "internal_layer=auto", "--response-length", "6"]
    assert main([*known, *changes, "--memory", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "DOES NOT FIT in 102 MiB" in out
    assert "note: internal_layer auto is assumed to be layer 1" in out
    assert max(map(len, out.splitlines())) <= 100
    assert main([*known, "--set", "internal_steps=0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["fits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--device tpu", "unknown device 'tpu'; choose one of cpu, a100"),
        ("--sharding fsdp2", "--sharding needs --processes 2 or more"),
        ("--processes 2 --sharding fsdp", "unknown sharding 'fsdp'"),
        ("--processes 3", "samples do not split evenly"),
        ("--flops 0", "--flops must be a finite number above 0"),
        ("--response-length 1000000000", "above the recipe's maximum of 11 tokens"),
        ("--set max_completion_length=600", "more than the model's context of 128"),
        ("--set internal_layer=9", "layer 9 does not exist: this model has layers 1 to 2"),
        ("--set micro_batch=3", "micro_batch 3"),
        ("--config-from nowhere", "there is no config.json"),
        ("--config-from empty", "no configuration of a model at"),
        ("--config-from t5", "this is not a causal LM"),
        ("--config-from no_such", "no configuration of a model at"),
    ],
)
def test_wrong_requests_are_one_line(capsys, folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    assert main(["plan", "recipe.yaml", "--config-from", ".", "--flops", "1e12", *arguments.split()]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
