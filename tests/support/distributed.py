"""Jobs for `processes.launch`: training in two processes over gloo on the CPU; each saves what it ended with.

accelerate 1.15 turns FSDP2 on for accelerators only. `enable_fsdp2_on_cpu` lifts that one condition; everything behind
it (wrapping, the optimizer's parameters, gradient clipping, checkpoints) is accelerate's and transformers' own code.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any


def enable_fsdp2_on_cpu() -> None:
    """Let accelerate use an FSDP plugin although its processes run on CPUs."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def enable_deepspeed_on_cpu() -> None:
    """Let accelerate hand its processes to DeepSpeed over gloo although they run on CPUs."""
    import torch
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["DS_ACCELERATOR"] = "cpu"
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # would compile an extension
    del os.environ["ACCELERATE_USE_CPU"]  # with it accelerate ignores DeepSpeed
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def engine_settings(engine: str) -> dict[str, Any]:
    """What a configuration needs beside the others'."""
    if engine == "fsdp2":
        enable_fsdp2_on_cpu()
        wrap = {"transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]}
        return {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT", **wrap}}
    if engine.startswith("zero"):
        enable_deepspeed_on_cpu()
        sizes = dict.fromkeys(
            ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
        )
        zero = {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
        return {"use_cpu": False, "deepspeed": {**sizes, "zero_optimization": {"stage": int(engine[-1])}, **zero}}
    return {}


def responses(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """The same responses for a prompt however the prompts are spread over processes: words that depend on it alone."""
    ids = [trainer.processing_class(p)["input_ids"] for p in prompts]
    group = trainer.num_generations
    made = []
    for i, prompt in enumerate(ids):
        start = sum(prompt) + 7 * (i % group) + 3 * trainer.state.global_step
        made.append([3 + (start * (j + 2) + j * j) % 90 for j in range(3 + start % 5)])
    return {"prompt_ids": ids, "completion_ids": made, "logprobs": None}


def train(
    folder: Path,
    rank: int,
    engine: str = "ddp",
    resume: str | None = None,
    sampled: bool = False,
    script: str | None = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """A whole run; losses, log and final weights of this process go to the folder.

    If ``sampled``, the model samples; else `responses`, the same for one process and for two. ``script`` is that of a
    `training.scripted`.
    """
    import torch
    from safetensors.torch import save_file

    from bupo.train import guard
    from tests.support.training import losses, make_trainer, scripted

    torch.set_num_threads(1)
    more = {} if sampled else {"rollout_func": responses}
    trainer = make_trainer(folder, **more, **engine_settings(engine), **(settings or {}))
    if script is not None:
        guard.decide = scripted(script)
    trainer.train(resume_from_checkpoint=resume)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if engine == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            found = {name: p.detach().clone() for name, p in model.state_dict().items()}
    else:
        found = {name: whole(p) for name, p in model.state_dict().items()}
    if trainer.critic is not None:
        found |= {f"critic.{name}": p.detach().clone() for name, p in trainer.critic.critic.state_dict().items()}
    save_file(found, folder / f"weights-{rank}.safetensors")
    told = {
        "losses": losses(trainer),
        "kind": str(trainer.accelerator.distributed_type),
        "log": [{k: v for k, v in row.items() if "time" not in k} for row in trainer.state.log_history],
        "phase_end": trainer.phase_end,
    }
    (folder / f"result-{rank}.json").write_text(json.dumps(told))


def uneven(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Responses of 3 tokens on the first process and of 40 on the others."""
    ids = [trainer.processing_class(p)["input_ids"] for p in prompts]
    made = [[3 + (i + j) % 90 for j in range(40 if trainer.accelerator.process_index else 3)] for i in range(len(ids))]
    return {"prompt_ids": ids, "completion_ids": made, "logprobs": None}


def analyse(folder: Path, rank: int, engine: str) -> None:
    """`choose_layer` and the entropy flow on a rollout batch whose responses need more passes on one process."""
    import torch

    from bupo.lens.analyze import analyze_rollouts
    from bupo.recipe import Recipe
    from bupo.train.diagnostics import Diagnostics, analyze_responses, choose_layer, spread_responses
    from tests.support.training import make_trainer

    torch.set_num_threads(1)
    analyze_rollouts.__kwdefaults__["batch_tokens"] = 64
    settings = {"max_completion_length": 48, "max_steps": 4, "updates_per_rollout": 2, **engine_settings(engine)}
    trainer = make_trainer(folder, rollout_func=uneven, **settings)
    told: dict[str, Any] = {"sequences": 0}

    def look(batch: Any, rollout: int) -> None:
        def count(module: Any, inputs: Any, output: Any) -> None:
            told["sequences"] += len(output[0] if isinstance(output, tuple) else output)

        handle = trainer.model.model.layers[0].register_forward_hook(count)
        analyze_responses(trainer.model, spread_responses(batch, 32), trainer.accelerator)
        handle.remove()
        choice = choose_layer(trainer.model, batch, trainer.accelerator)
        told["choice"], told["analysis"] = [choice.layer, choice.message], choice.analysis

    recipe = Recipe.model_validate({"model": "?", "dataset": "?", "flow_every": 1, "internal_layer": None})
    trainer.on_rollout += [look, Diagnostics(recipe, trainer, folder, print, None)]
    trainer.train()
    (folder / f"result-{rank}.json").write_text(json.dumps(told))


def command(folder: Path, rank: int, arguments: list[Any], engine: str = "ddp", subcommand: str = "train") -> None:
    """A bupo command as each process of a launcher runs it; engines come through the environment."""
    if engine == "torchrun":
        del os.environ["ACCELERATE_USE_CPU"]  # which only accelerate's own launcher sets
    if engine == "fsdp2":
        enable_fsdp2_on_cpu()
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
        os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    from bupo.cli import main

    sys.exit(main([subcommand, *map(str, arguments)]))


def checked(folder: Path, rank: int, recipe: Path) -> None:
    """`bupo train` where the second process has no memory, which stops both, and then with and without its check."""
    import psutil

    from bupo.cli import main

    memory = psutil.virtual_memory
    if rank == 1:
        psutil.virtual_memory = lambda: memory()._replace(total=2)
    assert main(["train", str(recipe), "--output", str(folder / "none")]) == 2
    psutil.virtual_memory = memory
    for name in ("check", "no-check"):
        assert main(["train", str(recipe), "--output", str(folder / name), *["--no-check"] * (name != "check")]) == 0


def whole(tensor: Any) -> Any:
    """All of a tensor that may be sharded."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone().contiguous()
