"""The phase guard: its rules on made-up signals, and what the monitor and the trainer do with its decisions."""

import math
from types import SimpleNamespace

import pytest
import torch

from bupo.train import guard
from bupo.train.diagnostics import spread_rows
from bupo.train.guard import WINDOW, PhaseMonitor, Signals, decide, repeated_ngrams
from tests.support.training import (
    Recorder,
    above,
    internal_logps,
    losses,
    phases,
    resumed,
    same_weights,
    scripted,
    trained,
    weights,
)

GOOD = Signals(reward=0.5, reward_error=0.05, perplexity=1.2, divergence=2.0, transfer=0.4, transfer_responses=32)
UNKNOWN = GOOD._replace(transfer=None, transfer_responses=0)


def observe(history):
    """The first decision that is not to continue, with the number of the batch it came after, else the last one."""
    decisions = [decide(history[: i + 1]) for i in range(len(history))]
    return next(((i, d) for i, d in enumerate(decisions, 1) if d.action != "continue"), (len(history), decisions[-1]))


def test_a_phase_that_serves_the_full_policy_goes_on():
    draws = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).tolist()
    noisy = [(0.4 + 0.004 * i + 0.04 * a, 0.05, 1.2 + 0.02 * b, 2 + 0.1 * c) for i, (a, b, c) in enumerate(draws)]
    assert observe([Signals(*one, 0.4, 32) for one in noisy])[1].action == "continue"
    bad = GOOD._replace(reward=0.4, perplexity=1.25, divergence=2.3)  # one bad batch is no harm
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
    number, decision = observe([GOOD] * 6 + [GOOD._replace(**change)] * WINDOW)
    assert 6 < number <= 6 + WINDOW
    assert reason in decision.reason
    # where the reward is no lower, the weights that the phase ended with are the best
    assert decision.action in (("restore",) if "reward" in change else ("restore", "switch"))


def test_the_best_weights_are_kept_and_gone_back_to():
    history = [GOOD._replace(reward=r) for r in (0.3, 0.3, 0.4, 0.4, 0.5, 0.6, 0.5, 0.4, 0.2, 0.1, 0.1)]
    decisions = [decide(history[: i + 1]) for i in range(len(history))]
    assert [d.keep for d in decisions] == [False] * 3 + [True] * 5 + [False] * 3  # while the mean of four does not fall
    assert [d.action for d in decisions].index("restore") == 8
    assert "reward fell from 0.500 to 0.425" in decisions[8].reason


def test_one_question_per_batch_tells_no_error_and_no_harm():
    settings = SimpleNamespace(num_generations=4)
    trainer = SimpleNamespace(rewards=torch.tensor([[0.0], [1.0]] * 4), reward_weights=torch.ones(1), args=settings)
    monitor = SimpleNamespace(_trainer=trainer)
    assert PhaseMonitor._reward_and_error(monitor) == (0.5, 0.0)
    settings.num_generations = 8
    reward, error = PhaseMonitor._reward_and_error(monitor)
    assert reward == 0.5
    assert math.isnan(error)
    alone = [GOOD._replace(reward=r, reward_error=error) for r in (0.9, 0.9, 0.9, 0.9, 0.1, 0.1, 0.1, 0.1)]
    assert observe(alone)[1].action == "continue"


@pytest.mark.parametrize("mean", [-0.3, 0.0, 0.1])
def test_updates_that_do_not_serve_the_full_policy_end_the_phase(mean):
    number, decision = observe([UNKNOWN] + [GOOD._replace(transfer=mean)] * 10)
    assert number == WINDOW + 1  # as soon as a window of it is known
    assert decision.action == "switch"
    assert f"{mean:+.3f} (standard error {1 / math.sqrt(WINDOW * 32):.3f})" in decision.reason
    # more responses make a small transfer count
    if mean > 0:
        assert observe([GOOD._replace(transfer=mean, transfer_responses=512)] * 9)[1].action == "continue"
    assert observe([UNKNOWN] * 9)[1].action == "continue"


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


GUARDED = {"internal_steps": "auto", "internal_max_steps": 5, "max_steps": 12, "updates_per_rollout": 2}


@pytest.fixture
def guarded(tmp_path, monkeypatch):
    """Train under a guard that decides by a script."""

    def guarded(script, folder=tmp_path, **changes):
        monkeypatch.setattr(guard, "decide", scripted(script))
        return trained(folder, Recorder, **{**GUARDED, **changes})

    return guarded


def test_a_switch_equals_the_schedule_with_that_many_steps(tmp_path, guarded):
    early = guarded("...s", tmp_path / "a")
    fixed = trained(tmp_path / "b", internal_steps=3, max_steps=12, updates_per_rollout=2)
    assert early.schedule == fixed.schedule
    assert early.phase_end == {"rollouts": 3, "action": "switch", "reason": "as scripted"}
    assert losses(early) == losses(fixed)
    assert same_weights(weights(early.model), weights(fixed.model))
    assert phases(early) == phases(fixed) == [1, 1, 1, 2, 2, 2]


def test_restoring_goes_back_to_the_best_weights_and_samples_anew(guarded):
    trainer = guarded("..k.r")
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
    assert trainer.monitor.best_weights == trainer.monitor.samples == {}
    steps = {int(trainer.optimizer.state[p]["step"]) for p in trainer.model.parameters()}
    assert steps == {4}  # moments do not survive: four updates since the restore, in every layer


def test_the_phase_ends_at_its_limit_and_only_what_it_trains_is_kept(guarded):
    assert phases(guarded("......", internal_max_steps=2)) == [1, 1, 2, 2, 2, 2]
    trainer = guarded(".k....", internal_max_steps=3, max_steps=6)
    assert trainer.phase_end is None
    lower = {name for name, _ in trainer.model.named_parameters() if not above(name, 2)}
    assert lower <= set(trainer.monitor.best_weights) <= lower | {"model.norm.weight"}
    # a decision waits for the end of an update, which spans two rollout batches here
    batches = {"steps_per_generation": 1, "gradient_accumulation_steps": 2, "updates_per_rollout": None}
    assert guarded(".sss......", internal_max_steps=6, max_steps=4, **batches).phase_end["rollouts"] == 2


@pytest.mark.parametrize("at", [1, 3, 4, 5], ids=["early", "kept", "ended", "after"])
def test_a_resumed_run_decides_the_same(tmp_path, at, guarded):
    settings = {**GUARDED, "save_strategy": "steps", "save_steps": 2}
    whole = guarded("..k.r", **settings)
    assert whole.phase_end == {"rollouts": 4, "action": "restore", "reason": "as scripted"}
    rest = resumed(tmp_path / "rest", whole, 2 * at, **settings)
    assert rest.phase_end == whole.phase_end
    assert rest.monitor.history == whole.monitor.history


def test_a_real_guard_in_a_real_run(tmp_path):
    """Random weights and a high learning rate: whatever it decides, the run ends and its records agree."""
    settings = {**GUARDED, "internal_max_steps": 7, "max_steps": 16, "learning_rate": 3e-2}
    trainer = trained(tmp_path, **settings)
    internal = phases(trainer).count(1)
    assert phases(trainer) == [1] * internal + [2] * (8 - internal)
    assert internal == (trainer.phase_end["rollouts"] if trainer.phase_end else 7)
    assert internal >= WINDOW
    assert len(trainer.monitor.history) in (internal, internal + 1)
