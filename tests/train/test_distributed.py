"""Two processes against one, over gloo on the CPU: DDP and FSDP2, across the switch of phases and after a resume."""

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.cli.test_cli_train import write_recipe
from tests.support import distributed
from tests.support.lens import random_lens
from tests.support.processes import launch

# every update uses a whole rollout batch (TRL shuffles within a process, so that smaller parts would differ), twice;
# epsilon keeps AdamW from making a difference of 1e-9 in a gradient near zero one of a learning rate
SAME = {"num_iterations": 2, "internal_steps": 2, "max_steps": 8, "adam_epsilon": 1e-4, "weight_decay": 0.1}
SAME |= {"save_strategy": "steps", "save_steps": 2}
ONE = {**SAME, "per_device_train_batch_size": 4, "steps_per_generation": 2, "gradient_accumulation_steps": 2}
TWO = {**SAME, "per_device_train_batch_size": 4, "steps_per_generation": 1, "gradient_accumulation_steps": 1}
TWO |= {"gradient_checkpointing": True}  # as recipes have it; changes no number


def run(folder, processes, settings, **arguments):
    """Train, and return every process's results and weights."""
    launch(processes, distributed.train, folder, settings=settings, **arguments)
    results = [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(processes)]
    return results, [load_file(folder / f"weights-{rank}.safetensors") for rank in range(processes)]


def close(ones, others):
    assert ones.keys() == others.keys()
    for name in ones:
        torch.testing.assert_close(ones[name], others[name], rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    results, weights = run(folder, 1, ONE)
    return results[0], weights[0]


SAVED = [pytest.param(2, id="internal"), pytest.param(6, id="full", marks=pytest.mark.slow)]


@pytest.mark.parametrize("step", SAVED)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_does(tmp_path, alone, engine, step):
    """Over the switch, and again after a resume from a checkpoint saved in the internal or in the full phase."""
    wanted, weights = alone
    results, found = run(tmp_path / "two", 2, TWO, engine=engine)
    kind = {"ddp": "DistributedType.MULTI_CPU", "fsdp2": "DistributedType.FSDP"}[engine]
    assert [r["kind"] for r in results] == [kind, kind]
    assert [row["phase"] for row in results[0]["log"] if "phase" in row] == [1, 1, 2, 2]
    assert results[0]["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
    for theirs in found:
        close(weights, theirs)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])  # replicas, or gathered shards
    checkpoint = str(tmp_path / "two" / f"checkpoint-{step}")
    again, resumed = run(tmp_path / "rest", 2, TWO, engine=engine, resume=checkpoint)
    assert again[0]["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
    close(weights, resumed[0])


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_processes_with_uneven_responses_analyse_the_same(tmp_path, engine):
    """The old code hung under FSDP2 (each process ran passes of its own), and under DDP each analysed everything."""
    launch(2, distributed.analyse, tmp_path, 100, engine=engine)
    first, second = (json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in range(2))
    assert (first["choice"], first["analysis"]) == (second["choice"], second["analysis"])
    assert len(list((tmp_path / "flow").iterdir())) == 2
    counts = [first["sequences"], second["sequences"]]
    whole = 2 * first["analysis"]["samples"]  # of two rollout batches; a check of the logits adds a few
    assert counts[0] == counts[1]
    assert (counts[0] < whole) == (engine == "ddp")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_train_through_maps_as_one_does(tmp_path, engine):
    """`trained_layers` leaves other layers alone there, too."""
    random_lens().save(tmp_path / "lens")
    lens = {"internal_lens": str(tmp_path / "lens"), "trained_layers": "1-2,4", "save_strategy": "no"}
    ones, weights = run(tmp_path / "one", 1, {**ONE, **lens})
    twos, found = run(tmp_path / "two", 2, {**TWO, **lens}, engine=engine)
    assert twos[0]["losses"] == pytest.approx(ones[0]["losses"], abs=1e-5)
    close(weights[0], found[0])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_share_a_fit(tmp_path, engine):
    """Its samples are drawn by both, and so are others than one process draws; the maps are the same in both."""
    ridge = {"internal_lens": "ridge", "internal_lens_tokens": 300, "save_strategy": "no"}
    results, found = run(tmp_path, 2, {**TWO, **ridge}, engine=engine)
    logged = [row for row in results[0]["log"] if row.get("phase") == 1]
    assert len(logged) == 2
    assert all("internal/lens_kl" in row for row in logged)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.slow
def test_two_processes_train_a_critic_as_one_does(tmp_path):
    ppo = {"estimator": "ppo", "critic_learning_rate": 0.1, "adam_epsilon": 1.0, "save_strategy": "no"}
    _, one = run(tmp_path / "one", 1, {**ONE, **ppo})
    _, two = run(tmp_path / "two", 2, {**TWO, **ppo})
    assert any(name.startswith("critic.") for name in one[0])
    close(one[0], two[0])


@pytest.mark.slow
def test_the_guard_under_fsdp2_keeps_and_restores_what_one_process_does(tmp_path):
    guarded = {"internal_steps": "auto", "internal_max_steps": 3, "save_strategy": "no"}
    ones, weights = run(tmp_path / "one", 1, {**ONE, **guarded, "probe_samples": 8}, script=".kr.")
    twos, found = run(tmp_path / "two", 2, {**TWO, **guarded, "probe_samples": 4}, script=".kr.", engine="fsdp2")
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
def test_zero_trains_as_one_process_does(tmp_path, stage):
    """With SGD: DeepSpeed counts AdamW's updates of layers without a gradient, so that AdamW differs at the switch."""
    sgd = {"optim": "sgd", "learning_rate": 0.05, "weight_decay": 0.0}
    ones, weights = run(tmp_path / "one", 1, {**ONE, **sgd})
    twos, found = run(tmp_path / "two", 2, {**TWO, **sgd}, engine=f"zero{stage}")
    assert [r["kind"] for r in twos] == ["DistributedType.DEEPSPEED"] * 2
    assert twos[0]["losses"] == pytest.approx(ones[0]["losses"], abs=1e-5)
    close(weights[0], found[0])
    for step in (2, 6):
        checkpoint = str(tmp_path / "two" / f"checkpoint-{step}")
        more = {"engine": f"zero{stage}", "resume": checkpoint}
        again, resumed = run(tmp_path / f"rest-{step}", 2, {**TWO, **sgd}, **more)
        assert again[0]["losses"] == pytest.approx(ones[0]["losses"], abs=1e-5)
        close(weights[0], resumed[0])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_replicas_stay_equal_when_the_model_samples(tmp_path, engine):
    settings = {"internal_steps": 2, "max_steps": 8, "updates_per_rollout": 2, "gradient_checkpointing": True}
    results, found = run(tmp_path, 2, settings, engine=engine, sampled=True)
    assert [row["phase"] for row in results[0]["log"] if "phase" in row] == [1, 1, 2, 2]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "torchrun"])
def test_the_command_in_two_processes(tmp_path, tiny_folder, engine):
    """`bupo train`, then --resume of the finished run and of one whose last checkpoint is gone."""
    recipe, output = (
        write_recipe(tmp_path, model=str(tiny_folder), micro_batch=2, precision="float32"),
        tmp_path / "run",
    )
    launch(2, distributed.command, tmp_path / "a", engine=engine, arguments=[recipe, "--output", output])
    assert (output / "checkpoints" / "checkpoint-2" / "pytorch_model_fsdp_0").exists() == (engine == "fsdp2")
    weights = load_file(output / "model" / "model.safetensors")
    start = load_file(tiny_folder / "model.safetensors")
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in start.items()}
    AutoModelForCausalLM.from_pretrained(output / "model")
    for name in ("checkpoint-8", "checkpoint-6"):  # at the end, and in the full phase
        shutil.rmtree(output / "model")
        if name == "checkpoint-6":
            shutil.rmtree(output / "checkpoints" / "checkpoint-8")
        launch(2, distributed.command, tmp_path / name, engine=engine, arguments=["--resume", "--output", output])
        resumed = load_file(output / "model" / "model.safetensors")
        assert all(torch.equal(weights[key], resumed[key]) for key in weights), name
