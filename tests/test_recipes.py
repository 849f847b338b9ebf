"""Every recipe in recipes/: the paper's numbers, and two rollout batches of each phase on a tiny model like its own."""

import json
import math
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from bupo.data.prompts import TEMPLATES
from bupo.models.load import SMALL_MODEL
from bupo.plan import PlanRequest, find_device, make_plan
from bupo.recipe import read_recipe
from bupo.train.build import check_recipe
from bupo.train.run import train
from tests.support.tiny import tiny_model

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
CONFIGS = Path(SMALL_MODEL).parent / "configs"
TINY_LAYERS = 6

# s_inter, layer, response tokens, template: of Table 8 of arXiv 2512.19673, and of the authors' scripts
PAPER = {
    "qwen3-4b": (30, 6, 7168, "qwen3-no-thinking"),
    "qwen3-8b": (20, 6, 7168, "qwen3-no-thinking"),
    "octothinker-3b": (20, 26, 3072, "octothinker"),
    "octothinker-8b": (20, 30, 3072, "octothinker"),
}
SCRIPTS = {"qwen3-4b-script": (30, 6, 8192, "qwen3-no-thinking"), "octothinker-3b-script": (30, 27, 3072, "chat")}


def config_of(recipe):
    """The configuration of a recipe's model: its own folder's, or the shape that ships."""
    shipped = CONFIGS / f"{recipe.model.replace('/', '--')}.json"
    if recipe.model == "small":
        return AutoConfig.from_pretrained(SMALL_MODEL)
    if shipped.exists():
        values = json.loads(shipped.read_text())
        return AutoConfig.for_model(values.pop("model_type"), **values)
    assert recipe.model == "models/smollm2"
    return AutoConfig.for_model("llama", num_hidden_layers=30, tie_word_embeddings=True)  # as `make smollm2` writes it


@pytest.mark.parametrize("name", sorted(PAPER | SCRIPTS))
def test_the_papers_settings_and_those_of_the_scripts(name):
    recipe = check_recipe(read_recipe(FOLDER / f"{name}.yaml"))
    steps, layer, response, template = (PAPER | SCRIPTS)[name]
    given = (recipe.updates_per_rollout, recipe.reward, recipe.dataset, recipe.problems)
    more = (recipe.trainer.get("delta"), recipe.trainer.get("weight_decay", 0))
    if name in PAPER:
        assert (*given, *more) == (16, "answer", "zwhe99/DeepMath-103K", 5000, None, 0)
    else:
        assert (*given, *more) == (4, "boxed-string", "deepmath-5k.parquet", None, 10.0, 0.01)
    assert (recipe.internal_steps, recipe.internal_layer) == (steps, layer)
    assert (recipe.max_prompt_length, recipe.max_completion_length) == (1024, response)
    assert recipe.template == template
    assert (recipe.prompts_per_rollout, recipe.samples_per_prompt) == (128, 8)
    assert (recipe.learning_rate, recipe.rollouts, recipe.temperature, recipe.estimator) == (1e-6, 300, 1.0, "grpo")
    for processes in (1, 2, 4, 8):
        recipe.trainer_settings(processes)  # splits evenly
    room = config_of(recipe).max_position_embeddings
    assert recipe.max_prompt_length + recipe.max_completion_length <= room
    assert layer < config_of(recipe).num_hidden_layers


def test_there_is_a_recipe_for_every_case_and_every_name_is_known():
    names = {path.stem for path in RECIPES}
    assert {*PAPER, *SCRIPTS, "small", "smollm2", "qwen3-4b-lora-24gb"} <= names
    for path in RECIPES:
        assert check_recipe(read_recipe(path)).template in TEMPLATES
        for line in path.read_text().splitlines():
            if line.startswith("#   bupo ") and " recipes/" in line:  # the commands in the comment name this very file
                assert f" recipes/{path.name}" in line


def scaled(path, folder, tokenizer):
    """A recipe with a tiny random model of its model's architecture, short texts and small batches."""
    raw = read_recipe(path)
    recipe = check_recipe(raw)
    config, samples = config_of(recipe), recipe.prompts_per_rollout * recipe.samples_per_prompt
    updates = min(4, recipe.updates_per_rollout)
    sizes = {"num_hidden_layers": TINY_LAYERS, "max_position_embeddings": 1024}
    tied = {"tie_word_embeddings": config.tie_word_embeddings}
    tiny_model(config.model_type, spread=3.0, **sizes, **tied).save_pretrained(folder / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    layer = math.floor(recipe.internal_layer / config.num_hidden_layers * TINY_LAYERS)
    small = {
        "model": str(folder / "model"),
        "rollouts": 4,
        "internal_layer": min(TINY_LAYERS - 1, max(1, layer)),
        "internal_steps": 2,
        "updates_per_rollout": updates,
        "prompts_per_rollout": 2 * updates,
        "samples_per_prompt": 2,
        "micro_batch": 4 if samples == recipe.micro_batch * recipe.updates_per_rollout else 2,  # several per update
        "save_every": 4,
        "max_prompt_length": 600,
        "max_completion_length": 5,
        "learning_rate": 1e-3,
        "trl": {name: value for name, value in recipe.trl.items() if "vllm" not in name},  # no vLLM here, and no hub
    }
    if recipe.dataset.startswith(("zwhe99/", "models/", "deepmath-5k")):  # not in a fresh clone
        rows = [{"question": f"What is {i} + {i}?", "final_answer": str(2 * i)} for i in range(40)]
        (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        small |= {"dataset": str(folder / "sums.jsonl"), "problems": 32, "reward": "tests.support.training:digits"}
    return check_recipe({**raw, **small})


SLOW = {path: pytest.mark.slow if path.stem.endswith(("-8b", "octothinker-3b-script")) else () for path in RECIPES}


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem, marks=marks) for p, marks in SLOW.items()])
def test_two_rollout_batches_of_each_phase(path, tiny_folder, tmp_path):
    recipe = scaled(path, tmp_path, AutoTokenizer.from_pretrained(tiny_folder))
    if path.stem in PAPER | SCRIPTS:
        assert (recipe.template, recipe.lora) == ((PAPER | SCRIPTS)[path.stem][3], None)
    summary = train(recipe, tmp_path / "run", say=lambda text: None)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    phases = [("internal", recipe.internal_layer)] * 2 + [("full", None)] * 2
    assert [(row["phase"], row["layer"]) for row in rows] == phases
    assert summary["updates"] == 4 * recipe.updates_per_rollout
    assert all(math.isfinite(row["loss"]) and row["entropy"] > 0 for row in rows)
    if recipe.reward == "tests.support.training:digits":  # a reward with signal moves the weights
        assert any(row["grad_norm"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_each_recipe_can_be_planned(path, tmp_path):
    recipe = check_recipe(read_recipe(path))
    config_of(recipe).save_pretrained(tmp_path)
    device = find_device("h100", None, None)
    plan = make_plan(
        recipe, PlanRequest(device, processes=1, config_from=tmp_path if "models/" in recipe.model else None)
    )
    assert set(plan["memory"]["peak_above_weights"]) == {"internal", "full"}
    assert plan["seconds"]["run"] > 0
