"""Sampling with transformers' own `generate`, from the whole model or from one of its internal policies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from bupo.errors import InputError
from bupo.evaluate.engines import Batch, Sampling, chunks, cut_at_end
from bupo.models.layout import context_length

_FIRST_STRETCH = 32  # tokens


class TransformersEngine:
    """Batched sampling with a Hugging Face causal LM.

    Args:
        model: in evaluation mode, on the device to be used.
        tokenizer: its tokenizer (for the end-of-sequence and padding tokens).
        batch_size: responses made at the same time. It belongs to the identity of a run: another batch size draws
            other responses from the same seed.
        internal_layer: sample from this layer's internal policy (counted from 1) instead of the model's.
        norm: read the internal policy through the final norm.
    """

    name = "transformers"

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: int = 64, internal_layer: int | None = None, norm: bool = False
    ):
        if batch_size < 1:
            raise InputError(f"batch size must be at least 1, not {batch_size}")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.internal_layer, self.norm = internal_layer, norm
        if internal_layer is not None:
            from bupo.models.internal_policy import check_layer, n_layers

            check_layer(n_layers(model), internal_layer)
        self.end_ids = end_tokens(model.generation_config, tokenizer)
        self.context = context_length(model.config)

    def plan(self, problems: int, samples: int, seed: int) -> list[Batch]:
        return chunks(problems, samples, self.batch_size, seed)

    def decode(self, response: Sequence[int]) -> str:
        return self.tokenizer.decode(list(response), skip_special_tokens=True)

    def is_finished(self, response: Sequence[int]) -> bool:
        return bool(response) and response[-1] in self.end_ids

    @torch.no_grad()
    def run(self, prompts: Sequence[Sequence[int]], batch: Batch, sampling: Sampling) -> list[list[int]]:
        rows = [list(prompts[problem]) for problem, _ in batch.items]
        width = max(map(len, rows))
        self.check_length(width, sampling)
        pad = self._pad_id()
        device = next(self.model.parameters()).device
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        with (
            seeded(batch.seed, device),
            _own_generation_config(self.model, self.generation_config(sampling)),
            self._policy(),
        ):
            try:
                return self._generate(ids, mask, sampling.max_new_tokens)
            except RuntimeError as error:
                if "probability tensor" in str(error):
                    raise InputError(
                        "the model gives non-finite probabilities; load it in float32 (--dtype float32) or check it"
                    ) from error
                raise

    def _generate(self, ids: torch.Tensor, mask: torch.Tensor, limit: int) -> list[list[int]]:
        """`generate` in stretches, after each of which the rows that have ended leave the batch.

        A few responses run much longer than the rest; without this, the whole batch is computed until the last ends.

        Args:
            ids: (B, P) padded on the left. mask: (B, P).
        """
        width = ids.shape[1]
        responses: list[list[int]] = [[] for _ in range(ids.shape[0])]
        rows = list(range(ids.shape[0]))
        cache, made = None, 0
        while rows and made < limit:
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=min(max(_FIRST_STRETCH, made), limit - made),  # doubling: few stretches
                return_dict_in_generate=True,
            )
            ids, cache = output.sequences, output.past_key_values
            made = ids.shape[1] - width
            mask = torch.cat([mask, mask.new_ones(len(rows), ids.shape[1] - mask.shape[1])], dim=1)
            for position, row in enumerate(rows):
                responses[row] = cut_at_end(ids[position, width:].tolist(), self.end_ids)
            going = [position for position, row in enumerate(rows) if not self.is_finished(responses[row])]
            if going and len(going) < len(rows):
                chosen = torch.tensor(going, device=ids.device)
                ids, mask = ids[chosen], mask[chosen]
                cache.batch_select_indices(chosen)
            rows = [rows[position] for position in going]
        return responses

    def check_length(self, prompt: int, sampling: Sampling) -> None:
        """Raise InputError where a prompt of so many tokens and the new ones exceed the model's context."""
        if self.context is not None and prompt + sampling.max_new_tokens > self.context:
            raise InputError(
                f"a prompt of {prompt} tokens and {sampling.max_new_tokens} new ones exceed the model's context of "
                f"{self.context}; lower --max-new-tokens"
            )

    def generation_config(self, sampling: Sampling) -> Any:
        """How to sample from the model's distribution and nothing else, as transformers takes it."""
        from transformers import GenerationConfig

        greedy = sampling.temperature == 0
        drawing = {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        return GenerationConfig(
            do_sample=not greedy,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(self.end_ids) or None,
            pad_token_id=self._pad_id(),
            **drawing,
        )

    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else min(self.end_ids, default=0)

    def _policy(self) -> Any:
        if self.internal_layer is None:
            return nullcontext()
        from bupo.models.internal_policy import internal_policy

        return internal_policy(self.model, self.internal_layer, norm=self.norm)


def sample(
    model: Any,
    tokenizer: Any,
    prompts_ids: Sequence[Sequence[int]],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[list[int]]]:
    """Sample responses to prompts.

    Args:
        prompts_ids: token ids of each prompt.
        progress: called with (responses made, responses in all) after each batch.

    Returns:
        problems x samples x token ids; a response includes the end-of-sequence token that ended it.

    Raises:
        InputError: prompt and response exceed the model's context, or the model's probabilities are not finite.
    """
    engine = TransformersEngine(model, tokenizer, batch_size=batch_size)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    responses: list[list[list[int]]] = [[[] for _ in range(samples)] for _ in prompts_ids]
    done = 0
    for batch in engine.plan(len(prompts_ids), samples, seed):
        for (problem, index), response in zip(batch.items, engine.run(prompts_ids, batch, sampling), strict=True):
            responses[problem][index] = response
        done += len(batch.items)
        if progress is not None:
            progress(done, len(prompts_ids) * samples)
    return responses


def end_tokens(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a response: the model's (there may be several) and the tokenizer's."""
    found: set[int] = set()
    for holder in (generation_config, tokenizer):
        value = getattr(holder, "eos_token_id", None)
        found.update([value] if isinstance(value, int) else value or [])
    return frozenset(found)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a seed of our own and give the caller's random state back."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _own_generation_config(model: Any, config: Any) -> Iterator[None]:
    """Exchange a model's generation config for the time of a call.

    Many checkpoints bring a top-k, a top-p or a repetition penalty in it, which `generate` mixes into whatever it is
    passed.
    """
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before
