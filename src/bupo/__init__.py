"""bupo: see the internal policies of language models, train them bottom-up, and measure it (arXiv 2512.19673)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bupo.lens.analyze import analyze_rollouts
    from bupo.lens.maps import Lens
    from bupo.models.internal_policy import internal_policy
    from bupo.models.load import load_model
    from bupo.notebook import look, read_results
    from bupo.train.config import BuPOConfig
    from bupo.train.trainer import BuPOTrainer

_MODULES = {  # imported on first use, so that the command line starts without torch
    "internal_policy": "bupo.models.internal_policy",
    "load_model": "bupo.models.load",
    "analyze_rollouts": "bupo.lens.analyze",
    "Lens": "bupo.lens.maps",
    "look": "bupo.notebook",
    "read_results": "bupo.notebook",
    "BuPOConfig": "bupo.train.config",
    "BuPOTrainer": "bupo.train.trainer",
}
__all__ = [
    "BuPOConfig", "BuPOTrainer", "Lens", "analyze_rollouts", "internal_policy", "load_model", "look", "read_results",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'bupo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
