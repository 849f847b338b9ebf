"""Samples with transformers' own `generate`, from the whole model or from one of its internal policies."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import GenerationConfig

from bupo.errors import InputError, not_finite
from bupo.evaluate.engines import Batch, Engine, Sampling, cut_at_end, end_tokens
from bupo.models.internal_policy import check_layer, internal_policy
from bupo.models.layout import context_length, find_layout, vocabulary_size
from bupo.models.load import model_revision
from bupo.models.padding import attends_only

_FIRST_STRETCH = 32  # tokens


class TransformersEngine(Engine):
    """Batched sampling with a Hugging Face causal LM, or from the internal policy of its layer ``internal_layer``,
    read through a lens.

    The same seed gives other responses with another batch size.
    """

    def __init__(
        self, model: Any, tokenizer: Any, batch_size: int = 64, internal_layer: int | None = None, lens: Any = "raw"
    ):
        if internal_layer is not None:
            check_layer(find_layout(model).n_layers, internal_layer)
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.internal_layer, self.lens = internal_layer, lens
        self.end_ids = end_tokens(model.generation_config, tokenizer)
        self.context, self.vocabulary = context_length(model.config), vocabulary_size(model)
        dtype = str(model.dtype).removeprefix("torch.")
        self.facts = {"revision": model_revision(model), "device": str(model.device), "dtype": dtype}
        pad = tokenizer.pad_token_id
        known = pad is not None and (self.vocabulary is None or pad < self.vocabulary)
        self._pad_id = pad if known else min(self.end_ids, default=0)

    def responses_per_batch(self, samples: int) -> int:
        return self.batch_size

    @torch.no_grad()
    def run(self, prompts: Sequence[Sequence[int]], batch: Batch, sampling: Sampling) -> list[list[int]]:
        rows = [list(prompts[problem]) for problem, _ in batch.items]
        policy = internal_policy(self.model, self.internal_layer, lens=self.lens) if self.internal_layer else None
        device, greedy = self.model.device, sampling.temperature == 0
        drawing = {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        ends: Any = {"eos_token_id": sorted(self.end_ids) or None, "pad_token_id": self._pad_id}
        config = GenerationConfig(do_sample=not greedy, max_new_tokens=sampling.max_new_tokens, **ends, **drawing)
        # `generate` mixes the model's own generation config into whatever it is passed, and many checkpoints ship a
        # top-k, a top-p or a repetition penalty
        before, self.model.generation_config = self.model.generation_config, config
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), policy or nullcontext():
                torch.manual_seed(batch.seed)
                return self._generate_groups(rows, sampling.max_new_tokens)
        except RuntimeError as error:
            if (reason := not_finite(error)) is None:
                raise
            raise InputError(reason) from error
        finally:
            self.model.generation_config = before

    def _generate_groups(self, rows: list[list[int]], limit: int) -> list[list[int]]:
        """Generate all rows together if the cache holds keys and values of attention only.

        Recurrent states can be neither cut nor continued, and may take padding for text: one call per prompt length.
        """
        if attends_only(self.model):
            return self._generate(rows, limit, _FIRST_STRETCH)
        responses: dict[int, list[int]] = {}
        for length in sorted(set(map(len, rows))):
            members = [index for index, row in enumerate(rows) if len(row) == length]
            group = self._generate([rows[index] for index in members], limit, limit)
            responses.update(zip(members, group, strict=True))
        return [responses[index] for index in range(len(rows))]

    def _generate(self, rows: list[list[int]], limit: int, stretch: int) -> list[list[int]]:
        """Call `generate` in stretches of tokens, after each of which the rows that have ended leave the batch.

        A few responses run much longer than the rest; without this, the whole batch is computed until the last ends.
        """
        width, device = max(map(len, rows)), self.model.device
        ids = torch.tensor([[self._pad_id] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        responses: list[list[int]] = [[] for _ in rows]
        running, made, cache = list(range(len(rows))), 0, None
        while running and made < limit:
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=min(max(stretch, made), limit - made),  # doubling keeps the stretches few
                return_dict_in_generate=True,
            )
            ids, cache = output.sequences, output.past_key_values if stretch < limit else None
            made = ids.shape[1] - width
            mask = torch.cat([mask, mask.new_ones(len(running), ids.shape[1] - mask.shape[1])], dim=1)
            for position, row in enumerate(running):
                responses[row] = cut_at_end(ids[position, width:].tolist(), self.end_ids)
            kept = [position for position, row in enumerate(running) if not self.is_finished(responses[row])]
            if kept and len(kept) < len(running):
                chosen = torch.tensor(kept, device=device)
                ids, mask = ids[chosen], mask[chosen]
                if cache is not None:  # MPT returns none and computes the prompt again
                    cache.batch_select_indices(chosen)
            running = [running[position] for position in kept]
        return responses


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    samples: int,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[list[int]]]:
    """Sample responses to prompts, both as token ids; return them as prompts x samples x tokens."""
    engine = TransformersEngine(model, tokenizer, batch_size=batch_size)
    responses: list[list[list[int]]] = [[] for _ in prompts]
    for batch in engine.plan(len(prompts), samples, sampling.seed):
        for (problem, _), response in zip(batch.items, engine.run(prompts, batch, sampling), strict=True):
            responses[problem].append(response)
        on_progress(sum(map(len, responses)), len(prompts) * samples)
    return responses
