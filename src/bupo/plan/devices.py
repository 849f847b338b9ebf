"""What machines can do: achieved products and memory traffic, not what their makers print. No torch here."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from bupo.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """One process's device.

    Attributes:
        flops: floating-point operations a second that matrix products reach in training.
        bandwidth: bytes a second that memory gives.
        memory: bytes, or None where it is the machine's own and no limit is checked.
        process: bytes that a process needs before it holds anything (libraries, contexts, caches).
        accelerator: whether the trainer runs in bfloat16 and with the tiled head's kernel by default.
    """

    name: str
    flops: float
    bandwidth: float
    memory: int | None
    process: int
    accelerator: bool


def _gpu(name: str, peak_tflops: float, tb_a_second: float, gb: int) -> Device:
    """40 % of the dense bfloat16 peak, 60 % of the bandwidth, 92 % of the memory; 0.6 GB of context."""
    return Device(name, 0.4e12 * peak_tflops, 0.6e12 * tb_a_second, int(0.92e9 * gb), int(0.6e9), True)


DEVICES = {
    "a100": _gpu("a100", 312, 2.04, 85),
    "h100": _gpu("h100", 989, 3.35, 85),
    "h200": _gpu("h200", 989, 4.8, 151),
    "l4": _gpu("l4", 121, 0.3, 24),
    "rtx3090": _gpu("rtx3090", 71, 0.94, 25),
    "rtx4090": _gpu("rtx4090", 165, 1.01, 25),
}
CPU_PROCESS = 40 * 2**20  # what the small recipes' processes grew by beside their tensors (docs/plan.md)


def cpu() -> Device:
    """This machine without an accelerator: 25 GFLOP/s a core in float32, a guess that --measure replaces."""
    return Device("cpu", 25e9 * (os.cpu_count() or 1), 10e9, None, CPU_PROCESS, False)


def find_device(name: str | None, flops: float | None = None, memory_gib: float | None = None) -> Device:
    """A device by name (default: cpu), with the user's own figures in place of ours.

    Raises:
        ConfigError: unknown name, or a figure that is not above 0.
    """
    if name in (None, "cpu"):
        found = cpu()
    elif name in DEVICES:
        found = DEVICES[name]
    else:
        raise ConfigError(f"unknown device {name!r}; one of cpu, {', '.join(DEVICES)}")
    for text, value in (("--flops", flops), ("--memory", memory_gib)):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{text} must be above 0, not {value}")
    if flops is not None:
        found = replace(found, flops=flops)
    if memory_gib is not None:
        found = replace(found, memory=int(memory_gib * 2**30))
    return found
