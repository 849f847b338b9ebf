"""The check before a run: it changes nothing, measures what it says, and stops or warns for the right reasons."""

import json
import random

import numpy as np
import psutil
import pytest
import torch

from bupo.recipe import read_recipe
from bupo.train import check
from bupo.train.build import build, check_recipe, closing_rewards
from bupo.train.check import examine, in_words, sample_warnings
from bupo.train.schedule import FULL, Phase, Schedule
from tests.cli.conftest import bupo  # noqa: F401  (a fixture)
from tests.cli.test_cli_train import final, read, recipe, rows  # noqa: F401  (a fixture)
from tests.support import distributed
from tests.support.processes import launch
from tests.support.training import digits, same_weights


def noisy(completions, **more):
    """Draws from every generator that a run has."""
    noise = random.random() + np.random.random() + torch.rand(1).item()
    return [share + noise * i / 100 for i, share in enumerate(digits(completions))]


def constant(completions, **_):
    return [0.25] * len(completions)


def none(completions, **_):
    return [None] * len(completions)


JOINT = {"internal_layer": None, "internal_steps": None, "phases": [{"layer": 2, "rollouts": 1, "weight": 0.5}]}
ADAPTERS = {"lora": {"r": 2, "dropout": 0.3}, "gradient_checkpointing": True, "micro_batch": 2}
ACCUMULATED = {"trl": {"num_iterations": 2}, "micro_batch": 2, "estimator": "ppo"}


@pytest.mark.parametrize(
    "changes", [{}, ADAPTERS, *(pytest.param(one, marks=pytest.mark.slow) for one in (JOINT, ACCUMULATED))],
    ids=["plain", "lora", "joint", "ppo"],
)  # fmt: skip
def test_a_run_with_the_check_is_bit_for_bit_one_without(bupo, tmp_path, recipe, changes):  # noqa: F811
    path = recipe(reward="tests.train.test_check:noisy", rollouts=2, **{"internal_steps": 1, **changes})
    for name, option in (("with", "--check"), ("with", ()), ("without", "--no-check")):
        only = ("--output", tmp_path / name)
        code, out, err = bupo("train", path, *only, *([option] if option else []), check=True)
        assert code == 0, err
        assert (tmp_path / name).exists() == (option != "--check")
        assert ("8 responses to 2 prompts" in out) == (option == "--check")
    assert same_weights(final(tmp_path / "with"), final(tmp_path / "without"))
    assert rows(tmp_path / "with") == rows(tmp_path / "without")


def found(bupo, path, code=0):  # noqa: F811
    now, out, _ = bupo("train", path, "--check", "--json", check=True)
    assert now == code
    return json.loads(out)


def test_the_findings(bupo, recipe, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = recipe()
    one = found(bupo, path)
    assert list(tmp_path.glob("bupo-check-*")) == []
    assert one["schedule"] == "2 rollout batches train layer 2, then 2 the full policy; 2 updates per rollout batch"
    assert (one["prompts"], one["notes"], one["problems"]) == (6, [], [])
    assert [(m["phase"], m["layer"], m["ran_out"]) for m in one["memory"]] == [
        ("internal", 2, None),
        ("full", None, None),
    ]
    assert all(psutil.Process().memory_info().rss / 2 < m["bytes"] < m["of"] for m in one["memory"])
    sampled = one["sampled"]
    assert (sampled["prompts"], sampled["responses"], sampled["no_answer"]) == (2, 8, None)
    assert 0 < sampled["cut_off"] < 1 <= sampled["mean_length"] <= 6
    assert len(sampled["spreads"]) == 2
    with (tmp_path / "sums.jsonl").open("a") as stream:
        stream.write(json.dumps({"prompt": "12345678+87654321=", "answer": "99999999"}) + "\n")
    assert found(bupo, path)["notes"] == ["left out 1 of 7 prompts, which have more than 12 tokens"]
    graded = found(bupo, recipe(reward="answer", max_completion_length=2))
    assert [graded["sampled"][name] for name in ("no_answer", "spreads")] == [1.0, [0.0, 0.0]]
    assert ["an answer" in line or "same reward" in line for line in graded["warnings"]] == [True, True]
    flat = found(bupo, recipe(reward="tests.train.test_check:constant"))
    assert (flat["sampled"]["reward"], flat["sampled"]["spreads"]) == (0.25, [0.0, 0.0])
    assert [line for line in flat["warnings"] if "got the same reward" in line]
    nothing = found(bupo, recipe(reward="tests.train.test_check:none"))
    assert nothing["sampled"]["reward"] is None
    assert [
        line for line in nothing["warnings"] if "no reward function gave any of 8 sampled responses a number" in line
    ]


def test_what_does_not_fit_stops_the_run_and_leaves_what_was_there(bupo, tmp_path, recipe, monkeypatch):  # noqa: F811
    path, folder = recipe(rollouts=1, internal_steps=1), tmp_path / "run"
    assert bupo("train", path, "--output", folder)[0] == 0
    before = read(folder), final(folder), sorted(folder.rglob("*"))
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(total=2**20))
    code, _, err = bupo("train", path, "--output", folder, "--overwrite", check=True)
    assert code == 2
    assert "error: an update of micro_batch 4 x (12 + 6 tokens) in the internal phase, layer 2 takes" in err
    assert "of 1 MiB per process: it does not fit; lower micro_batch or max_completion_length" in err
    assert before[0] == read(folder)
    assert same_weights(before[1], final(folder))
    assert before[2] == sorted(folder.rglob("*"))
    assert bupo("train", path, "--output", tmp_path / "new", check=True)[0] == 2
    assert not (tmp_path / "new").exists()
    told = found(bupo, path, 2)
    assert (told["sampled"], len(told["memory"]), len(told["problems"])) == (None, 1, 1)


def test_memory_that_runs_out_is_a_finding(bupo, recipe, monkeypatch):  # noqa: F811
    def exhausted(trainer, recipe, phase):
        if phase is FULL:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(check, "_update", exhausted)
    told = found(bupo, recipe(), 2)
    assert [one["ran_out"] for one in told["memory"]] == [None, "accelerator"]
    assert "in the full phase runs out of accelerator memory, of" in told["problems"][0]


@pytest.fixture
def trainer(tmp_path, recipe):  # noqa: F811
    """A trainer of a recipe, ready to train, and the recipe."""
    settings = check_recipe(read_recipe(recipe(internal_steps="auto", micro_batch=2)))
    made = build(settings, tmp_path / "run", lambda line: None)
    with closing_rewards(made.reward_funcs):
        yield made, settings


def test_the_update_is_that_of_the_phase(trainer):
    """Two passes where gradients accumulate; layers above l get none; AdamW will keep two numbers for each of them."""
    made, settings = trainer
    made.create_optimizer()
    kept, sizes = {}, {name: p.numel() for name, p in made.model.named_parameters()}
    for phase in (Phase(2, 1), Phase(2, 1, 0.5), FULL):
        made.phase = phase
        check._update(made, settings, phase)
        kept[phase.name] = {name for name, p in made.model.named_parameters() if p.grad is not None}
        first = made.model.model.layers[0].mlp.up_proj.weight.grad.clone()
        made.model.zero_grad()
        made.args.gradient_accumulation_steps = 1
        check._update(made, settings, phase)
        torch.testing.assert_close(first, 2 * made.model.model.layers[0].mlp.up_proj.weight.grad)
        made.args.gradient_accumulation_steps = 2
        made.model.zero_grad()
    assert kept["full"] == kept["joint"] == sizes.keys()
    upper = {name for name in sizes if "layers.2." in name or "layers.3." in name}
    assert kept["internal"] == sizes.keys() - upper - {"model.norm.weight"}
    assert check._moments(made, FULL) == check._moments(made, Phase(2, 1, 0.5)) == 8 * sum(sizes.values())
    assert check._moments(made, Phase(2, 1)) == 8 * sum(size for name, size in sizes.items() if name not in upper)


def test_engines_and_times_that_cannot_be_tried(trainer, monkeypatch):
    made, settings = trainer
    monkeypatch.setattr(check, "SECONDS", 1e-9)
    told = examine(made, settings)
    assert (told["sampled"]["stopped_at"], told["warnings"]) == (1, [])
    assert made.generation_config.max_time is None
    made.args.use_vllm, made.args.vllm_mode = True, "server"
    monkeypatch.setattr(check, "engine", lambda args: "deepspeed")
    told = examine(made, settings)
    assert (told["sampled"], told["memory"], told["problems"]) == (None, [], [])
    assert [note.split(",")[0] for note in told["notes"]] == [
        "no update is tried under DeepSpeed", "no responses are sampled",
    ]  # fmt: skip


def test_two_processes_agree(tmp_path, recipe):  # noqa: F811
    """One without room stops both; where both have room, the run is that of one without the check."""
    path = recipe(rollouts=2, internal_steps=1, micro_batch=2, precision="float32")
    launch(2, distributed.checked, tmp_path, recipe=path)
    assert not (tmp_path / "none").exists()
    assert same_weights(final(tmp_path / "check"), final(tmp_path / "no-check"))
    assert rows(tmp_path / "check") == rows(tmp_path / "no-check")


WORDS = [
    ([], 3, 1, False, "3 rollout batches train the full policy; 1 update per rollout batch"),
    ([Phase(4, 8)], 45, 4, False,
     "8 rollout batches train layer 4, then 37 the full policy; 4 updates per rollout batch"),
    ([Phase(2, 1), Phase("auto", 2, 0.5)], 3, 2, False,
     "1 rollout batch trains layer 2, then 2 the boundary layer (weight 0.5, beside the full policy); 2 updates per "
     "rollout batch"),
    ([Phase(4, 8)], 45, 4, True,
     "up to 8 rollout batches train layer 4, then the others the full policy; 4 updates per rollout batch"),
]  # fmt: skip


@pytest.mark.parametrize(("phases", "rollouts", "updates", "guarded", "words"), WORDS)
def test_the_schedule_in_words(phases, rollouts, updates, guarded, words):
    assert in_words(Schedule(tuple(phases)), rollouts, updates, guarded) == words


GOOD = {"responses": 8, "cut_off": 0.9, "no_answer": 0.9, "reward": 0.0, "spreads": [0.0, 0.1], "stopped_at": None}
JUDGED = [
    ({}, []),
    ({"cut_off": 1.0}, ["max_completion_length 6"]),
    ({"no_answer": 1.0}, ["an answer that the reward can read"]),
    ({"spreads": [0.0, 0.0]}, ["got the same reward"]),
    ({"reward": None, "spreads": [0.0, 0.0]}, ["no reward function gave any"]),
    ({"cut_off": 1.0, "no_answer": 1.0, "spreads": [0.0]}, ["cut off", "can read", "same reward"]),
    ({"cut_off": 1.0, "no_answer": 1.0, "spreads": [0.0], "stopped_at": 3}, []),
]


@pytest.mark.parametrize(("changes", "parts"), JUDGED)
def test_what_samples_say_against_a_run(changes, parts):
    warnings = sample_warnings({**GOOD, **changes}, 6)
    assert len(warnings) == len(parts)
    assert all(part in warning for part, warning in zip(parts, warnings, strict=True))


def test_groups_hold_responses_to_one_prompt_with_their_advantages(bupo, tmp_path, recipe):  # noqa: F811
    folder, sizes = tmp_path / "run", {"rollouts": 5, "save_every": 3, "prompts_per_rollout": 6, "micro_batch": 12}
    assert bupo("train", recipe(reward="tests.train.test_check:noisy", **sizes), "--output", folder)[0] == 0
    kept = {file.name: [json.loads(line) for line in file.open()] for file in (folder / "rollouts").iterdir()}
    assert sorted(kept) == [f"rollout-{number:04d}.jsonl" for number in (1, 3, 5)]
    for number, phase, layer in ((1, "internal", 2), (3, "full", None), (5, "full", None)):
        lines = kept[f"rollout-{number:04d}.jsonl"]
        assert [line["group"] for line in lines] == [group for group in range(4) for _ in range(4)]
        assert {(line["rollout"], line["phase"], line["layer"]) for line in lines} == {(number, phase, layer)}
        assert all(len({line["prompt"] for line in lines[i : i + 4]}) == 1 for i in range(0, 16, 4))
        rewards = torch.tensor([line["reward"] for line in lines]).view(4, 4)
        wanted = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        advantages = torch.tensor([line["advantage"] for line in lines]).view(4, 4)
        torch.testing.assert_close(advantages, wanted, rtol=0, atol=1e-3)
        assert all(len(line["response"]) <= line["length"] <= 6 for line in lines)  # tokens may have no text
        assert all(line["length"] == 6 for line in lines if line["cut_off"])
        assert {line["cut_off"] for line in lines} == {True, False}
    whole = recipe(rollouts=2, prompts_per_rollout=6, trl={"log_completions": True, "mask_truncated_completions": True})
    assert bupo("train", whole, "--output", folder, "--overwrite")[0] == 0
    kept = [[json.loads(line) for line in file.open()] for file in sorted((folder / "rollouts").iterdir())]
    assert [len(lines) for lines in kept] == [24, 24]
    assert all(line["length"] == 6 for line in kept[0] if line["cut_off"])
