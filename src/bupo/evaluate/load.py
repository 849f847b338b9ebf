"""From a configuration to a loaded engine."""

from __future__ import annotations

from typing import Any

from bupo.evaluate.engines import Engine
from bupo.evaluate.run import EvalConfig


def load_engine(
    config: EvalConfig, *, device: str | None = None, trust_remote_code: bool = False
) -> tuple[Engine, Any, dict[str, Any]]:
    """The engine, its tokenizer, and what is worth keeping about them (model revision, device).

    Raises:
        InputError: no such model, or a layer that it does not have.
    """
    from bupo.evaluate.engine_transformers import TransformersEngine
    from bupo.model.load import load_model, model_revision

    model, tokenizer = load_model(
        config.model, dtype=config.dtype, device=device, revision=config.revision, trust_remote_code=trust_remote_code
    )
    engine = TransformersEngine(
        model,
        tokenizer,
        batch_size=config.batch_size,
        internal_layer=config.internal_layer,
        norm=config.internal_norm,
    )
    device_name = str(next(model.parameters()).device)
    return engine, tokenizer, {"revision": model_revision(model) or config.fingerprint, "device": device_name}
