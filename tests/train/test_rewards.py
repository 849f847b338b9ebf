"""Rewards that are no finite number stop before anything is trained on them; None leaves a response out."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from bupo.errors import InputError, TrainingStopped
from tests.support.tiny import tiny_config
from tests.support.training import even_share, make_trainer, same_weights, tiny_tokenizer, weights


def returning(value, kind):
    """A reward function that returns the value for the sixth response of a batch, else 0.5."""

    def mine(completions, **columns):
        return [value if i == 5 else 0.5 for i in range(len(completions))]

    async def awaited(completions, **columns):
        return mine(completions)

    return {"function": mine, "async": awaited}[kind]


@pytest.mark.parametrize("kind", ["function", "async"])
@pytest.mark.parametrize("value", [math.nan, -math.inf, "0.5", torch.tensor(math.inf), [1.0]], ids=str)
def test_a_reward_that_is_no_finite_number_stops_before_the_update(tmp_path, value, kind):
    trainer = make_trainer(tmp_path, internal_steps=0, reward_funcs=[even_share, returning(value, kind)])
    before = weights(trainer.model)
    with pytest.raises(InputError, match=r"reward (mine|awaited) must return a finite number or None") as error:
        trainer.train()
    assert f"returned {value!r} for response 6 of its batch: 'w" in str(error.value)
    assert same_weights(before, weights(trainer.model))
    assert trainer.reward_funcs[0] is even_share


def test_a_reward_model_that_returns_nan_stops(tmp_path):
    judge = AutoModelForSequenceClassification.from_config(tiny_config("qwen2", num_labels=1))
    torch.nn.init.constant_(judge.score.weight, math.nan)
    judge.config._name_or_path = "org/judge"
    more = {"reward_funcs": judge, "reward_processing_classes": tiny_tokenizer()}
    with pytest.raises(InputError, match=r"reward judge must return .* returned nan for response 1"):
        make_trainer(tmp_path, internal_steps=0, **more).train()


def test_none_leaves_responses_out_but_not_all_of_a_rollout_batch(tmp_path):
    make_trainer(tmp_path, internal_steps=0, max_steps=1, reward_funcs=returning(None, "function")).train()
    trainer = make_trainer(tmp_path, internal_steps=0, reward_funcs=lambda completions, **_: [None] * len(completions))
    with pytest.raises(TrainingStopped, match=r"no reward function gave any response a number in update 1"):
        trainer.train()
