"""Rollouts by transformers' continuous batching: in both phases, and refused where it would change the weights."""

from __future__ import annotations

import pytest
import torch

from bupo.errors import ConfigError
from tests.support.training import make_trainer


@pytest.mark.parametrize("setting", ["bf16", "fp16"])
def test_a_cast_of_the_weights_in_training_is_refused(tmp_path, setting):
    """TRL casts the model in training to sample; with float32 weights that would stay."""
    kind = {"bf16": "bfloat16", "fp16": "float16"}[setting]
    with pytest.raises(ConfigError, match=rf"use_transformers_continuous_batching would turn the weights .* to {kind}"):
        make_trainer(tmp_path, internal_steps=1, use_transformers_continuous_batching=True, **{setting: True})


@pytest.mark.slow
def test_it_samples_in_both_phases(tmp_path):
    cache = {"num_blocks": 64, "max_batch_tokens": 64}  # else it takes as much of the memory as it can
    engine = {"use_transformers_continuous_batching": True, "transformers_continuous_batching_config": cache}
    trainer = make_trainer(tmp_path, internal_steps=1, max_steps=8, **engine)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "phase" in row]
    assert [row["phase"] for row in rows] == [1, 2]
    assert all(row["completions/mean_length"] > 0 for row in rows)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
