"""Recipes: reading, changing, checking, the batch arithmetic."""

import dataclasses
import itertools
import re
from pathlib import Path

import pytest

from bupo.errors import ConfigError, InputError
from bupo.recipe import Recipe, load_yaml, override, read_recipe
from bupo.train.build import check_recipe
from bupo.train.config import BuPOConfig
from bupo.train.effects import NEEDS, NEVER

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.yaml"))
SMALLEST = {"model": "small", "dataset": "arithmetic"}


def problems(**raw):
    with pytest.raises(ConfigError) as error:
        check_recipe(raw)
    return error.value.problems


def test_the_package_exports_what_users_import():
    import bupo

    functions = ["analyze_rollouts", "internal_policy", "load_model", "look", "read_results"]
    assert sorted(bupo.__all__) == ["BuPOConfig", "BuPOTrainer", "Lens", *functions]
    assert all(callable(getattr(bupo, name)) for name in bupo.__all__)
    assert set(bupo.__all__) <= set(dir(bupo))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bupo.nothing  # noqa: B018


@pytest.mark.parametrize("path", [*RECIPES, Path("src/bupo/assets/demo.yaml")], ids=lambda path: path.stem)
def test_shipped_recipes_survive_their_record(path):
    """What run.json holds is the same recipe: --resume reads it from there."""
    recipe = check_recipe(read_recipe(RECIPES[0].parents[1] / path))
    record = recipe.model_dump(mode="json")
    assert check_recipe(record) == recipe
    assert record["internal_steps"] == recipe.trainer_settings(1)["internal_steps"]


def test_the_defaults_are_the_papers():
    recipe = check_recipe(SMALLEST)
    expected = {"num_generations": 8, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 32,
                "updates_per_rollout": 4, "max_steps": 1200, "max_completion_length": 7168, "temperature": 1.0,
                "learning_rate": 1e-6, "internal_steps": 0, "seed": 0, "gradient_checkpointing": True}  # fmt: skip
    assert recipe.trainer_settings(1).items() >= expected.items()
    assert recipe.max_prompt_length == 1024


def test_settings_of_the_trainer_pass_through():
    """Under their own name or under trl; those that a record is read for stand at its top."""
    recipe = check_recipe({**SMALLEST, "epsilon_high": 0.28, "trl": {"learning_rate": 1e-4, "beta": 0}})
    settings = recipe.trainer_settings(1)
    assert (settings["epsilon_high"], settings["learning_rate"], settings["beta"]) == (0.28, 1e-4, 0)
    record = recipe.model_dump(mode="json")
    assert (record["learning_rate"], record["trl"]) == (1e-4, {"beta": 0})
    assert check_recipe({**SMALLEST, "fsdp": True}).trainer_settings(1)["fsdp"] is True


def test_every_key_has_a_description():
    for model in (Recipe, *(Recipe.model_fields[name].annotation.__args__[0] for name in ("lora", "eval"))):
        for name, field in model.model_fields.items():
            assert field.description.rstrip(")").endswith((".", "none")), name


def test_batch_arithmetic_over_many_settings():
    good = 0
    sizes = ((3, 4, 16), (2, 8), (1, 2, 3, 4), (1, 2, 4, 8), (1, 2, 4))
    for prompts, samples, updates, micro, processes in itertools.product(*sizes):
        batch = {"prompts_per_rollout": prompts, "samples_per_prompt": samples, "updates_per_rollout": updates}
        recipe = Recipe(**SMALLEST, **batch, micro_batch=micro, rollouts=5)
        if (prompts * samples) % (updates * micro * processes):
            with pytest.raises(ConfigError, match=r"not split evenly|not a multiple of micro_batch"):
                recipe.trainer_settings(processes)
            continue
        good += 1
        settings = recipe.trainer_settings(processes)
        assert micro * settings["gradient_accumulation_steps"] * updates * processes == prompts * samples
        assert settings["max_steps"] == 5 * updates
    assert good > 50


def test_more_passes_and_evaluations_are_counted_in_updates():
    recipe = check_recipe({**SMALLEST, "rollouts": 10, "save_every": 5, "trl": {"num_iterations": 2}})
    expected = {"max_steps": 80, "save_steps": 40, "num_iterations": 2}
    assert recipe.trainer_settings(1).items() >= expected.items()
    evaluation = {"dataset": "arithmetic", "samples": 3, "every": 5}
    recipe = check_recipe({**SMALLEST, "micro_batch": 8, "eval": evaluation})
    expected = {"eval_steps": 20, "num_generations_eval": 3, "per_device_eval_batch_size": 9}  # whole groups of 3
    assert recipe.trainer_settings(1).items() >= expected.items()


WRONG = [
    ({"learning_rat": 1}, "unknown key learning_rat (did you mean learning_rate?)"),
    ({"trl": {"epsilon_hihg": 1}}, "unknown key trl.epsilon_hihg (did you mean epsilon_high?)"),
    ({"lora": {"rank": 4}}, "unknown key lora.rank (valid: r, alpha, dropout, target_modules, four_bit)"),
    ({"lora": {"target_modules": 4}}, "lora.target_modules must be text or a list, not 4"),
    ({"rollouts": "many"}, "rollouts must be a whole number, not 'many'"),
    ({"rollouts": True}, "rollouts must be a whole number, not True"),
    ({"rollouts": 0}, "rollouts must be at least 1, not 0"),
    ({"rollouts": 99999999999999999999}, "rollouts must be at most 10000000, not 99999999999999999999"),
    ({"learning_rate": float("nan")}, "learning_rate must be a finite number, not nan"),
    ({"learning_rate": 0.0}, "learning_rate must be a number above 0, not 0.0"),
    ({"temperature": -1}, "temperature must be a number above 0, not -1"),
    ({"trl": {"generation_kwargs": {"x": float("inf")}}}, "trl.generation_kwargs holds a value that run.json cannot"),
    ({"trl": {"epsilon": "wide"}}, "trl.epsilon must be a number, not 'wide'"),
    ({"samples_per_prompt": 1}, "samples_per_prompt must be at least 2, not 1"),
    ({"seed": 2**32}, "seed must be below 4294967296, not 4294967296"),
    ({"template": "qwen"}, "template must be one of auto, raw, chat, qwen-math, qwen3-no-thinking or octothinker"),
    (
        {"internal_lens": "ridge", "internal_lens_refit": -1},
        "internal_lens_refit must be a whole number from 0, not -1",
    ),
    ({"internal_lens_refit": 2}, "internal_lens_refit need internal_lens ridge"),
    ({"lora": 4}, "lora must be a mapping with r, alpha, dropout, target_modules, four_bit, not 4"),
    ({"trl": [1]}, "trl must be a mapping, not [1]"),
    ({"keep_checkpoints": 1}, "keep_checkpoints must be at least 2, not 1"),
    ({"internal_layer": 2, "internal_steps": 301}, "internal phases take 301 rollout batches, more than the 300"),
    ({"max_steps": 3}, "max_steps is set by the recipe's own key: rollouts"),
    ({"beta": 0, "trl": {"beta": 0}}, "beta is given twice, as a key of the recipe and under trl"),
    ({"trl": {"num_iterations": 0}}, "trl.num_iterations must be a whole number from 1, not 0"),
    ({"trl": {"remove_unused_columns": True}}, "trl.remove_unused_columns would drop the column"),
    ({"trl": {"chat_template_kwargs": {"enable_thinking": False}}}, "is set by the recipe's own key: template"),
    ({"reward": "good answers"}, "reward must be answer, boxed-string, module:function, a list of different ones"),
    ({"reward": ["answer", "answer"]}, "mapping to weights, not all of them 0, not ['answer', 'answer']"),
    ({"reward": {"answer": 0, "boxed-string": 0.0}}, "not {'answer': 0, 'boxed-string': 0.0}"),
    ({"reward": {"answer": float("nan")}}, "not {'answer': nan}"),
    ({"reward": {"answer": True}}, "not {'answer': True}"),
    ({"reward": []}, "reward must be answer"),
    ({"reward_weights": [2.0]}, "reward_weights is set by the recipe's own key: reward"),
    ({"report_to": ["tensorbord"]}, "report_to must be one of tensorboard, trackio or wandb, not 'tensorbord'"),
    ({"eval": {"every": 3}}, "eval.dataset is missing"),
    ({"model": ""}, "model is missing"),
    ({"prompts_per_rollout": 5, "updates_per_rollout": 3}, "updates_per_rollout 3: 40 samples do not split evenly"),
    ({"inside_layer": 2}, "inside_layer and inside_responses need inside_every"),
    ({"inside_every": 2}, "inside_every needs a layer to compare with the others"),
]


@pytest.mark.parametrize(("change", "part"), WRONG, ids=[str(c) for c, _ in WRONG])
def test_wrong_recipes(change, part):
    (problem,) = problems(**{**SMALLEST, **change})
    assert part in problem


def test_all_problems_come_together():
    """The recipe's own, unknown keys, wrong types, the batch arithmetic, and what BuPOConfig finds."""
    wrong = {"internal_steps": 3, "trl": {"seed": 1}, "learning_rate": "fast", "modl": "x", "lora": {"r": 0}}
    assert problems(**wrong, micro_batch=7) == [
        "model is missing",
        "dataset is missing",
        "lora.r must be at least 1, not 0",
        "learning_rate must be a number, not 'fast'",
        "unknown key modl (did you mean model?)",
        "trl.seed is set by the recipe's own key: seed",
        "prompts_per_rollout 128 x samples_per_prompt 8 / updates_per_rollout 4 = 256 samples, not a multiple of "
        "micro_batch 7; it could be 1, 2, 4 or 8",
        "internal_steps needs internal_layer: a layer from 1 to L, or auto",
    ]


def test_changes():
    raw = {"lora": {"r": 4}, "eval": None}
    changes = ["learning_rate=1e-5", "lora.r=8", "eval.dataset=arithmetic", "internal_layer = auto", "trl={a: [1]}"]
    assert override(raw, [*changes, "x="]) == {
        "lora": {"r": 8}, "eval": {"dataset": "arithmetic"}, "learning_rate": 1e-5, "internal_layer": "auto",
        "trl": {"a": [1]}, "x": None,
    }  # fmt: skip
    assert raw == {"lora": {"r": 4}, "eval": None}
    with pytest.raises(ConfigError) as error:
        override({"model": "small"}, ["seed", "=3", "model.size=2"])
    assert error.value.problems == [
        "--set 'seed' is not of the form key=value",
        "--set '=3' is not of the form key=value",
        "--set model.size: model is not a mapping",
    ]


def test_numbers_in_yaml():
    text = "a: 1e-6\nb: 3E5\nc: -1.5e3\nd: 1e6x\ne: e5"
    assert load_yaml(text, "it") == {"a": 1e-6, "b": 3e5, "c": -1500.0, "d": "1e6x", "e": "e5"}


BROKEN = [
    (b"a: 1\nb: 2\na: 3", "is not valid YAML in line 3: key 'a' is given twice"),
    (b"a: {b: 1, b: 2}", "is not valid YAML in line 1: key 'b' is given twice"),
    (b"a: !!python/object/apply:os.system ['true']", "is not valid YAML in line 1"),
    (b"a: 1\nb: [", "is not valid YAML in line 2"),
    (b"[a]: 1\n{b: 1}: 2", "is not valid YAML"),
    (b"a: " + b"[" * 5000, "is not valid YAML: nested too deeply"),
    (b"a: " + b"9" * 5000, "is not valid YAML: Exceeds the limit"),
    ("a: \u00fc".encode("latin-1"), "cannot be read as text in UTF-8"),
    (b"a: \x00\x01", "is not valid YAML"),
    (b"- 1\n", "must hold keys and values, such as 'model: small'"),
    (b"", "must hold keys and values"),
]


@pytest.mark.parametrize(("content", "part"), BROKEN, ids=[str(c[:20]) for c, _ in BROKEN])
def test_broken_files_give_one_line(tmp_path, content, part):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(InputError, match=re.escape(part)):
        read_recipe(tmp_path / "recipe.yaml")


def test_reading(tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel: small\n")  # a byte-order mark, as some editors write it
    assert read_recipe(path) == {"model": "small"}
    monkeypatch.chdir(RECIPES[0].parents[1])
    with pytest.raises(InputError, match=r"recipe nothing.yaml does not exist; there are .*recipes/small.yaml"):
        read_recipe("nothing.yaml")


WITHOUT_EFFECT = [
    ({"warmup_steps": 10}, "warmup_steps has no effect without an lr_scheduler_type that warms up"),
    ({"trl": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor has no effect in bupo train; leave it out"),
    ({"data_seed": 4}, "data_seed has no effect in bupo train"),
    ({"vllm_mode": "server"}, "vllm_mode has no effect without use_vllm"),
    ({"use_vllm": True, "vllm_server_port": 1}, "vllm_server_port has no effect without vllm_mode server"),
    ({"use_vllm": True, "cache_implementation": "static"}, "cache_implementation has no effect without use_vllm false"),
    ({"loss_type": "sapo", "epsilon_high": 0.3}, "epsilon_high has no effect without a loss_type that clips"),
    ({"loss_type": "cispo", "delta": 2.0}, "delta has no effect without a loss_type that clips on both sides"),
    ({"loss_type": "cispo", "epsilon_high": 5.0, "epsilon": 0.1}, "epsilon has no effect without epsilon_high left"),
    ({"sapo_temperature_neg": 2.0}, "sapo_temperature_neg has no effect without loss_type sapo"),
    ({"sync_ref_model": True}, "sync_ref_model has no effect without beta above 0"),
    ({"entropy_target": 0.1}, "entropy_target has no effect without use_adaptive_entropy"),
    ({"optim_args": "x=1"}, "optim_args has no effect without an optim other than adamw_torch and adafactor"),
    ({"run_name": "x"}, "run_name has no effect without report_to"),
    ({"report_to": ["wandb"], "project": "x"}, "project has no effect without report_to trackio"),
    ({"eval_on_start": True}, "eval_on_start has no effect without eval"),
    ({"internal_layer": 3}, "internal_layer has no effect without internal_steps (0 is plain GRPO) or phases"),
    ({"revision": "main"}, "revision has no effect, as small is not on the hub; leave it out"),
    ({"dataset": __file__, "split": "test"}, "split has no effect, as "),
    ({"eval": {"dataset": __file__, "split": "train"}}, "eval.split has no effect, as "),
    ({"internal_temperature": 2.0}, "internal_temperature has no effect without internal_steps"),
]


@pytest.mark.parametrize(("change", "part"), WITHOUT_EFFECT, ids=[str(c) for c, _ in WITHOUT_EFFECT])
def test_settings_without_effect_are_refused(change, part):
    assert any(part in problem for problem in problems(**{**SMALLEST, **change}))


def test_settings_with_what_they_need_pass():
    for change in (
        {"warmup_steps": 10, "lr_scheduler_type": "constant_with_warmup"},
        {"use_vllm": True, "vllm_mode": "server", "vllm_server_port": 1},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"report_to": ["tensorboard"], "run_name": "x", "eval": {"dataset": "arithmetic"}, "eval_on_start": True},
        {"internal_layer": 3, "internal_steps": 0, "internal_temperature": 2.0},
        {"use_vllm": False, "beta": 0.0, "internal_lens": "raw"},  # defaults
    ):
        assert check_recipe(check_recipe({**SMALLEST, **change}).model_dump(mode="json"))
    names = {*NEVER.split(), *(name for *_, names in NEEDS for name in names.split())}
    assert not names - {field.name for field in dataclasses.fields(BuPOConfig)}
