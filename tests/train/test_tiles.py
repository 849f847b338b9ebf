"""Narrow tiles of the head in an internal phase: the same policy, and TRL's width afterwards."""

import pytest
import torch

from bupo.models.internal_policy import internal_policy
from bupo.train import tiles
from bupo.train.tiles import NARROWEST, TILE_BYTES, TILE_TOKENS, WIDEST, narrow_tiles, tile_width
from bupo.train.trainer import add_fused_lm_head, trl_utils
from tests.support.tiny import tiny_model
from tests.support.training import make_trainer


@pytest.mark.parametrize("tokens", [1, 50, 512, 1000, 2048, 4096, 100_000])
def test_a_tile_is_a_power_of_two_that_fits(tokens):
    width = tile_width(tokens)
    assert width & (width - 1) == 0
    assert NARROWEST <= width <= WIDEST
    size = 4 * width * min(tokens, TILE_TOKENS)
    assert size <= TILE_BYTES or width == NARROWEST
    assert 2 * size > TILE_BYTES or width == WIDEST


def test_narrow_tiles_leave_result_and_gradients(monkeypatch):
    """Tiles narrower than the vocabulary, and the backward pass after the context, as in training."""
    model = tiny_model("qwen3", spread=3.0)  # 97 words: seven tiles of 16
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    ids = torch.arange(3, 43).view(2, 20)
    found = []
    for width in (WIDEST, 16):
        model.zero_grad()
        monkeypatch.setattr(tiles, "tile_width", lambda tokens, width=width: width)
        with internal_policy(model, 2), narrow_tiles(trl_utils, ids.device, 1):
            assert width == trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
            out = model(input_ids=ids, labels=ids, fused_lm_head=True)
        assert trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE == WIDEST
        (out.log_probs.sum() + out.entropy.sum()).backward()
        found.append([out.log_probs, out.entropy, *(p.grad for p in model.parameters() if p.grad is not None)])
    for wide, narrow in zip(*found, strict=True):
        torch.testing.assert_close(narrow, wide, rtol=1e-4, atol=1e-5)


def test_devices_with_the_kernel_keep_its_tiles_and_errors_bring_the_width_back(monkeypatch):
    with pytest.raises(RuntimeError), narrow_tiles(trl_utils, torch.device("cpu"), 4096):
        raise RuntimeError
    assert trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE == WIDEST
    monkeypatch.setattr(trl_utils, "_use_triton", lambda device: True)
    with narrow_tiles(trl_utils, "cuda", 4096):
        assert trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE == WIDEST


def test_the_trainer_narrows_in_the_internal_phase_only(tmp_path, monkeypatch):
    """There for the full policy too, which is measured; afterwards the width is TRL's."""
    seen = []
    plain = trl_utils._ChunkedLogProbFunction.apply

    def look(*args):
        seen.append((args[5], trainer.state.global_step < 4, trainer._scored.layer is not None))
        return plain(*args)

    monkeypatch.setattr(trl_utils._ChunkedLogProbFunction, "apply", look)
    monkeypatch.setattr(tiles, "tile_width", lambda tokens: 2048)
    trainer = make_trainer(tmp_path, internal_steps=1)
    trainer.train()
    assert set(seen) == {(2048, True, True), (2048, True, False), (WIDEST, False, False)}
