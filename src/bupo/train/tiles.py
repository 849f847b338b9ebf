"""Narrows the tiles of logits that TRL's head computes on devices without Triton, where it folds tiles in torch.

TRL's head computes 32,768 vocabulary entries at a time for all tokens of a micro-batch, and about seven float32 tensors
of that size in the backward pass. In an internal phase few layers run, so these are most of an update's memory and a
good part of its time. Narrower tiles change neither the result nor the products. Outside internal phases the tiles are
TRL's, so that losses are TRL's bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TILE_TOKENS = 4096  # TRL's `TOKEN_CHUNK_SIZE`
TILE_BYTES = 4 * 2**20  # of one float32 tile; about what stays in a cache (docs/decisions.md)
NARROWEST, WIDEST = 1024, 32_768  # narrower products are slow
_WIDTH = "_CHUNKED_LOGPROB_CHUNK_SIZE"


def tile_width(tokens: int) -> int:
    """Vocabulary entries per tile, a power of two, for a micro-batch of ``tokens`` tokens with prompts and padding."""
    room = TILE_BYTES // (4 * max(1, min(tokens, TILE_TOKENS)))
    return min(WIDEST, max(NARROWEST, 1 << max(0, room.bit_length() - 1)))


@contextmanager
def narrow_tiles(head: Any, device: Any, tokens: int) -> Iterator[None]:
    """Within this context the fused head uses tiles of `tile_width` on ``device``; backward may run after it.

    Args:
        head: the module that defines the head (`trl.trainer.utils`).
    """
    before = getattr(head, _WIDTH, None)
    if before is None or head._use_triton(device):
        yield
        return
    setattr(head, _WIDTH, min(before, tile_width(tokens)))
    try:
        yield
    finally:
        setattr(head, _WIDTH, before)
