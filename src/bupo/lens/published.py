"""Reads lenses that others published: Jacobian lenses (one ``.pt`` file) and tuned lenses (arXiv 2303.08112)."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from bupo.errors import InputError
from bupo.lens.maps import Lens

_SPACES = "spaces/"


def load_published(source: str) -> Lens:
    """Load a published lens; a folder that `Lens.save` wrote is loaded, too.

    Args:
        source: a file or folder, or ``OWNER/REPOSITORY/PATH`` on the Hugging Face hub (``spaces/`` in front for a
            space). A Jacobian lens is a ``.pt`` file with one matrix per layer under ``J`` and is read as
            ``LN(J H) E_u^T``; a tuned lens is a folder with ``params.pt`` and ``config.json`` and is read as
            ``LN(H + A H + b) E_u^T``. Their layers are counted from 0: ``J[0]`` is the first block's output, translator
            0 is the embedding's.

    Raises:
        InputError: there is no such file, or it holds no lens.
    """
    if (folder := Path(source).expanduser()).is_dir() and not (folder / "params.pt").is_file():
        return Lens.load(folder)
    tuned = source.removesuffix("/params.pt") if not source.endswith(".pt") or source.endswith("/params.pt") else None
    try:
        if tuned is None:
            lens = _jacobian(_load(source))
        else:
            config = json.loads(_fetch(f"{tuned}/config.json").read_text(encoding="utf-8"))
            lens = _tuned(_load(f"{tuned}/params.pt"), config)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise InputError(f"{source} holds no published lens: {' '.join(str(error).split())[:200]}") from error
    lens.card["source"] = source
    return lens.complete()


def _load(source: str) -> dict[Any, Any]:
    return torch.load(_fetch(source), map_location="cpu", weights_only=True)


def _fetch(source: str) -> Path:
    """The local file of this name, or else the file on the hub."""
    if (path := Path(source).expanduser()).is_file():
        return path
    owner, _, rest = source.removeprefix(_SPACES).partition("/")
    repository, _, name = rest.partition("/")
    if not name or source.startswith(("/", ".", "~")):
        raise InputError(f"lens {source} does not exist; name a file, a folder or OWNER/REPOSITORY/PATH on the hub")
    kind = "space" if source.startswith(_SPACES) else "model"
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", name, repo_type=kind))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"lens {source} is no local file and cannot be read from the hub: {reason}") from error


def _jacobian(content: dict[str, Any]) -> Lens:
    maps = _stacked({int(layer): matrix for layer, matrix in content["J"].items()}, first=0)
    return Lens("jacobian", maps, torch.zeros(maps.shape[:2]), {"prompts": int(content["n_prompts"])})


def _tuned(content: dict[str, Tensor], config: dict[str, Any]) -> Lens:
    layers, width = int(config["num_hidden_layers"]), int(config["d_model"])
    numbers = range(1, layers)
    maps = _stacked({i: content[f"{i}.weight"] for i in numbers}, first=1) + torch.eye(width)
    biases = torch.stack([content.get(f"{i}.bias", torch.zeros(width)).float() for i in numbers])
    about = {"model": config["base_model_name_or_path"], "revision": config.get("base_model_revision")}
    return Lens("tuned", maps, biases, about)


def _stacked(matrices: dict[int, Tensor], first: int) -> Tensor:
    if sorted(matrices) != list(range(first, first + len(matrices))):
        raise ValueError(f"it has matrices for the layers {sorted(matrices)}, not for every layer from {first} on")
    return torch.stack([matrices[i].float() for i in sorted(matrices)])
