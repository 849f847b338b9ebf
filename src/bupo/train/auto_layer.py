"""``internal_layer: auto``: the layer that ``internal_rule`` names in a quick analysis of the first rollout batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bupo.lens import agreement as choice
from bupo.lens.analyze import analyze_rollouts

RESPONSES = 32  # enough for the signs of the FFN entropy change; standard errors enter the rule


@dataclass(frozen=True)
class TokenRollout:
    """One response of a training batch as token ids."""

    prompt_ids: list[int]
    response_ids: list[int]


@dataclass(frozen=True)
class LayerChoice:
    """The layer found, or None with a message that lists the alternatives; ``analysis`` as in ``analysis.json``."""

    layer: int | None
    message: str
    analysis: dict[str, Any] = field(repr=False, default_factory=dict)


def choose_layer(
    model: nn.Module, batch: Mapping[str, Tensor], *, rule: str = "boundary", responses: int = RESPONSES
) -> LayerChoice:
    """Analyse some responses of a rollout batch (spread evenly over it) and name the layer that a rule gives.

    Args:
        rule: ``boundary``, the paper's, or ``recommended`` (:func:`bupo.lens.agreement.choose_layer`).
    """
    rollouts = unpad(batch)
    rows = torch.linspace(0, len(rollouts) - 1, min(responses, len(rollouts))).round().long().tolist()
    with torch.no_grad():
        chosen = [rollouts[i] for i in rows]
        analysis = analyze_rollouts(model, chosen)
        if rule == "recommended":
            analysis["layer_choice"] = choice.choose_layer(model, chosen, analysis)
    layer, reason = choice.chosen_layer(analysis, rule)
    if layer is not None:
        return LayerChoice(layer, reason, analysis)
    return LayerChoice(None, f"internal_layer auto: {reason}. {_alternatives(analysis)}", analysis)


def _alternatives(analysis: dict[str, Any]) -> str:
    layers = analysis["layers"]
    change = analysis["entropy_change"]["ffn"]
    positive = [str(i) for i, value in enumerate(change, start=1) if value > 0]
    seen = f"layers with a positive FFN entropy change: {', '.join(positive) or 'none'}"
    return (
        f"Set internal_layer to a number from 1 to {layers} ({seen}; the paper's choices lie at 1/6 of the depth in "
        "Qwen3 and just below the last layers in Llama), or internal_steps to 0 for plain GRPO"
    )


def unpad(batch: Mapping[str, Tensor]) -> list[TokenRollout]:
    """The responses of a padded batch (prompts padded left, responses right), empty ones left out."""
    found = []
    for row in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        response = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
        if prompt and response:
            found.append(TokenRollout(prompt, response))
    return found
