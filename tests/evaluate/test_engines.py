"""Launch configurations, and what a training run says when memory runs out or an engine cannot do what was asked."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from bupo.errors import ConfigError
from bupo.train.config import engine
from tests.support.training import config

CONFIGS = sorted((Path(__file__).parents[2] / "recipes" / "accelerate").glob("*.yaml"))
WANTED = {  # what accelerate makes of each: kind, machines, processes
    "single": ("NO", 1, 1),
    "ddp": ("MULTI_GPU", 1, 8),
    "fsdp2": ("FSDP", 1, 8),
    "fsdp2-2x8": ("FSDP", 2, 16),
    "zero2": ("DEEPSPEED", 1, 8),
    "zero3": ("DEEPSPEED", 1, 8),
}


@pytest.mark.parametrize("path", CONFIGS, ids=[p.stem for p in CONFIGS])
def test_launch_configs_are_what_accelerate_reads(path, monkeypatch):
    """Through accelerate's own loader, and its launcher's translation into the environment of the processes."""
    assert {one.stem for one in CONFIGS} == set(WANTED)
    loaded = load_config_from_file(str(path))  # raises for keys that it does not know
    kind, machines, processes = WANTED[path.stem]
    assert (loaded.distributed_type.value, loaded.num_machines, loaded.num_processes) == (kind, machines, processes)
    arguments = ["--config_file", str(path), "-m", "bupo", "train", "r.yaml", "--output", "x"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert args.num_processes == processes
    assert (args.use_fsdp, args.use_deepspeed) == (kind == "FSDP", kind == "DEEPSPEED")
    assert f"--config_file recipes/accelerate/{path.name}" in path.read_text()
    assert "not run" in path.read_text().lower()
    assert kind != "DEEPSPEED" or args.zero_stage == int(path.stem[-1])
    if kind == "FSDP":
        for name, value in prepare_multi_gpu_env(args).items():
            if name.startswith(("FSDP", "ACCELERATE_USE")):
                monkeypatch.setenv(name, value)
        monkeypatch.setenv("WORLD_SIZE", "1")
        plugin = FullyShardedDataParallelPlugin()
        assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
        assert "SHARDED" in str(plugin.state_dict_type)
        assert engine(SimpleNamespace(deepspeed=None, fsdp=None, world_size=16)) == "fsdp2"


def test_the_engine_is_found_in_settings_and_environment(monkeypatch):
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(name, raising=False)

    def found(**settings):
        return engine(SimpleNamespace(**{"deepspeed": None, "fsdp": None, "world_size": 2, **settings}))

    assert found(world_size=1) == "one"
    assert found() == "ddp"
    assert found(fsdp=True, fsdp_config={"version": 2}) == "fsdp2"
    assert found(fsdp=True, fsdp_config={"version": 1}) == "fsdp1"
    assert found(deepspeed={"zero_optimization": {}}) == "deepspeed"
    for name, value, wanted in [
        ("ACCELERATE_USE_FSDP", "true", "fsdp1"),
        ("FSDP_VERSION", "2", "fsdp2"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "deepspeed"),
    ]:
        monkeypatch.setenv(name, value)
        assert found() == wanted


def test_what_deepspeed_cannot_do_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("bupo.train.config.engine", lambda args: "deepspeed")
    config(tmp_path, internal_steps=2)
    with pytest.raises(ConfigError, match=r"weight_decay 0\.1 would shrink the layers"):
        config(tmp_path, internal_steps=2, weight_decay=0.1)
    with pytest.raises(ConfigError, match="internal_steps auto keeps weights, which DeepSpeed and FSDP1 shard"):
        config(tmp_path, internal_steps="auto", internal_max_steps=2)
