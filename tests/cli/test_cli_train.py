"""`bupo train` as a user runs it, in process, on a tiny random model."""

import json
import shutil

import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bupo.cli import main
from tests.support import training
from tests.support.tiny import tiny_model
from tests.support.training import same_weights

RECIPE = yaml.safe_load("""{
    reward: "tests.support.training:digits", rollouts: 4, prompts_per_rollout: 2, samples_per_prompt: 4,
    updates_per_rollout: 2, micro_batch: 4, max_prompt_length: 12, max_completion_length: 6, learning_rate: 0.003,
    internal_layer: 2, internal_steps: 2, gradient_checkpointing: false, save_every: 1, keep_checkpoints: null, seed: 5
}""")


def write_recipe(folder, **changes):
    """A recipe file (with changes) in a folder; the data are six sums in a file beside it."""
    rows = [{"prompt": f"{i}+{i + 1}=", "answer": str(2 * i + 1)} for i in range(6)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"dataset": str(folder / "sums.jsonl"), **RECIPE, **changes}))
    return path


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    return lambda **changes: write_recipe(tmp_path, **{"model": str(tiny_folder), **changes})


def rows(folder):
    """The log without times."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "sampling_seconds", "step_time")} for row in log]


def final(folder):
    return load_file(folder / "model" / "model.safetensors")


def read(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, tiny_folder):
    """A whole run with checkpoints after every rollout batch, not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(["train", str(write_recipe(folder, model=str(tiny_folder))), "--output", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def finished(whole_run, tmp_path, recipe):
    """A copy of it, and its recipe."""
    raw = read(whole_run)
    raw["config"]["dataset"] = str(recipe().parent / "sums.jsonl")
    folder = shutil.copytree(whole_run, tmp_path / "finished")
    raw["result"] |= {"output": str(folder), "model": str(folder / "model")}
    (folder / "run.json").write_text(json.dumps(raw, indent=1, ensure_ascii=False) + "\n")
    return folder


def test_a_run_writes_what_it_should(bupo, tmp_path, recipe, tiny_folder):
    folder, path = tmp_path / "run", recipe()
    evaluation = f"eval={{dataset: '{tmp_path / 'sums.jsonl'}', limit: 3, samples: 2, every: 2}}"
    changes = ("--seed", 7, "--set", "trl.epsilon_high=0.3", "--set", evaluation)
    code, out, err = bupo("train", path, "--output", folder, "--json", *changes)
    assert code == 0
    summary = json.loads(out)
    assert (summary["updates"], summary["rollouts"], summary["internal_layer"]) == (8, 4, 2)
    assert not summary["interrupted"]
    log = [row for row in rows(folder) if "rollout" in row]
    assert [(row["rollout"], row["step"]) for row in log] == [(1, 2), (2, 4), (3, 6), (4, 8)]
    assert [(row["phase"], row["layer"]) for row in log] == [("internal", 2)] * 2 + [("full", None)] * 2
    for row in log:
        assert row["reward"] is not None
        assert row["entropy"] > 0
        assert row["mean_length"] > 0
        assert (row["internal_entropy"] is not None) == (row["phase"] == "internal")
    measured = [row for row in rows(folder) if "eval_reward" in row]
    assert [(row["step"], "rollout" in row) for row in measured] == [(4, False), (8, False)]
    assert "evaluation after update 4: reward" in err
    record = read(folder)
    assert (record["command"], record["result"]) == ("train", summary)
    assert record["config"]["seed"] == record["seed"] == 7
    assert record["config"]["trl"] == {"epsilon_high": 0.3}
    assert record["config"]["updates_per_rollout"] == 2
    assert {"torch", "trl", "transformers"} <= set(record["versions"])
    names = "README.md config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json"
    assert sorted(p.name for p in (folder / "model").iterdir()) == names.split()
    assert not same_weights(final(folder), load_file(tiny_folder / "model.safetensors"))
    AutoModelForCausalLM.from_pretrained(folder / "model")
    lines = [line for line in err.splitlines() if line.startswith("rollout ")]
    assert len(lines) == 4
    assert lines[0].startswith("rollout 1/4  internal l=2")
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


REFUSED = [
    ({"model": "no/such/model"}, "model folder no/such/model does not exist"),
    ({"dataset": "nothing.jsonl"}, "no such file: nothing.jsonl"),
    ({"dataset": "columns.jsonl"}, "lacks an answer column"),
    ({"max_completion_length": 1000}, "exceed the model's context of 512"),
    ({"max_prompt_length": 2}, "no prompt fits into max_prompt_length 2"),
    ({"prompts_per_rollout": 8}, "6 prompts, fewer than the 8 of a rollout batch"),
    ({"trl": {"beta": 0.1, "entropy_coef": 0.1}}, "beta 0.1"),
    ({"trl": {"optim": "no_such_optimizer"}}, "no_such_optimizer"),
    ({"reward": "tests.support.training:no_such"}, "cannot be imported"),
    ({"lora": {"target_modules": ["no_such_module"]}}, "no_such_module"),
    ({"dtype": "float32", "template": "chat"}, "no chat template"),
    # found by the first rollout batch or update only; what was written by then is removed
    ({"trl": {"top_k": -3}}, "`top_k` has to be a strictly positive integer"),
    ({"trl": {"pad_to_multiple_of": 0}}, "ZeroDivisionError"),
    ({"trl": {"adam_beta1": 7.0}}, "Invalid beta parameter at index 0"),
    ({"phases": "[" * 5000, "internal_layer": None, "internal_steps": None}, "phases must be a list of"),
]


@pytest.mark.parametrize(("changes", "part"), REFUSED, ids=[str(c) for c, _ in REFUSED])
def test_wrong_inputs_give_one_line_and_leave_nothing(refused, tmp_path, recipe, monkeypatch, changes, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "columns.jsonl").write_text('{"prompt": "1+1="}\n')
    assert part in refused("train", recipe(**changes), output=tmp_path / "run")


def test_models_that_cannot_be_trained_are_refused(refused, bupo, tmp_path, recipe, tiny_folder):
    """A tokenizer that belongs to another model or can neither pad nor end, and weights that are not numbers."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    keep = {name: value for name, value in settings.items() if name not in ("pad_token", "eos_token")}
    write = (folder / "tokenizer_config.json").write_text
    write(json.dumps(keep))
    path = recipe(model=str(folder))
    assert "has no padding and no end-of-sequence token" in refused("train", path, output=tmp_path / "run")
    write(json.dumps(settings))
    tiny_model("qwen3", vocab_size=15, max_position_embeddings=512).save_pretrained(folder)
    beyond = "is outside the model's vocabulary of 15"
    assert beyond in refused("train", path, output=tmp_path / "run")
    sampled = ("--dataset", tmp_path / "sums.jsonl")
    assert beyond in refused("analyze", "--model", folder, *sampled, output=tmp_path / "run")
    assert beyond in refused("eval", "--model", folder, *sampled, output=tmp_path / "run")
    model = tiny_model("qwen3", max_position_embeddings=512)
    model.model.layers[1].mlp.down_proj.weight.data.fill_(float("nan"))
    model.save_pretrained(folder)
    code, _, err = bupo("train", path, "--output", tmp_path / "run")
    assert code == 2
    assert "update 1 (rollout batch 1, internal phase, layer 2): the model's probabilities are not finite" in err


def test_other_refusals(bupo, tmp_path, recipe, finished):
    path, new, before = recipe(), tmp_path / "new", read(finished)
    for arguments, part in [
        ((path, "--output", finished), "already holds a run"),
        ((path,), "--output is missing"),
        (("--output", new), "name a recipe"),
        ((path, "--output", finished, "--resume", "--overwrite"), "exclude each other"),
        (("--output", finished, "--resume", "--seed", 3), "takes no other settings"),
        ((path, "--output", finished, "--resume", "--seed", 6), "seed was 5 and is now 6"),
        (("--output", tmp_path, "--resume"), "holds no training run"),
        ((path, "--output", new, "--resume"), "holds no complete checkpoint"),
        ((path, "--output", finished, "--resume", "--check"), "leave out --resume"),
    ]:
        code, _, err = bupo("train", *arguments, check=True)
        assert code == 2
        assert part in err
    assert read(finished) == before
    assert not new.exists()


def test_plain_grpo_from_the_same_recipe_replaces_a_whole_run(bupo, recipe, finished):
    plain = ("--internal-steps", 0, "--rollouts", 2)
    code, out, _ = bupo("train", recipe(), "--output", finished, *plain, "--overwrite")
    assert code == 0
    assert "2 rollout batches" in out
    assert [(row["rollout"], row["phase"]) for row in rows(finished)] == [(1, "full"), (2, "full")]
    names = sorted(p.name for p in (finished / "checkpoints").glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-4"]


# -- stopping and continuing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [2, 6], ids=["internal phase", "full phase"])
def test_a_killed_run_continues_as_if_nothing_had_happened(bupo, finished, whole_run, last):
    shutil.rmtree(finished / "model")
    for step in range(last + 2, 10, 2):
        shutil.rmtree(finished / "checkpoints" / f"checkpoint-{step}")
    broken = finished / "checkpoints" / f"checkpoint-{last + 2}"  # killed while this one was written
    broken.mkdir()
    (broken / "trainer_state.json").write_text("{")
    with (finished / "log.jsonl").open("a") as stream:
        stream.write('{"step": 10, "rol')
    code, _, err = bupo("train", "--resume", "--output", finished)
    assert code == 0, err
    assert same_weights(final(finished), final(whole_run))
    assert rows(finished) == rows(whole_run)
    assert read(finished)["resumed"] is True


@pytest.mark.parametrize("missing", [None, "model", "result"])
def test_resuming_a_finished_run_keeps_its_record(bupo, finished, missing):
    """And completes it where the run was killed after its last checkpoint."""
    expected, weights = read(finished), final(finished)
    if missing == "model":
        shutil.rmtree(finished / "model")
    if missing == "result":  # the layer that `auto` found and the guard's decision come from the checkpoint
        end = {"rollouts": 1, "action": "switch", "reason": "as scripted"}
        state = finished / "checkpoints" / "checkpoint-8" / "bupo_state.json"
        state.write_text(json.dumps({**json.loads(state.read_text()), "phase_end": end}))
        (finished / "run.json").write_text(json.dumps({k: v for k, v in expected.items() if k != "result"}))
        expected["result"]["phase_end"] = end
    code, out, _ = bupo("train", "--resume", "--output", finished, "--json")
    assert code == 0
    record = read(finished)
    assert json.loads(out) == record["result"]
    if missing == "result":
        record["result"]["seconds"] = expected["result"]["seconds"]
        record, expected = record["result"], expected["result"]
    assert record == expected
    assert same_weights(final(finished), weights)
    assert len(rows(finished)) == 4


@pytest.mark.parametrize("when", [1, 3])
def test_ctrl_c_saves_and_says_how_to_continue(bupo, tmp_path, recipe, whole_run, monkeypatch, when):
    monkeypatch.setattr(training, "INTERRUPT_IN_ROLLOUT", [when, 0])
    folder = tmp_path / "stopped"
    stopping = recipe(reward="tests.support.training:digits_then_interrupt", save_every=4)
    code, out, err = bupo("train", stopping, "--output", folder)
    assert code == 130
    assert "stopping after this rollout batch" in err
    assert f"stopped after rollout batch {when}; checkpoint saved" in out
    assert f"bupo train --resume --output {folder}" in out
    assert not (folder / "model").exists()
    assert [p.name for p in (folder / "checkpoints").glob("checkpoint-*")] == [f"checkpoint-{2 * when}"]
    assert bupo("train", "--resume", "--output", folder)[0] == 0
    assert same_weights(final(folder), final(whole_run))
    ours, theirs = (
        [{k: v for k, v in row.items() if "digits" not in k} for row in rows(f)] for f in (folder, whole_run)
    )
    assert ours == theirs


def test_a_run_that_diverges_names_the_update(bupo, tmp_path, recipe):
    code, _, err = bupo("train", recipe(learning_rate=1e38), "--output", tmp_path / "run")
    assert code == 2
    assert "bupo: error: non-finite" in err
    assert "in update 2 (rollout batch 1, internal phase, layer 2)" in err


def test_auto_stops_or_says_which_layer(bupo, tmp_path, recipe):
    folder = tmp_path / "run"
    auto = ("--internal-layer", "auto", "--json")
    code, out, err = bupo("train", recipe(rollouts=2), "--output", folder, *auto)
    if code == 0:
        analysis = json.loads((folder / "auto_layer.json").read_text())
        assert json.loads(out)["internal_layer"] == analysis["boundary_layer"]
    else:
        assert code == 2
        assert "Set internal_layer to a number" in err
