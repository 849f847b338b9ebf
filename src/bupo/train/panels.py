"""What trackers show beside the trainer's own curves: gradient norms by layer group, the entropy flow as a figure.

Trackers (``report_to``) get every metric of ``log.jsonl``; internal entropy and clip fraction are among them as
``internal/entropy`` and ``internal/clip_ratio/*``. This file adds the rest. It draws nothing: the figure comes from a
function that whoever starts the run hands over.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from bupo.errors import ConfigError, InputError
from bupo.lens.analyze import analyze_rollouts
from bupo.models.layout import find_layout, unwrap
from bupo.run_folder import write_json
from bupo.train.auto_layer import unpad

# draws an analysis: (analysis, folder, name without ending) -> the PNG
Draw = Callable[[Mapping[str, Any], Path, str], Path]
FLOW_RESPONSES = 16
FLOW_PANEL = "internal/entropy_flow"


def check_trackers(names: Iterable[str]) -> None:
    """Raise `ConfigError` for trackers whose package is not here, before a run starts."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            [
                f"report_to {name}: the package is not installed (pip install {name}, or leave it out)"
                for name in missing
            ]
        )


class GradientGroups(TrainerCallback):
    """Logs ``grad_norm/embedding``, ``/layers_to_l``, ``/layers_above_l`` and ``/head`` (with the final norm).

    L2 norms before clipping, so that their squares add up to that of ``grad_norm``; a tied unembedding counts as
    embedding. l is the layer of the internal phase, also after it, so that the curves go on; without one there is
    ``/layers`` alone. A group without gradients (above l in an internal phase) is 0.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        norms = self.norms()
        total = sum(norm**2 for norm in norms.values()) ** 0.5
        before = self._trainer.unclipped_norm
        scale = 1.0 if before is None or total == 0 else float(before) / total  # clipping has happened by now
        for name, norm in norms.items():
            self._trainer._metrics["train"][f"grad_norm/{name}"].append(norm * scale)

    def norms(self) -> dict[str, float]:
        """The norms of the gradients as they are."""
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        groups = parameter_groups(model, self._layer())
        squares = torch.stack([self._square(parameters) for parameters in groups.values()])
        return dict(zip(groups, squares.sqrt().tolist(), strict=True))

    def _layer(self) -> int | None:
        schedule = self._trainer.schedule
        done = max(self._trainer._step - 1, 0)  # the micro-batch that this update ends with
        stage = schedule.at(done // self._trainer.args.generate_every)
        layers = [layer for layer in schedule.layers if isinstance(layer, int)]
        return stage.layer if isinstance(stage.layer, int) else layers[-1] if layers else None

    def _square(self, parameters: Iterable[Tensor]) -> Tensor:
        accelerator = self._trainer.accelerator
        grads = [p.grad for p in parameters if p.grad is not None]
        total = torch.zeros((), device=accelerator.device)
        sharded = any(hasattr(g, "to_local") for g in grads)
        local = [g.to_local() if hasattr(g, "to_local") else g for g in grads]
        local = [g for g in local if g.numel()]
        if local:
            total = total + torch.stack(torch._foreach_norm(local)).float().square().sum().to(total.device)
        return accelerator.reduce(total, reduction="sum") if sharded else total


def parameter_groups(model: Any, layer: int | None) -> dict[str, list[Tensor]]:
    """Trainable parameters by group: embedding, layers up to and above l (or all), head with the final norm."""
    layout = find_layout(model)
    embedding = list(unwrap(model).get_input_embeddings().parameters())
    known = {id(p) for p in embedding}
    cut = layout.n_layers if layer is None else layer
    groups = {
        "embedding": embedding,
        "layers" if layer is None else "layers_to_l": [p for m in layout.layers[:cut] for p in m.parameters()],
    }
    if layer is not None:
        groups["layers_above_l"] = [p for m in layout.layers[cut:] for p in m.parameters()]
    known |= {id(p) for parameters in groups.values() for p in parameters}
    groups["head"] = [p for p in model.parameters() if id(p) not in known]
    return {name: [p for p in found if p.requires_grad] for name, found in groups.items()}


class EntropyFlow:
    """Every so many rollout batches (the first included): analyse the model on its own responses, save, draw, show.

    Called by the trainer with each rollout batch, before its updates. Writes ``flow/rollout-0001.json`` (an analysis,
    see `bupo.lens.analyze`) and, given ``draw``, the figure beside it; trackers that take images get it as
    ``internal/entropy_flow``. A model that cannot be analysed costs one line and ends the figures, not the run.
    """

    def __init__(self, trainer: Any, folder: Path, every: int, say: Callable[[str], None], draw: Draw | None = None):
        self._trainer, self._folder, self._every, self._say, self._draw = trainer, folder, every, say, draw
        self._broken = False

    def __call__(self, batch: Mapping[str, Tensor], rollout: int) -> None:
        """Args: the rollout batch, and its number from 0."""
        if rollout % self._every or self._broken:
            return
        rollouts = unpad(batch)
        rows = torch.linspace(0, len(rollouts) - 1, min(FLOW_RESPONSES, len(rollouts))).round().long().tolist()
        try:
            with torch.no_grad():  # on every process: a sharded model needs them all
                analysis = analyze_rollouts(self._trainer.model, [rollouts[i] for i in rows])
        except InputError as error:
            self._broken = True
            self._say(f"no entropy flow: {error}")
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
                import numpy
                from PIL import Image

                pixels = numpy.asarray(Image.open(image).convert("RGB"))
                callback.tb_writer.add_image(FLOW_PANEL, pixels, step, dataformats="HWC")
            elif kind == "TrackioCallback":
                callback._trackio.log({FLOW_PANEL: callback._trackio.Image(str(image))})
            elif kind == "WandbCallback":
                callback._wandb.log({FLOW_PANEL: callback._wandb.Image(str(image))})


def add_panels(
    trainer: Any, folder: Path, *, trackers: bool, flow_every: int, say: Callable[[str], None], draw: Draw | None
) -> None:
    """Attach to a trainer what its recipe asks for."""
    if trackers:
        trainer.add_callback(GradientGroups(trainer))
    if flow_every:
        trainer.on_rollout.append(EntropyFlow(trainer, folder / "flow", flow_every, say, draw))
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is None:
            callback.logging_dir = str(folder / "tensorboard")
