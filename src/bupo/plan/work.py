"""Operations and time of a rollout batch: counted from the model's shape, divided by what a device achieves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bupo.plan.shape import Shape
from bupo.plan.simulate import Settings, UpdateBytes
from bupo.recipe import Recipe

if TYPE_CHECKING:
    from bupo.plan.estimate import Question
    from bupo.plan.measure import Speeds

PROBE_SHARE = 8  # an eighth of the responses is scored anew in an internal phase


def forward_flops(shape: Shape, layers: int, tokens: int) -> float:
    """Of one sequence through the first ``layers`` layers: a multiply and an add for each matrix entry and token, and
    scores and values of every pair of positions (kernels with a padding mask do not skip the future)."""
    return 2.0 * tokens * sum(shape.matrix[:layers]) + 4.0 * tokens**2 * shape.attention_width * layers


def batch_flops(
    recipe: Recipe, shape: Shape, batch: dict[str, int], layer: int | None, settings: Settings
) -> dict[str, float]:
    """Of one rollout batch, in all processes."""
    samples, length = batch["samples"], batch["length"]
    head = 2.0 * shape.vocabulary * shape.width * (batch["response"] if settings.triton else length)
    backward, head_backward = (1, 2) if recipe.lora else (2, 3)  # adapters: no gradient of the frozen matrices
    found: dict[str, float] = {}
    for name, depth in (("internal", layer), ("full", len(shape.layers))):
        if depth is None:
            continue
        body = forward_flops(shape, depth, length)
        again = 1 if recipe.gradient_checkpointing else 0
        found[f"scoring_{name}"] = samples * (body + head)
        found[f"updates_{name}"] = (
            batch["passes"] * samples * (body * (1 + backward + again) + head * (1 + head_backward))
        )
    if layer is not None:
        share = max(batch["micro_batch"] * (samples // batch["samples_a_process"]), samples // PROBE_SHARE) / samples
        probe = share * (2 * found["scoring_full"] + found["scoring_internal"])
        if is_joint(recipe):  # the joint objective does both
            found["scoring_internal"] += found["scoring_full"]
            found["updates_internal"] += found["updates_full"]
        found["probe_internal"] = probe + (found["scoring_full"] if _corrected(recipe) else 0.0)
    if not _scores(recipe, batch):
        found |= dict.fromkeys([name for name in found if name.startswith("scoring_")], 0.0)
    pairs = 2.0 * length**2 * shape.attention_width * len(shape.layers)  # half of all: a token reads its past
    words = 2.0 * batch["response"] * shape.vocabulary * shape.width
    found["generation"] = samples * (2.0 * length * sum(shape.matrix) + pairs + words)
    return found


def _corrected(recipe: Recipe) -> bool:
    """Whether vLLM's samples are weighed by the full policy's old log-probabilities."""
    return bool(recipe.trl.get("use_vllm", False) and recipe.trl.get("vllm_importance_sampling_correction", True))


def _scores(recipe: Recipe, batch: dict[str, int]) -> bool:
    """Whether old log-probabilities are computed: with one update a rollout batch they are the update's own."""
    return batch["updates"] > 1 or _corrected(recipe)


def savings(flops: dict[str, float], full: UpdateBytes, internal: UpdateBytes) -> dict[str, float]:
    """The internal phase as a share of the full one: an update's operations, all of a batch's, an update's memory."""
    return {
        "update_flops": flops["updates_internal"] / flops["updates_full"],
        "training_flops": (flops["updates_internal"] + flops["scoring_internal"] + flops["probe_internal"])
        / (flops["updates_full"] + flops["scoring_full"]),
        "update_memory": (internal.peak + 2 * internal.gradients) / (full.peak + 2 * full.gradients),
    }


def run_tokens(recipe: Recipe, batch: dict[str, int]) -> int:
    """Response tokens of the whole run, at most."""
    return batch["samples"] * batch["response"] * recipe.rollouts


def seconds_of(
    recipe: Recipe,
    shape: Shape,
    asked: Question,
    batch: dict[str, int],
    layer: int | None,
    flops: dict[str, float],
    settings: Settings,
    speeds: Speeds | None,
    rollout: dict[str, Any],
) -> dict[str, Any]:
    """Seconds of a rollout batch by part and phase, and of the run."""
    parts = {}
    for name in ("internal", "full"):
        depth = layer if name == "internal" else len(shape.layers)
        if depth is None:
            continue
        if speeds is not None:
            joint = is_joint(recipe)
            parts[name] = speeds.rollout_batch(
                shape, batch, depth, internal=name == "internal", joint=joint, scores=_scores(recipe, batch)
            )
        else:
            rate = asked.device.flops * asked.processes
            parts[name] = {
                "generation": _generation_seconds(shape, asked, batch, flops, settings, rollout),
                "scoring": (flops[f"scoring_{name}"] + flops.get("probe_internal", 0.0) * (name == "internal")) / rate,
                "updates": flops[f"updates_{name}"] / rate,
            }
        parts[name]["rollout_batch"] = sum(parts[name].values())
        parts[name]["update"] = parts[name]["updates"] / batch["updates"]
    first = batch["internal_rollouts"] if layer is not None else 0
    run = (recipe.rollouts - first) * parts["full"]["rollout_batch"]
    run += first * parts["internal"]["rollout_batch"] if first else 0.0
    return {**parts, "run": run, "measured": speeds is not None}


def _generation_seconds(
    shape: Shape,
    asked: Question,
    batch: dict[str, int],
    flops: dict[str, float],
    settings: Settings,
    rollout: dict[str, Any],
) -> float:
    """Every step reads the weights and the cache, and computes: whichever takes longer. Where vLLM's cache holds fewer
    responses than there are, they come in waves that read the weights anew."""
    size = settings.compute.itemsize
    text = shape.config.get_text_config()
    ratio = getattr(text, "num_key_value_heads", text.num_attention_heads) / text.num_attention_heads
    cache = 2 * shape.attention_width * ratio * len(shape.layers) * size * (batch["prompt"] + batch["response"] / 2)
    room = rollout.get("cache_tokens")
    wanted = batch["samples_a_process"] * (batch["prompt"] + batch["response"] / 2)
    waves = max(1.0, wanted / room) if room else 1.0
    read = batch["response"] * (shape.total * size * waves + batch["samples_a_process"] * cache)
    return max(flops["generation"] / asked.processes / asked.device.flops, read / asked.device.bandwidth)


def is_joint(recipe: Recipe) -> bool:
    """Whether any internal phase also optimises the full policy."""
    return any(phase.get("weight", 1.0) < 1.0 for phase in recipe.phases or [])
