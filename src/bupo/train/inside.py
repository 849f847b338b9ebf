"""What training does inside a model: the metrics of `bupo compare` against the first reading, as files."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bupo.errors import InputError
from bupo.lens.compare import LayerMeasurements, compare_models, measure_layers
from bupo.run_folder import write_bytes, write_json


@dataclass
class InsideReadings:
    """Writes ``baseline.npy`` (the first reading token by token) and ``after-0000.json``, ... by what was trained on.

    With ``drift``, ``states.npy`` (unit vectors in float16) too, and every reading has the drift of each layer. All
    processes read; the ``main`` one writes.
    """

    folder: Path
    main: bool
    done: str = "rollouts_done"  # the key that says how much has been trained on
    tokens: int = 512
    drift: bool = False
    continued: bool = True  # take up the baseline that the part of the run before a resume left
    _baseline: LayerMeasurements | None = field(default=None, init=False)

    def read(self, model: nn.Module, responses: Sequence[Any], layer: int, done: int) -> dict[str, Any]:
        """Measure the model as it is now; the content of ``after-*.json``."""
        now = measure_layers(model, responses, layer, tokens=self.tokens, keep_states=self.drift)
        now = replace(now, values=now.values.float().double())  # as it comes back from the file
        if self._baseline is None:
            self._baseline = self._restored(now) if self.continued else now
            self._save(self._baseline)
        joined = compare_models([("start", self._baseline), ("now", now)])
        item = joined["models"][1]
        del item["name"], item["cosine"], item["change"]["cosine"]
        result: dict[str, Any] = {"schema": 1, "kind": "inside", self.done: done}
        result |= {name: joined[name] for name in ("layer", "layers", "tokens", "samples", "standard_error_method")}
        result |= item
        if self.main:
            write_json(self.folder / f"after-{done:04d}.json", result)
        return result

    def _restored(self, now: LayerMeasurements) -> LayerMeasurements:
        """The baseline on file, or this first reading if there is none."""
        arrays = self._arrays(now)
        if not all((self.folder / name).exists() for name in arrays):
            return now
        found = {name: torch.from_numpy(np.load(self.folder / name, allow_pickle=False)) for name in arrays}
        if any(found[name].shape != values.shape for name, values in arrays.items()):
            raise InputError(f"{self.folder} holds readings of other responses, tokens or layers; name another folder")
        return replace(now, values=found["baseline.npy"].double(), states=found.get("states.npy"))

    def _save(self, baseline: LayerMeasurements) -> None:
        for name, values in self._arrays(baseline).items() if self.main else ():
            np.save(stream := io.BytesIO(), values.numpy(), allow_pickle=False)
            write_bytes(self.folder / name, stream.getvalue())

    def _arrays(self, measured: LayerMeasurements) -> dict[str, torch.Tensor]:
        arrays = {"baseline.npy": measured.values.float()}
        return arrays if measured.states is None else {**arrays, "states.npy": measured.states}
