"""Readings of every layer while transformers' ``Trainer``, or a trainer of TRL, trains a model."""

import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from bupo.data.rollouts import read_responses
from bupo.errors import InputError
from bupo.lens.analyze import AnalysisOptions, analyze_rollouts
from bupo.lens.batching import check_rollouts
from bupo.lens.maps import Lens, named_lens
from bupo.models.internal_policy import check_layer
from bupo.models.layout import find_layout
from bupo.run_folder import RUN_FILE, describe_run, write_json
from bupo.train.inside import InsideReadings

RESPONSES = 64  # at most so many are read


class LayerReadings(TrainerCallback):
    """Reads every layer on the same responses before the first update, every so many updates, and after the last.

    The trainer logs, for each layer: the entropy of its policy (``layer_entropy/01`` and so on), how the FFN changes
    the entropy (``layer_ffn_entropy_change``), its agreement with the output through the lens (``layer_kl`` in nats
    and ``layer_top1``, a share of tokens), and the drift of its states since the start (``layer_drift``, 1 - cosine).

    `bupo report` draws the folder: ``analysis.json`` is the analysis of the latest reading, ``analysis/`` has all of
    them, and ``inside/`` the metrics of `bupo compare` against the start. Readings draw no random number and change no
    weight. If the model cannot be read later in training, a warning says so, and training continues without them.

    Args:
        responses: a responses file, or what `bupo.analyze_rollouts` takes; the first 64 are read.
        every: number of updates between two readings.
        lens: ``norm``, ``raw``, ``ridge`` (fitted at every reading on half of the responses), a folder, or a `Lens`.
        layer: the layer whose cosines and divergences are followed (default: the middle one).
        tokens: number of response tokens that are read.
        folder: where the files go (default: ``layer_readings`` in the trainer's ``output_dir``). What an earlier run
            read there from the first update of this one on is removed.

    Raises:
        InputError: at the start of training, if the model, the responses, the lens or the layer cannot be used.
    """

    def __init__(
        self,
        responses: str | Path | Sequence[Any],
        every: int = 50,
        lens: str | Lens = "norm",
        *,
        layer: int | None = None,
        tokens: int = 256,
        folder: str | Path | None = None,
    ):
        for name, value in (("every", every), ("tokens", tokens)):
            if type(value) is not int or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1, not {value!r}")
        self._given, self._every, self._lens, self._layer, self._tokens = responses, every, lens, layer, tokens
        self._folder = None if folder is None else Path(folder)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **_: Any
    ) -> None:
        if is_deepspeed_zero3_enabled():
            raise InputError("layers cannot be read under DeepSpeed ZeRO-3; use ZeRO-2, FSDP2 or DDP")
        given, layers = self._given, find_layout(model).n_layers
        responses = read_responses(given, processing_class) if isinstance(given, str | Path) else list(given)
        self._responses = check_rollouts(model, responses[:RESPONSES])
        self._at = (layers + 1) // 2 if self._layer is None else self._layer
        check_layer(layers, self._at)
        lens = self._lens if self._lens == "ridge" else named_lens(self._lens).check(model)
        self._options = AnalysisOptions(layer_choice=True, choice_tokens=self._tokens, lenses=[lens])
        self._main, self._ended = state.is_world_process_zero, False
        self._to = self._folder or Path(args.output_dir, "layer_readings")
        if self._main:
            for old in self._to.glob("*/after-*.json"):
                if int(old.stem.removeprefix("after-")) >= state.global_step:
                    old.unlink()
        self._inside = InsideReadings(
            self._to / "inside", self._main, "updates_done", self._tokens, drift=True, continued=state.global_step > 0
        )
        self._read(state, control, model)
        config = {"every": self._every, "lens": getattr(lens, "kind", lens), "layer": self._at, "tokens": self._tokens}
        record = describe_run("callbacks.LayerReadings", {**config, "seed": args.seed})
        del record["argv"]  # of the user's own script
        if self._main:
            write_json(self._to / RUN_FILE, record)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        due = state.global_step % self._every == 0 or state.global_step >= state.max_steps
        if not self._ended and (due or control.should_training_stop):
            try:
                self._read(state, control, model)
            except InputError as error:
                self._ended = True
                warnings.warn(f"no more layer readings after update {state.global_step}: {error}", stacklevel=2)

    def _read(self, state: Any, control: Any, model: Any) -> None:
        analysis = analyze_rollouts(model, self._responses, max_tokens=self._tokens, options=self._options)
        inside = self._inside.read(model, self._responses, self._at, state.global_step)
        if self._main:
            for name in (f"analysis/after-{state.global_step:04d}.json", "analysis.json"):
                write_json(self._to / name, {**analysis, "updates": state.global_step})
        (curves,) = analysis["layer_choice"]["curves"].values()
        columns = {"entropy": analysis["sites"]["layer_out"], "ffn_entropy_change": analysis["entropy_change"]["ffn"]}
        columns |= {"kl": curves["kl"], "top1": curves["top1"], "drift": inside["drift"]["mean"]}
        logs = {f"layer_{name}/{n:02d}": v for name, values in columns.items() for n, v in enumerate(values, start=1)}
        should_log = control.should_log
        # not TRL's own `log`, which would empty the means that it gathers for its next row
        Trainer.log(_calling_trainer(), logs)
        control.should_log = should_log  # the row of this update is still to come


def _calling_trainer() -> Trainer:
    """The trainer that called a callback: events do not name it, and trackers come before the callbacks of a user."""
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), Trainer):
        frame = frame.f_back
    assert frame is not None, "a TrainerCallback is called by a Trainer"
    return frame.f_locals["self"]
