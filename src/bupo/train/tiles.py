"""How wide a tile of logits the trainer's head makes on devices without Triton, where it folds tiles in torch.

TRL's head makes 32,768 words at a time for all tokens of a micro-batch, and about seven float32 tensors of that size in
the backward pass. In an internal phase few layers run, so these are most of an update's memory and, paged in anew each
time, a good part of its time. Narrower tiles change neither result nor products. After the phase, and where there is
none, they are TRL's, so that losses are TRL's bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TILE_TOKENS = 4096  # TRL's `TOKEN_CHUNK_SIZE`
TILE_BYTES = 4 * 2**20  # of one float32 tile: about what stays in a cache (docs/decisions.md)
NARROWEST, WIDEST = 1024, 32_768  # narrower products are slow
_WIDTH = "_CHUNKED_LOGPROB_CHUNK_SIZE"


def tile_words(tokens: int) -> int:
    """Words of a tile for so many tokens of a micro-batch, prompts and padding included: a power of two."""
    room = TILE_BYTES // (4 * max(1, min(tokens, TILE_TOKENS)))
    return min(WIDEST, max(NARROWEST, 1 << max(0, room.bit_length() - 1)))


@contextmanager
def narrow_tiles(head: Any, device: Any, tokens: int) -> Iterator[None]:
    """Within it a fused head on ``device`` takes tiles of `tile_words`; its backward pass may run after it.

    Args:
        head: the module that defines the head (`trl.trainer.utils`).
    """
    before = getattr(head, _WIDTH, None)
    if before is None or head._use_triton(device):
        yield
        return
    setattr(head, _WIDTH, min(before, tile_words(tokens)))
    try:
        yield
    finally:
        setattr(head, _WIDTH, before)
