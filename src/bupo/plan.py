"""Estimate whether a recipe fits in memory and roughly how long it takes, from its model's configuration alone.

`bupo.train.footprint` counts bytes and operations of one micro-batch and one rollout; here they become those of a run.
docs/plan.md says what is counted and what is left out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from bupo.errors import ConfigError
from bupo.models.fake import describe_model, read_config
from bupo.models.internal_policy import check_layer
from bupo.models.layout import context_length
from bupo.recipe import Recipe
from bupo.train.config import BuPOConfig
from bupo.train.footprint import Workload, count_rollout, count_update
from bupo.train.lora import lora_config

SHARDINGS = ("ddp", "fsdp2", "zero2", "zero3")
UTILISATION = 0.4  # assumed share of the peak operations and bandwidth
FRAGMENTATION = 0.92  # usable share of an accelerator's memory
PEAKS = {  # dense bfloat16 FLOP/s, bytes per second and bytes
    "a100": (312e12, 2.04e12, 85e9),
    "h100": (989e12, 3.35e12, 85e9),
    "h200": (989e12, 4.8e12, 151e9),
    "l4": (121e12, 0.3e12, 24e9),
    "rtx3090": (71e12, 0.94e12, 25e9),
    "rtx4090": (165e12, 1.01e12, 25e9),
}
CPU_PROCESS, ACCELERATOR_PROCESS = 40 * 2**20, 600 * 2**20  # bytes beside tensors: libraries' buffers, a CUDA context
CPU_ALLOCATOR = 1.15  # glibc keeps freed blocks; of an update's tensors about a sixth more is resident than alive
NF4 = 4.127 / 8  # bytes per 4-bit weight with its share of the quantised scales
PROBE = 1 / 8  # share of the responses on which an internal phase measures the full policy
_Phases = dict[str, tuple[int | None, int, float]]  # layer (None: full policy), rollout batches and weight, by name


@dataclass(frozen=True)
class Device:
    """What one process runs on: FLOP/s and bytes per second that it reaches, and bytes (memory None: no limit)."""

    name: str
    flops: float
    bandwidth: float
    memory: int | None
    process: int
    accelerator: bool


@dataclass(frozen=True)
class PlanRequest:
    """What a plan needs beside the recipe. Lengths are in padded tokens; None takes the recipe's maximum."""

    device: Device
    processes: int = 1
    sharding: str = "ddp"
    prompt: int | None = None
    response: int | None = None
    config_from: Path | None = None


def find_device(name: str, flops: float | None = None, memory_gib: float | None = None) -> Device:
    """Return a device by its name, upper or lower case, with the user's numbers in place of the assumed ones.

    Raises:
        ConfigError: the name is unknown, or a number is not above 0.
    """
    name = name.lower()
    if name not in ("cpu", *PEAKS):
        raise ConfigError(f"unknown device {name!r}; choose one of cpu, {', '.join(PEAKS)}")
    for option, value in (("--flops", flops), ("--memory", memory_gib)):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{option} must be a finite number above 0, not {value}")
    peak, bandwidth, size = PEAKS.get(name) or (0.0, 25e9, 0.0)
    if name == "cpu" and flops is None:  # measured
        setup, threads = "import torch; matrix = torch.ones(1024, 1024)", torch.get_num_threads()
        peak = 2 * 1024**3 / Timer("matrix @ matrix", setup, num_threads=threads).timeit(4).median
    memory = int(memory_gib * 2**30 if memory_gib else FRAGMENTATION * size) or None
    process = CPU_PROCESS if name == "cpu" else ACCELERATOR_PROCESS
    return Device(name, flops or UTILISATION * peak, UTILISATION * bandwidth, memory, process, name != "cpu")


def make_plan(recipe: Recipe, request: PlanRequest) -> dict[str, Any]:
    """Estimate memory and time of a run.

    Returns:
        Sections ``model``, ``batch``, ``device``, ``memory`` (bytes per process), ``flops`` (per rollout batch, all
        processes), ``tokens``, ``seconds``, ``notes`` and ``phase1`` (the first internal phase's update as a
        share of the full policy's). Internal phases are named ``internal``, ``internal_2``, ...

    Raises:
        InputError, ConfigError: the model has no readable configuration, or recipe, model and request do not fit.
    """
    if request.sharding not in SHARDINGS:
        raise ConfigError(f"unknown sharding {request.sharding!r}; choose one of {', '.join(SHARDINGS)}")
    settings = BuPOConfig(**{"output_dir": "unused", "bf16": False, **recipe.trainer_settings(request.processes)})
    config, source = read_config(
        recipe.model, request.config_from, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code
    )
    batch = _batch(recipe, request, settings, config)
    model = {"name": recipe.model, "source": source, **describe_model(config)}
    depth = model["layers"]
    phases, notes = _phases(settings, recipe.rollouts, depth)
    work = _workload(recipe, request, settings, batch)
    counts = {}
    full = beside = count_update(config, depth, work, internal=False, narrow=False)
    if len(phases) > 1 and not work.triton:
        beside = count_update(config, depth, work, internal=False, narrow=True)
    for name, (layer, _, weight) in phases.items():
        if layer is not None:
            counts[name] = _beside(count_update(config, layer, work, internal=True, narrow=True), beside, weight)
    counts["full"] = full
    memory = _memory(recipe, request, settings, work, model["parameters"], counts, count_rollout(config, depth, work))
    flops = _flops(settings, batch, counts)
    layer = next(iter(phases.values()))[0]
    tokens = batch["samples"] * batch["response"]
    return {
        "model": {**model, "internal_layer": layer, "trained": full["trained"]},
        "batch": {**batch, "internal_rollouts": recipe.rollouts - phases["full"][1]},
        "device": asdict(request.device),
        "processes": request.processes,
        "sharding": request.sharding if request.processes > 1 else None,
        "memory": memory,
        "flops": flops,
        "tokens": {"rollout": tokens, "run": tokens * recipe.rollouts},
        "seconds": _seconds(request, batch, phases, flops, memory),
        "notes": notes,
        "phase1": layer and {"update_flops": flops["updates_internal"] / flops["updates_full"]},
    }


def _batch(recipe: Recipe, request: PlanRequest, settings: BuPOConfig, config: Any) -> dict[str, int]:
    """Return the sizes of a rollout batch, after checking the lengths against the recipe's and the model's."""
    lengths = {}
    for name, longest in (("prompt", recipe.max_prompt_length), ("response", recipe.max_completion_length)):
        lengths[name] = getattr(request, name) or longest
        if lengths[name] > longest:
            raise ConfigError(f"--{name}-length {lengths[name]} is above the recipe's maximum of {longest} tokens")
    length, context = sum(lengths.values()), context_length(config)
    if context and length > context:
        raise ConfigError(f"prompt and response have {length} tokens, more than the model's context of {context}")
    return {
        "samples": recipe.samples_per_rollout(),
        "samples_a_process": recipe.samples_per_rollout() // request.processes,
        "micro_batch": recipe.micro_batch,
        "accumulation": settings.gradient_accumulation_steps,
        "updates": recipe.updates_per_rollout * settings.num_iterations,
        "passes": settings.num_iterations,
        "rollouts": recipe.rollouts,
        **lengths,
        "length": length,
    }


def _phases(settings: BuPOConfig, rollouts: int, depth: int) -> tuple[_Phases, list[str]]:
    """Return the phases, the full policy's last, and notes on what is assumed about them."""
    phases: _Phases = {}
    notes = []
    for number, phase in enumerate(settings.schedule().internal, 1):
        layer = phase.layer if isinstance(phase.layer, int) else max(1, depth // 6)
        if phase.layer == "auto":
            notes.append(f"internal_layer auto is assumed to be layer {layer}, a sixth of the depth")
        check_layer(depth, layer)
        phases["internal" if number == 1 else f"internal_{number}"] = (layer, phase.rollouts or 0, phase.weight)
    if settings.internal_steps == "auto":
        notes.append("internal_steps auto may end earlier; its copy of the trained weights is not counted")
    if settings.estimator == "ppo":
        notes.append("the critic of estimator ppo is counted as a second policy")
    phases["full"] = (None, rollouts - sum(n for _, n, _ in phases.values()), 1.0)
    return phases, notes


def _workload(recipe: Recipe, request: PlanRequest, settings: BuPOConfig, batch: dict[str, int]) -> Workload:
    accelerator = request.device.accelerator
    low = recipe.precision == "bfloat16" or (recipe.precision == "auto" and accelerator)
    compute = torch.bfloat16 if low else torch.float32
    dtype = torch.bfloat16 if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    gathered = request.processes > 1 and request.sharding in ("fsdp2", "zero3")
    if gathered or (recipe.lora is not None and recipe.lora.four_bit):
        dtype = compute  # weights are gathered, or unpacked, in the dtype of products
    return Workload(
        dtype=dtype,
        compute=compute,
        batch=recipe.micro_batch,
        prompt=batch["prompt"],
        response=batch["response"],
        samples=batch["samples_a_process"],
        checkpointing=settings.gradient_checkpointing,
        accumulates=batch["accumulation"] > 1 or request.processes > 1,
        triton=accelerator,
        frozen=settings.frozen_layers or 0,
        lora=lora_config(recipe),
    )


def _beside(internal: dict[str, int], full: dict[str, int], weight: float) -> dict[str, int]:
    """Return the cost of an internal phase, which scores the full policy too, and also trains it if it is joint.

    The graph of a joint phase's internal surrogate is alive while the full policy's is made and differentiated.
    """
    scoring = max(internal["scoring"], full["scoring"])
    if weight == 1.0:
        return {**internal, "scoring": scoring}
    sums = {name: internal[name] + full[name] for name in ("kept", "scoring_flops", "update_flops")}
    return {**full, **sums, "scoring": scoring, "update": internal["kept"] + full["update"]}


def _memory(
    recipe: Recipe,
    request: PlanRequest,
    settings: BuPOConfig,
    work: Workload,
    size: dict[str, int],
    counts: dict[str, dict[str, int]],
    rollout: dict[str, int],
) -> dict[str, Any]:
    """Return bytes per process by phase and part, and whether they fit."""
    n, device = request.processes, request.device
    sharding = request.sharding if n > 1 else "none"
    held = 4 if recipe.dtype == "float32" else 2
    packed = size["matrices"] if recipe.lora is not None and recipe.lora.four_bit else 0
    weights, gathered, critic, reserved = int((size["total"] - packed) * held + packed * NF4), 0, 0, 0
    if settings.estimator == "ppo":  # weights, gradients and moments, whole in every process
        critic = weights + 3 * counts["full"]["gradients"]
    if sharding in ("fsdp2", "zero3"):  # two layers, embedding and unembedding are whole at a time
        weights //= n
        gathered = (2 * size["largest_layer"] + size["embedding"] + size["head"]) * work.dtype.itemsize
    if settings.use_vllm and settings.vllm_mode == "colocate":
        reserved = int(settings.vllm_gpu_memory_utilization * (device.memory or 0))
    memory: dict[str, Any] = {"weights": weights, "gathered": gathered, "critic": critic, "process": device.process}
    peaks: dict[str, int] = {}
    above = {}
    for name, count in counts.items():
        gradients = count["trained"] * (4 if recipe.lora else held)
        optimizer = 2 * gradients // (n if sharding in ("fsdp2", "zero2", "zero3") else 1)
        # DDP reduces a second copy in buckets; without accumulation gradients are part of what an update makes
        kept = {"none": gradients * work.accumulates, "ddp": 2 * gradients}.get(sharding, gradients // n)
        base = weights + gathered + critic + device.process + optimizer
        parts = {"update": kept + count["update"], "scoring": count["scoring"]}
        if not settings.use_vllm:
            parts["rollout"] = rollout["peak"]
        slack = 1.0 if device.accelerator else CPU_ALLOCATOR
        totals = {part: base + int(slack * alive) for part, alive in parts.items()}
        peaks |= {f"{part} ({name} phase)": total for part, total in totals.items()}
        above[name] = max(totals.values()) - weights
        state = {"gradients": gradients, "optimizer": optimizer, "kept_activations": count["kept"]}
        memory[name] = {**state, "update_beside_weights": parts["update"], **totals}
    worst = max(peaks, key=lambda name: peaks[name])
    memory["rollout"] = {"engine": "vLLM" if settings.use_vllm else "transformers", "reserved": reserved, **rollout}
    memory |= {"peak": peaks[worst], "peak_in": worst, "peak_above_weights": above, "needed": peaks[worst] + reserved}
    memory["fits"] = None if device.memory is None else memory["needed"] <= device.memory
    return memory


def _flops(settings: BuPOConfig, batch: dict[str, int], counts: dict[str, dict[str, int]]) -> dict[str, float]:
    """Return operations per rollout batch of all processes, by part and phase."""
    corrected = settings.use_vllm and settings.vllm_importance_sampling_correction
    scores = batch["updates"] > 1 or corrected  # a single update makes its own old log-probabilities
    passes = batch["samples"] / batch["micro_batch"]
    full = passes * counts["full"]["scoring_flops"]
    flops = {"generation": full}  # with a KV cache, every token passes through the model once
    for name, count in counts.items():
        scoring, updates = passes * count["scoring_flops"], passes * batch["passes"] * count["update_flops"]
        if settings.estimator == "ppo":
            scoring, updates = scoring + full, updates + passes * batch["passes"] * counts["full"]["update_flops"]
        flops[f"scoring_{name}"] = scoring if scores else 0.0
        flops[f"updates_{name}"] = updates
        if name != "full":
            flops[f"probe_{name}"] = PROBE * (2 * full + scoring) + (full if corrected else 0.0)
    return flops


def _seconds(
    request: PlanRequest, batch: dict[str, int], phases: _Phases, flops: dict[str, float], memory: dict[str, Any]
) -> dict[str, Any]:
    """Return seconds per rollout batch by phase and part, and of the run: operations over the device's rate.

    A sampling step takes at least as long as reading the weights and the KV cache once.
    """
    rate = request.device.flops * request.processes
    cache = (
        batch["samples_a_process"] * (batch["prompt"] + batch["response"] / 2) * memory["rollout"]["cache_per_token"]
    )
    whole = memory["weights"] * (request.processes if memory["gathered"] else 1)
    reading = batch["response"] * (whole + cache) / request.device.bandwidth
    seconds: dict[str, Any] = {"run": 0.0}
    for name, (_, rollouts, _) in phases.items():
        parts = {
            "generation": max(flops["generation"] / rate, reading),
            "scoring": (flops[f"scoring_{name}"] + flops.get(f"probe_{name}", 0.0)) / rate,
            "updates": flops[f"updates_{name}"] / rate,
        }
        seconds[name] = {**parts, "rollout_batch": sum(parts.values())}
        seconds["run"] += rollouts * seconds[name]["rollout_batch"]
    return seconds
