"""Load a model and its tokenizer by hub id, folder or the name of a shipped model; errors say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bupo.errors import InputError

SMALL_MODEL = Path(__file__).parent.parent / "assets" / "small"
DTYPES = ("float32", "bfloat16", "float16")


def resolve_model(name: str) -> str:
    """``small`` means the model shipped in the package; anything else is a folder or a hub id and stays as it is.

    Raises:
        InputError: ``name`` looks like a path but no model folder is there.
    """
    if name == "small":
        return str(SMALL_MODEL)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise InputError(f"model folder {path} has no config.json; name the folder save_pretrained wrote")
        return str(path)
    if path.exists():
        raise InputError(f"model {path} is a file; name the model's folder")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"model folder {name} does not exist")
    return name


def model_revision(model: Any) -> str | None:
    """The hub commit of a loaded model, or None for a local folder."""
    return getattr(getattr(model, "config", None), "_commit_hash", None)


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    path = resolve_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many types here; all mean the same to a user
        raise InputError(_explain("tokenizer", name, error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """A causal LM in evaluation mode and its tokenizer.

    Args:
        name: hub id, model folder, or ``small`` (shipped).
        dtype: ``float32``, ``bfloat16``, ``float16``, ``auto`` (what the checkpoint holds), or ``fitting``: that too,
            unless it is a 16-bit one and the device has no units for it. Then float32 is exact as well, and faster.
        device: torch device; the accelerator if there is one, else the CPU. Models that are quantised, or sharded by a
            ``device_map`` among the further arguments of ``from_pretrained``, stay where they were loaded.

    Raises:
        InputError: no such model, not a causal LM, a damaged file, an unknown dtype, or an unreachable hub.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if dtype not in (*DTYPES, "auto", "fitting"):
        raise InputError(f"unknown dtype {dtype!r}; choose one of auto, {', '.join(DTYPES)}")
    path = resolve_model(name)
    model: Any
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
    _refuse_unsafe(path, name)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        # a multimodal model is read as the language model that it holds
        multimodal = type(config) in AutoModelForImageTextToText._model_mapping
        auto: Any = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
        model = auto.from_pretrained(
            path,
            dtype="auto" if dtype in ("auto", "fitting") else getattr(torch, dtype),
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **kwargs,
        )
    except Exception as error:
        raise InputError(_explain("model", name, error)) from error
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "fitting" and not getattr(model, "is_quantized", False):
        from bupo.models.unembed import has_low_precision_units

        if model.dtype in (torch.bfloat16, torch.float16) and not has_low_precision_units(
            torch.device(device), model.dtype
        ):
            model = model.float()
    # quantised and sharded models are where they belong already, and refuse to be moved
    if "device_map" not in kwargs and not getattr(model, "is_quantized", False):
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"cannot put the model on {device!r}: {_first_line(error)}") from error
    return model.eval(), tokenizer


def _refuse_unsafe(path: str, name: str) -> None:
    folder = Path(path)
    if not folder.is_dir():
        return
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"model folder {name} holds no .safetensors file (other weight formats are not loaded)")
    try:
        json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise InputError(f"{folder / 'config.json'} is not valid JSON: {error}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _explain(what: str, name: str, error: BaseException) -> str:
    text = str(error)
    if not Path(name).expanduser().exists() and name != "small":
        hub_words = (
            "offline",
            "connect",
            "not a local folder",
            "not a valid model identifier",
            "couldn't",
            "cannot find",
        )
        if any(word in text.lower() for word in hub_words) or isinstance(error, OSError):
            return (
                f"cannot load {what} {name!r}: no such local folder, and the hub has none by this name or cannot be "
                f"reached (check the spelling, log in for gated models, or pass a local folder)"
            )
    return f"cannot load {what} {name!r}: {_first_line(error)}"
