"""Analyses of the model in training: the layer of ``internal_layer: auto``, gradient norms, entropy flows, readings."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor, nn
from transformers import TrainerCallback

from bupo.data.rollouts import read_responses
from bupo.errors import InputError
from bupo.lens import layer_choice
from bupo.lens.analyze import analyze_rollouts
from bupo.lens.batching import check_rollouts
from bupo.models.internal_policy import check_layer
from bupo.models.layout import find_layout, unwrap
from bupo.recipe import Recipe
from bupo.run_folder import write_json, write_text
from bupo.train.advantages import total_rewards
from bupo.train.images import image_inputs
from bupo.train.inside import InsideReadings

# draws an analysis: (analysis, folder, file name without suffix) -> the PNG
Draw = Callable[[Mapping[str, Any], Path, str], Path]
FLOW_RESPONSES, INSIDE_RESPONSES, FLOW_PANEL = 16, 64, "internal/entropy_flow"
KEPT_GROUPS = 4  # of a rollout batch
CHOICE_RESPONSES = 32  # enough for the signs of the FFN entropy change; standard errors enter the rule


class Diagnostics(TrainerCallback):
    """Groups of responses to read, and what a recipe's ``report_to``, ``flow_every`` and ``inside_every`` ask for.

    - ``rollouts/rollout-0001.jsonl``, ...: a row per response, for `KEPT_GROUPS` groups of the first rollout batch, of
      every one before a checkpoint, and of the last; with ``log_completions`` every rollout batch, whole.
    - With trackers, ``grad_norm/*`` by `parameter_groups`: L2 norms before clipping, whose squares add up to that of
      ``grad_norm``. l is the layer of the internal phase, also after it.
    - Every ``flow_every`` rollout batches an analysis of the model on some of its responses, in
      ``flow/rollout-0001.json`` with the figure beside it, which trackers that take images get too.
    - Every ``inside_every`` rollout batches and at the end the metrics of `bupo compare`, always on the same responses.
      ``inside/`` gets ``responses.jsonl``, ``baseline.npy`` (the first reading token by token) and ``after-0000.json``,
      ... by the rollout batches trained on; the log gets the full policy's ``inside/perplexity``, and of layer l
      ``inside/entropy``, ``inside/cosine_top`` (to layer L's states) and ``inside/divergence`` (to the output).

    Readings draw no random number. If the model cannot be read, one line says so, and the run continues without them.
    Raises `InputError` if ``inside_layer`` does not exist or the responses cannot be read.
    """

    def __init__(self, recipe: Recipe, trainer: Any, folder: Path, log: Callable[[str], None], draw: Draw | None):
        self._recipe, self._trainer, self._folder, self._log, self._draw = recipe, trainer, folder, log, draw
        self._main = trainer.accelerator.is_main_process
        self._ended: set[str] = set()  # kinds of readings that failed
        self._responses: Sequence[Any] | None = None
        self._readings = InsideReadings(folder / "inside", self._main)
        layer = recipe.inside_layer or recipe.internal_layer
        self._layer = layer if isinstance(layer, int) else None  # None: the layer of the internal phase, once known
        if recipe.inside_every and self._layer is not None:
            check_layer(find_layout(trainer.model).n_layers, self._layer)
        if recipe.inside_responses is not None:
            tokenizer = trainer.processing_class
            self._responses = read_responses(recipe.inside_responses, tokenizer, recipe.template)[:INSIDE_RESPONSES]
            check_rollouts(trainer.model, self._responses)
        for callback in trainer.callback_handler.callbacks:
            if type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is None:
                callback.logging_dir = str(folder / "tensorboard")

    def __call__(self, batch: Mapping[str, Tensor], rollout: int) -> None:
        """Take the rollout batch with this number, counted from 0."""
        flow_every, inside_every, number = self._recipe.flow_every, self._recipe.inside_every, rollout + 1
        every = self._trainer.args.log_completions
        if every or number in (1, self._recipe.rollouts) or number % self._recipe.save_every == 0:
            self._keep_groups(batch, number, None if every else KEPT_GROUPS * self._recipe.samples_per_prompt)
        if flow_every and rollout % flow_every == 0:
            self._read("entropy flow", self._flow, batch, rollout)
        if inside_every and self._responses is None:
            self._responses = self._first_responses(batch)
        if inside_every and rollout % inside_every == 0:
            reading = self._read("readings inside", self._inside, rollout)
            if reading is not None:
                metrics = self._trainer._metrics["train"]
                metrics["inside/perplexity"] = [reading["perplexity"]["value"]]
                metrics["inside/entropy"] = [reading["entropy"]["mean"][reading["layer"] - 1]]
                metrics["inside/cosine_top"] = [reading["cosine_of_layer"]["mean"][-1]]
                metrics["inside/divergence"] = [reading["divergence"]["mean"][-1]]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and self._recipe.inside_every and self._responses is not None:
            self._read("readings inside", self._inside, self._trainer.rollout)

    def _read(self, kind: str, read: Callable[..., Any], *arguments: Any) -> Any:
        """What ``read`` returns; None once it has failed, which the first time is said."""
        try:
            return None if kind in self._ended else read(*arguments)
        except InputError as error:
            self._ended.add(kind)
            self._log(f"no {kind}: {error}")
            return None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._recipe.report_to:
            return
        trainer = self._trainer
        layer = trainer.phase.layer or next(iter(reversed(trainer.schedule.layers)), None)
        groups = parameter_groups(trainer.accelerator.unwrap_model(trainer.model), layer)
        norms = torch.stack([self._square(parameters) for parameters in groups.values()]).sqrt().tolist()
        total, unclipped = sum(norm**2 for norm in norms) ** 0.5, trainer.unclipped_norm
        scale = 1.0 if unclipped is None or total == 0 else float(unclipped) / total  # clipping has happened by now
        for name, norm in zip(groups, norms, strict=True):
            trainer._metrics["train"][f"grad_norm/{name}"].append(norm * scale)

    def _square(self, parameters: Iterable[Tensor]) -> Tensor:
        accelerator = self._trainer.accelerator
        grads: list[Any] = [p.grad for p in parameters if p.grad is not None]
        local = [g.to_local() if hasattr(g, "to_local") else g for g in grads]
        local = [g for g in local if g.numel()]
        norms = torch.stack(torch._foreach_norm(local)) if local else torch.zeros(1)
        total = norms.float().square().sum().to(accelerator.device)
        return accelerator.reduce(total, reduction="sum") if any(hasattr(g, "to_local") for g in grads) else total

    def _flow(self, batch: Mapping[str, Tensor], rollout: int) -> None:
        responses = spread_responses(batch, FLOW_RESPONSES)
        analysis = analyze_responses(self._trainer.model, responses, self._trainer.accelerator)
        name, folder = f"rollout-{rollout + 1:04d}", self._folder / "flow"
        if self._main:
            write_json(folder / f"{name}.json", {**analysis, "rollout": rollout + 1})
        if self._draw is None or not self._main:
            return
        image = self._draw(analysis, folder, name)
        for callback in self._trainer.callback_handler.callbacks:
            tracker = getattr(callback, "_trackio", getattr(callback, "_wandb", None))
            if tracker is not None:
                tracker.log({FLOW_PANEL: tracker.Image(str(image))})
            elif getattr(callback, "tb_writer", None) is not None:
                pixels, step = np.asarray(Image.open(image).convert("RGB")), self._trainer.state.global_step
                callback.tb_writer.add_image(FLOW_PANEL, pixels, step, dataformats="HWC")

    def _keep_groups(self, batch: Mapping[str, Tensor], number: int, most: int | None) -> None:
        trainer, ids, lengths = self._trainer, batch["completion_ids"], batch["completion_mask"].sum(dim=1)
        pad, masked = trainer.processing_class.pad_token_id, lengths == 0  # by mask_truncated_completions
        last = ids.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
        cut_off = masked | ~torch.isin(last, torch.tensor([*trainer.eos_token_ids, pad], device=ids.device))
        places = torch.arange(1, ids.size(1) + 1, device=ids.device)
        lengths = torch.where(masked, ((ids != pad) * places).amax(dim=1), lengths)  # the padding is behind
        ends = gather_object(list(zip(lengths.tolist(), cut_off.tolist(), strict=True)))
        rewards = total_rewards(trainer.rewards, trainer.reward_weights).tolist()
        columns = [trainer._logs[name] for name in ("prompt", "completion", "advantages")]  # of all processes, too
        columns += [[None if math.isnan(reward) else reward for reward in rewards], *zip(*ends, strict=True)]
        names = ("prompt", "response", "advantage", "reward", "length", "cut_off")
        rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
        about = {"rollout": number, "phase": trainer.phase.name, "layer": trainer.phase.layer}
        if self._main:
            size = self._recipe.samples_per_prompt
            lines = [json.dumps({**about, "group": i // size, **row}) + "\n" for i, row in enumerate(rows[:most])]
            write_text(self._folder / "rollouts" / f"rollout-{number:04d}.jsonl", "".join(lines))

    def _first_responses(self, batch: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """The first process's responses of this rollout batch, or those that a resumed run began with."""
        path = self._folder / "inside" / "responses.jsonl"
        if path.exists():
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        responses = first_process_responses(batch)[:INSIDE_RESPONSES]
        if self._main:
            write_text(path, "".join(json.dumps(response) + "\n" for response in responses))
        self._trainer.accelerator.wait_for_everyone()
        return responses

    def _inside(self, done: int) -> dict[str, Any]:
        """Measure the model as it is after ``done`` rollout batches, on every process; the first writes the result."""
        layers = self._trainer.schedule.layers if self._layer is None else [self._layer]
        if not layers:
            raise InputError("no layer to compare with is known yet; set inside_layer")
        return self._readings.read(self._trainer.model, self._responses or [], layers[-1], done)


def parameter_groups(model: Any, layer: int | None) -> dict[str, list[Tensor]]:
    """Trainable parameters: embedding (also if tied), layers up to and above l (or all), head with the final norm."""
    layers = find_layout(model).layers
    parts = {"layers": layers} if layer is None else {"layers_to_l": layers[:layer], "layers_above_l": layers[layer:]}
    groups = {"embedding": list(unwrap(model).get_input_embeddings().parameters())}
    groups |= {name: [p for module in modules for p in module.parameters()] for name, modules in parts.items()}
    grouped = {id(p) for parameters in groups.values() for p in parameters}
    groups["head"] = [p for p in model.parameters() if id(p) not in grouped]
    return {name: [p for p in parameters if p.requires_grad] for name, parameters in groups.items()}


@dataclass(frozen=True)
class LayerChoice:
    """The boundary layer, or None with a message that lists the candidates; ``analysis`` as in ``analysis.json``."""

    layer: int | None
    message: str
    analysis: dict[str, Any] = field(repr=False, default_factory=dict)


def choose_layer(model: nn.Module, batch: Mapping[str, Tensor], accelerator: Any) -> LayerChoice:
    """Apply the paper's boundary rule to a quick analysis of a rollout batch; all processes get the same answer."""
    responses = spread_responses(batch, CHOICE_RESPONSES)
    try:
        analysis = analyze_responses(model, responses, accelerator)
        layer, reason = analysis["boundary_layer"], analysis["boundary_reason"]
        if layer is not None:
            return LayerChoice(layer, reason, analysis)
        analysis["layer_choice"] = layer_choice.choose_layer(model, check_rollouts(model, responses), analysis)
    except InputError as error:
        return LayerChoice(None, f"internal_layer auto: {error}")
    positive = [str(layer) for layer, value in enumerate(analysis["entropy_change"]["ffn"], start=1) if value > 0]
    return LayerChoice(
        None,
        f"internal_layer auto: {reason}. Candidates: {analysis['layer_choice']['recommendation']['reason']}; layers "
        f"with a positive FFN entropy change: {', '.join(positive) or 'none'}; the paper's choices lie at 1/6 of the "
        f"depth in Qwen3 and just below the last layers in Llama. Set internal_layer to a number up to "
        f"{analysis['layers']}, or internal_steps to 0 for plain GRPO",
        analysis,
    )


def analyze_responses(model: nn.Module, responses: list[dict[str, Any]], accelerator: Any) -> dict[str, Any]:
    """The content of ``analysis.json``; every process must pass the same responses and gets the same result.

    The processes divide the responses, except under DeepSpeed, where a forward pass of a sharded model needs them all.
    """
    share = accelerator.num_processes > 1 and accelerator.distributed_type != "DEEPSPEED"
    return analyze_rollouts(model, responses, share=share)


def first_process_responses(batch: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The first process's responses of a padded batch, on every process; empty ones are left out."""
    rows = []
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    for number, (prompt, shown, response, kept) in enumerate(zip(*(batch[name] for name in names), strict=True)):
        row = {"prompt_ids": prompt[shown.bool()].tolist(), "response_ids": response[kept.bool()].tolist()}
        if all(row.values()):
            images = image_inputs(batch, number)
            rows.append({**row, "image_inputs": images} if images else row)
    return broadcast_object_list([rows], from_process=0)[0]


def spread_responses(batch: Mapping[str, Tensor], n: int) -> list[dict[str, Any]]:
    """At most n of `first_process_responses`, spread evenly over the batch."""
    rows = first_process_responses(batch)
    return [rows[i] for i in spread_rows(len(rows), n)]


def spread_rows(size: int, n: int) -> Tensor:
    """Indices of at most n of ``size`` rows, spread evenly (the responses to one prompt lie next to each other)."""
    return torch.linspace(0, size - 1, min(size, n)).round().long()
