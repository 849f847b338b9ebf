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
    positive = [str(layer) for layer, value in enumerate(analysis["entropy_change"]["ffn"], start=1) if value > 0]
    message = (
        f"internal_layer auto: {reason}. Candidates: {analysis['layer_choice']['recommendation']['reason']}; layers "
        f"with a positive FFN entropy change: {', '.join(positive) or 'none'}; the paper's choices lie at 1/6 of the "
        f"depth in Qwen3 and just below the last layers in Llama. Set internal_layer to a number up to "
        f"{analysis['layers']}, or internal_steps to 0 for plain GRPO"
    )
    return LayerChoice(None, message, analysis)


def analyze_responses(model: nn.Module, responses: list[dict[str, Any]], accelerator: Any) -> dict[str, Any]:
    """The content of ``analysis.json``; every process must pass the same responses and gets the same result.

    The processes divide the responses among themselves, except under DeepSpeed, where a forward pass of a sharded model
    needs them all. Raises `InputError` on every process if the model cannot be analysed.
    """
    share = accelerator.num_processes > 1 and accelerator.distributed_type != "DEEPSPEED"
    return analyze_rollouts(model, responses, share=share)


def first_process_responses(batch: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The first process's responses of a padded batch, on every process; empty ones are left out."""
    rows = []
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    for prompt, shown, response, kept in zip(*(batch[name] for name in names), strict=True):
        row = {"prompt_ids": prompt[shown.bool()].tolist(), "response_ids": response[kept.bool()].tolist()}
        rows += [row] if all(row.values()) else []
    return broadcast_object_list([rows], from_process=0)[0]


def spread_responses(batch: Mapping[str, Tensor], n: int) -> list[dict[str, Any]]:
    """At most n of `first_process_responses`, spread evenly over the batch."""
    rows = first_process_responses(batch)
    return [rows[i] for i in spread_rows(len(rows), n).tolist()]


def spread_rows(size: int, n: int) -> Tensor:
    """Indices of at most n of ``size`` rows, spread evenly (the responses to one prompt lie next to each other)."""
    return torch.linspace(0, size - 1, min(size, n)).round().long()
