"""The images in the prompts of a rollout batch: what a forward pass needs of them, and the part of some responses."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from trl import GRPOTrainer
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

_TEXT = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")
# all that TRL's scores take; the batch has these names for the inputs of a vision-language model only
_SCORED_WITH = tuple(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
_COUNTS = ("num_images", "num_tiles")  # of each response, by which TRL divides pixels; no model takes them
_BY_TOKEN = ("token_type_ids", "mm_token_type_ids")  # which tokens stand for images; the other fields are of images


def image_fields(batch: Mapping[str, Any], *, counts: bool = True) -> dict[str, Any]:
    """What a model with images is called with besides token ids and mask, with TRL's ``counts`` or without."""
    return {name: batch[name] for name in _SCORED_WITH if name in batch and (counts or name not in _COUNTS)}


def choose_rows(batch: Mapping[str, Any], rows: Iterable[int]) -> dict[str, Any]:
    """These responses of a rollout batch, as far as scoring needs them; an image is several rows of pixels."""
    rows, fields = list(rows), {name: batch[name] for name in _TEXT if name in batch}
    if "num_images" in batch and any(batch["num_images"][row] for row in rows):
        fields = split_pixel_values_by_grid(fields | image_fields(batch))
    return unsplit_pixel_values_by_grid({
        name: part[rows] if isinstance(part, Tensor) else [part[row] for row in rows] for name, part in fields.items()
    })  # fmt: skip


def image_inputs(batch: Mapping[str, Any], row: int) -> dict[str, Tensor]:
    """What a model is called with besides for this response without its padding and last token, on the CPU."""
    one = choose_rows(batch, [row])
    kept = torch.cat([one["prompt_mask"], one["completion_mask"]], dim=1)[0].bool()
    fields = image_fields(one, counts=False)
    by_token = {name: fields[name][:, kept][:, :-1] for name in _BY_TOKEN if name in fields}
    return {name: value.cpu() for name, value in {**fields, **by_token}.items()}


def prompt_with_images(row: Mapping[str, Any]) -> Any:
    """The prompt of a dataset's row, with the row's images in it as TRL puts them there."""
    images = row.get("images") or [image for image in [row.get("image")] if image is not None]
    return prepare_multimodal_messages(row["prompt"], images=images) if images else row["prompt"]


def inputs_of_prompt(processed: Mapping[str, Any], response: int) -> dict[str, Tensor]:
    """The same as `image_inputs`, from what the processor made of one prompt, for a response of so many tokens."""
    if "pixel_values" not in processed:
        return {}
    fields = {name: torch.as_tensor(np.asarray(value)) for name, value in processed.items()}
    grown = {name: functional.pad(fields[name], (0, response - 1)) for name in _BY_TOKEN if name in fields}
    return {**fields, **grown}
