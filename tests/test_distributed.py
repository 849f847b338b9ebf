"""Two processes against one, over gloo on the CPU: DDP and FSDP2, across the switch of phases and after a resume."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

# every update uses a whole rollout batch (TRL shuffles within a process, so that smaller parts would differ), twice;
# epsilon keeps AdamW from making a difference of 1e-9 in a gradient near zero one of a learning rate
SAME = {
    "num_iterations": 2,
    "internal_steps": 2,
    "max_steps": 8,
    "adam_epsilon": 1e-4,
    "save_strategy": "steps",
    "save_steps": 2,
    "weight_decay": 0.1,
}
ONE = {**SAME, "per_device_train_batch_size": 4, "steps_per_generation": 2, "gradient_accumulation_steps": 2}
TWO = {**SAME, "per_device_train_batch_size": 4, "steps_per_generation": 1, "gradient_accumulation_steps": 1}

KINDS = {"ddp": "DistributedType.MULTI_CPU", "fsdp2": "DistributedType.FSDP"}


def run(warm, folder, processes, settings, **arguments):
    """Start it, and every process's results and weights."""
    found = warm.call(
        "distributed:launch", processes=processes, job="train", folder=str(folder), settings=settings, **arguments
    )
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


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_does(warm, tmp_path, alone, engine):
    wanted, weights = alone
    results, found = run(warm, tmp_path / "two", 2, TWO, engine=engine)
    assert [r["kind"] for r in results] == [
        {"ddp": "DistributedType.MULTI_CPU", "fsdp2": "DistributedType.FSDP"}[engine]
    ] * 2
    assert [row["phase"] for row in results[0]["log"] if "phase" in row] == [1, 1, 2, 2]
    assert results[0]["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
    for theirs in found:
        close(weights, theirs)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])  # replicas, or gathered shards
    for step in (2, 6):  # saved in the internal and in the full phase
        rest = tmp_path / f"rest-{step}"
        checkpoint = str(tmp_path / "two" / f"checkpoint-{step}")
        again, resumed = run(warm, rest, 2, TWO, engine=engine, resume=checkpoint)
        assert again[0]["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
        close(weights, resumed[0])
