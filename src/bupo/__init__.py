"""bupo: the internal policies of language models (arXiv 2512.19673): see, train bottom-up, measure."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bupo.lens.analyze import analyze_rollouts
    from bupo.models.internal_policy import internal_policy
    from bupo.models.load import load_model
    from bupo.train.config import BuPOConfig
    from bupo.train.trainer import BuPOTrainer

# Imported on first use: the command line must start without torch.
_HOMES = {
    "internal_policy": "bupo.models.internal_policy",
    "load_model": "bupo.models.load",
    "analyze_rollouts": "bupo.lens.analyze",
    "BuPOConfig": "bupo.train.config",
    "BuPOTrainer": "bupo.train.trainer",
}
__all__ = ["BuPOConfig", "BuPOTrainer", "analyze_rollouts", "internal_policy", "load_model"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'bupo' has no attribute {name!r}")
