"""The shape of a recipe's model from its configuration alone: parameters by group, and a model without numbers in it.

Nothing is downloaded but a configuration, and not even that where a copy of it ships or ``--config-from`` names one.
A *fake* model has PyTorch's `FakeTensor` parameters: every operation gives shapes, dtypes and lifetimes, and computes
nothing, so that a model of any size fits into any memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bupo.errors import InputError
from bupo.models.layout import find_layout
from bupo.models.load import resolve_model

CONFIGS = Path(__file__).resolve().parents[1] / "assets" / "configs"


@dataclass(frozen=True)
class Shape:
    """Parameter counts of a causal LM.

    Attributes:
        source: where the configuration came from, for a person.
        config: the configuration.
        embedding, head: parameters of the token embedding and of the unembedding (0 where it is the embedding's).
        layers: parameters of each layer, 1..L.
        rest: the final norm, and whatever else there is.
        matrix: parameters of each layer's matrices that one token meets (of experts, those it is routed to).
        vocabulary, width: V and d.
    """

    name: str
    source: str
    config: Any
    embedding: int
    head: int
    layers: tuple[int, ...]
    rest: int
    matrix: tuple[int, ...]
    vocabulary: int
    width: int

    @property
    def total(self) -> int:
        return self.embedding + self.head + sum(self.layers) + self.rest

    @property
    def attention_width(self) -> int:
        """Query heads times head size: what a score between two positions costs, and what reading a value costs."""
        text = self.config.get_text_config()
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return int(text.num_attention_heads * size)


def read_config(name: str, config_from: str | Path | None = None, *, revision: str | None = None) -> tuple[Any, str]:
    """The configuration of a model and where it came from.

    ``config_from`` is a folder with a config.json, or such a file. Without it: the model's own folder, the copy that
    ships (of the recipes' models), or the hub.

    Raises:
        InputError: none of them has it.
    """
    from transformers import AutoConfig

    shipped = CONFIGS / f"{name.replace('/', '--')}.json"
    if config_from is None and not Path(name).expanduser().exists() and shipped.exists():
        return _from_file(shipped), "the shape that ships with bupo"
    if config_from is not None:
        path = Path(config_from).expanduser()
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"--config-from {config_from}: there is no config.json")
        return _from_file(path), str(path)
    folder = resolve_model(name)
    try:
        config = AutoConfig.from_pretrained(folder, revision=revision)
    except Exception as error:
        raise InputError(
            f"no configuration of {name!r}: no such folder, and the hub has none by this name or cannot be reached; "
            "name a folder or config.json with --config-from"
        ) from error
    return config, "its folder" if Path(folder).is_dir() else "the hub"


def _from_file(path: Path) -> Any:
    from transformers import AutoConfig

    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no configuration of a model: {' '.join(str(error).split())}") from error


def read_shape(config: Any, name: str, source: str) -> Shape:
    """Count the parameters of the model a configuration describes.

    Raises:
        InputError: it is no decoder-only causal LM.
    """
    with fake_model(config) as model:
        layout = find_layout(model)
        embedding = sum(p.numel() for p in model.get_input_embeddings().parameters())
        tied = layout.unembedding.weight is model.get_input_embeddings().weight
        head = 0 if tied else sum(p.numel() for p in layout.unembedding.parameters())
        layers = tuple(sum(p.numel() for p in layer.parameters()) for layer in layout.layers)
        total = sum(p.numel() for p in model.parameters())
        return Shape(
            name=name,
            source=source,
            config=config,
            embedding=embedding,
            head=head,
            layers=layers,
            rest=total - embedding - head - sum(layers),
            matrix=tuple(_met_by_a_token(layer, config) for layer in layout.layers),
            vocabulary=layout.unembedding.weight.shape[0],
            width=layout.unembedding.weight.shape[1],
        )


def _met_by_a_token(layer: Any, config: Any) -> int:
    text = config.get_text_config()
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    used = getattr(text, "num_experts_per_tok", None)
    share = used / experts if experts and used else 1.0
    sizes = (p.numel() * (share if p.ndim == 3 else 1.0) for p in layer.parameters() if p.ndim >= 2)
    return round(sum(sizes))


def cut(config: Any, layers: int) -> Any:
    """The configuration of the same model with fewer layers."""
    smaller = deepcopy(config)
    text = smaller.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[:layers]
    return smaller


@contextmanager
def fake_model(config: Any, dtype: torch.dtype = torch.float32) -> Iterator[Any]:
    """A model without numbers, within the mode in which it can be run."""
    from transformers import AutoModelForCausalLM

    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except ValueError as error:
            raise InputError(f"this is no causal LM: {' '.join(str(error).split())[:200]}") from error
        yield model
