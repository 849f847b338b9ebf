"""Advantage estimators against enumerated small cases, and in training with every kind of schedule."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from bupo.train.advantages import COMPUTED_HERE, ESTIMATORS, outcome_advantages, total_rewards
from tests.support.training import Gradients, Recorder, above, even_share, losses, phases, trained

R = [1.0, 0.0, 0.5, 1.0, 0.0, 0.0, 1.0, 0.25]  # two questions of four
NAN = math.nan


def test_rloo_is_the_distance_from_the_mean_of_the_others():
    expected = [
        R[i] - statistics.mean(R[j] for j in range(g, g + 4) if j != i) for g in (0, 4) for i in range(g, g + 4)
    ]
    torch.testing.assert_close(outcome_advantages("rloo", torch.tensor(R), 4), torch.tensor(expected))


def test_reinforce_plus_plus_normalises_over_the_batch():
    mean, deviation = statistics.mean(R), statistics.stdev(R)
    expected = torch.tensor([(r - mean) / (deviation + 1e-4) for r in R])
    torch.testing.assert_close(outcome_advantages("reinforce++", torch.tensor(R), 4), expected)


def test_its_baseline_variant_subtracts_the_mean_of_the_question_first():
    centred = [r - statistics.mean(R[g : g + 4]) for g in (0, 4) for r in R[g : g + 4]]
    mean, deviation = statistics.mean(centred), statistics.stdev(centred)
    expected = torch.tensor([(c - mean) / (deviation + 1e-4) for c in centred])
    torch.testing.assert_close(outcome_advantages("reinforce++-baseline", torch.tensor(R), 4), expected)


@pytest.mark.parametrize("name", COMPUTED_HERE)
def test_equal_rewards_and_responses_that_could_not_be_scored(name):
    assert not outcome_advantages(name, torch.ones(8), 4).any()
    advantages = outcome_advantages(name, torch.tensor([1.0, NAN, 0.0, 1.0]), 4)
    assert advantages[1] == 0
    alone = outcome_advantages(name, torch.tensor([1.0, 0.0, 1.0]), 3)
    torch.testing.assert_close(advantages[[0, 2, 3]], alone)
    assert not outcome_advantages(name, torch.full((4,), NAN), 4).any()
    assert not outcome_advantages(name, torch.tensor([NAN, NAN, NAN, 1.0]), 4).any()


def test_total_rewards_leave_out_what_a_function_could_not_score():
    rewards = torch.tensor([[1.0, 2.0], [NAN, 2.0], [NAN, NAN]])
    assert total_rewards(rewards, torch.tensor([1.0, 0.5])).nan_to_num(-1).tolist() == [2.0, 1.0, -1.0]
    with pytest.raises(ValueError, match="unknown estimator"):
        outcome_advantages("gae", torch.ones(4), 4)


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "ppo"])  # that one: test_critic.py
def test_estimators_in_training(tmp_path, name):
    """In both phases, the advantage of every response is the estimator's of its reward and its rollout batch."""
    trainer = trained(tmp_path, Recorder, estimator=name, internal_steps=1)
    shown = torch.tensor(list(trainer._logs["advantages"]))  # of the second rollout batch, in order
    rewards = torch.tensor(list(trainer._logs["rewards"]["even_share"]))
    if name == "grpo":
        groups = rewards.view(-1, 4)
        centred = groups - groups.mean(1, keepdim=True)
        expected = (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    else:
        expected = outcome_advantages(name, rewards, 4)
    torch.testing.assert_close(shown, expected, rtol=1e-4, atol=1e-5)
    for start in (0, 4):
        inputs = [trainer.seen[i][1] for i in range(start, start + 4)]
        used = torch.cat([i["advantages"] for i in inputs])
        rows = [(r, m.bool()) for i in inputs for r, m in zip(i["completion_ids"], i["completion_mask"], strict=True)]
        scored = torch.tensor(even_share([row[mask].tolist() for row, mask in rows]))
        if name == "reinforce++":  # the batch was shuffled, but a better response has a greater advantage
            assert torch.equal(used.argsort(stable=True), scored.argsort(stable=True))
    torch.testing.assert_close(used.sort().values, shown.sort().values, rtol=1e-4, atol=1e-5)


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
