"""What single tokens look like at every layer: the data of the report's token explorer (``tokens.json``, schema 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bupo.lens.analyze import TokenPair, check_rollouts, get_unembedding
from bupo.lens.old_tokens import TokenReadings, read_tokens
from bupo.models.capture import capture_layers
from bupo.models.layout import eval_mode, unwrap
from bupo.models.unembed import Unembedding

GROUP = 4


def explore_rollouts(
    model: nn.Module,
    rollouts: Sequence[TokenPair],
    decode: Callable[[list[int]], str],
    *,
    top: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Readings of the layer policies ``softmax(H^l E_u^T)`` (Eq. 5) at every response token, one response at a time.

    Args:
        rollouts: few responses; every one costs L vocabulary products a token.
        decode: turns token ids into text.
        top: how many of a layer's most likely tokens are kept.
        progress: called with (responses finished, responses in all).

    Returns:
        The content of ``tokens.json``: per sample the tokens as text and, as L rows of T numbers, ``entropy`` (nats),
        ``logprob`` and ``rank`` (from 1) of the token that was generated, ``kl`` to the final policy (nats), and
        ``top`` as (text, probability) pairs.

    Raises:
        InputError: see :func:`bupo.lens.analyze.analyze_rollouts`.
    """
    check_rollouts(model, rollouts)
    inner = unwrap(model)
    rule = get_unembedding(model)
    samples = []
    with eval_mode(inner):
        for number, rollout in enumerate(rollouts, start=1):
            samples.append(_sample(model, rollout, rule, decode, top))
            if progress is not None:
                progress(number, len(rollouts))
    return {"schema": 1, "samples": samples}


def _sample(
    model: nn.Module, rollout: TokenPair, rule: Unembedding, decode: Callable[[list[int]], str], top: int
) -> dict[str, Any]:
    device = rule.weight.device
    response = list(rollout.response_ids)
    ids = torch.tensor([[*rollout.prompt_ids, *response][:-1]], device=device)
    keep = torch.zeros_like(ids, dtype=torch.bool)
    keep[0, len(rollout.prompt_ids) - 1 :] = True
    states, final = capture_layers(model, ids, torch.ones_like(ids), keep, group=GROUP)
    readings = read_tokens(states, final, torch.tensor(response, device=device), rule, top=top)
    return {
        "problem_id": getattr(rollout, "problem_id", None),
        "prompt": decode(list(rollout.prompt_ids)),
        "tokens": [decode([token]) for token in response],
        "layers": len(states),
        **_plain(readings, decode),
    }


def _plain(readings: TokenReadings, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    text: dict[int, str] = {}

    def name(token: int) -> str:
        if token not in text:
            text[token] = decode([token])
        return text[token]

    def rows(values: Tensor) -> list[list[float]]:
        return [[round(v, 4) for v in row] for row in values.tolist()]

    top = [
        [
            [[name(token), round(share, 4)] for token, share in zip(tokens, shares, strict=True)]
            for tokens, shares in zip(layer_tokens, layer_shares, strict=True)
        ]
        for layer_tokens, layer_shares in zip(readings.top.tolist(), readings.top_probability.tolist(), strict=True)
    ]
    return {
        "entropy": rows(readings.entropy),
        "logprob": rows(readings.logprob),
        "kl": rows(readings.kl),
        "rank": readings.rank.tolist(),
        "top": top,
    }
