"""The phase guard: its rules on made-up signals, and what the monitor and the trainer do with its decisions."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from bupo.train.auto_layer import spread_rows
from bupo.train.guard import WINDOW, PhaseGuard, Signals
from bupo.train.monitor import repeated_ngrams
from tests.support.training import (
    Recorder,
    ScriptedGuard,
    above,
    internal_logps,
    losses,
    make_trainer,
    phases,
    resumed,
    same_weights,
    trained,
    weights,
)

GOOD = Signals(reward=0.5, reward_error=0.05, perplexity=1.2, divergence=2.0, transfer=0.4, transfer_responses=32)


def observe(history):
    """The first decision that is not to continue, with the number of the batch it came after, else the last one."""
    guard = PhaseGuard()
    for number, signals in enumerate(history, start=1):
        decision = guard.observe(signals)
        if decision.action != "continue":
            return number, decision
    return len(history), decision


# -- rules -----------------------------------------------------------------------------------------------------------


def test_a_phase_that_serves_the_full_policy_goes_on():
    draws = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).tolist()
    history = [
        Signals(0.4 + 0.004 * i + 0.04 * a, 0.05, 1.2 + 0.02 * b, 2.0 + 0.1 * c, 0.4, 32)
        for i, (a, b, c) in enumerate(draws)
    ]
    assert observe(history)[1].action == "continue"
    bad = replace(GOOD, reward=0.4, perplexity=1.25, divergence=2.3)  # one bad batch is no harm
    assert observe([GOOD] * 6 + [bad] + [GOOD] * 6)[1].action == "continue"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"reward": 0.2}, "reward fell from 0.500 to"),
        ({"perplexity": 1.6}, "perplexity on its responses rose from 1.200 to"),
        ({"divergence": 6.0}, "KL(full || internal) rose from 2.00 to"),
    ],
)
def test_harm_is_named_and_undone(change, reason):
    number, decision = observe([GOOD] * 6 + [replace(GOOD, **change)] * WINDOW)
    assert 6 < number <= 6 + WINDOW
    assert reason in decision.reason
    # where the reward is no lower, the weights that the phase ended with are the best
    assert decision.action in (("restore",) if "reward" in change else ("restore", "switch"))


def test_the_best_weights_are_kept_and_gone_back_to():
    guard = PhaseGuard()
    rewards = [0.3, 0.3, 0.4, 0.4, 0.5, 0.6, 0.5, 0.4, 0.2, 0.1, 0.1]
    decisions = [guard.observe(replace(GOOD, reward=r)) for r in rewards]
    assert [d.keep for d in decisions] == [False] * 3 + [True] * 5 + [False] * 3  # while the mean of four does not fall
    assert [d.action for d in decisions].index("restore") == 8
    assert "reward fell from 0.500 to 0.425" in decisions[8].reason


@pytest.mark.parametrize("mean", [-0.3, 0.0, 0.1])
def test_updates_that_do_not_serve_the_full_policy_end_the_phase(mean):
    first = replace(GOOD, transfer=None, transfer_responses=0)
    number, decision = observe([first] + [replace(GOOD, transfer=mean)] * 10)
    assert number == WINDOW + 1  # as soon as a window of it is known
    assert decision.action == "switch"
    assert f"{mean:+.3f} (standard error {1 / math.sqrt(WINDOW * 32):.3f})" in decision.reason


def test_more_responses_make_a_small_transfer_count():
    assert observe([replace(GOOD, transfer=0.1, transfer_responses=512)] * 9)[1].action == "continue"
    assert observe([replace(GOOD, transfer=0.1, transfer_responses=32)] * 9)[1].action == "switch"
    assert observe([replace(GOOD, transfer=None, transfer_responses=0)] * 9)[1].action == "continue"


def test_a_guard_continues_from_its_state():
    one, two = PhaseGuard(), PhaseGuard()
    history = [replace(GOOD, reward=0.5 - 0.02 * i, transfer=None if i == 0 else 0.3) for i in range(12)]
    for signals in history[:6]:
        one.observe(signals)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert [one.observe(s) for s in history[6:]] == [two.observe(s) for s in history[6:]]


# -- measuring -------------------------------------------------------------------------------------------------------


def test_transfer_is_the_correlation_of_advantage_and_change(tmp_path):
    trainer = trained(tmp_path, Recorder, internal_steps=2, probe_samples=16)
    start, end = trainer.seen[0][0], trainer.seen[4][0]
    changes, advantages = [], []
    for _, inputs, _, _ in trainer.seen[:4]:
        with torch.no_grad():
            logps = [internal_logps(model, inputs, 4, norm=True)[0] for model in (start, end)]
        changes.append(((logps[1] - logps[0]) * inputs["completion_mask"]).sum(-1))
        advantages.append(inputs["advantages"])
    expected = torch.corrcoef(torch.stack([torch.cat(changes), torch.cat(advantages)]))[0, 1].item()
    first, second = trainer.state.log_history[:2]
    assert "internal/transfer" not in first
    assert second["internal/transfer"] == pytest.approx(expected, abs=1e-4)


def test_repetition_and_rows():
    assert repeated_ngrams([[1, 2, 3, 4, 1, 2, 3, 4, 1, 2], [5, 6, 7], [9] * 7]) == (3 + 3, 7 + 4)
    assert repeated_ngrams([[1, 2], []]) == (0, 0)
    assert spread_rows(8, 3).tolist() == [0, 4, 7]
    assert spread_rows(3, 9).tolist() == [0, 1, 2]


# -- in the trainer --------------------------------------------------------------------------------------------------


GUARDED = {"internal_steps": "auto", "internal_max_steps": 5, "max_steps": 12, "updates_per_rollout": 2}


def guarded(folder, script, **changes):
    trainer = make_trainer(folder, Recorder, **{**GUARDED, **changes})
    trainer.monitor.guard = ScriptedGuard(script)
    return trainer


def test_a_switch_equals_the_schedule_with_that_many_steps(tmp_path):
    early = guarded(tmp_path / "a", "...s")
    early.train()
    fixed = trained(tmp_path / "b", internal_steps=3, max_steps=12, updates_per_rollout=2)
    assert early.schedule == fixed.schedule
    assert early.phase_end == {"rollouts": 3, "action": "switch", "reason": "as scripted"}
    assert losses(early) == losses(fixed)
    assert same_weights(weights(early.model), weights(fixed.model))
    assert phases(early) == phases(fixed) == [1, 1, 1, 2, 2, 2]


def test_restoring_goes_back_to_the_best_weights_and_samples_anew(tmp_path):
    trainer = guarded(tmp_path, "..k.r")
    trainer.train()
    kept, after = trainer.seen[4][0], trainer.seen[8][0]  # before the third and the fifth rollout batch's updates
    assert same_weights(weights(kept), weights(after))
    assert not same_weights(weights(kept), weights(trainer.seen[7][0]))
    assert trainer.schedule.ends == (4,)
    model, inputs, _, _ = trainer.seen[8]
    with torch.no_grad():
        full, _ = internal_logps(model, inputs, 4, norm=True)
    mask = inputs["completion_mask"].bool()
    torch.testing.assert_close(inputs["old_per_token_logps"][mask], full[mask], rtol=1e-4, atol=1e-5)
    row = trainer.state.log_history[4]
    assert (row["phase"], row["rollout"]) == (2, 5)
    assert not any(name.startswith("internal") for name in row)
    assert not trainer.monitor.best_weights
    assert not trainer.monitor.samples
    steps = {int(trainer.optimizer.state[p]["step"]) for p in trainer.model.parameters()}
    assert steps == {4}  # moments do not survive: four updates since the restore, in every layer


def test_the_phase_ends_at_the_latest_at_its_limit(tmp_path):
    trainer = guarded(tmp_path, "......", internal_max_steps=2)
    trainer.train()
    assert trainer.phase_end is None
    assert phases(trainer) == [1, 1, 2, 2, 2, 2]


def test_a_decision_waits_for_the_end_of_an_update(tmp_path):
    # an update spans two rollout batches
    batches = {"steps_per_generation": 1, "gradient_accumulation_steps": 2, "updates_per_rollout": None}
    trainer = guarded(tmp_path, ".sss......", internal_max_steps=6, max_steps=4, **batches)
    trainer.train()
    assert trainer.phase_end["rollouts"] == 2


@pytest.mark.parametrize("at", [1, 3, 4, 5], ids=["early", "kept", "ended", "after"])
def test_a_resumed_run_decides_the_same(tmp_path, at, monkeypatch):
    monkeypatch.setattr("bupo.train.monitor.PhaseGuard", lambda: ScriptedGuard("..k.r"))
    settings = {**GUARDED, "save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path, **settings)
    assert whole.phase_end == {"rollouts": 4, "action": "restore", "reason": "as scripted"}
    assert resumed(tmp_path / "rest", whole, 2 * at, **settings).phase_end == whole.phase_end


def test_only_what_the_phase_trains_is_kept(tmp_path):
    trainer = guarded(tmp_path, ".k....", internal_max_steps=3, max_steps=6)
    trainer.train()
    names = {name for name, _ in trainer.model.named_parameters()}
    lower = {name for name in names if not above(name, 2)}
    assert lower <= set(trainer.monitor.best_weights) <= lower | {"model.norm.weight"}


def test_a_real_guard_in_a_real_run(tmp_path):
    """Random weights and a high learning rate: whatever it decides, the run ends and its records agree."""
    settings = {**GUARDED, "internal_max_steps": 7, "max_steps": 16, "learning_rate": 3e-2}
    trainer = trained(tmp_path, **settings)
    internal = phases(trainer).count(1)
    assert phases(trainer) == [1] * internal + [2] * (8 - internal)
    assert internal == (trainer.phase_end["rollouts"] if trainer.phase_end else 7)
    assert internal >= WINDOW
    assert len(trainer.monitor.guard.history) in (internal, internal + 1)
