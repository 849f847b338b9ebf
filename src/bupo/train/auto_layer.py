"""Analyses the model in training on its own responses, and finds the layer that ``internal_layer: auto`` stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from bupo.errors import InputError
from bupo.lens.analyze import analyze_rollouts

RESPONSES = 32  # enough for the signs of the FFN entropy change; standard errors enter the rule


@dataclass(frozen=True)
class Response:
    """One response of a training batch as token ids."""

    prompt_ids: list[int]
    response_ids: list[int]


@dataclass(frozen=True)
class LayerChoice:
    """The boundary layer, or None with a message that lists the candidates; ``analysis`` as in ``analysis.json``."""

    layer: int | None
    message: str
    analysis: dict[str, Any] = field(repr=False, default_factory=dict)


def choose_layer(model: nn.Module, batch: Mapping[str, Tensor], accelerator: Any) -> LayerChoice:
    """Apply the paper's boundary rule to a quick analysis of a rollout batch; all processes get the same answer."""
    try:
        analysis = analyze_batch(model, batch, RESPONSES, accelerator)
    except InputError as error:
        return LayerChoice(None, f"internal_layer auto: {error}")
    layer, reason = analysis["boundary_layer"], analysis["boundary_reason"]
    if layer is not None:
        return LayerChoice(layer, reason, analysis)
    return LayerChoice(None, f"internal_layer auto: {reason}. {_candidates(analysis)}", analysis)


def _candidates(analysis: dict[str, Any]) -> str:
    change = analysis["entropy_change"]["ffn"]
    positive = ", ".join(str(layer) for layer, value in enumerate(change, start=1) if value > 0)
    return (
        f"Set internal_layer to a number from 1 to {analysis['layers']} (layers with a positive FFN entropy change: "
        f"{positive or 'none'}; the paper's choices lie at 1/6 of the depth in Qwen3 and just below the last layers in "
        "Llama; `bupo analyze` also shows where the layers begin to agree with the output), or internal_steps to 0 for "
        "plain GRPO"
    )


def analyze_batch(model: nn.Module, batch: Mapping[str, Tensor], responses: int, accelerator: Any) -> dict[str, Any]:
    """Analyse some of the first process's responses, spread evenly over its part of the batch.

    A forward pass of a sharded model is a collective operation, so there every process runs the same passes. Otherwise
    the processes divide the responses among themselves.

    Returns: the content of ``analysis.json``, the same on every process.

    Raises:
        InputError: (on every process) the model cannot be analysed.
    """
    rows = first_process_responses(batch)
    rows = [rows[i] for i in spread_rows(len(rows), responses).tolist()]
    sharded = accelerator.distributed_type in ("FSDP", "DEEPSPEED")
    return analyze_rollouts(model, rows, share=accelerator.num_processes > 1 and not sharded)


def first_process_responses(batch: Mapping[str, Tensor]) -> list[Response]:
    """The first process's responses of a padded batch, on every process; empty ones are left out."""
    rows = []
    for row in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        response = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
        if prompt and response:
            rows.append(Response(prompt, response))
    return broadcast_object_list([rows], from_process=0)[0]


def spread_rows(size: int, n: int) -> Tensor:
    """Indices of at most n of ``size`` rows, spread evenly (the responses to one prompt lie next to each other)."""
    return torch.linspace(0, size - 1, min(size, n)).round().long()
