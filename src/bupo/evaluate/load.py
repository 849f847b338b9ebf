"""Loads the engine that an evaluation's configuration names."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, GenerationConfig

from bupo.errors import InputError
from bupo.evaluate.config import EvalConfig
from bupo.evaluate.engines import Engine, end_tokens
from bupo.evaluate.hf_engine import TransformersEngine
from bupo.evaluate.vllm_engine import VllmEngine
from bupo.models.layout import context_length
from bupo.models.load import load_model, load_tokenizer, model_revision, resolve_model


def load_engine(
    config: EvalConfig, *, device: str | None = None, trust_remote_code: bool = False
) -> tuple[Engine, Any, dict[str, Any]]:
    """Return the engine, its tokenizer, and the facts about them that results record (revision, device, dtype).

    Raises:
        InputError: the model does not exist, or lacks the internal layer.
    """
    if config.engine == "vllm":
        return _load_vllm(config, trust_remote_code)
    model, tokenizer = load_model(
        config.model,
        dtype="fitting" if config.dtype == "auto" else config.dtype,
        device=device,
        revision=config.revision,
        trust_remote_code=trust_remote_code,
    )
    engine = TransformersEngine(
        model, tokenizer, batch_size=config.batch_size, internal_layer=config.internal_layer, norm=config.internal_norm
    )
    describe = {
        "revision": model_revision(model) or config.fingerprint,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return engine, tokenizer, describe


def _load_vllm(config: EvalConfig, trust_remote_code: bool) -> tuple[Engine, Any, dict[str, Any]]:
    path = resolve_model(config.model)
    source = {"revision": config.revision, "trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(config.model, **source)  # type: ignore[arg-type]
    try:
        model_config = AutoConfig.from_pretrained(path, **source)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the configuration of {config.model!r}: {str(error).splitlines()[0]}") from error
    try:
        generation_config = GenerationConfig.from_pretrained(path, revision=config.revision or "main")
    except OSError:  # a model without one ends its responses with the tokenizer's token
        generation_config = None
    engine = VllmEngine(
        path,
        tokenizer,
        end_tokens(generation_config, tokenizer),
        context=context_length(model_config),
        dtype=config.dtype,
        **source,
    )
    commit = getattr(model_config, "_commit_hash", None) or config.fingerprint
    return engine, tokenizer, {"revision": commit, "device": "vllm", "dtype": config.dtype}
