"""A plan in words: the table that `bupo plan` prints, and with ``--explain`` every formula with its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def size(value: float) -> str:
    """Bytes with a unit."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if value >= factor:
            return f"{value / factor:,.1f} {unit}"
    return f"{value / 2**10:,.1f} KiB"


def count(value: float) -> str:
    """A number with a unit of thousands."""
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:,.2f} {unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def summary(plan: dict[str, Any]) -> str:
    """What a person decides by."""
    return "\n".join(_summary(plan))


def _summary(plan: dict[str, Any]) -> Iterator[str]:
    model, memory, batch = plan["model"], plan["memory"], plan["batch"]
    n, parts = plan["processes"], model["parameters"]
    yield f"{model['name']}: {count(parts['total'])} parameters, {model['layers']} layers ({model['source']})"
    where = f"{n} processes, {plan['sharding']}" if n > 1 else "1 process"
    yield f"{plan['device']['name']}, {where}; responses of {batch['response']:,} tokens after {batch['prompt']:,}"
    yield ""
    yield f"memory a process     {size(memory['needed'])}, the most in: {memory['peak_in']}"
    yield f"  weights            {size(memory['weights'])}"
    for name in ("internal", "full"):
        if name in memory:
            part = memory[name]
            yield (
                f"  {name + ' phase':<18} update {size(part['update'])}, scoring {size(part['scoring'])}"
                + (f", rollout {size(part['rollout'])}" if part["rollout"] else "")
            )
    yield f"  rollouts           {_rollouts(memory['rollout'])}"
    if memory["fits"] is not None:
        room = plan["device"]["memory"]
        yield f"  {'fits' if memory['fits'] else 'DOES NOT FIT'} into {size(room)}" + (
            "" if memory["fits"] else ": " + _remedy(plan)
        )
    yield ""
    seconds = plan["seconds"]
    how = "measured here" if seconds["measured"] else f"at {count(plan['device']['flops'])}FLOP/s a process"
    yield f"time                 {duration(seconds['run'])} for {batch['rollouts']} rollout batches, {how}"
    for name in ("internal", "full"):
        if name in seconds:
            part = seconds[name]
            yield (
                f"  {name + ' phase':<18} {duration(part['rollout_batch'])} a rollout batch: generation "
                f"{duration(part['generation'])}, scoring {duration(part['scoring'])}, updates "
                f"{duration(part['updates'])}"
            )
    yield f"rollout tokens       {count(plan['tokens']['rollout'])} a batch, {count(plan['tokens']['run'])} in all"
    if plan["phase1"] is not None:
        saved = plan["phase1"]
        yield (
            f"internal phase       its update takes {saved['update_flops']:.0%} of a full one's operations and "
            f"{saved['update_memory']:.0%} of its memory beside the weights"
        )
    for note in plan["notes"]:
        yield f"note: {note}"


def _rollouts(rollout: dict[str, Any]) -> str:
    if rollout["engine"] == "transformers":
        return f"transformers, all at once: KV cache {size(rollout['cache'])}, {size(rollout['peak'])} at most"
    text = f"{rollout['engine']}, {size(rollout['cache_per_token'])} of KV cache a token"
    if rollout.get("cache_tokens") is None:
        return text
    return f"{text}; {size(rollout['reserved'])} reserved, room for {rollout['cache_tokens']:,} tokens at a time"


def _remedy(plan: dict[str, Any]) -> str:
    memory = plan["memory"]
    if memory["peak_in"].startswith("rollout"):
        return "fewer or shorter responses at a time, more processes, or vLLM (trl.use_vllm)"
    if plan["batch"]["micro_batch"] > 1:
        return "a smaller micro_batch, more processes with --sharding fsdp2, or lora"
    return "more processes with --sharding fsdp2, shorter responses, or lora"


def explanation(plan: dict[str, Any]) -> str:
    """Every formula with its numbers."""
    return "\n".join(_explanation(plan))


def _explanation(plan: dict[str, Any]) -> Iterator[str]:
    model, memory, batch, flops = plan["model"], plan["memory"], plan["batch"], plan["flops"]
    parts, n = model["parameters"], plan["processes"]
    yield "Parameters"
    yield (
        f"  embedding {parts['embedding']:,} + layers 1-l {parts['layers_to_l']:,} + layers above l "
        f"{parts['layers_above_l']:,} + head {parts['head']:,}{' (tied)' if model['tied'] else ''} + rest "
        f"{parts['rest']:,} = {parts['total']:,}"
    )
    yield "Batch"
    yield (
        f"  {batch['samples']:,} responses a rollout batch / {batch['updates'] // batch['passes']} updates / {n} "
        f"processes = {batch['accumulation']} micro-batches of {batch['micro_batch']} x ({batch['prompt']:,} + "
        f"{batch['response']:,}) tokens an update"
    )
    yield "Memory of a process"
    share = f" / {n} processes" if plan["sharding"] in ("fsdp2", "zero3") else ""
    yield f"  weights: {parts['total']:,} x {round(memory['weights'] * (n if share else 1) / parts['total'])} B{share}"
    yield f"           = {size(memory['weights'])}"
    if memory["gathered"]:
        yield f"  whole at a time: two layers, embedding and head = {size(memory['gathered'])}"
    for name in ("internal", "full"):
        if name not in memory:
            continue
        part = memory[name]
        depth = model["internal_layer"] if name == "internal" else model["layers"]
        yield f"  {name} phase ({depth} layers run and trained)"
        yield f"    gradients of what is trained: {size(part['gradients'])} (before sharding)"
        yield f"    AdamW's two moments of it: {size(part['optimizer'])}"
        yield (
            f"    activations kept for the backward pass, counted by running the model without numbers: "
            f"{size(part['kept_activations'])} = "
            f"{part['kept_activations'] / depth / batch['micro_batch'] / batch['length']:,.0f} B a layer and token"
        )
        yield f"    an update beside weights and moments, at most: {size(part['update_beside_weights'])}"
        yield f"    old log-probabilities (no gradient), with all that is held: {size(part['scoring'])}"
    rollout = memory["rollout"]
    yield f"  KV cache: {size(rollout['cache_per_token'])} a token; {_rollouts(rollout)}"
    yield f"  the process itself: {size(memory['process'])}"
    yield "Operations of one rollout batch (multiply and add are two), all processes"
    yield f"  generation {count(flops['generation'])}FLOP"
    for name in ("internal", "full"):
        if f"updates_{name}" in flops:
            yield (
                f"  {name} phase: old log-probabilities {count(flops['scoring_' + name])}FLOP, "
                f"updates {count(flops['updates_' + name])}FLOP"
            )
    if "probe_internal" in flops:
        yield f"  watching the full policy in the internal phase: {count(flops['probe_internal'])}FLOP"
    yield (
        "  a pass through a sequence: 2 x matrix entries x tokens + 4 x tokens^2 x attention width a layer; an update "
        "is forward, backward (twice that) and, with checkpointing, forward again; the head makes its logits again in "
        "the backward pass"
    )
    seconds = plan["seconds"]
    yield "Time"
    if seconds["measured"]:
        yield "  a few layers and a quarter of this model's timed here, and a straight line through both"
    else:
        yield (
            f"  operations / ({count(plan['device']['flops'])}FLOP/s x {n}); a generated token costs at least reading "
            f"weights and cache at {count(plan['device']['bandwidth'])}B/s"
        )
