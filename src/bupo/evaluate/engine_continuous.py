"""Sampling with transformers' continuous batching: when a response ends, the next question takes its place at once."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from bupo.errors import InputError
from bupo.evaluate.engines import Batch, Sampling, chunks, cut_at_end
from bupo.evaluate.hf_engine import TransformersEngine, seeded

_ROUNDS = 8  # places are filled so many times a batch on average: more means less idling, and more lost by a kill
_PAGE = 64  # tokens; transformers' own 256 wastes memory on short responses
_PROMPT_TOKENS = 2048  # of new prompts computed in one forward


class ContinuousEngine(TransformersEngine):
    """Sampling from the whole model with paged attention; as `TransformersEngine` in everything else.

    ``batch_size`` responses are under way at a time. The cache has room for that many of the longest, and all
    questions of a batch are queued before the first is computed: so what is computed together, and with it the
    response to every question, follows from the seed alone and not from free memory or from time.

    Raises:
        InputError: the model has attention that cannot be paged.
    """

    name = "continuous"

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 64):
        super().__init__(model, tokenizer, batch_size=batch_size)
        if not hasattr(model, "init_continuous_batching"):
            raise InputError(f"{type(model).__name__} has no continuous batching; use --engine transformers")

    def plan(self, problems: int, samples: int, seed: int) -> list[Batch]:
        return chunks(problems, samples, self.batch_size * _ROUNDS, seed)

    @torch.no_grad()
    def run(self, prompts: Sequence[Sequence[int]], batch: Batch, sampling: Sampling) -> list[list[int]]:
        rows = [list(prompts[problem]) for problem, _ in batch.items]
        self.check_length(max(map(len, rows)), sampling)
        with seeded(batch.seed, self.model.device), _quiet():
            return [cut_at_end(response, self.end_ids) for response in self._answers(rows, batch.seed, sampling)]

    def _answers(self, rows: list[list[int]], seed: int, sampling: Sampling) -> list[list[int]]:
        from transformers import ContinuousBatchingConfig

        longest = max(map(len, rows)) + sampling.max_new_tokens
        settings = ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=self.batch_size * (longest // _PAGE + 2),
            max_batch_tokens=self.batch_size + _PROMPT_TOKENS,
            max_requests_per_batch=self.batch_size,
            use_async_batching=False,
            auto_switch_to_flash=importlib.util.find_spec("flash_attn") is not None,  # else it may come from the hub
            seed=seed % 2**32,
        )
        try:
            manager = self.model.init_continuous_batching(self.generation_config(sampling), settings)
            manager.warmup()  # makes the cache here and now, so that a model that cannot do this is found out
        except (ValueError, NotImplementedError, AttributeError) as error:
            raise InputError(
                f"continuous batching does not work with this model ({error}); use --engine transformers"
            ) from error
        names = manager.add_requests(rows, max_new_tokens=sampling.max_new_tokens)
        found: dict[str, list[int]] = {}
        manager.start()
        try:
            while len(found) < len(rows):
                result = manager.get_result(timeout=1)
                if result is not None and result.error is not None:
                    raise InputError(f"continuous batching failed ({result.error}); use --engine transformers")
                if result is not None and result.is_finished():
                    found[result.request_id] = list(result.generated_tokens)
                elif result is None and not manager.is_running():
                    raise InputError("continuous batching ended early; use --engine transformers")
        finally:
            manager.stop(block=True, hard_stop=len(found) < len(rows))
            manager.destroy()
        return [found[name] for name in names]


@contextmanager
def _quiet() -> Iterator[None]:
    """Failures are raised here in one line; transformers also logs their tracebacks, and advice on every start."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)
