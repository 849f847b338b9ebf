"""Rewards, memory that runs out, and adapters: what a run makes of each."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bupo.data.problems import Problem
from bupo.errors import ConfigError, InputError, out_of_memory
from bupo.models.unembed import has_low_precision_units
from bupo.recipe import read_recipe
from bupo.train.build import build, check_recipe, closing_rewards, trainer_config
from bupo.train.rewards import finite, make_rewards
from tests.cli.conftest import bupo  # noqa: F401  (a fixture)
from tests.cli.test_cli_train import recipe  # noqa: F401  (a fixture)
from tests.models.test_load import changed
from tests.support import distributed
from tests.support.processes import launch
from tests.support.tiny import tiny_model
from tests.support.training import same_weights, weights


def test_the_answer_reward_grades():
    problems = [Problem("a", "1+1=", "2", "t"), Problem("b", "?", r"\frac{", "t"), Problem("c", "2+2=", "4", "t")]
    logged = {}
    rewards = make_rewards(["answer", "boxed-string"], problems)
    with closing_rewards(rewards):
        columns = {"problem": [0, 0, 1, 2, 2], "log_metric": logged.__setitem__}
        columns["completions"] = [r"\boxed{2}", r"\boxed{3}", r"\boxed{3}", "no box", r"\boxed{4.0}"]
        values = [reward(**columns) for reward in rewards]
    assert values == [[1.0, 0.0, None, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0, 0.0]]
    assert logged == {"grading/unparsable": 0.2, "grading/timeout": 0.0}


def raising(completions, **columns):
    raise KeyError("gold")


@pytest.mark.parametrize(
    ("values", "part"),
    [
        (["1.0", "0.5"], "must return a finite number or None per response, but returned '1.0' for response 1"),
        ([1.0, math.nan], "but returned nan for response 2 of its batch: 'second'"),
        ([1.0, -math.inf], "but returned -inf for response 2 of its batch: 'second'"),
        ([1.0, [2.0]], "but returned [2.0] for response 2"),
        ([1.0], "must return one number per response (2), not [1.0]"),
        ("ab", "must return one number per response (2), not 'ab'"),
        (None, "must return one number per response (2), not None"),
        ({0: 1.0, 1: 2.0}, "must return one number per response (2), not {"),
    ],
    ids=str,
)
def test_wrong_rewards_name_function_response_and_value(values, part):
    with pytest.raises(InputError, match=r"^reward mine:f must return ") as error:
        finite("reward mine:f", values, ["first", "second"])
    assert part in str(error.value)


def test_rewards_may_be_any_numbers_or_none():
    values = [None, True, 2, 0.5, torch.tensor(3.0)]
    assert finite("reward mine:f", values, ["x"] * 5) == [None, 1.0, 2.0, 0.5, 3.0]
    assert finite("reward mine:f", torch.ones(2), ["x"] * 2) == [1.0, 1.0]


def test_a_reward_that_fails_is_one_line(bupo, tmp_path, recipe):  # noqa: F811
    code, _, err = bupo("train", recipe(reward="tests.train.test_run:raising"), "--output", tmp_path / "run")
    assert code == 2
    assert err.splitlines()[-1] == "bupo: error: reward tests.train.test_run:raising failed with KeyError('gold')"


def test_an_own_reward_lies_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/usr/lib"])
    (tmp_path / "my_own_reward.py").write_text(
        "def f(problems, **columns): return [p.answer for p in problems]\nN = 3\n"
    )
    [reward] = make_rewards(["my_own_reward:f"], [Problem("a", "1+1=", 2.0, "t")])
    assert (reward(completions=["x"], problem=[0]), reward.__name__) == ([2.0], "my_own_reward:f")
    for name, part in (("my_own_reward:g", "no attribute 'g'"), ("my_own_reward:N", "must be a function, not 3")):
        with pytest.raises(ConfigError, match=part):
            make_rewards([name], [])
    (tmp_path / "broken_reward.py").write_text("def f(:\n")
    with pytest.raises(ConfigError, match=r"cannot be imported: SyntaxError: .*broken_reward.py, line 1"):
        make_rewards(["answer", "broken_reward:f"], [])


def test_whose_memory_ran_out():
    whose = {
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"): "accelerator",
        RuntimeError("CUDA error: out of memory"): "accelerator",
        MemoryError(): "host",
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"): "host",
        OSError(12, "Cannot allocate memory"): "host",
        RuntimeError("shapes do not fit"): None,
        ValueError("memory"): None,
    }
    assert [out_of_memory(error) for error in whose] == list(whose.values())


def test_real_exhaustion_of_host_memory_is_one_line(bupo, tmp_path, recipe):  # noqa: F811
    code, _, err = bupo("train", recipe(reward="tests.support.training:much_memory"), "--output", tmp_path / "run")
    assert code == 2
    assert [line for line in err.splitlines() if line.startswith("bupo: error: ")] == [
        "bupo: error: out of host memory in update 1 (rollout batch 1, internal phase, layer 2); lower micro_batch or "
        "max_completion_length, set gradient_checkpointing to true, or use lora. Checkpoints stay"
    ]
    assert "Traceback" not in err


def test_adapters_on_tied_embeddings_are_refused(bupo, tmp_path, recipe, tiny_folder):  # noqa: F811
    tied = tmp_path / "tied"
    shutil.copytree(tiny_folder, tied)
    tiny_model("qwen3", tie_word_embeddings=True, max_position_embeddings=512).save_pretrained(tied)
    path = recipe(model=str(tied), lora={"r": 2, "target_modules": ["embed_tokens", "q_proj"]})
    code, _, err = bupo("train", path, "--output", tmp_path / "run")
    assert code == 2
    assert "names an embedding that is tied to the unembedding" in err
    assert not (tmp_path / "run").exists()


TARGETS = [["embed_tokens", "q_proj"], "all-linear", r".*\.[qv]_proj"]


def test_the_reference_model_is_the_model_that_is_trained(tmp_path, recipe, tiny_folder):  # noqa: F811
    folder = changed(tmp_path / "m", tiny_folder, lambda tensors: {f"_orig_mod.{k}": v for k, v in tensors.items()})
    settings = check_recipe(read_recipe(recipe(model=folder, beta=0.1, internal_steps=0)))
    with pytest.warns(UserWarning, match="_orig_mod"):
        trainer = build(settings, tmp_path / "run", lambda line: None)
    assert same_weights(weights(trainer.model), weights(trainer.ref_model))
    branch = settings.model_copy(update={"model": "org/name", "revision": "branch"})
    assert trainer_config(branch, tmp_path).model_init_kwargs["revision"] == "branch"


@pytest.mark.parametrize("native", [False, True])
def test_bfloat16_is_not_emulated(native, tmp_path, recipe, monkeypatch):  # noqa: F811
    settings = check_recipe(read_recipe(recipe()))  # precision: auto
    monkeypatch.setattr("bupo.train.build.accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    monkeypatch.setattr("bupo.train.build.BuPOConfig", dict)
    assert trainer_config(settings, tmp_path)["bf16"] == native
    assert has_low_precision_units(torch.device("cuda"), torch.bfloat16) == native
    assert has_low_precision_units(torch.device("cuda"), torch.float16)


def test_a_target_module_that_does_not_exist_is_refused_beside_one_that_does(bupo, tmp_path, recipe):  # noqa: F811
    path = recipe(lora={"r": 2, "target_modules": ["q_proj", "Wqkv"]})
    code, _, err = bupo("train", path, "--output", tmp_path / "run")
    assert (code, "lora.target_modules: the model has no module 'Wqkv'" in err) == (2, True)


@pytest.mark.parametrize(("target", "dtype"), [*((target, "float32") for target in TARGETS), (TARGETS[1], "bfloat16")])
def test_the_merged_model_is_base_plus_adapter(bupo, tmp_path, recipe, tiny_folder, target, dtype):  # noqa: F811
    from peft import PeftModel

    folder = tmp_path / "run"
    path = recipe(lora={"r": 2, "target_modules": target}, rollouts=2, learning_rate=0.02, dtype=dtype)
    code, _, err = bupo("train", path, "--output", folder)
    assert code == 0, err
    ids = torch.randint(3, 20, (2, 6))
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(folder / "model").eval()(ids).logits
        base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=dtype).float().eval()  # rounded as in training
        start = base(ids).logits
        both = PeftModel.from_pretrained(base, folder / "adapter").eval()(ids).logits
    assert not torch.allclose(start, both, atol=1e-2)
    torch.testing.assert_close(merged, both, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_adapters_are_merged_under_fsdp2(tmp_path, recipe, tiny_folder):  # noqa: F811
    """A merge on the main process alone would wait for the others' shards for ever."""
    folder = tmp_path / "run"
    path = recipe(lora={"r": 2}, rollouts=1, internal_steps=1, micro_batch=2, precision="float32", learning_rate=0.1)
    arguments = [path, "--output", folder]
    launch(2, distributed.command, tmp_path / "told", 120, engine="fsdp2", arguments=arguments)
    merged, start = load_file(folder / "model" / "model.safetensors"), load_file(tiny_folder / "model.safetensors")
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {name: w.shape for name, w in merged.items()} == {name: w.shape for name, w in start.items()}
    name = "model.layers.0.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    assert b.abs().max() > 0
    torch.testing.assert_close(merged[f"{name}.weight"], start[f"{name}.weight"] + 32 / 2 * b @ a)
