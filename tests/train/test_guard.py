"""The phase guard: its rules on made-up signals, and what the trainer does with its verdicts."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from bupo.errors import ConfigError
from bupo.train.guard import WINDOW, PhaseGuard, Signals, Verdict
from tests.support.training import config, losses, make_trainer, same_weights, weights
from tests.train.test_trainer import Recorder, above, internal_logps, trained

GOOD = Signals(
    reward=0.5,
    reward_error=0.05,
    length=100.0,
    perplexity=1.2,
    repetition=0.02,
    divergence=2.0,
    transfer=0.4,
    transfer_responses=32,
)


def observe(history):
    """The first verdict that is not to continue, with the number of the batch it came after, else the last one."""
    guard = PhaseGuard()
    for number, signals in enumerate(history, start=1):
        verdict = guard.observe(signals)
        if verdict.action != "continue":
            return number, verdict
    return len(history), verdict


# -- rules ---------------------------------------------------------------------------------------------------------


def test_a_phase_that_serves_the_full_policy_goes_on():
    noise = torch.Generator().manual_seed(0)
    draws = torch.randn(40, 6, generator=noise).tolist()
    history = [
        Signals(0.4 + 0.004 * i + 0.04 * d[0], 0.05, 100 + 5 * d[1], 1.2 + 0.02 * d[2], 0.02, 2.0 + 0.1 * d[3], 0.4, 32)
        for i, d in enumerate(draws)
    ]
    assert observe(history)[1].action == "continue"


HARM = [
    ({"reward": 0.2}, "reward fell from 0.500 to"),
    ({"perplexity": 1.6}, "perplexity on its responses rose from 1.200 to"),
    ({"length": 900.0}, "mean response length went from 100 to"),
    ({"length": 1.0}, "mean response length went from 100 to"),
    ({"repetition": 0.5}, "repeated 4-grams rose from 2.0% to"),
    ({"divergence": 6.0}, "KL(full || internal) rose from 2.00 to"),
]


@pytest.mark.parametrize(("change", "reason"), HARM, ids=[str(c) for c, _ in HARM])
def test_harm_is_named_and_undone(change, reason):
    number, verdict = observe([GOOD] * 6 + [replace(GOOD, **change)] * WINDOW)
    assert 6 < number <= 6 + WINDOW
    assert reason in verdict.reason
    if "reward" in change:
        assert verdict.action == "restore"
    # harm that came with no less reward: nothing better is kept than what the phase ended with
    else:
        assert verdict.action in ("restore", "switch")


def test_one_bad_batch_is_no_harm():
    bad = replace(GOOD, reward=0.4, perplexity=1.25, length=130.0, divergence=2.3)
    assert observe([GOOD] * 6 + [bad] + [GOOD] * 6)[1].action == "continue"


def test_the_best_weights_are_kept_and_gone_back_to():
    guard = PhaseGuard()
    rewards = [0.3, 0.3, 0.4, 0.4, 0.5, 0.6, 0.5, 0.4, 0.2, 0.1, 0.1]
    verdicts = [guard.observe(replace(GOOD, reward=r)) for r in rewards]
    assert [v.keep for v in verdicts] == [False] * 3 + [True] * 5 + [False] * 3  # while the mean of four does not fall
    assert [v.action for v in verdicts].index("restore") == 8
    assert "reward fell from 0.500 to 0.425" in verdicts[8].reason


@pytest.mark.parametrize("mean", [-0.3, 0.0, 0.1])
def test_updates_that_do_not_serve_the_full_policy_end_the_phase(mean):
    first = replace(GOOD, transfer=None, transfer_responses=0)
    number, verdict = observe([first] + [replace(GOOD, transfer=mean)] * 10)
    assert number == WINDOW + 1  # as soon as a window of it is known
    assert verdict.action == "switch"
    assert f"{mean:+.3f} (standard error {1 / math.sqrt(WINDOW * 32):.3f})" in verdict.reason


def test_more_responses_make_a_small_transfer_count():
    assert observe([replace(GOOD, transfer=0.1, transfer_responses=512)] * 9)[1].action == "continue"
    assert observe([replace(GOOD, transfer=0.1, transfer_responses=32)] * 9)[1].action == "switch"
    assert observe([replace(GOOD, transfer=None, transfer_responses=0)] * 9)[1].action == "continue"


def test_state_round_trip():
    one = PhaseGuard()
    history = [replace(GOOD, reward=0.5 - 0.02 * i, transfer=None if i == 0 else 0.3) for i in range(12)]
    for signals in history[:6]:
        one.observe(signals)
    two = PhaseGuard.from_state(json.loads(json.dumps(one.state())))
    assert [one.observe(s) for s in history[6:]] == [two.observe(s) for s in history[6:]]


# -- in the trainer ------------------------------------------------------------------------------------------------


class Scripted(PhaseGuard):
    """Says what it was told to say after each batch: k keep, s switch, r restore, anything else continue."""

    script = ""

    def observe(self, signals):
        self.history.append(signals)
        letter = self.script[len(self.history) - 1]
        action = {"s": "switch", "r": "restore"}.get(letter, "continue")
        return Verdict(action, "as scripted" if action != "continue" else "", keep=letter == "k")


def guarded(folder, script, kind=Recorder, **changes):
    settings = {"internal_steps": "auto", "internal_max_steps": 5, "max_steps": 12, "updates_per_rollout": 2}
    trainer = make_trainer(folder, kind, **{**settings, **changes})
    trainer.guard = type("G", (Scripted,), {"script": script})()
    return trainer


def test_a_switch_is_the_schedule_with_that_many_steps(tmp_path):
    early, fixed = trained(
        lambda: guarded(tmp_path / "a", "...s"),
        lambda: make_trainer(tmp_path / "b", Recorder, internal_steps=3, max_steps=12, updates_per_rollout=2),
    )
    assert early.schedule == fixed.schedule
    assert early.phase_end == {"rollouts": 3, "action": "switch", "reason": "as scripted"}
    assert losses(early) == losses(fixed)
    assert same_weights(weights(early.model), weights(fixed.model))
    rows = [early.state.log_history, fixed.state.log_history]
    assert [[r["phase"] for r in log[:-1]] for log in rows] == [[1, 1, 1, 2, 2, 2]] * 2


def test_restoring_goes_back_to_the_kept_weights_and_samples_anew(tmp_path):
    trainer = guarded(tmp_path, "..k.r")
    trainer.train()
    kept, after = trainer.seen[4][0], trainer.seen[8][0]  # before the third and the fifth rollout batch's updates
    assert same_weights(weights(kept), weights(after))
    assert not same_weights(weights(kept), weights(trainer.seen[7][0]))
    assert trainer.schedule.switches == (4,)
    model, inputs, _, _ = trainer.seen[8]
    with torch.no_grad():
        full, _ = internal_logps(model, inputs, 4, norm=True)
    mask = inputs["completion_mask"].bool()
    torch.testing.assert_close(inputs["old_per_token_logps"][mask], full[mask], rtol=1e-4, atol=1e-5)
    row = trainer.state.log_history[4]
    assert (row["phase"], row["rollout"]) == (2, 5)
    assert not any(name.startswith("internal") for name in row)
    assert trainer._kept is None
    assert trainer._probed is None


def test_optimizer_moments_do_not_survive_a_restore(tmp_path):
    trainer = guarded(tmp_path, ".k.r")
    trainer.train()
    names = dict(trainer.model.named_parameters())
    states = trainer.optimizer.state
    steps = {name: int(states[p]["step"]) for name, p in names.items()}
    assert set(steps.values()) == {6}  # six updates since the restore, in every layer


def test_the_phase_ends_at_the_latest_where_it_was_told(tmp_path):
    trainer = guarded(tmp_path, "......", internal_max_steps=2)
    trainer.train()
    assert trainer.phase_end is None
    assert trainer.schedule.switches == (2,)
    assert [row["phase"] for row in trainer.state.log_history[:-1]] == [1, 1, 2, 2, 2, 2]


def test_a_verdict_waits_for_the_end_of_an_update(tmp_path):
    # an update spans two rollout batches
    batches = {"steps_per_generation": 1, "gradient_accumulation_steps": 2, "updates_per_rollout": None}
    trainer = guarded(tmp_path, ".sss......", internal_max_steps=6, max_steps=4, num_generations=4, **batches)
    trainer.train()
    assert trainer.phase_end["rollouts"] == 2


@pytest.mark.parametrize("at", [1, 3, 4, 5], ids=["early", "kept", "ended", "after"])
def test_a_resumed_run_decides_the_same(tmp_path, at):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = guarded(tmp_path, "..k.r", **saving)
    whole.train()
    rest = guarded(tmp_path / "rest", "..k.r", **saving)
    script = rest.guard.script
    load = rest._load_watch

    def keep_script(folder, state):
        load(folder, state)
        if rest.guard is not None:
            history = rest.guard.history
            rest.guard = type("G", (Scripted,), {"script": script})(history)

    rest._load_watch = keep_script
    rest.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{2 * at}"))
    assert rest.phase_end == whole.phase_end
    assert same_weights(weights(whole.model), weights(rest.model))
    timed = {"step_time"}
    for a, b in zip(whole.state.log_history[:-1], rest.state.log_history[:-1], strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}


def test_only_what_the_phase_trains_is_kept(tmp_path):
    trainer = guarded(tmp_path, ".k....", internal_max_steps=4, max_steps=6)
    trainer.train()
    names = {name for name, _ in trainer.model.named_parameters()}
    lower = {name for name in names if not above(name, 2)}
    assert lower <= set(trainer._kept) <= lower | {"model.norm.weight"}
    joint = guarded(tmp_path / "joint", ".k....", internal_max_steps=4, max_steps=6, internal_weight=0.5)
    joint.train()
    assert set(joint._kept) == names


def test_transfer_is_the_correlation_of_advantage_and_change(tmp_path):
    trainer = make_trainer(tmp_path, Recorder, internal_steps=2, probe_samples=16)
    trainer.train()
    start, end = trainer.seen[0][0], trainer.seen[4][0]
    changes, advantages = [], []
    for _, inputs, _, _ in trainer.seen[:4]:
        with torch.no_grad():
            logps = [internal_logps(model, inputs, 4, norm=True)[0] for model in (start, end)]
        changes.append(((logps[1] - logps[0]) * inputs["completion_mask"]).sum(-1))
        advantages.append(inputs["advantages"])
    wanted = torch.corrcoef(torch.stack([torch.cat(changes), torch.cat(advantages)]))[0, 1].item()
    first, second = trainer.state.log_history[:2]
    assert "internal/transfer" not in first
    assert second["internal/transfer"] == pytest.approx(wanted, abs=1e-4)


def test_a_real_guard_in_a_real_run(tmp_path):
    """Random weights and a high learning rate: whatever it decides, the run ends and says so consistently."""
    trainer = make_trainer(
        tmp_path, internal_steps="auto", internal_max_steps=7, max_steps=16, updates_per_rollout=2, learning_rate=3e-2
    )
    trainer.train()
    phases = [row["phase"] for row in trainer.state.log_history if "phase" in row]
    internal = phases.count(1)
    assert phases == [1] * internal + [2] * (8 - internal)
    assert internal == (trainer.phase_end["rollouts"] if trainer.phase_end else 7)
    assert internal >= WINDOW
    assert len(trainer.guard.history) in (internal, internal + 1)


WRONG = [
    ({"internal_steps": "automatic"}, "a whole number from 0"),
    ({"internal_steps": 2, "internal_max_steps": 3}, "goes with internal_steps auto"),
    ({"internal_max_steps": 0}, "goes with internal_steps auto"),
    ({"max_steps": -1, "num_train_epochs": 1}, "needs internal_max_steps"),
    ({"internal_layer": None}, "internal_steps needs internal_layer"),
    ({"beta": 0.1}, "beta 0.1"),
    ({"internal_ladder": [[1, 2]], "internal_layer": None}, "not both"),
]


@pytest.mark.parametrize(("changes", "part"), WRONG, ids=[str(c) for c, _ in WRONG])
def test_wrong_settings(tmp_path, changes, part):
    with pytest.raises(ConfigError) as error:
        config(tmp_path, **{"internal_steps": "auto", **changes})
    assert any(part in problem for problem in error.value.problems), error.value.problems


def test_without_a_limit_a_third_of_the_run(tmp_path):
    args = config(tmp_path, internal_steps="auto", max_steps=40, updates_per_rollout=2)
    assert args.schedule().switches == (6,)
    # updates that span two rollout batches: an even number of them
    batches = {"steps_per_generation": 1, "gradient_accumulation_steps": 2}
    assert config(tmp_path, internal_steps="auto", max_steps=5, **batches).schedule().switches == (2,)
