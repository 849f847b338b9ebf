"""What trackers show beside TRL's own curves: gradient norms by layer group, and the entropy flow as a figure.

Trackers (``report_to``) get every metric of ``log.jsonl``. Figures are drawn by a function that the caller passes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback

from bupo.errors import ConfigError, InputError
from bupo.models.layout import find_layout, unwrap
from bupo.run_folder import write_json
from bupo.train.auto_layer import analyze_responses, spread_responses

# draws an analysis: (analysis, folder, file name without suffix) -> the PNG
Draw = Callable[[Mapping[str, Any], Path, str], Path]
FLOW_RESPONSES = 16
FLOW_PANEL = "internal/entropy_flow"


def check_trackers(names: Iterable[str]) -> None:
    """Raise `ConfigError` if the package of a tracker is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            [
                f"report_to {name}: the package is not installed (pip install {name}, or leave it out)"
                for name in missing
            ]
        )


class GradientNorms(TrainerCallback):
    """Logs ``grad_norm/embedding``, ``/layers_to_l``, ``/layers_above_l`` and ``/head`` (with the final norm).

    They are L2 norms before clipping, so their squares add up to that of ``grad_norm``. A tied unembedding counts as
    embedding. l is the layer of the internal phase, also after it; a run without one logs ``/layers`` instead. A group
    without gradients (the layers above l in an internal phase) has norm 0.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        layer = trainer.phase.layer or next(iter(reversed(trainer.schedule.layers)), None)
        groups = parameter_groups(trainer.accelerator.unwrap_model(trainer.model), layer)
        squares = torch.stack([self._square(parameters) for parameters in groups.values()])
        norms = squares.sqrt().tolist()
        total = sum(norm**2 for norm in norms) ** 0.5
        unclipped = trainer.unclipped_norm
        scale = 1.0 if unclipped is None or total == 0 else float(unclipped) / total  # clipping has happened by now
        for name, norm in zip(groups, norms, strict=True):
            trainer._metrics["train"][f"grad_norm/{name}"].append(norm * scale)

    def _square(self, parameters: Iterable[Tensor]) -> Tensor:
        """The squared norm of the gradients, over all shards."""
        accelerator = self._trainer.accelerator
        grads = [p.grad for p in parameters if p.grad is not None]
        local = [g.to_local() if hasattr(g, "to_local") else g for g in grads]
        local = [g for g in local if g.numel()]
        total = torch.zeros((), device=accelerator.device)
        if local:
            total = total + torch.stack(torch._foreach_norm(local)).float().square().sum().to(total.device)
        return accelerator.reduce(total, reduction="sum") if any(hasattr(g, "to_local") for g in grads) else total


def parameter_groups(model: Any, layer: int | None) -> dict[str, list[Tensor]]:
    """Trainable parameters by group: embedding, layers up to and above l (or all layers), head with the final norm."""
    layout = find_layout(model)
    embedding = list(unwrap(model).get_input_embeddings().parameters())
    lower = [p for m in layout.layers[:layer] for p in m.parameters()]
    groups = {"embedding": embedding, "layers" if layer is None else "layers_to_l": lower}
    if layer is not None:
        groups["layers_above_l"] = [p for m in layout.layers[layer:] for p in m.parameters()]
    grouped = {id(p) for parameters in groups.values() for p in parameters}
    groups["head"] = [p for p in model.parameters() if id(p) not in grouped]
    return {name: [p for p in parameters if p.requires_grad] for name, parameters in groups.items()}


class EntropyFlow:
    """Analyses the model every N rollout batches, starting with the first, and saves and plots the result.

    The trainer calls it with each rollout batch, before its updates. It writes ``flow/rollout-0001.json`` (an analysis)
    and the figure beside it, which trackers that take images get as ``internal/entropy_flow``. If the model cannot be
    analysed, one line says so and the figures end; the run continues.
    """

    def __init__(self, trainer: Any, folder: Path, every: int, log: Callable[[str], None], draw: Draw | None = None):
        self._trainer, self._folder, self._every, self._log, self._draw = trainer, folder, every, log, draw
        self._broken = False

    def __call__(self, batch: Mapping[str, Tensor], rollout: int) -> None:
        """Take the rollout batch with this number, counted from 0."""
        if rollout % self._every or self._broken:
            return
        try:
            responses = spread_responses(batch, FLOW_RESPONSES)
            analysis = analyze_responses(self._trainer.model, responses, self._trainer.accelerator)
        except InputError as error:
            self._broken = True
            self._log(f"no entropy flow: {error}")
            return
        if not self._trainer.accelerator.is_main_process:
            return
        name = f"rollout-{rollout + 1:04d}"
        write_json(self._folder / f"{name}.json", {**analysis, "rollout": rollout + 1})
        if self._draw is not None:
            self._show(self._draw(analysis, self._folder, name))

    def _show(self, image: Path) -> None:
        step = self._trainer.state.global_step
        for callback in self._trainer.callback_handler.callbacks:
            kind = type(callback).__name__
            if kind == "TensorBoardCallback" and callback.tb_writer is not None:
                pixels = np.asarray(Image.open(image).convert("RGB"))
                callback.tb_writer.add_image(FLOW_PANEL, pixels, step, dataformats="HWC")
            elif kind == "TrackioCallback":
                callback._trackio.log({FLOW_PANEL: callback._trackio.Image(str(image))})
            elif kind == "WandbCallback":
                callback._wandb.log({FLOW_PANEL: callback._wandb.Image(str(image))})


def add_diagnostics(
    trainer: Any, folder: Path, *, trackers: bool, flow_every: int, log: Callable[[str], None], draw: Draw | None
) -> None:
    """Attach what a recipe's ``report_to`` and ``flow_every`` ask for."""
    if trackers:
        trainer.add_callback(GradientNorms(trainer))
    if flow_every:
        trainer.on_rollout.append(EntropyFlow(trainer, folder / "flow", flow_every, log, draw))
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is None:
            callback.logging_dir = str(folder / "tensorboard")
