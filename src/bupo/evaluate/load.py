"""From a configuration to a loaded engine."""

from __future__ import annotations

from typing import Any

from bupo.errors import InputError
from bupo.evaluate.engines import Engine
from bupo.evaluate.run import EvalConfig


def load_engine(
    config: EvalConfig, *, device: str | None = None, trust_remote_code: bool = False
) -> tuple[Engine, Any, dict[str, Any]]:
    """The engine, its tokenizer, and what is worth keeping about them (model revision, device, dtype).

    Raises:
        InputError: no such model, or a layer that it does not have.
    """
    if config.engine == "vllm":
        return _load_vllm(config, trust_remote_code)
    from bupo.evaluate.hf_engine import TransformersEngine
    from bupo.models.load import load_model, model_revision

    dtype = "fitting" if config.dtype == "auto" else config.dtype
    model, tokenizer = load_model(
        config.model, dtype=dtype, device=device, revision=config.revision, trust_remote_code=trust_remote_code
    )
    engine: TransformersEngine
    if config.engine == "continuous":
        from bupo.evaluate.engine_continuous import ContinuousEngine

        engine = ContinuousEngine(model, tokenizer, batch_size=config.batch_size)
    else:
        engine = TransformersEngine(
            model,
            tokenizer,
            batch_size=config.batch_size,
            internal_layer=config.internal_layer,
            norm=config.internal_norm,
        )
    describe = {
        "revision": model_revision(model) or config.fingerprint,
        "device": str(next(model.parameters()).device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return engine, tokenizer, describe


def _load_vllm(config: EvalConfig, trust_remote_code: bool) -> tuple[Engine, Any, dict[str, Any]]:
    from transformers import AutoConfig, GenerationConfig

    from bupo.evaluate.hf_engine import end_tokens
    from bupo.evaluate.vllm_engine import VllmEngine
    from bupo.models.layout import context_length
    from bupo.models.load import load_tokenizer, resolve_model

    path = resolve_model(config.model)
    revision = config.revision
    tokenizer = load_tokenizer(config.model, revision=revision, trust_remote_code=trust_remote_code)
    try:
        model_config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the configuration of {config.model!r}: {str(error).splitlines()[0]}") from error
    try:
        generation_config = GenerationConfig.from_pretrained(path, revision=revision or "main")
    except OSError:  # a model without one ends with the tokenizer's token
        generation_config = None
    engine = VllmEngine(
        path,
        tokenizer,
        end_tokens(generation_config, tokenizer),
        context=context_length(model_config),
        dtype=config.dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    commit = getattr(model_config, "_commit_hash", None) or config.fingerprint
    return engine, tokenizer, {"revision": commit, "device": "vllm", "dtype": config.dtype}
