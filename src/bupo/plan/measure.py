"""How fast this machine runs a recipe's model: a quarter of its layers and a few less are timed, the rest is a line.

Random weights of the model's own shape; an update is the trainer's (tiled head, checkpointing, precision), a generation
transformers' own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from bupo.plan.shape import Shape, cut
from bupo.plan.simulate import Settings, prepare
from bupo.train.tiles import narrow_tiles

FEW, MORE = 2, 4  # layers: so many, and a quarter of the model's or so many
STEPS = (2, 10)  # tokens generated in the two timed generations


@dataclass(frozen=True)
class Line:
    """Seconds as a straight line over the number of layers."""

    start: float
    layer: float

    def at(self, layers: int) -> float:
        return max(self.start + self.layer * layers, 0.0)


@dataclass(frozen=True)
class Speeds:
    """Seconds on this machine: of one micro-batch's update and scoring (through the full policy's head, and through the
    internal one's, whose tiles may be narrower), one generated token of the whole local rollout batch, and AdamW a
    parameter."""

    update: Line
    scoring: Line
    internal_update: Line
    internal_scoring: Line
    token: Line
    optimizer: float
    flops: float  # achieved by the update's products

    def rollout_batch(
        self,
        shape: Shape,
        batch: dict[str, int],
        depth: int,
        *,
        internal: bool,
        joint: bool = False,
        scores: bool = True,
    ) -> dict[str, float]:
        """Seconds of one rollout batch whose ratio reads layer ``depth``, by part; joint: and the full policy's;
        scores: old log-probabilities are computed."""
        layers = len(shape.layers)
        passes = batch["samples_a_process"] // batch["micro_batch"]
        joint = joint and internal
        trained = shape.total - sum(shape.layers[depth:]) if internal and not joint else shape.total
        score, update = self.scoring.at(layers), self.update.at(layers)
        scoring = passes * score * scores
        if internal:
            inner = self.internal_scoring.at(depth)
            update = self.internal_update.at(depth) + (update if joint else 0.0)
            scoring = passes * (inner + (score if joint else 0.0)) * scores
            # the probe: an eighth of the responses, full twice and internal once
            scoring += max(1.0, passes / 8) * (2 * score + inner)
        prefill = passes * self.scoring.at(layers) * batch["prompt"] / batch["length"]
        return {
            "generation": prefill + batch["response"] * self.token.at(layers),
            "scoring": scoring,
            "updates": batch["passes"] * passes * update + batch["updates"] * trained * self.optimizer,
        }


def measure(shape: Shape, settings: Settings, *, device: str, repeats: int = 3) -> Speeds:
    """Time the model's layers here, the two depths in turn; medians of ``repeats`` count."""
    few, more = min(FEW, len(shape.layers)), min(max(MORE, len(shape.layers) // 4), len(shape.layers))
    times: dict[int, list[dict[str, float]]] = {few: [], more: []}
    for _ in range(repeats):
        for n, rows in times.items():
            rows.append(_time(shape, settings, n, device))
    found = {n: {name: statistics.median(r[name] for r in rows) for name in rows[0]} for n, rows in times.items()}
    lines = {}
    for name in ("update", "scoring", "internal_update", "internal_scoring", "token"):
        slope = (found[more][name] - found[few][name]) / (more - few) if more > few else 0.0
        slope = max(slope, 0.0)
        lines[name] = Line(found[few][name] - slope * few, slope)
    tokens = settings.batch * (settings.prompt + settings.response)
    again = 4 if settings.checkpointing else 3
    work = 2.0 * tokens * again * sum(shape.matrix[few:more])
    gone = found[more]["update"] - found[few]["update"]
    return Speeds(**lines, optimizer=found[more]["optimizer"], flops=work / gone if gone > 0 else 0.0)


def _time(shape: Shape, settings: Settings, layers: int, device: str) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    from bupo.train.trainer import add_fused_lm_head, trl_utils

    config = cut(shape.config, layers)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=settings.dtype).to(device)
    model.generation_config.eos_token_id = None
    seconds = {"token": _time_token(model, settings, device)}
    add_fused_lm_head(model, temperature=1.0, outputs=("log_probs", "entropy"))
    model = prepare(model, settings).to(device)
    ids = torch.randint(0, shape.vocabulary, (settings.batch, settings.prompt + settings.response), device=device)
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, : settings.prompt] = -100

    def score() -> torch.Tensor:
        low = settings.compute != torch.float32
        with torch.autocast(torch.device(device).type, dtype=settings.compute) if low else nullcontext():
            return model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs

    def update() -> None:
        now = score()
        (now - now.detach()).exp().sum().backward()

    for name, tiles in (("", nullcontext), ("internal_", partial(narrow_tiles, trl_utils, ids.device, ids.numel()))):
        with tiles():
            with torch.no_grad():
                seconds[f"{name}scoring"] = _seconds(score, device)
            seconds[f"{name}update"] = _seconds(update, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.grad is not None], lr=1e-6, fused=True)
    size = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    seconds["optimizer"] = _seconds(lambda: optimizer.step(), device) / size
    return seconds


def _time_token(model: nn.Module, settings: Settings, device: str) -> float:
    """Of one token of every response, where half of the response is there."""
    context = settings.prompt + settings.response // 2
    ids = torch.zeros(settings.rollout, context, dtype=torch.long, device=device)
    low = settings.compute != torch.float32
    spent = []
    for steps in STEPS:

        def generate(steps: int = steps) -> None:
            with torch.autocast(torch.device(device).type, dtype=settings.compute) if low else nullcontext():
                model.generate(  # type: ignore[operator]
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=steps,
                    min_new_tokens=steps, pad_token_id=0,
                )  # fmt: skip

        spent.append(_seconds(generate, device))
    return max(spent[1] - spent[0], 0.0) / (STEPS[1] - STEPS[0])


def _seconds(run: Callable[[], Any], device: str) -> float:
    """Of one run, after one that warms up."""
    spent = 0.0
    for _ in range(2):
        started = time.perf_counter()
        run()
        if device != "cpu":
            torch.accelerator.synchronize()
        spent = time.perf_counter() - started
    return spent
