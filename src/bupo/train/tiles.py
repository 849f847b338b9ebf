"""Narrows the tiles of logits that TRL's head computes on devices without Triton: 32,768 words for all tokens at once.

About seven float32 tensors of that size are most of the memory, and a good part of the time, of an internal phase's
update, in which few layers run. Narrower tiles change neither the result nor the products.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TILE_TOKENS = 4096  # TRL's `TOKEN_CHUNK_SIZE`
TILE_BYTES = 4 * 2**20  # of one float32 tile; about what stays in a cache (docs/decisions.md)
NARROWEST, WIDEST = 1024, 32_768  # narrower products are slow


def tile_width(tokens: int) -> int:
    """Vocabulary entries per tile, a power of two, for a micro-batch of ``tokens`` tokens with prompts and padding."""
    room = TILE_BYTES // (4 * max(1, min(tokens, TILE_TOKENS)))
    return min(WIDEST, max(NARROWEST, 1 << max(0, room.bit_length() - 1)))


@contextmanager
def narrow_tiles(head: Any, device: Any, tokens: int) -> Iterator[None]:
    """Within this context the fused head of ``head`` (`trl.trainer.utils`) uses tiles of `tile_width` on ``device``."""
    before = head._CHUNKED_LOGPROB_CHUNK_SIZE
    if not head._use_triton(device):
        head._CHUNKED_LOGPROB_CHUNK_SIZE = min(before, tile_width(tokens))
    try:
        yield  # backward may run after the context
    finally:
        head._CHUNKED_LOGPROB_CHUNK_SIZE = before
