"""Chooses and loads the engine of an evaluation."""

from __future__ import annotations

import importlib.util
from typing import Any

from bupo.errors import InputError
from bupo.evaluate.config import EvalConfig
from bupo.evaluate.engines import Engine
from bupo.evaluate.hf_engine import TransformersEngine
from bupo.evaluate.vllm_engine import VLLM_REMEDY, VllmEngine
from bupo.models.load import load_model


def choose_engine(name: str, *, internal_layer: int | None = None) -> str:
    """Return the engine that a name means here: ``auto`` is vLLM where it is installed and can be used."""
    if name not in ("auto", "transformers", "vllm"):
        raise InputError(f"unknown engine {name!r}; use one of auto, transformers, vllm")
    installed = importlib.util.find_spec("vllm") is not None
    if name == "auto":
        return "vllm" if installed and internal_layer is None else "transformers"
    if name == "vllm" and internal_layer is not None:
        raise InputError("--engine vllm cannot sample from an internal policy; use --engine transformers")
    if name == "vllm" and not installed:
        raise InputError(f"vLLM is not installed; {VLLM_REMEDY}")
    return name


def load_engine(config: EvalConfig, *, device: str | None = None, trust_remote_code: bool = False) -> Engine:
    """Load the model that the configuration names into its engine."""
    source: dict[str, Any] = {"revision": config.revision, "trust_remote_code": trust_remote_code}
    if config.engine == "vllm":
        return VllmEngine(config.model, config.dtype, **source)
    dtype = "fitting" if config.dtype == "auto" else config.dtype
    model, tokenizer = load_model(config.model, dtype=dtype, device=device, **source)
    return TransformersEngine(model, tokenizer, config.batch_size, config.internal_layer, config.internal_norm)
