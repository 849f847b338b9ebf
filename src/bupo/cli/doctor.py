"""``bupo doctor``: what this installation can run, and whether it reads internal policies right."""

import importlib.util
import json
from typing import Any

import typer

from bupo.cli import options
from bupo.errors import InputError
from bupo.run_folder import machine, versions

# modules that are not needed everywhere, and what they are for
OPTIONAL = {
    "vllm": "sampling with vLLM",
    "deepspeed": "training with ZeRO",
    "bitsandbytes": "QLoRA",
    "triton": "the kernel for entropies, on CUDA",
    "liger_kernel": "TRL's Liger loss",
    "flash_attn": "FlashAttention",
    "trackio": "tracking with trackio",
    "wandb": "tracking with Weights & Biases",
}


def doctor(device: options.Device = None, as_json: options.AsJson = False) -> None:
    """Show versions, devices and optional packages, and test tiny models in seconds.

    Reads a tiny random model of several architectures layer by layer and compares it with definitions written out:
    policies, gradients, entropies. The exit code is 1 if one of the checks fails. Add --json to a bug report.

    Examples:
      bupo doctor
      bupo doctor --device cuda --json
    """
    import torch

    from bupo.lens.selftest import checks
    from bupo.models.load import accelerator

    used = device or (accelerator() or torch.device("cpu")).type
    try:
        torch.empty(0, device=used)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {used!r} cannot be used here; leave out --device, or name one that can") from error
    found: dict[str, Any] = {"versions": versions(), "machine": machine(), "devices": _devices(torch)}
    found["optional"] = {name: importlib.util.find_spec(name) is not None for name in OPTIONAL}
    found["checks"] = []
    if not as_json:
        _show(found)
    for name, deviation, right in checks(used):
        found["checks"].append({"name": name, "deviation": deviation, "passed": right})
        if not as_json:
            shown = deviation if isinstance(deviation, str) else f"largest deviation {deviation:.1e}"
            typer.echo(f"{'ok    ' if right else 'FAILED'}  {name} ({shown})")
    if as_json:
        typer.echo(json.dumps(found))
    if not all(check["passed"] for check in found["checks"]):
        raise typer.Exit(1)


def _devices(torch: Any) -> list[dict[str, Any]]:
    """The processor and the accelerators that torch sees; memory in GiB."""
    cpu = {"device": "cpu", "threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}
    cuda = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [cpu] + [
        {"device": f"cuda:{i}", "name": found.name, "memory_gib": round(found.total_memory / 2**30, 1),
         "capability": f"{found.major}.{found.minor}", "bfloat16": found.major >= 8}
        for i, found in enumerate(cuda)
    ]  # fmt: skip


def _show(found: dict[str, Any]) -> None:
    typer.echo("  ".join(f"{name} {version}" for name, version in found["versions"].items()))
    about = found["machine"]
    typer.echo(f"{about['platform']}, {about['cores']} cores, {about['memory_gib']} GiB")
    for device in found["devices"]:
        typer.echo("  ".join(f"{name} {value}" for name, value in device.items()))
    for name, there in found["optional"].items():
        typer.echo(f"{'there  ' if there else 'missing'}  {name}: {OPTIONAL[name]}")
