"""Rewards that are no finite number stop before anything is trained on them; None leaves a response out."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from bupo.errors import InputError, TrainingStopped
from bupo.grading import Grader, boxed_string
from bupo.recipe import read_recipe
from bupo.train.build import build, check_recipe
from tests.cli.test_cli_train import recipe  # noqa: F401  (a fixture)
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


async def reference(completions, problems, **columns):
    """The reference answer if that is 1 more than a multiple of 4, else None."""
    assert len(problems) == len(completions)
    return [int(p.answer) if int(p.answer) % 4 == 1 else None for p in problems]


def counting(completions, **columns):
    return list(range(len(completions)))


def test_a_recipe_adds_several_rewards_by_their_weights(tmp_path, recipe):  # noqa: F811
    here = "tests.train.test_rewards"
    weights = {"answer": 2, f"{here}:counting": -0.5, f"{here}:reference": 0.25}
    rows = []
    trainer = build(check_recipe(read_recipe(recipe(reward=weights, rollouts=2, internal_steps=1))), tmp_path / "run")
    trainer.on_rollout.append(lambda batch, rollout: rows.append((trainer.rewards, batch["advantages"])))
    trainer.train()
    assert trainer.reward_func_names == list(weights)
    rewards, advantages = rows[0]
    assert rewards[:, 1].tolist() == list(range(8))
    assert any(batch[:, 2].isnan().any() for batch, _ in rows)
    totals = (rewards.nan_to_num() @ torch.tensor([2, -0.5, 0.25])).view(-1, 4)
    expected = (totals - totals.mean(1, keepdim=True)) / (totals.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(advantages, expected.flatten())
    assert "rewards/answer/mean" in trainer.state.log_history[0]


async def failing(completions, **columns):
    raise KeyError("gold")


async def infinite(completions, **columns):
    return [math.inf] * len(completions)


@pytest.mark.parametrize(("name", "part"), [("failing", "failed with KeyError"), ("infinite", "returned inf for")])
def test_an_async_reward_of_a_recipe_that_fails_is_named(tmp_path, recipe, name, part):  # noqa: F811
    name = f"tests.train.test_rewards:{name}"
    trainer = build(check_recipe(read_recipe(recipe(reward=["answer", name]))), tmp_path / "run")
    with pytest.raises(InputError, match=f"^reward {name} .*{part}"):
        trainer.train()


def test_the_grader_is_a_reward_of_the_trainer(tmp_path):
    data = Dataset.from_dict({"prompt": ["w3 w4", "w5"] * 4, "answer": ["1", None] * 4})
    trainer = make_trainer(
        tmp_path, internal_steps=0, max_steps=1, reward_funcs=[Grader(), boxed_string], train_dataset=data
    )
    trainer.train()
    assert trainer.reward_func_names == ["answer", "boxed_string"]
    assert {tuple(row) for row in trainer.rewards.nan_to_num(-1).tolist()} == {(0.0, 0.0), (-1.0, -1.0)}
    assert trainer.state.log_history[0]["grading/unparsable"] == pytest.approx(0.5, abs=0.5)
