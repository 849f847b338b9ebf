"""Analyses the model in training on its own responses, and finds the layer that ``internal_layer: auto`` stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from bupo.errors import InputError
from bupo.lens import layer_choice
from bupo.lens.analyze import analyze_rollouts
from bupo.lens.batching import check_rollouts

RESPONSES = 32  # enough for the signs of the FFN entropy change; standard errors enter the rule


@dataclass(frozen=True)
class LayerChoice:
    """The boundary layer, or None with a message that lists the candidates; ``analysis`` as in ``analysis.json``."""

    layer: int | None
    message: str
    analysis: dict[str, Any] = field(repr=False, default_factory=dict)


def choose_layer(model: nn.Module, batch: Mapping[str, Tensor], accelerator: Any) -> LayerChoice:
    """Apply the paper's boundary rule to a quick analysis of a rollout batch; all processes get the same answer."""
    responses = spread_responses(batch, RESPONSES)
    try:
        analysis = analyze_responses(model, responses, accelerator)
        layer, reason = analysis["boundary_layer"], analysis["boundary_reason"]
        if layer is not None:
            return LayerChoice(layer, reason, analysis)
        analysis["layer_choice"] = layer_choice.choose_layer(model, check_rollouts(model, responses), analysis)
    except InputError as error:
        return LayerChoice(None, f"internal_layer auto: {error}")
    change = analysis["entropy_change"]["ffn"]
    positive = ", ".join(str(layer) for layer, value in enumerate(change, start=1) if value > 0)
    message = (
        f"internal_layer auto: {reason}. Candidates: {analysis['layer_choice']['recommendation']['reason']}; layers "
        f"with a positive FFN entropy change: {positive or 'none'}; the paper's choices lie at 1/6 of the depth in "
        f"Qwen3 and just below the last layers in Llama. Set internal_layer to a number up to {analysis['layers']}, or "
        "internal_steps to 0 for plain GRPO"
    )
    return LayerChoice(None, message, analysis)


def analyze_responses(model: nn.Module, responses: list[dict[str, Any]], accelerator: Any) -> dict[str, Any]:
    """The content of ``analysis.json``; every process must pass the same responses and gets the same result.

    A forward pass of a sharded model is a collective operation, so there every process runs the same passes. Otherwise
    the processes divide the responses among themselves.

    Raises:
        InputError: (on every process) the model cannot be analysed.
    """
    share = accelerator.num_processes > 1 and accelerator.distributed_type != "DEEPSPEED"
    return analyze_rollouts(model, responses, share=share)


def first_process_responses(batch: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The first process's responses of a padded batch, on every process; empty ones are left out."""
    rows = []
    for row in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        response = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
        if prompt and response:
            rows.append({"prompt_ids": prompt, "response_ids": response})
    return broadcast_object_list([rows], from_process=0)[0]


def spread_responses(batch: Mapping[str, Tensor], n: int) -> list[dict[str, Any]]:
    """At most n of `first_process_responses`, spread evenly over the batch."""
    rows = first_process_responses(batch)
    return [rows[i] for i in spread_rows(len(rows), n).tolist()]


def spread_rows(size: int, n: int) -> Tensor:
    """Indices of at most n of ``size`` rows, spread evenly (the responses to one prompt lie next to each other)."""
    return torch.linspace(0, size - 1, min(size, n)).round().long()
