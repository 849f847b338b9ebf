"""The settings: what command lines and files may hold, the defaults, and what is refused."""

import json
import os

import pytest
import torch
from transformers import HfArgumentParser
from trl import TrlParser

from bupo.errors import ConfigError, InputError
from bupo.models.load import check_group, use_cpus_without_accelerator
from bupo.train.config import BuPOConfig
from bupo.train.schedule import Phase
from tests.support.training import config

PHASES = [{"layer": 2, "rollouts": 3}, {"layer": "auto", "rollouts": 1, "weight": 0.5}]
BASE = ["--output_dir", "x", "--use_cpu", "true", "--bf16", "false", "--max_steps", "40"]


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--internal_layer", "4", "--internal_steps", "3"], (Phase(4, 3),)),
        (["--internal_layer", "auto", "--internal_steps", "auto"], (Phase("auto", 3),)),
        (["--phases", json.dumps(PHASES), "--internal_temperature", "2.5"], (Phase(2, 3), Phase("auto", 1, 0.5))),
        (["--phases", json.dumps(PHASES), "--internal_steps", "0"], ()),
        ([], ()),
    ],
)
def test_command_lines_parse(parser, arguments, expected):
    (args,) = parser(BuPOConfig).parse_args_into_dataclasses([*BASE, *arguments])
    assert args.schedule().internal == expected
    assert args.internal_temperature == (2.5 if "--internal_temperature" in arguments else 1.0)
    assert args.guarded == ("auto" in arguments)


def test_files_parse(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"output_dir: x\nuse_cpu: true\nbf16: false\nmax_steps: 40\nphases: {json.dumps(PHASES)}\n")
    (args,) = TrlParser(BuPOConfig).parse_args_and_config(["--config", str(file)])
    assert args.phases == [{"weight": 1.0, **phase} for phase in PHASES]


def test_defaults_follow_the_paper(tmp_path):
    args = BuPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    assert (args.steps_per_generation, args.logging_steps) == (4 * args.gradient_accumulation_steps, 4)
    numbers = {"learning_rate": 1e-6, "max_grad_norm": 1.0, "epsilon": 0.2, "beta": 0.0, "entropy_coef": 0.0}
    sampling = {"temperature": 1.0, "top_p": 1.0, "num_generations": 8, "num_iterations": 1, "scale_rewards": "group"}
    others = {"lr_scheduler_type": "constant", "loss_type": "dapo", "ddp_find_unused_parameters": None}
    for name, value in {**numbers, **sampling, **others}.items():
        assert getattr(args, name) == value, name
    assert args.schedule().internal == ()


def test_one_process_trains_on_one_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)  # with a launcher, transformers does not ask
    with pytest.warns(UserWarning, match="sees 8 GPUs and trains on one"):
        args = BuPOConfig(output_dir=str(tmp_path), bf16=False, per_device_train_batch_size=4)
    assert (args.n_gpu, args.train_batch_size) == (1, 4)


def test_a_mac_trains_on_its_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert BuPOConfig(output_dir=str(tmp_path), bf16=False).use_cpu


UNSUPPORTED = [  # in an internal phase only
    ({"beta": 0.1}, "beta 0.1"),
    ({"entropy_coef": 0.01}, "entropy_coef"),
    ({"use_adaptive_entropy": True}, "use_adaptive_entropy"),
    ({"top_entropy_quantile": 0.2}, "top_entropy_quantile 0.2"),
    ({"loss_type": "vespo"}, "'vespo' mixes"),
    ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
    ({"use_liger_kernel": True}, "use_liger_kernel"),
    ({"torch_compile": True}, "torch_compile"),
    ({"ddp_find_unused_parameters": False}, "ddp_find_unused_parameters"),
    ({"ddp_static_graph": True}, "ddp_static_graph"),
]
WRONG = [
    ({"internal_layer": None}, "internal_steps needs internal_layer"),
    ({"internal_layer": 0}, "layer from 1 to L"),
    ({"internal_layer": "first"}, "layer from 1 to L"),
    ({"internal_steps": -1}, "whole number of rollout batches from 0"),
    ({"internal_steps": 1.5}, "whole number of rollout batches from 0"),
    ({"internal_steps": "automatic"}, "whole number of rollout batches from 0"),
    ({"internal_steps": 3}, "take 3 rollout batches, more than the 2 of the run"),
    ({"internal_max_steps": 2}, "needs internal_steps auto"),
    ({"internal_steps": "auto", "internal_max_steps": 0}, "whole number from 1"),
    ({"internal_steps": "auto", "max_steps": -1}, "needs internal_max_steps"),
    ({"internal_temperature": 0.0}, "internal_temperature must be a number above 0"),
    ({"internal_temperature": "auto"}, "internal_temperature must be a number above 0"),
    ({"probe_samples": 0}, "probe_samples"),
    ({"save_total_limit": 1}, "save_total_limit"),
    ({"updates_per_rollout": 0}, "updates_per_rollout"),
    ({"updates_per_rollout": 2, "steps_per_generation": 2}, "either updates_per_rollout or"),
    ({"internal_steps": 3, "steps_per_generation": 2, "gradient_accumulation_steps": 4}, "inside an update of 4"),
    ({"phases": [{"layer": 2, "rollouts": 1}], "internal_steps": 1}, "not both"),
    ({"phases": [{"layer": 2, "rollouts": 1}], "internal_steps": None, "beta": 0.1}, "beta"),
    ({"phases": [{"layer": 1, "rollouts": 1, "weight": 0}]}, "weight: above 0 to 1"),
    ({"phases": [{"layer": 1, "rollouts": 1, "weight": 1.5}]}, "weight: above 0 to 1"),
    *[({"phases": value}, "phases must be a list of") for value in ([], [3], [{"layer": 1}], "1,2")],
    ({"phases": [{"layer": 1, "rollouts": 0}]}, "rollouts: from 1"),
    ({"phases": [{"layer": 0, "rollouts": 1}]}, "layer: from 1 or auto"),
    ({"estimator": "gae"}, "estimator must be one of grpo, rloo"),
    ({"estimator": "rloo", "scale_rewards": "batch"}, "weighted sum of the rewards; leave scale_rewards"),
    ({"estimator": "rloo", "multi_objective_aggregation": "normalize_then_sum"}, "leave multi_objective_aggregation"),
    ({"estimator": "rloo", "critic_clip": 0.2}, "critic_clip needs estimator ppo, not rloo"),
    ({"gae_lambda": 0.9}, "gae_lambda needs estimator ppo, not grpo"),
    ({"estimator": "ppo", "gae_lambda": 1.1}, "gae_lambda must be between 0 and 1"),
    ({"estimator": "ppo", "gae_gamma": -0.1}, "gae_gamma must be between 0 and 1"),
    ({"estimator": "ppo", "critic_learning_rate": 0.0}, "critic_learning_rate must be a number above 0"),
    ({"estimator": "ppo", "steps_per_generation": 3, "gradient_accumulation_steps": 2}, "needs whole updates"),
    ({"frozen_layers": 4}, "frozen_layers 4: write 1-4 for layers 1 to 4, or [4] for that layer alone"),
    ({"trained_layers": True}, "trained_layers must be a layer from 1 to L, a range such as 10-15"),
    ({"trained_layers": "3-1"}, "trained_layers: 3-1 runs backwards; write 1-3"),
    ({"trained_layers": "0"}, "trained_layers: layer 0 does not exist"),
    ({"trained_layers": []}, "trained_layers must be a layer"),
    ({"trained_layers": 3, "frozen_layers": "1-2"}, "set either trained_layers or frozen_layers, not both"),
    ({"frozen_layers": "1-2"}, "frozen_layers 1-2 freezes every layer of the internal policy of layer 2"),
    ({"trained_layers": "3,4"}, "trained_layers 3,4 freezes every layer of the internal policy of layer 2"),
    ({"upper_learning_rate_scale": 0.1}, "need each other"),
    ({"upper_learning_rate_above": 2}, "need each other"),
    ({"upper_learning_rate_scale": 0.0, "upper_learning_rate_above": 2}, "scale must be a number above 0"),
]


@pytest.mark.parametrize(("settings", "part"), UNSUPPORTED + WRONG, ids=lambda value: str(value)[:60])
def test_what_is_refused(tmp_path, settings, part):
    with pytest.raises(ConfigError) as error:
        config(tmp_path, **{"internal_steps": 2, **settings})
    assert any(part in problem for problem in error.value.problems), error.value.problems


@pytest.mark.parametrize(
    "settings",
    [s for s, _ in UNSUPPORTED[:6]]
    + [{"internal_temperature": 2.0}, {"internal_max_steps": 3}, {"phases": [{"layer": 2, "rollouts": 1}]}]
    + [{"internal_layer": "auto"}, {"internal_lens": "norm"}, {"frozen_layers": "1-3"}],
    ids=str,
)
def test_zero_internal_steps_are_the_baseline_whatever_else_is_set(tmp_path, settings):
    args = config(tmp_path, internal_steps=0, **settings)
    assert args.schedule().internal == ()
    assert args.ddp_find_unused_parameters is None


def test_problems_are_collected(tmp_path):
    with pytest.raises(ConfigError) as error:
        config(tmp_path, internal_steps=2, beta=0.1, entropy_coef=0.1, save_total_limit=1, probe_samples=0)
    assert len(error.value.problems) == 2  # single settings first
    with pytest.raises(ConfigError) as error:
        config(tmp_path, internal_steps=2, beta=0.1, entropy_coef=0.1, torch_compile=True)
    assert len(error.value.problems) == 3


def test_reentrant_checkpointing_is_refused_under_ddp(tmp_path, monkeypatch):
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    config(tmp_path, internal_steps=2, **reentrant)  # one process: it works
    monkeypatch.setattr(BuPOConfig, "world_size", property(lambda self: 2))
    assert config(tmp_path, internal_steps=2).ddp_find_unused_parameters is True
    with pytest.raises(ConfigError, match="reentrant"):
        config(tmp_path, internal_steps=2, **reentrant)


def test_processes_that_form_no_group_are_refused_and_cpus_are_told_to_accelerate(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="the launched processes do not form a group"):
        check_group(1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "")  # restored at the end
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    use_cpus_without_accelerator()
    assert "ACCELERATE_USE_CPU" not in os.environ
    monkeypatch.setenv("LOCAL_RANK", "1")
    use_cpus_without_accelerator()
    assert ("ACCELERATE_USE_CPU" in os.environ) is not torch.accelerator.is_available()


def test_a_guarded_phase_without_a_limit_may_take_a_third_of_the_run(tmp_path):
    args = config(tmp_path, internal_steps="auto", max_steps=40, updates_per_rollout=2)
    assert args.schedule().ends == (6,)
    # updates that span two rollout batches: an even number of them
    batches = {"steps_per_generation": 1, "gradient_accumulation_steps": 2}
    assert config(tmp_path, internal_steps="auto", max_steps=5, **batches).schedule().ends == (2,)
