"""What training does inside, measured while it goes on: the readings of `bupo compare` every so many rollout batches.

The same responses are read each time: a file's, or those of the run's first rollout batch, which the starting model
made. Written to ``inside/``: ``responses.jsonl`` (they), ``baseline.npy`` (the first reading, token by token, so that a
resumed run pairs with it) and ``after-0000.json``, ... by the number of rollout batches trained on (0: the start).
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
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import TrainerCallback

from bupo.data.rollouts import read_responses
from bupo.errors import InputError
from bupo.lens.batching import TokenPair, check_rollouts
from bupo.lens.compare import Reading, compare, read_inside
from bupo.models.internal_policy import check_layer, n_layers
from bupo.recipe import Recipe
from bupo.run_folder import write_bytes, write_json, write_text
from bupo.train.auto_layer import TokenRollout, unpad

RESPONSES, TOKENS = 64, 512
FOLDER = "inside"


def inside_readings(
    recipe: Recipe, trainer: Any, tokenizer: Any, folder: Path, say: Callable[[str], None]
) -> InsideReadings:
    """The readings that a recipe with ``inside_every`` asks for.

    Raises:
        InputError: no such layer, or responses that cannot be read.
    """
    asked = recipe.inside_layer if recipe.inside_layer is not None else recipe.internal_layer
    layer = asked if isinstance(asked, int) else None
    if layer is not None:
        check_layer(n_layers(trainer.model), layer)
    given = None
    if recipe.inside_responses is not None:
        given = read_responses(recipe.inside_responses, tokenizer, recipe.template)[:RESPONSES]
        check_rollouts(trainer.model, given)
    return InsideReadings(trainer, folder / FOLDER, recipe.inside_every, say, layer=layer, given=given)


class InsideReadings(TrainerCallback):
    """Called by the trainer with each rollout batch, before its updates; as a callback it reads once more at the end.

    Metrics (for trackers and ``log.jsonl``): ``inside/perplexity`` of the full policy, ``inside/entropy`` of layer l's,
    ``inside/cosine_top`` (layer l's states to layer L's) and ``inside/divergence`` (layer l's policy to the output).
    Draws no random number and leaves the model as it was. A model that cannot be read costs one line and ends the
    readings, not the run.

    Args:
        layer: l, from 1; None: the layer of the internal phase, once it is known.
        given: responses to read instead of the first rollout batch's.
    """

    def __init__(
        self,
        trainer: Any,
        folder: Path,
        every: int,
        say: Callable[[str], None],
        *,
        layer: int | None = None,
        given: Sequence[TokenPair] | None = None,
    ):
        self._trainer, self._folder, self._every, self._say = trainer, folder, every, say
        self._layer, self._rollouts = layer, given
        self._baseline: Reading | None = None
        self._broken = False

    def __call__(self, batch: Mapping[str, Tensor], rollout: int) -> None:
        """Args: the rollout batch, and its number from 0."""
        if self._rollouts is None:
            self._rollouts = self._first_responses(batch)
        if rollout % self._every or self._broken:
            return
        found = self._read(rollout)
        if found is None:
            return
        metrics, layer = self._trainer._metrics["train"], found["layer"]
        metrics["inside/perplexity"] = [found["perplexity"]["value"]]
        metrics["inside/entropy"] = [found["entropy"]["mean"][layer - 1]]
        metrics["inside/cosine_top"] = [found["cosine_of_layer"]["mean"][-1]]
        metrics["inside/divergence"] = [found["divergence"]["mean"][-1]]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and self._rollouts is not None and not self._broken:
            self._read(self._trainer._step // self._trainer.args.generate_every)

    def _first_responses(self, batch: Mapping[str, Tensor]) -> list[TokenPair]:
        """Of this rollout batch's first process, or those that a run which is resumed began with."""
        path = self._folder / "responses.jsonl"
        if path.exists():
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            return [TokenRollout(row["prompt_ids"], row["response_ids"]) for row in rows]
        found: list[Any] = [unpad(batch)[:RESPONSES]]
        broadcast_object_list(found, from_process=0)
        if self._trainer.accelerator.is_main_process:
            rows = [{"prompt_ids": r.prompt_ids, "response_ids": r.response_ids} for r in found[0]]
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._trainer.accelerator.wait_for_everyone()
        return found[0]

    def _read(self, done: int) -> dict[str, Any] | None:
        """Read the model as it is after ``done`` rollout batches; every process does, the first writes."""
        assert self._rollouts is not None
        layer = self._layer if self._layer is not None else self._layer_of_schedule()
        try:
            if layer is None:
                raise InputError("no layer to compare with is known yet; set inside_layer")
            reading = read_inside(self._trainer.model, self._rollouts, layer, tokens=TOKENS)
        except InputError as error:
            self._broken = True
            self._say(f"no readings inside: {error}")
            return None
        reading = replace(reading, values=reading.values.float().double())  # as it comes back from the file
        base = self._first(reading, main=self._trainer.accelerator.is_main_process)
        joined = compare([("start", base), ("now", reading)], self._rollouts, tokens=TOKENS)
        item = joined["models"][1]
        found = {
            "schema": 1,
            "kind": "inside",
            "rollouts_done": done,
            **{name: joined[name] for name in ("layer", "layers", "tokens", "samples", "standard_error_method")},
            **{k: v for k, v in item.items() if k not in ("name", "cosine")},
        }
        found["change"] = {k: v for k, v in item["change"].items() if k != "cosine"}
        if self._trainer.accelerator.is_main_process:
            write_json(self._folder / f"after-{done:04d}.json", found)
        return found

    def _first(self, reading: Reading, *, main: bool) -> Reading:
        """The baseline: the first reading of the run, also of the part before it was resumed."""
        if self._baseline is None:
            path = self._folder / "baseline.npy"
            if path.exists():
                values = torch.from_numpy(np.load(path, allow_pickle=False)).double()
                self._baseline = replace(reading, values=values)
            else:
                self._baseline = reading
                if main:
                    stream = io.BytesIO()
                    np.save(stream, reading.values.float().numpy(), allow_pickle=False)
                    write_bytes(path, stream.getvalue())
        return self._baseline

    def _layer_of_schedule(self) -> int | None:
        layers = [layer for layer in self._trainer.schedule.layers if isinstance(layer, int)]
        return layers[-1] if layers else None
