"""Advantage estimators against enumerated small cases, and ladders and joint objectives in the trainer."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from transformers import TrainerCallback

from bupo.errors import ConfigError
from bupo.train import advantages as estimators
from bupo.train.advantages import advantages
from tests.support.training import config, even_share, losses, make_trainer, same_weights, weights
from tests.train.test_trainer import L, Recorder, above, internal_logps, surrogate, trained

R = [1.0, 0.0, 0.5, 1.0, 0.0, 0.0, 1.0, 0.25]  # two questions of four
NAN = math.nan


def test_rloo_is_the_distance_from_the_others_mean():
    wanted = [R[i] - statistics.mean(R[j] for j in range(g, g + 4) if j != i) for g in (0, 4) for i in range(g, g + 4)]
    torch.testing.assert_close(advantages("rloo", torch.tensor(R), 4), torch.tensor(wanted))


def test_reinforce_plus_plus_normalises_over_the_batch():
    mean, deviation = statistics.mean(R), statistics.stdev(R)
    wanted = torch.tensor([(r - mean) / (deviation + 1e-4) for r in R])
    torch.testing.assert_close(advantages("reinforce++", torch.tensor(R), 4), wanted)


def test_its_baseline_variant_takes_the_questions_mean_first():
    centred = [r - statistics.mean(R[g : g + 4]) for g in (0, 4) for r in R[g : g + 4]]
    mean, deviation = statistics.mean(centred), statistics.stdev(centred)
    wanted = torch.tensor([(c - mean) / (deviation + 1e-4) for c in centred])
    torch.testing.assert_close(advantages("reinforce++-baseline", torch.tensor(R), 4), wanted)


@pytest.mark.parametrize("name", estimators.OWN)
def test_equal_rewards_give_none(name):
    assert not advantages(name, torch.ones(8), 4).any()


@pytest.mark.parametrize("name", estimators.OWN)
def test_responses_that_could_not_be_scored_count_nowhere(name):
    with_gap = torch.tensor([1.0, NAN, 0.0, 1.0])
    found = advantages(name, with_gap, 4)
    assert found[1] == 0
    alone = advantages(name, torch.tensor([1.0, 0.0, 1.0]), 3)
    torch.testing.assert_close(found[[0, 2, 3]], alone)
    assert not advantages(name, torch.full((4,), NAN), 4).any()
    assert not advantages(name, torch.tensor([NAN, NAN, NAN, 1.0]), 4).any()


def test_unknown_estimators(tmp_path):
    with pytest.raises(ValueError, match="unknown estimator"):
        advantages("gae", torch.ones(4), 4)
    with pytest.raises(ConfigError, match="estimator must be one of grpo, dr_grpo"):
        config(tmp_path, estimator="gae")


SETTINGS = [
    ("grpo", {"loss_type": "dapo", "scale_rewards": "group", "epsilon_high": None}),
    ("dr_grpo", {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    ("dapo", {"loss_type": "dapo", "scale_rewards": "group", "epsilon": 0.2, "epsilon_high": 0.28}),
    ("rloo", {"scale_rewards": "none"}),
]


@pytest.mark.parametrize(("name", "wanted"), SETTINGS)
def test_settings_of_estimators(tmp_path, name, wanted):
    args = config(tmp_path, estimator=name)
    assert {field: getattr(args, field) for field in wanted} == wanted


def test_settings_that_contradict_the_estimator(tmp_path):
    with pytest.raises(ConfigError, match="estimator dr_grpo sets loss_type to 'dr_grpo'; do not set it to 'bnpo'"):
        config(tmp_path, estimator="dr_grpo", loss_type="bnpo")
    with pytest.raises(ConfigError, match="estimator rloo sets scale_rewards to 'none'"):
        config(tmp_path, estimator="rloo", scale_rewards="batch")
    with pytest.raises(ConfigError, match="weighted sum"):
        config(tmp_path, estimator="rloo", multi_objective_aggregation="normalize_then_sum")
    assert config(tmp_path, estimator="dapo", epsilon_high=0.4).epsilon_high == 0.4


@pytest.mark.parametrize("name", [name for name in estimators.NAMES if name != "ppo"])  # that one: test_critic.py
def test_estimators_in_training(tmp_path, name):
    """In both phases, the advantage of every response is the estimator's of its reward and its rollout batch."""
    trainer = make_trainer(tmp_path, Recorder, estimator=name, internal_steps=1, num_generations=4)
    trainer.train()
    shown = torch.tensor(list(trainer._logs["advantages"]))  # of the second rollout batch, in order
    rewards = torch.tensor(list(trainer._logs["rewards"]["even_share"]))
    if name in estimators.OWN:
        wanted = advantages(name, rewards, 4)
    else:
        groups = rewards.view(-1, 4)
        wanted = groups - groups.mean(1, keepdim=True)
        wanted = (wanted / (groups.std(1, keepdim=True) + 1e-4) if name != "dr_grpo" else wanted).flatten()
    torch.testing.assert_close(shown, wanted, rtol=1e-4, atol=1e-5)
    for start in (0, 4):
        used = torch.cat([trainer.seen[i][1]["advantages"] for i in range(start, start + 4)])
        scored = torch.tensor(
            even_share(
                [
                    row[mask.bool()].tolist()
                    for i in range(start, start + 4)
                    for row, mask in zip(
                        trainer.seen[i][1]["completion_ids"], trainer.seen[i][1]["completion_mask"], strict=True
                    )
                ]
            )
        )
        assert used.shape == scored.shape  # the batch was shuffled: a better response still has a greater advantage
        if name == "reinforce++":
            assert torch.equal(used.argsort(stable=True), scored.argsort(stable=True))
    torch.testing.assert_close(used.sort().values, shown.sort().values, rtol=1e-4, atol=1e-5)


# -- ladder --------------------------------------------------------------------------------------------------------


def test_a_ladder_trains_one_layer_after_the_other(tmp_path):
    seen = []

    class Reached(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.append({n for n, p in model.named_parameters() if p.grad is not None})

    trainer = make_trainer(
        tmp_path,
        internal_layer=None,
        internal_ladder=[[1, 1], [3, 2]],
        updates_per_rollout=2,
        callbacks=[Reached()],
    )
    trainer.train()
    names = {name for name, _ in trainer.model.named_parameters()}
    for update, layer in zip(seen, (1, 1, 3, 3, 3, 3, None, None), strict=True):
        assert update == {n for n in names if layer is None or not above(n, layer)}
    assert [row["phase"] for row in trainer.state.log_history[:4]] == [1, 1, 1, 2]


def test_a_ladder_of_one_rung_is_the_two_phases(tmp_path):
    one, two = trained(
        lambda: make_trainer(tmp_path / "a", internal_layer=None, internal_ladder=[[2, 1]]),
        lambda: make_trainer(tmp_path / "b", internal_steps=1),
    )
    assert losses(one) == losses(two)
    assert same_weights(weights(one.model), weights(two.model))


def test_a_resumed_ladder(tmp_path):
    settings = {"internal_layer": None, "internal_ladder": [[1, 1], [3, 1]], "updates_per_rollout": 2, "max_steps": 6}
    settings |= {"save_strategy": "steps", "save_steps": 2, "internal_weight": 0.5}
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    rest = make_trainer(tmp_path, **settings)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_weights(weights(whole.model), weights(rest.model))


@pytest.mark.parametrize("rungs", [[], [3], [[1]], [[1, 0]], [[0, 1]], [[1, 2.0]], "1,2", [["auto", 1]]])
def test_wrong_ladders(tmp_path, rungs):
    with pytest.raises(ConfigError, match="a ladder is a list of"):
        config(tmp_path, internal_layer=None, internal_ladder=rungs)


def test_ladders_meet_the_same_checks(tmp_path):
    with pytest.raises(ConfigError, match="not both"):
        config(tmp_path, internal_ladder=[[1, 1]], internal_steps=2)
    with pytest.raises(ConfigError, match="beta"):
        config(tmp_path, internal_layer=None, internal_ladder=[[1, 1]], beta=0.1)
    with pytest.raises(ConfigError, match="inside an update"):
        config(
            tmp_path,
            internal_layer=None,
            internal_ladder=[[1, 1]],
            steps_per_generation=2,
            gradient_accumulation_steps=4,
        )
    with pytest.raises(ConfigError, match="layer 9 does not exist"):
        make_trainer(tmp_path, internal_layer=None, internal_ladder=[[1, 1], [9, 1]])


# -- joint objective -----------------------------------------------------------------------------------------------


def test_the_joint_loss_is_the_weighted_sum_of_both_surrogates(tmp_path):
    trainer = make_trainer(tmp_path, Recorder, internal_steps=1, internal_weight=0.3, max_steps=5)
    trainer.train()
    start = trainer.seen[0][0]
    for model, inputs, loss, _ in trainer.seen[:4]:
        both = []
        for layer, norm in ((2, False), (L, True)):
            with torch.no_grad():
                old, _ = internal_logps(start, inputs, layer, norm)
                logps, _ = internal_logps(model, inputs, layer, norm)
                both.append(surrogate(logps, old, inputs, "dapo", "token", 4))
        torch.testing.assert_close(loss, 0.3 * both[0] + 0.7 * both[1], rtol=1e-4, atol=1e-6)
    first = trainer.state.log_history[0]
    assert {"entropy", "internal/entropy", "clip_ratio/low_mean", "internal/clip_ratio/low_mean"} <= set(first)
    assert first["phase"] == 1


def test_every_layer_learns_from_the_joint_objective(tmp_path):
    trainer = make_trainer(tmp_path, internal_steps=2, internal_weight=0.5)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("weight", [0.0, -1.0, 1.5])
def test_wrong_weights(tmp_path, weight):
    with pytest.raises(ConfigError, match="internal_weight must be above 0 and at most 1"):
        config(tmp_path, internal_weight=weight)
