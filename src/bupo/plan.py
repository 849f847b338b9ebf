"""Estimate whether a recipe fits in memory and roughly how long it takes, from its model's configuration alone.

`bupo.train.footprint` counts bytes and operations of one micro-batch and one rollout; here they become those of a run.
docs/plan.md says what is counted and what is left out.
"""

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
from bupo.train.config import BuPOConfig, failed
from bupo.train.footprint import Workload, count_rollout, count_update
from bupo.train.layers import layer_problems, select
from bupo.train.lora import lora_config
from bupo.train.schedule import Phase

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
Counts = dict[str, int]


@dataclass(frozen=True)
class Device:
    """What one process runs on."""

    name: str
    flops: float  # per second, as reached
    bandwidth: float  # bytes per second, as reached
    memory: int | None  # usable bytes; None: no limit
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
    """Return a device by its name, with the user's numbers in place of the assumed ones, or raise `ConfigError`."""
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
    return Device(name, flops or UTILISATION * peak, UTILISATION * bandwidth, memory, name != "cpu")


def make_plan(recipe: Recipe, request: PlanRequest) -> dict[str, Any]:
    """Estimate memory (bytes per process), operations (per rollout batch, all processes) and seconds of a run.

    Internal phases are named ``internal``, ``internal_2``, ...; ``phase1`` is the first one's update as a share of the
    full policy's. Raises `InputError` if there is no readable configuration, or recipe, model and request do not fit.
    """
    plan = _Plan(recipe, request)
    memory, flops = plan._memory(), plan._flops()
    layer, rollouts = next(iter(plan.phases.values())).layer, recipe.rollouts
    batch = {"samples": plan.samples, "prompt": plan.prompt, "response": plan.response, "rollouts": rollouts}
    return {
        "model": {**plan.model, "internal_layer": layer, "trained": plan.counts["full"]["trained"]},
        "batch": {**batch, "internal_rollouts": rollouts - (plan.phases["full"].rollouts or 0)},
        "device": asdict(request.device),
        "processes": request.processes,
        "sharding": plan.sharding if request.processes > 1 else None,
        "memory": memory,
        "flops": flops,
        "seconds": plan._seconds(flops, memory),
        "notes": plan.notes,
        "phase1": layer and {"update_flops": flops["updates_internal"] / flops["updates_full"]},
    }


class _Plan:
    """What a plan is made of: sizes, phases, and the counts of one micro-batch of each phase and of one rollout."""

    def __init__(self, recipe: Recipe, request: PlanRequest):
        if request.sharding not in SHARDINGS:
            raise ConfigError(f"unknown sharding {request.sharding!r}; choose one of {', '.join(SHARDINGS)}")
        self.recipe, self.request, self.device, self.processes = recipe, request, request.device, request.processes
        self.sharding = request.sharding if self.processes > 1 else "none"
        self.settings = BuPOConfig(**{"output_dir": "unused", "bf16": False, **recipe.trainer_settings(self.processes)})
        source = {"revision": recipe.revision, "trust_remote_code": recipe.trust_remote_code}
        config, origin = read_config(recipe.model, request.config_from, **source)
        self.prompt, self.response = self._lengths(context_length(config))
        self.model = {"name": recipe.model, "source": origin, **describe_model(config)}
        self.samples = recipe.prompts_per_rollout * recipe.samples_per_prompt
        depth = self.model["layers"]
        self._set_phases(depth)
        self.work = work = self._workload()
        full = beside = count_update(config, depth, work, internal=False, narrow=False)
        if len(self.phases) > 1 and not work.triton:
            beside = count_update(config, depth, work, internal=False, narrow=True)
        self.counts = {
            name: _beside(count_update(config, phase.layer, work, internal=True, narrow=True), beside, phase.weight)
            for name, phase in self.phases.items()
            if isinstance(phase.layer, int)
        } | {"full": full}
        self.rollout = count_rollout(config, depth, work)

    def _lengths(self, context: int | None) -> list[int]:
        """Padded lengths of prompts and responses, checked against the recipe's and the model's."""
        longest = {"prompt": self.recipe.max_prompt_length, "response": self.recipe.max_completion_length}
        lengths = [getattr(self.request, name) or most for name, most in longest.items()]
        for length, (name, most) in zip(lengths, longest.items(), strict=True):
            if length > most:
                raise ConfigError(f"--{name}-length {length} is above the recipe's maximum of {most} tokens")
        if context and sum(lengths) > context:
            total = f"prompt and response have {sum(lengths)} tokens"
            raise ConfigError(f"{total}, more than the model's context of {context}")
        return lengths

    def _set_phases(self, depth: int) -> None:
        """Set the phases, the full policy's last, and notes on what is assumed about them."""
        schedule, guess = self.settings.schedule(), max(1, depth // 6)
        auto = any(phase.layer == "auto" for phase in schedule.internal)
        self.notes = failed({
            f"internal_layer auto is assumed to be layer {guess}, a sixth of the depth": auto,
            "internal_steps auto may end earlier; its copy of the weights is not counted": self.settings.guarded,
            "the critic of estimator ppo is counted as a second policy": self.settings.estimator == "ppo",
        })  # fmt: skip
        internal = schedule.with_layer(guess)
        for layer in internal.layers:
            check_layer(depth, layer)
        if problems := layer_problems(self.settings, internal, depth):
            raise ConfigError(problems)
        self.phases = {f"internal_{n}" if n > 1 else "internal": p for n, p in enumerate(internal.internal, start=1)}
        self.phases["full"] = Phase(rollouts=self.recipe.rollouts - sum(p.rollouts or 0 for p in internal.internal))

    def _workload(self) -> Workload:
        recipe, accelerator = self.recipe, self.device.accelerator
        low = recipe.precision == "bfloat16" or (recipe.precision == "auto" and accelerator)
        compute = torch.bfloat16 if low else torch.float32
        dtype = torch.bfloat16 if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
        if self.sharding in ("fsdp2", "zero3") or (recipe.lora is not None and recipe.lora.four_bit):
            dtype = compute  # weights are gathered, or unpacked, in the dtype of products
        return Workload(
            *(dtype, compute, recipe.micro_batch, self.prompt, self.response, self.samples // self.processes),
            checkpointing=self.settings.gradient_checkpointing,
            accumulates=self.settings.gradient_accumulation_steps > 1 or self.processes > 1,
            triton=accelerator,
            selection=select(self.settings, self.model["layers"]),
            lora=lora_config(recipe),
        )

    def _memory(self) -> dict[str, Any]:
        """Bytes per process by phase and part, and whether they fit."""
        n, device, settings, recipe = self.processes, self.device, self.settings, self.recipe
        size = self.model["parameters"]
        held = 4 if recipe.dtype == "float32" else 2
        packed = size["matrices"] if recipe.lora is not None and recipe.lora.four_bit else 0
        weights, gathered, critic, reserved = int((size["total"] - packed) * held + packed * NF4), 0, 0, 0
        if settings.estimator == "ppo":  # weights, gradients and moments, whole in every process
            critic = weights + 3 * self.counts["full"]["gradients"]
        if self.sharding in ("fsdp2", "zero3"):  # two layers, embedding and unembedding are whole at a time
            weights //= n
            gathered = (2 * size["largest_layer"] + size["embedding"] + size["head"]) * self.work.dtype.itemsize
        if settings.use_vllm and settings.vllm_mode == "colocate":
            reserved = int(settings.vllm_gpu_memory_utilization * (device.memory or 0))
        process, slack = (ACCELERATOR_PROCESS, 1.0) if device.accelerator else (CPU_PROCESS, CPU_ALLOCATOR)
        memory: dict[str, Any] = {"weights": weights, "gathered": gathered, "critic": critic, "process": process}
        peaks: Counts = {}
        above = {}
        for name, count in self.counts.items():
            gradients = count["trained"] * (4 if recipe.lora else held)
            optimizer = 2 * gradients // (1 if self.sharding in ("none", "ddp") else n)
            # DDP reduces a second copy in buckets; without accumulation gradients are part of what an update makes
            kept = {"none": gradients * self.work.accumulates, "ddp": 2 * gradients}.get(self.sharding, gradients // n)
            parts = {"update": kept + count["update"], "scoring": count["scoring"]}
            parts |= {} if settings.use_vllm else {"rollout": self.rollout["peak"]}
            base = weights + gathered + critic + process + optimizer
            totals = {part: base + int(slack * alive) for part, alive in parts.items()}
            peaks |= {f"{part} ({name} phase)": total for part, total in totals.items()}
            above[name] = max(totals.values()) - weights
            state = {"gradients": gradients, "optimizer": optimizer, "kept_activations": count["kept"]}
            memory[name] = {**state, "update_beside_weights": parts["update"], **totals}
        worst = max(peaks, key=lambda name: peaks[name])
        engine, needed = "vLLM" if settings.use_vllm else "transformers", peaks[worst] + reserved
        memory |= {"rollout": {"engine": engine, "reserved": reserved, **self.rollout}, "peak_above_weights": above}
        memory |= {"peak": peaks[worst], "peak_in": worst, "needed": needed}
        return {**memory, "fits": None if device.memory is None else needed <= device.memory}

    def _flops(self) -> dict[str, float]:
        """Operations per rollout batch of all processes, by part and phase."""
        corrected = self.settings.use_vllm and self.settings.vllm_importance_sampling_correction
        scores = self.recipe.updates(1) > 1 or corrected  # a single update makes its own old log-probabilities
        micro_batches, full = self.samples / self.recipe.micro_batch, self.counts["full"]
        scored = micro_batches * full["scoring_flops"]
        flops = {"generation": scored}  # with a KV cache, every token passes through the model once
        for name, count in self.counts.items():
            scoring, updates = (micro_batches * count[part] for part in ("scoring_flops", "update_flops"))
            if self.settings.estimator == "ppo":
                scoring, updates = scoring + scored, updates + micro_batches * full["update_flops"]
            flops[f"scoring_{name}"] = scoring if scores else 0.0
            flops[f"updates_{name}"] = updates * self.settings.num_iterations
            if name != "full":
                flops[f"probe_{name}"] = PROBE * (2 * scored + scoring) + (scored if corrected else 0.0)
        return flops

    def _seconds(self, flops: dict[str, float], memory: dict[str, Any]) -> dict[str, Any]:
        """Seconds per rollout batch by phase and part, and of the run: operations over the device's rate.

        A sampling step takes at least as long as reading the weights and the KV cache once.
        """
        rate, per_token = self.device.flops * self.processes, self.rollout["cache_per_token"]
        cache = self.work.samples * (self.prompt + self.response / 2) * per_token
        whole = memory["weights"] * (self.processes if memory["gathered"] else 1)
        reading = self.response * (whole + cache) / self.device.bandwidth
        seconds: dict[str, Any] = {"run": 0.0}
        for name, phase in self.phases.items():
            parts = {
                "generation": max(flops["generation"] / rate, reading),
                "scoring": (flops[f"scoring_{name}"] + flops.get(f"probe_{name}", 0.0)) / rate,
                "updates": flops[f"updates_{name}"] / rate,
            }
            seconds[name] = {**parts, "rollout_batch": sum(parts.values())}
            seconds["run"] += (phase.rollouts or 0) * seconds[name]["rollout_batch"]
        return seconds


def _beside(internal: Counts, full: Counts, weight: float) -> Counts:
    """The cost of an internal phase, which scores the full policy too, and also trains it if it is joint.

    The graph of a joint phase's internal surrogate is alive while the full policy's is made and differentiated.
    """
    scoring = max(internal["scoring"], full["scoring"])
    if weight == 1.0:
        return {**internal, "scoring": scoring}
    sums = {name: internal[name] + full[name] for name in ("kept", "scoring_flops", "update_flops")}
    return {**full, **sums, "scoring": scoring, "update": internal["kept"] + full["update"]}
