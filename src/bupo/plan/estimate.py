"""``bupo plan``: memory and time of a recipe, from its configuration, before anything is loaded.

Shape legend: S responses a rollout batch, N processes, B micro-batch, P prompt and R response tokens, T = P + R,
V vocabulary, d width, L layers, l the internal layer. docs/plan.md says why each term is what it is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from bupo.errors import ConfigError
from bupo.plan.devices import Device
from bupo.plan.measure import Speeds
from bupo.plan.shape import Shape
from bupo.plan.simulate import RolloutBytes, Settings, UpdateBytes, simulate_rollout, simulate_update
from bupo.plan.work import batch_flops, is_joint, run_tokens, savings, seconds_of
from bupo.recipe import Recipe

NF4 = 4.127 / 8  # bytes a weight in 4 bits, with its share of the twice quantised scales
SHARDINGS = ("ddp", "fsdp2", "zero2", "zero3")


@dataclass(frozen=True)
class Question:
    """What a plan is asked for beside the recipe: processes, how they share, the device, the lengths to count on."""

    device: Device
    processes: int = 1
    sharding: str = "ddp"
    prompt: int | None = None  # P, default: the recipe's longest
    response: int | None = None  # R, likewise


def make_plan(recipe: Recipe, shape: Shape, asked: Question, speeds: Speeds | None = None) -> dict[str, Any]:
    """Estimate memory and time.

    Args:
        speeds: measured on this machine; without them the device's products and memory bandwidth are divided by.

    Returns:
        Sections ``model``, ``batch``, ``memory`` (bytes a process), ``flops`` (of all processes), ``tokens``,
        ``seconds`` and ``phase1``.

    Raises:
        ConfigError: the batch does not split over the processes, or an internal layer that the model does not have.
    """
    if asked.sharding not in SHARDINGS:
        raise ConfigError(f"unknown sharding {asked.sharding!r}; one of {', '.join(SHARDINGS)}")
    batch = _batch(recipe, asked)
    layer = internal_layer(recipe, len(shape.layers))
    settings = settings_of(recipe, asked)
    full = simulate_update(shape.config, len(shape.layers), settings, whole=True)
    internal = None if layer is None else simulate_update(shape.config, layer, settings, whole=False)
    if internal is not None:
        # the full policy runs in an internal phase too: a part of the responses is watched without gradient
        beside = simulate_update(shape.config, len(shape.layers), settings, whole=True, narrow=True)
        internal = replace(internal, scoring=max(internal.scoring, beside.scoring))
        if is_joint(recipe):
            internal = _joint(internal, beside)
    rollout = None if _vllm(recipe) else simulate_rollout(shape.config, len(shape.layers), settings)
    flops = batch_flops(recipe, shape, batch, layer, settings)
    memory = _memory(recipe, shape, asked, settings, full, internal, rollout)
    return {
        "model": _model(shape, layer, full),
        "batch": batch,
        "device": asdict(asked.device),
        "processes": asked.processes,
        "sharding": asked.sharding if asked.processes > 1 else None,
        "memory": memory,
        "flops": flops,
        "tokens": {"rollout": batch["samples"] * batch["response"], "run": run_tokens(recipe, batch)},
        "seconds": seconds_of(recipe, shape, asked, batch, layer, flops, settings, speeds, memory["rollout"]),
        "notes": _notes(recipe),
        "phase1": None if internal is None else savings(flops, full, internal),
    }


def _notes(recipe: Recipe) -> list[str]:
    """What the figures leave out."""
    notes = []
    if recipe.estimator == "ppo":
        notes.append("the critic of ppo, a model of its own, is not counted: neither its memory nor its updates")
    if recipe.frozen_layers:
        notes.append("frozen_layers are counted as if they were trained: the figures are too high")
    if recipe.internal_steps == "auto":
        notes.append(
            "internal_steps auto keeps a copy of the trained weights in the host's memory; its phase may end early"
        )
    if recipe.internal_layer == "auto":
        notes.append("internal_layer auto: a sixth of the depth is assumed")
    return notes


def _joint(internal: UpdateBytes, full: UpdateBytes) -> UpdateBytes:
    """Both surrogates' graphs at once: the internal one waits while the full one is made, and both go together."""
    return UpdateBytes(
        kept=internal.kept + full.kept,
        gradients=full.gradients,
        trained=full.trained,
        scoring=max(internal.scoring, full.scoring),
        forward=internal.kept + full.forward,
        head=internal.kept + full.head,
        backward=internal.kept + full.backward,
    )


# -- the batch ---------------------------------------------------------------------------------------------------------


def _batch(recipe: Recipe, asked: Question) -> dict[str, int]:
    settings = recipe.trainer_settings(asked.processes)
    prompt = min(asked.prompt or recipe.max_prompt_length, recipe.max_prompt_length)
    response = min(asked.response or recipe.max_completion_length, recipe.max_completion_length)
    samples = recipe.samples_per_rollout()
    return {
        "samples": samples,
        "samples_a_process": samples // asked.processes,
        "micro_batch": recipe.micro_batch,
        "accumulation": settings["gradient_accumulation_steps"],
        "updates": recipe.updates_per_rollout * int(recipe.trl.get("num_iterations", 1)),
        "passes": int(recipe.trl.get("num_iterations", 1)),
        "rollouts": recipe.rollouts,
        "internal_rollouts": internal_rollouts(recipe),
        "prompt": prompt,
        "response": response,
        "length": prompt + response,
    }


def internal_layer(recipe: Recipe, layers: int) -> int | None:
    """The layer whose internal phase is planned: the highest of a ladder, L // 6 in place of ``auto``."""
    found: Any = recipe.internal_layer if recipe.internal_steps else None
    if recipe.phases:
        found = max(phase["layer"] for phase in recipe.phases)
    if found == "auto":
        found = max(1, layers // 6)
    if found is not None and not 1 <= found <= layers:
        raise ConfigError(f"layer {found} does not exist: this model has layers 1 to {layers}")
    return found


def internal_rollouts(recipe: Recipe) -> int:
    """Rollout batches of the internal phase; the most where the guard may end it."""
    if recipe.phases:
        return sum(phase["rollouts"] for phase in recipe.phases)
    if recipe.internal_steps == "auto":
        return recipe.internal_max_steps or max(recipe.rollouts // 3, 1)
    return int(recipe.internal_steps or 0)


def settings_of(recipe: Recipe, asked: Question) -> Settings:
    """What the memory of a pass depends on."""
    batch = _batch(recipe, asked)
    low = recipe.precision == "bfloat16" or (recipe.precision == "auto" and asked.device.accelerator)
    compute = torch.bfloat16 if low else torch.float32
    dtype = torch.bfloat16 if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    if asked.processes > 1 and asked.sharding in ("fsdp2", "zero3"):
        dtype = compute  # layers are gathered in the precision of the products
    return Settings(
        dtype=dtype,
        compute=compute,
        batch=recipe.micro_batch,
        prompt=batch["prompt"],
        response=batch["response"],
        rollout=batch["samples_a_process"],
        checkpointing=recipe.gradient_checkpointing,
        accumulates=batch["accumulation"] > 1 or asked.processes > 1,
        triton=asked.device.accelerator,
        lora=None if recipe.lora is None else (recipe.lora.r, recipe.lora.target_modules),
    )


def _vllm(recipe: Recipe) -> bool:
    return bool(recipe.trl.get("use_vllm", False))


# -- memory ------------------------------------------------------------------------------------------------------------


def _model(shape: Shape, layer: int | None, full: UpdateBytes) -> dict[str, Any]:
    below = sum(shape.layers[:layer]) if layer else 0
    return {
        "name": shape.name,
        "source": shape.source,
        "layers": len(shape.layers),
        "internal_layer": layer,
        "vocabulary": shape.vocabulary,
        "width": shape.width,
        "parameters": {
            "embedding": shape.embedding,
            "layers_to_l": below,
            "layers_above_l": sum(shape.layers) - below,
            "head": shape.head,
            "rest": shape.rest,
            "total": shape.total,
        },
        "tied": shape.head == 0,
        "trained": full.trained,
    }


def _memory(
    recipe: Recipe,
    shape: Shape,
    asked: Question,
    settings: Settings,
    full: UpdateBytes,
    internal: UpdateBytes | None,
    rollout: RolloutBytes | None,
) -> dict[str, Any]:
    n, mode = asked.processes, asked.sharding if asked.processes > 1 else "one"
    held = 2 if recipe.dtype != "float32" else 4
    whole = shape.total * held
    if recipe.lora is not None and recipe.lora.four_bit:
        packed = sum(shape.matrix)
        whole = int((shape.total - packed) * held + packed * NF4)
    weights = whole // n if mode in ("fsdp2", "zero3") else whole
    gathered = 0
    if mode in ("fsdp2", "zero3"):  # two layers, and embedding and head, are whole at a time
        size = settings.dtype.itemsize
        gathered = (2 * max(shape.layers) + shape.embedding + shape.head) * size
    phases: dict[str, dict[str, Any]] = {}
    for name, found in (("internal", internal), ("full", full)):
        if found is None:
            continue
        gradients = found.trained * (4 if recipe.lora else held)
        optimizer = 2 * gradients  # AdamW's two moments
        work = found.peak - (found.gradients if settings.accumulates else 0)
        if mode == "one":
            kept_gradients = gradients if settings.accumulates else 0  # else they are made while activations go
        else:
            # DDP reduces in buckets that are a second copy
            kept_gradients = 2 * gradients if mode == "ddp" else gradients // n
            optimizer = optimizer if mode == "ddp" else optimizer // n
        base = weights + optimizer + gathered + asked.device.process
        phases[name] = {
            "gradients": gradients,
            "optimizer": optimizer,
            "kept_activations": found.kept,
            "update_beside_weights": kept_gradients + work,
            "update": base + kept_gradients + work,
            "scoring": base + found.scoring,
            "rollout": None if rollout is None else base + rollout.peak,
        }
    peaks = {
        f"{kind} ({name} phase)": part[kind]
        for name, part in phases.items()
        for kind in ("update", "scoring", "rollout")
        if part[kind] is not None
    }
    worst = max(peaks, key=lambda name: int(peaks[name]))
    memory: dict[str, Any] = {
        "weights": weights,
        "gathered": gathered,
        "process": asked.device.process,
        **phases,
        "rollout": _rollout_memory(recipe, shape, asked, rollout),
        "peak": peaks[worst],
        "peak_in": worst,
        "peak_above_weights": {
            name: max(part[kind] or 0 for kind in ("update", "scoring", "rollout")) - weights
            for name, part in phases.items()
        },
    }
    reserved = memory["rollout"].get("reserved", 0)
    memory["needed"] = memory["peak"] + reserved
    memory["fits"] = None if asked.device.memory is None else memory["needed"] <= asked.device.memory
    return memory


def _rollout_memory(recipe: Recipe, shape: Shape, asked: Question, rollout: RolloutBytes | None) -> dict[str, Any]:
    if rollout is not None:
        return {"engine": "transformers", **asdict(rollout), "peak": rollout.peak, "reserved": 0}
    text = shape.config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * len(shape.layers) * getattr(text, "num_key_value_heads", text.num_attention_heads) * size * 2
    mode = recipe.trl.get("vllm_mode", "colocate")
    found: dict[str, Any] = {"engine": f"vLLM ({mode})", "cache_per_token": per_token, "reserved": 0}
    if mode == "colocate" and asked.device.memory:
        share = float(recipe.trl.get("vllm_gpu_memory_utilization", 0.3))
        tensor_parallel = int(recipe.trl.get("vllm_tensor_parallel_size", 1))
        found["reserved"] = int(share * asked.device.memory)
        found["cache_tokens"] = max(0, found["reserved"] - shape.total * 2 // tensor_parallel) // per_token
    return found
