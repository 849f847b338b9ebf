"""Advantage estimators against enumerated small cases, and in training with every kind of schedule."""

import math
from statistics import mean, stdev

import pytest
import torch

from bupo.train.advantages import COMPUTED_HERE, ESTIMATORS, outcome_advantages, total_rewards
from tests.support.training import Gradients, Recorder, above, losses, make_trainer, phases, trained

R = [1.0, 0.0, 0.5, 1.0, 0.0, 0.0, 1.0, 0.25]  # two questions of four
CENTRED = [r - mean(R[start : start + 4]) for start in (0, 4) for r in R[start : start + 4]]
NAN = math.nan
BY_HAND = {
    "rloo": [R[i] - mean(R[j] for j in range(s, s + 4) if j != i) for s in (0, 4) for i in range(s, s + 4)],
    "reinforce++": [(r - mean(R)) / (stdev(R) + 1e-4) for r in R],
    "reinforce++-baseline": [(c - mean(CENTRED)) / (stdev(CENTRED) + 1e-4) for c in CENTRED],
}


@pytest.mark.parametrize("name", COMPUTED_HERE)
def test_estimators_by_hand(name):
    torch.testing.assert_close(outcome_advantages(name, torch.tensor(R), 4), torch.tensor(BY_HAND[name]))
    assert not outcome_advantages(name, torch.ones(8), 4).any()
    # responses that could not be scored
    advantages = outcome_advantages(name, torch.tensor([1.0, NAN, 0.0, 1.0]), 4)
    assert advantages[1] == 0
    alone = outcome_advantages(name, torch.tensor([1.0, 0.0, 1.0]), 3)
    torch.testing.assert_close(advantages[[0, 2, 3]], alone)
    assert not outcome_advantages(name, torch.full((4,), NAN), 4).any()
    assert not outcome_advantages(name, torch.tensor([NAN, NAN, NAN, 1.0]), 4).any()


def test_total_rewards_leave_out_what_a_function_could_not_score():
    rewards = torch.tensor([[1.0, 2.0], [NAN, 2.0], [NAN, NAN]])
    assert total_rewards(rewards, torch.tensor([1.0, 0.5])).nan_to_num(-1).tolist() == [2.0, 1.0, -1.0]


@pytest.mark.parametrize("name", ["grpo", *COMPUTED_HERE])  # ppo: test_critic.py
def test_estimators_in_training(tmp_path, name):
    """In both phases, the advantage of every response is the estimator's of its reward and its rollout batch."""
    trainer, seen = make_trainer(tmp_path, Recorder, estimator=name, internal_steps=1), []
    trainer.on_rollout.append(lambda batch, rollout: seen.append((trainer.rewards[:, 0], batch["advantages"])))
    trainer.train()
    for rewards, advantages in seen:
        groups = rewards.view(-1, 4)
        grpo = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        expected = grpo.flatten() if name == "grpo" else outcome_advantages(name, rewards, 4)
        torch.testing.assert_close(advantages, expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == 2
    torch.testing.assert_close(torch.tensor(list(trainer._logs["advantages"])), expected, rtol=1e-4, atol=1e-5)
    used = torch.cat([inputs["advantages"] for _, inputs, _, _ in trainer.seen[4:]])  # shuffled
    torch.testing.assert_close(used.sort().values, expected.sort().values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_runs_with_every_kind_of_phase(tmp_path, estimator):
    seen, layers = Gradients(), [1, 4, 3, None]  # the second is a joint phase, which reaches all layers
    kinds = [{"layer": 1, "rollouts": 1}, {"layer": 2, "rollouts": 1, "weight": 0.4}, {"layer": 3, "rollouts": 1}]
    batches = {"num_generations": 2, "per_device_train_batch_size": 2, "updates_per_rollout": 2}
    trainer = trained(tmp_path, estimator=estimator, max_completion_length=3, phases=kinds, callbacks=[seen], **batches)
    assert all(math.isfinite(loss) for loss in losses(trainer))
    assert phases(trainer) == [1, 1, 1, 2]
    names = {name for name, _ in trainer.model.named_parameters()}
    for number, update in enumerate(seen.updates):
        layer = layers[number // 2]
        assert set(update) == (names if layer in (4, None) else {n for n in names if not above(n, layer)}), number
    assert (trainer.critic is not None) == (estimator == "ppo")
