"""`bupo train` as a user runs it, in process, on a tiny random model."""

from __future__ import annotations

import json

import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bupo.cli import main
from tests.support import training
from tests.support.training import same_weights

RECIPE = {
    "reward": "tests.support.training:digits",
    "rollouts": 4,
    "prompts_per_rollout": 2,
    "samples_per_prompt": 4,
    "updates_per_rollout": 2,
    "micro_batch": 4,
    "max_prompt_length": 12,
    "max_completion_length": 6,
    "learning_rate": 3e-3,
    "internal_layer": 2,
    "internal_steps": 2,
    "gradient_checkpointing": False,
    "save_every": 1,
    "keep_checkpoints": None,
    "seed": 5,
}


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    """Writes a recipe (with changes) and returns its path; the data are six sums in a file."""

    def write(name="recipe.yaml", **changes):
        data = tmp_path / "sums.jsonl"
        data.write_text(
            "".join(json.dumps({"prompt": f"{i}+{i + 1}=", "answer": str(2 * i + 1)}) + "\n" for i in range(6))
        )
        path = tmp_path / name
        path.write_text(yaml.safe_dump({"model": str(tiny_folder), "dataset": str(data), **RECIPE, **changes}))
        return path

    return write


def run(capsys, *arguments):
    code = main(["train", *map(str, arguments)])
    out = capsys.readouterr()
    return code, out.out, out.err


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def untimed(folder):
    return [{k: v for k, v in row.items() if k not in ("seconds", "step_time")} for row in rows(folder)]


def final(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture
def finished(capsys, tmp_path, recipe):
    """A whole run with checkpoints after every rollout batch."""
    folder = tmp_path / "whole"
    assert run(capsys, recipe(), "--output", folder)[0] == 0
    return folder


def test_a_run_writes_what_it_should(capsys, tmp_path, recipe, tiny_folder):
    folder = tmp_path / "run"
    code, out, err = run(capsys, recipe(), "--output", folder, "--json", "--seed", 7, "--set", "trl.epsilon_high=0.3")
    assert code == 0
    summary = json.loads(out)
    assert summary["updates"] == 8
    assert summary["rollouts"] == 4
    assert summary["internal_layer"] == 2
    assert not summary["interrupted"]
    log = rows(folder)
    assert [row["rollout"] for row in log] == [1, 2, 3, 4]
    assert [row["step"] for row in log] == [2, 4, 6, 8]
    assert [(row["phase"], row["layer"]) for row in log] == [("internal", 2)] * 2 + [("full", None)] * 2
    for row in log:
        assert row["reward"] is not None
        assert row["entropy"] > 0
        assert row["mean_length"] > 0
        assert (row["internal_entropy"] is not None) == (row["phase"] == "internal")
    told = json.loads((folder / "run.json").read_text())
    assert told["command"] == "train"
    assert told["config"]["seed"] == told["seed"] == 7
    assert told["config"]["trl"] == {"epsilon_high": 0.3}
    assert told["config"]["updates_per_rollout"] == 2
    assert told["result"] == summary
    assert {"torch", "trl", "transformers"} <= set(told["versions"])
    assert sorted(p.name for p in (folder / "model").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not same_weights(final(folder), load_file(tiny_folder / "model.safetensors"))
    AutoModelForCausalLM.from_pretrained(folder / "model")
    lines = [line for line in err.splitlines() if line.startswith("rollout ")]
    assert len(lines) == 4
    assert lines[0].startswith("rollout 1/4  internal l=2")
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_plain_grpo_from_the_same_recipe(capsys, tmp_path, recipe):
    folder = tmp_path / "run"
    code, out, _ = run(capsys, recipe(), "--output", folder, "--internal-steps", 0, "--rollouts", 2)
    assert code == 0
    assert "2 rollout batches" in out
    assert {row["phase"] for row in rows(folder)} == {"full"}


# -- refusals ------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"model": "no/such/model"}, "model folder no/such/model does not exist"),
    ({"dataset": "nothing.jsonl"}, "no such file: nothing.jsonl"),
    ({"dataset": "columns.jsonl"}, "lacks an answer column"),
    ({"internal_layer": 5}, "layer 5 does not exist: this model has layers 1 to 4"),
    ({"internal_layer": 0}, "internal_layer must be a layer from 1"),
    ({"max_completion_length": 1000}, "exceed the model's context of 512"),
    ({"max_prompt_length": 2}, "no prompt fits into max_prompt_length 2"),
    ({"prompts_per_rollout": 8}, "6 prompts, fewer than the 8 of one rollout batch"),
    ({"trl": {"epsilon_hihg": 0.3}}, "unknown key trl.epsilon_hihg (did you mean epsilon_high?)"),
    ({"trl": {"beta": 0.1, "entropy_coef": 0.1}}, "beta 0.1"),
    ({"trl": {"loss_type": "vespo"}}, "'vespo' mixes"),
    ({"trl": {"optim": "no_such_optimizer"}}, "no_such_optimizer"),
    ({"reward": "tests.support.training:no_such"}, "cannot be imported"),
    ({"reward": "no_such_module:f"}, "cannot be imported"),
    ({"lora": {"target_modules": ["no_such_module"]}}, "no_such_module"),
    ({"dtype": "float32", "template": "chat"}, "no chat template"),
]


@pytest.mark.parametrize(("changes", "part"), REFUSED, ids=[str(c) for c, _ in REFUSED])
def test_wrong_inputs_give_one_line_and_leave_nothing(capsys, tmp_path, recipe, monkeypatch, changes, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "columns.jsonl").write_text('{"prompt": "1+1="}\n')
    folder = tmp_path / "run"
    code, out, err = run(capsys, recipe(**changes), "--output", folder)
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("bupo: error: ")]
    assert len(lines) == 1
    assert part in lines[0]
    assert "Traceback" not in err
    assert not folder.exists()


def test_other_refusals(capsys, tmp_path, recipe, finished):
    path = recipe()
    before = (finished / "run.json").read_text()
    assert "already holds a run" in run(capsys, path, "--output", finished)[2]
    assert (finished / "run.json").read_text() == before
    assert "--output is missing" in run(capsys, path)[2]
    assert "name a recipe" in run(capsys, "--output", tmp_path / "x")[2]
    assert "exclude each other" in run(capsys, path, "--output", finished, "--resume", "--overwrite")[2]
    assert "takes no other settings" in run(capsys, "--output", finished, "--resume", "--seed", 3)[2]
    assert "seed was 5 and is now 6" in run(capsys, path, "--output", finished, "--resume", "--seed", 6)[2]
    assert "holds no training run" in run(capsys, "--output", tmp_path, "--resume")[2]
    assert "holds no complete checkpoint" in run(capsys, path, "--output", tmp_path / "new", "--resume")[2]
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "x").exists()


def test_overwriting_replaces_the_whole_run(capsys, recipe, finished):
    code, _, _ = run(capsys, recipe(rollouts=2), "--output", finished, "--overwrite")
    assert code == 0
    assert [row["rollout"] for row in rows(finished)] == [1, 2]
    names = sorted(p.name for p in (finished / "checkpoints").glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-4"]


# -- stopping and going on -----------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_as_if_nothing_had_happened(capsys, tmp_path, recipe, finished):
    import shutil

    for last in (2, 6):  # in the internal and in the full phase
        folder = tmp_path / f"killed-{last}"
        shutil.copytree(finished, folder)
        shutil.rmtree(folder / "model")
        for step in range(last + 2, 10, 2):
            shutil.rmtree(folder / "checkpoints" / f"checkpoint-{step}")
        broken = folder / "checkpoints" / f"checkpoint-{last + 2}"  # killed while this one was written
        broken.mkdir()
        (broken / "trainer_state.json").write_text("{")
        with (folder / "log.jsonl").open("a") as stream:
            stream.write('{"step": 10, "rol')
        code, _, err = run(capsys, "--resume", "--output", folder)
        assert code == 0, err
        assert same_weights(final(folder), final(finished))
        assert untimed(folder) == untimed(finished)
        assert json.loads((folder / "run.json").read_text())["resumed"] is True


def test_a_run_killed_after_its_last_checkpoint_only_writes_the_model(capsys, finished):
    import shutil

    wanted = final(finished)
    shutil.rmtree(finished / "model")
    code, _, _ = run(capsys, "--resume", "--output", finished)
    assert code == 0
    assert same_weights(final(finished), wanted)
    assert len(rows(finished)) == 4


@pytest.mark.parametrize("when", [1, 3])
def test_ctrl_c_saves_and_says_how_to_go_on(capsys, tmp_path, recipe, finished, monkeypatch, when):
    monkeypatch.setattr(training, "INTERRUPT_IN_ROLLOUT", [when, 0])
    folder = tmp_path / "stopped"
    stopping = recipe(reward="tests.support.training:digits_then_interrupt", save_every=4)
    code, out, err = run(capsys, stopping, "--output", folder)
    assert code == 130
    assert "stopping after this rollout batch" in err
    assert f"stopped after rollout batch {when}; checkpoint saved" in out
    assert f"bupo train --resume --output {folder}" in out
    assert not (folder / "model").exists()
    assert [p.name for p in (folder / "checkpoints").glob("checkpoint-*")] == [f"checkpoint-{2 * when}"]
    code, _, _ = run(capsys, "--resume", "--output", folder)
    assert code == 0
    assert same_weights(final(folder), final(finished))
    changed = {"rewards/digits/mean", "rewards/digits/std"}
    for ours, wanted in zip(untimed(folder), untimed(finished), strict=True):
        assert {k: v for k, v in ours.items() if "digits" not in k} == {
            k: v for k, v in wanted.items() if k not in changed
        }


def test_trouble_in_training_names_the_update(capsys, tmp_path, recipe):
    code, _, err = run(capsys, recipe(learning_rate=1e38), "--output", tmp_path / "a")
    assert code == 2
    assert "bupo: error: non-finite" in err
    assert "in update 2 (rollout batch 1, internal phase, layer 2)" in err
    code, _, err = run(capsys, recipe(reward="tests.support.training:no_memory"), "--output", tmp_path / "b")
    assert code == 2
    assert "bupo: error: out of accelerator memory in update 1 (rollout batch 1, internal phase, layer 2); lower" in err


# -- variants ------------------------------------------------------------------------------------------------------


def test_lora_leaves_an_adapter_and_a_merged_model(capsys, tmp_path, recipe, tiny_folder):
    folder = tmp_path / "run"
    code, _, err = run(capsys, recipe(lora={"r": 2}, rollouts=3), "--output", folder)
    assert code == 0, err
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    merged, start = final(folder), load_file(tiny_folder / "model.safetensors")
    assert merged.keys() == start.keys()
    assert not same_weights(merged, start)
    assert (merged["lm_head.weight"] == start["lm_head.weight"]).all()


def test_evaluation_during_training(capsys, tmp_path, recipe):
    path = recipe(rollouts=2)
    data = yaml.safe_load(path.read_text())["dataset"]
    folder = tmp_path / "run"
    code, _, err = run(
        capsys, path, "--output", folder, "--set", f"eval={{dataset: '{data}', limit: 3, samples: 2, every: 1}}"
    )
    assert code == 0, err
    measured = [row for row in rows(folder) if "eval_reward" in row]
    assert [row["step"] for row in measured] == [2, 4]
    assert all("rollout" not in row for row in measured)
    assert "evaluation after update 2: reward" in err


def test_auto_stops_or_says_which_layer(capsys, tmp_path, recipe):
    folder = tmp_path / "run"
    code, out, err = run(capsys, recipe(rollouts=2), "--output", folder, "--internal-layer", "auto", "--json")
    if code == 0:
        analysis = json.loads((folder / "auto_layer.json").read_text())
        assert json.loads(out)["internal_layer"] == analysis["boundary_layer"]
    else:
        assert code == 2
        assert "Set internal_layer to a number from 1 to 4" in err


def test_the_answer_reward_grades(capsys, tmp_path, tiny_folder):
    from bupo.data.problems import Problem
    from bupo.train.rewards import AnswerReward

    asked = [Problem("a", "1+1=", "2", "t"), Problem("b", "?", r"\frac{", "t"), Problem("c", "2+2=", "4", "t")]
    logged = {}
    reward = AnswerReward(asked)
    try:
        found = reward(
            completions=[r"\boxed{2}", r"\boxed{3}", "no box", r"\boxed{4.0}"],
            problem=[0, 0, 2, 2],
            log_metric=logged.__setitem__,
        )
    finally:
        reward.close()
    assert found == [1.0, 0.0, 0.0, 1.0]
    assert logged == {"grading/unparsable": 0.25, "grading/timeout": 0.0}
