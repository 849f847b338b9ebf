"""Logs the metrics of `bupo compare` every N rollout batches during training.

The same responses are read each time: those of a file, or those of the run's first rollout batch, which the starting
model sampled. The folder ``inside/`` gets ``responses.jsonl``, ``baseline.npy`` (the first reading, token by token, so
that a resumed run is paired with it) and ``after-0000.json``, ... by the number of rollout batches trained on.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from bupo.data.rollouts import read_responses
from bupo.errors import InputError
from bupo.lens.batching import check_rollouts
from bupo.lens.compare import LayerMeasurements, compare_models, measure_layers
from bupo.models.internal_policy import check_layer
from bupo.models.layout import find_layout
from bupo.recipe import Recipe
from bupo.run_folder import write_bytes, write_json, write_text
from bupo.train.auto_layer import first_process_responses

RESPONSES, TOKENS = 64, 512
FOLDER = "inside"


class LayerDrift(TrainerCallback):
    """Called by the trainer with each rollout batch, before its updates; as a callback it measures again at the end.

    Metrics: ``inside/perplexity`` of the full policy, ``inside/entropy`` of layer l's policy, ``inside/cosine_top``
    (layer l's states to layer L's) and ``inside/divergence`` (KL of layer l's policy to the output). It draws no random
    number and leaves the model unchanged. If the model cannot be read, one line says so and the readings end; the run
    continues.

    Raises:
        InputError: the layer does not exist, or the responses cannot be read.
    """

    def __init__(self, recipe: Recipe, trainer: Any, tokenizer: Any, folder: Path, log: Callable[[str], None]):
        self._trainer, self._folder, self._every, self._log = trainer, folder / FOLDER, recipe.inside_every, log
        layer = recipe.inside_layer if recipe.inside_layer is not None else recipe.internal_layer
        self._layer = layer if isinstance(layer, int) else None  # None: the layer of the internal phase, once known
        if self._layer is not None:
            check_layer(find_layout(trainer.model).n_layers, self._layer)
        self._responses: Sequence[Any] | None = None
        if recipe.inside_responses is not None:
            self._responses = read_responses(recipe.inside_responses, tokenizer, recipe.template)[:RESPONSES]
            check_rollouts(trainer.model, self._responses)
        self._baseline: LayerMeasurements | None = None
        self._broken = False

    def __call__(self, batch: Mapping[str, Tensor], rollout: int) -> None:
        """Take the rollout batch with this number, counted from 0."""
        if self._responses is None:
            self._responses = self._first_responses(batch)
        if rollout % self._every or self._broken:
            return
        reading = self._measure(rollout)
        if reading is None:
            return
        metrics, layer = self._trainer._metrics["train"], reading["layer"]
        metrics["inside/perplexity"] = [reading["perplexity"]["value"]]
        metrics["inside/entropy"] = [reading["entropy"]["mean"][layer - 1]]
        metrics["inside/cosine_top"] = [reading["cosine_of_layer"]["mean"][-1]]
        metrics["inside/divergence"] = [reading["divergence"]["mean"][-1]]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and self._responses is not None and not self._broken:
            self._measure(self._trainer.rollout)

    def _first_responses(self, batch: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """The first process's responses of this rollout batch, or those that a resumed run began with."""
        path = self._folder / "responses.jsonl"
        if path.exists():
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        responses = first_process_responses(batch)[:RESPONSES]
        if self._trainer.accelerator.is_main_process:
            write_text(path, "".join(json.dumps(response) + "\n" for response in responses))
        self._trainer.accelerator.wait_for_everyone()
        return responses

    def _measure(self, done: int) -> dict[str, Any] | None:
        """Read the model as it is after ``done`` rollout batches, on every process; the first one writes the result."""
        assert self._responses is not None
        layers = [self._layer] if self._layer is not None else list(self._trainer.schedule.layers)
        try:
            if not layers:
                raise InputError("no layer to compare with is known yet; set inside_layer")
            reading = measure_layers(self._trainer.model, self._responses, layers[-1], tokens=TOKENS)
        except InputError as error:
            self._broken = True
            self._log(f"no readings inside: {error}")
            return None
        reading = replace(reading, values=reading.values.float().double())  # as it comes back from the file
        base = self._first(reading)
        joined = compare_models([("start", base), ("now", reading)])
        item = joined["models"][1]
        shared = ("layer", "layers", "tokens", "samples", "standard_error_method")
        result = {
            "schema": 1,
            "kind": "inside",
            "rollouts_done": done,
            **{name: joined[name] for name in shared},
            **{k: v for k, v in item.items() if k not in ("name", "cosine")},
            "change": {k: v for k, v in item["change"].items() if k != "cosine"},
        }
        if self._trainer.accelerator.is_main_process:
            write_json(self._folder / f"after-{done:04d}.json", result)
        return result

    def _first(self, reading: LayerMeasurements) -> LayerMeasurements:
        """The first reading of the run, including the part before a resume."""
        if self._baseline is None:
            path = self._folder / "baseline.npy"
            if path.exists():
                values = torch.from_numpy(np.load(path, allow_pickle=False)).double()
                self._baseline = replace(reading, values=values)
                return self._baseline
            self._baseline = reading
            if self._trainer.accelerator.is_main_process:
                stream = io.BytesIO()
                np.save(stream, reading.values.float().numpy(), allow_pickle=False)
                write_bytes(path, stream.getvalue())
        return self._baseline
