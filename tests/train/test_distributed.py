"""Two processes against one, over gloo on the CPU: DDP and FSDP2, across the switch of phases and after a resume."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.cli.test_cli_train import RECIPE

# every update uses a whole rollout batch (TRL shuffles within a process, so that smaller parts would differ), twice;
# epsilon keeps AdamW from making a difference of 1e-9 in a gradient near zero one of a learning rate
SAME = {"num_iterations": 2, "internal_steps": 2, "max_steps": 8, "adam_epsilon": 1e-4, "weight_decay": 0.1}
SAME |= {"save_strategy": "steps", "save_steps": 2}
ONE = {**SAME, "per_device_train_batch_size": 4, "steps_per_generation": 2, "gradient_accumulation_steps": 2}
TWO = {**SAME, "per_device_train_batch_size": 4, "steps_per_generation": 1, "gradient_accumulation_steps": 1}
TWO |= {"gradient_checkpointing": True}  # as recipes have it; changes no number


def run(warm, folder, processes, settings, **arguments):
    """Start it, and every process's results and weights."""
    job = {"processes": processes, "job": "train", "folder": str(folder), "settings": settings}
    found = warm.call("distributed:launch", **job, **arguments)
    assert found["codes"] == [0] * processes, "\n".join(found["told"])
    results = [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(processes)]
    return results, [load_file(folder / f"weights-{rank}.safetensors") for rank in range(processes)]


def close(ones, others):
    assert ones.keys() == others.keys()
    for name in ones:
        torch.testing.assert_close(ones[name], others[name], rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(scope="module")
def alone(warm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    results, weights = run(warm, folder, 1, ONE)
    return results[0], weights[0]


SAVED = [pytest.param(2, id="internal"), pytest.param(6, id="full", marks=pytest.mark.slow)]


@pytest.mark.parametrize("step", SAVED)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_does(warm, tmp_path, alone, engine, step):
    """Over the switch, and again after a resume from a checkpoint saved in the internal or in the full phase."""
    wanted, weights = alone
    results, found = run(warm, tmp_path / "two", 2, TWO, engine=engine)
    kind = {"ddp": "DistributedType.MULTI_CPU", "fsdp2": "DistributedType.FSDP"}[engine]
    assert [r["kind"] for r in results] == [kind, kind]
    assert [row["phase"] for row in results[0]["log"] if "phase" in row] == [1, 1, 2, 2]
    assert results[0]["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
    for theirs in found:
        close(weights, theirs)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])  # replicas, or gathered shards
    checkpoint = str(tmp_path / "two" / f"checkpoint-{step}")
    again, resumed = run(warm, tmp_path / "rest", 2, TWO, engine=engine, resume=checkpoint)
    assert again[0]["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
    close(weights, resumed[0])


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_processes_with_uneven_responses_analyse_the_same(warm, tmp_path, engine):
    """The old code hung under FSDP2 (each process ran passes of its own), and under DDP each analysed everything."""
    job = {"processes": 2, "job": "analyse", "folder": str(tmp_path), "engine": engine}
    answer = warm.call("distributed:launch", seconds=100, **job)
    assert answer["codes"] == [0, 0], "\n".join(answer["told"])
    first, second = (json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in range(2))
    assert (first["choice"], first["analysis"]) == (second["choice"], second["analysis"])
    assert len(list((tmp_path / "flow").iterdir())) == 2
    counts = [first["sequences"], second["sequences"]]
    whole = 2 * first["analysis"]["samples"]  # of two rollout batches; a check of the logits adds a few
    assert counts[0] == counts[1]
    assert (counts[0] < whole) == (engine == "ddp")


@pytest.mark.slow
def test_two_processes_train_a_critic_as_one_does(warm, tmp_path):
    ppo = {"estimator": "ppo", "critic_learning_rate": 0.1, "adam_epsilon": 1.0, "save_strategy": "no"}
    _, one = run(warm, tmp_path / "one", 1, {**ONE, **ppo})
    _, two = run(warm, tmp_path / "two", 2, {**TWO, **ppo})
    assert any(name.startswith("critic.") for name in one[0])
    close(one[0], two[0])


@pytest.mark.slow
def test_the_guard_under_fsdp2_keeps_and_restores_what_one_process_does(warm, tmp_path):
    guarded = {"internal_steps": "auto", "internal_max_steps": 3, "save_strategy": "no"}
    ones, weights = run(warm, tmp_path / "one", 1, {**ONE, **guarded, "probe_samples": 8}, script=".kr.")
    twos, found = run(warm, tmp_path / "two", 2, {**TWO, **guarded, "probe_samples": 4}, script=".kr.", engine="fsdp2")
    assert ones[0]["phase_end"] == {"rollouts": 2, "action": "restore", "reason": "as scripted"}
    assert [r["phase_end"] for r in twos] == [ones[0]["phase_end"]] * 2
    assert twos[0]["losses"] == pytest.approx(ones[0]["losses"], abs=1e-5)
    close(weights[0], found[0])
    for one, two in zip(ones[0]["log"][:2], twos[0]["log"][:2], strict=True):
        for name in ("perplexity", "internal/divergence", "internal/transfer", "repetition"):
            assert (name in one) == (name in two)
            if name in one:
                assert two[name] == pytest.approx(one[name], abs=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_as_one_process_does(warm, tmp_path, stage):
    """With SGD: DeepSpeed counts AdamW's updates of layers without a gradient, so that AdamW differs at the switch."""
    sgd = {"optim": "sgd", "learning_rate": 0.05, "weight_decay": 0.0}
    ones, weights = run(warm, tmp_path / "one", 1, {**ONE, **sgd})
    twos, found = run(warm, tmp_path / "two", 2, {**TWO, **sgd}, engine=f"zero{stage}")
    assert [r["kind"] for r in twos] == ["DistributedType.DEEPSPEED"] * 2
    assert twos[0]["losses"] == pytest.approx(ones[0]["losses"], abs=1e-5)
    close(weights[0], found[0])
    for step in (2, 6):
        checkpoint = str(tmp_path / "two" / f"checkpoint-{step}")
        more = {"engine": f"zero{stage}", "resume": checkpoint}
        again, resumed = run(warm, tmp_path / f"rest-{step}", 2, {**TWO, **sgd}, **more)
        assert again[0]["losses"] == pytest.approx(ones[0]["losses"], abs=1e-5)
        close(weights[0], resumed[0])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_replicas_stay_equal_when_the_model_samples(warm, tmp_path, engine):
    settings = {"internal_steps": 2, "max_steps": 8, "updates_per_rollout": 2, "gradient_checkpointing": True}
    results, found = run(warm, tmp_path, 2, settings, engine=engine, sampled=True)
    assert [row["phase"] for row in results[0]["log"] if "phase" in row] == [1, 1, 2, 2]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_the_command_in_two_processes(warm, tmp_path, tiny_folder, engine):
    """`bupo train`, then --resume of the finished run and of one whose last checkpoint is gone."""
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(6)))
    recipe = {**RECIPE, "model": str(tiny_folder), "dataset": str(data), "micro_batch": 2, "precision": "float32"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    output = tmp_path / "run"
    job = {"processes": 2, "job": "command", "engine": engine}
    arguments = [str(tmp_path / "recipe.yaml"), "--output", str(output)]
    found = warm.call("distributed:launch", **job, folder=str(tmp_path / "a"), arguments=arguments)
    assert found["codes"] == [0, 0], "\n".join(found["told"])
    assert (output / "checkpoints" / "checkpoint-2" / "pytorch_model_fsdp_0").exists() == (engine == "fsdp2")
    weights = load_file(output / "model" / "model.safetensors")
    start = load_file(tiny_folder / "model.safetensors")
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in start.items()}
    AutoModelForCausalLM.from_pretrained(output / "model")
    for name in ("checkpoint-8", "checkpoint-6"):  # at the end, and in the full phase
        shutil.rmtree(output / "model")
        if name == "checkpoint-6":
            shutil.rmtree(output / "checkpoints" / "checkpoint-8")
        again = ["--resume", "--output", str(output)]
        found = warm.call("distributed:launch", **job, folder=str(tmp_path / name), arguments=again)
        assert found["codes"] == [0, 0], "\n".join(found["told"])
        resumed = load_file(output / "model" / "model.safetensors")
        assert all(torch.equal(weights[key], resumed[key]) for key in weights), name
