"""Recipes: reading, changing, checking, the batch arithmetic; and no torch."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from bupo.errors import ConfigError, InputError
from bupo.recipe import Recipe, parse, read_recipe
from bupo.schema import load_yaml, override

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.yaml"))
SMALLEST = {"model": "small", "dataset": "arithmetic"}


def problems(raw):
    with pytest.raises(ConfigError) as error:
        parse(raw)
    return error.value.problems


def test_parsing_needs_no_torch():
    code = (
        "import sys; from bupo.recipe import parse, read_recipe;"
        f"[parse(read_recipe(p)) for p in {[str(p) for p in RECIPES]!r}];"
        "assert not {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", RECIPES, ids=[p.stem for p in RECIPES])
def test_shipped_recipes_parse_and_round_trip(path):
    recipe = parse(read_recipe(path))
    assert parse(recipe.to_dict()) == recipe
    assert recipe.trainer_settings(1)["internal_steps"] == recipe.internal_steps
    assert recipe.internal_steps > 0


def test_the_defaults_are_the_papers():
    recipe = parse(SMALLEST)
    settings = recipe.trainer_settings(1)
    wanted = {
        "num_generations": 8,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 32,
        "updates_per_rollout": 4,
        "max_steps": 1200,
        "max_completion_length": 7168,
        "temperature": 1.0,
        "learning_rate": 1e-6,
        "internal_steps": 0,
    }
    assert {name: settings[name] for name in wanted} == wanted
    assert recipe.max_prompt_length == 1024


def test_batch_arithmetic_over_many_settings():
    good = 0
    for prompts, samples, updates, micro, processes in itertools.product(
        (3, 4, 16), (2, 8), (1, 2, 3, 4), (1, 2, 4, 8), (1, 2, 4)
    ):
        recipe = Recipe(
            **SMALLEST,
            prompts_per_rollout=prompts,
            samples_per_prompt=samples,
            updates_per_rollout=updates,
            micro_batch=micro,
            rollouts=5,
        )
        if (prompts * samples) % (updates * micro * processes):
            with pytest.raises(ConfigError):
                recipe.trainer_settings(processes)
            continue
        good += 1
        settings = recipe.trainer_settings(processes)
        accumulation = settings["gradient_accumulation_steps"]
        assert micro * accumulation * updates * processes == prompts * samples
        assert settings["max_steps"] == 5 * updates
    assert good > 50


def test_uneven_batches_say_what_would_fit():
    (problem,) = problems({**SMALLEST, "prompts_per_rollout": 16, "updates_per_rollout": 2, "micro_batch": 5})
    assert "prompts_per_rollout 16 x samples_per_prompt 8 / updates_per_rollout 2 = 64" in problem
    assert "no multiple of micro_batch 5; it could be 1, 2, 4 or 8" in problem
    (problem,) = problems({**SMALLEST, "prompts_per_rollout": 5, "updates_per_rollout": 3})
    assert "40 samples do not split into updates_per_rollout 3" in problem
    with pytest.raises(ConfigError, match="do not split over 3 processes"):
        parse(SMALLEST).trainer_settings(3)


def test_more_passes_over_a_rollout_count_as_updates():
    recipe = parse({**SMALLEST, "rollouts": 10, "save_every": 5, "trl": {"num_iterations": 2}})
    settings = recipe.trainer_settings(1)
    assert (settings["max_steps"], settings["save_steps"], settings["num_iterations"]) == (80, 40, 2)


def test_evaluation_settings():
    recipe = parse({**SMALLEST, "micro_batch": 8, "eval": {"dataset": "arithmetic", "samples": 3, "every": 5}})
    settings = recipe.trainer_settings(1)
    assert settings["eval_steps"] == 20
    assert settings["per_device_eval_batch_size"] == 9  # whole groups of 3
    assert settings["num_generations_eval"] == 3


WRONG = [
    ({"modl": "x"}, "unknown key modl (did you mean model?)"),
    ({"learning_rat": 1}, "did you mean learning_rate?"),
    ({"lora": {"rank": 4}}, "unknown key lora.rank (valid: r, alpha, dropout, target_modules, four_bit)"),
    ({"rollouts": "many"}, "rollouts must be a whole number, not 'many'"),
    ({"rollouts": True}, "rollouts must be a whole number, not True"),
    ({"rollouts": 2.5}, "rollouts must be a whole number, not 2.5"),
    ({"rollouts": 0}, "rollouts must be at least 1, not 0"),
    ({"learning_rate": 0}, "learning_rate must be above 0, not 0.0"),
    ({"learning_rate": float("nan")}, "learning_rate must be above 0, not nan"),
    ({"samples_per_prompt": 1}, "samples_per_prompt must be at least 2"),
    ({"template": "qwen"}, "template must be one of auto, raw, chat"),
    ({"internal_norm": "yes please"}, "internal_norm must be true or false"),
    ({"lora": 4}, "lora must be a mapping with r, alpha, dropout, target_modules, four_bit or null"),
    ({"trl": [1]}, "trl must be a mapping"),
    ({"keep_checkpoints": 1}, "keep_checkpoints must be at least 2"),
    ({"internal_steps": 3}, "internal_steps needs internal_layer"),
    ({"internal_rule": "best"}, "internal_rule must be"),
    ({"internal_rule": "recommended", "internal_layer": 2}, "internal_rule goes with internal_layer auto"),
    ({"internal_layer": "top"}, "internal_layer must be a layer from 1 to L or auto, not 'top'"),
    ({"internal_layer": 0}, "internal_layer counts from 1"),
    ({"internal_layer": 2, "internal_steps": 301}, "internal_steps 301 is more than rollouts 300"),
    ({"trl": {"max_steps": 3}}, "trl.max_steps is set by the recipe's own key: rollouts"),
    ({"trl": {"num_iterations": 0}}, "trl.num_iterations must be"),
    ({"reward": "good answers"}, "reward must be answer or module:function"),
    ({"eval": {"every": 3}}, "eval.dataset is missing"),
    ({"model": ""}, "model is missing"),
    ({"internal_weight": 1.5}, "internal_weight is a share"),
    ({"internal_ladder": [[6]]}, "internal_ladder: a ladder is a list of"),
    ({"internal_ladder": [[6, 200], [12, 200]]}, "takes 400 rollout batches, more than rollouts 300"),
    ({"internal_ladder": [[6, 20]], "internal_layer": 6}, "not both"),
    ({"estimator": "ppo2"}, "estimator must be one of grpo"),
]


@pytest.mark.parametrize(("change", "part"), WRONG, ids=[str(c) for c, _ in WRONG])
def test_wrong_recipes(change, part):
    found = problems({**SMALLEST, **change})
    assert any(part in problem for problem in found), found


def test_all_problems_come_together():
    found = problems({"modl": "x", "rollouts": 0, "lora": {"rank": 1, "r": 0}, "template": 3})
    assert len(found) == 5
    assert problems({"internal_steps": 3, "trl": {"seed": 1}}) == [
        "model is missing",
        "dataset is missing",
        "internal_steps needs internal_layer: a layer from 1 to L, or auto",
        "trl.seed is set by the recipe's own key: seed",
    ]


def test_changes():
    raw = {"lora": {"r": 4}, "eval": None}
    changed = override(
        raw, ["learning_rate=1e-5", "lora.r=8", "eval.dataset=arithmetic", "internal_layer=auto", "trl={a: [1]}", "x="]
    )
    assert changed == {
        "lora": {"r": 8},
        "eval": {"dataset": "arithmetic"},
        "learning_rate": 1e-5,
        "internal_layer": "auto",
        "trl": {"a": [1]},
        "x": None,
    }
    assert raw == {"lora": {"r": 4}, "eval": None}
    with pytest.raises(ConfigError) as error:
        override({"model": "small"}, ["seed", "=3", "model.size=2"])
    assert len(error.value.problems) == 3


def test_yaml():
    assert load_yaml("a: 1e-6\nb: 3E5\nc: -1.5e3\nd: 1e6x\ne: e5", "it") == {
        "a": 1e-6,
        "b": 3e5,
        "c": -1500.0,
        "d": "1e6x",
        "e": "e5",
    }
    with pytest.raises(InputError, match="it is not valid YAML in line 3: key 'a' is given twice"):
        load_yaml("a: 1\nb: 2\na: 3", "it")
    with pytest.raises(InputError, match="not valid YAML"):
        load_yaml("a: !!python/object/apply:os.system ['true']", "it")
    with pytest.raises(InputError, match="in line 2"):
        load_yaml("a: 1\nb: [", "it")


def test_reading(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    with pytest.raises(InputError, match=r"recipe nothing.yaml does not exist; there are .*recipes/small.yaml"):
        read_recipe("nothing.yaml")
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(InputError, match="must hold keys and values"):
        read_recipe(path)
