"""The schedule against a simulation of the trainer's buffering, over every combination of batch settings."""

from __future__ import annotations

import itertools

import pytest

from bupo.errors import ConfigError
from bupo.train.schedule import Schedule, Stage, alignment_problems, ladder, two_phase

ROLLOUTS = 7


def simulate(schedule, steps_per_generation, iterations, accumulation, rollouts_per_epoch=None):
    """TRL's loop: rollouts generated, buffered, consumed by micro-batches, grouped into updates.

    A batch is tagged with the stage of its rollout's number when it is generated (rollouts counted as they happen).
    Returns the updates, each a list of (rollout, slice, stage) in the order consumed.
    """
    generate_every = steps_per_generation * iterations
    epoch = None if rollouts_per_epoch is None else rollouts_per_epoch * generate_every
    updates, window, generated, buffer = [], [], 0, None
    for step in range(ROLLOUTS * generate_every):
        if step % generate_every == 0 or buffer is None:
            buffer = [(generated, part, schedule.index(generated)) for part in range(steps_per_generation)]
            generated += 1
        assert step // generate_every == generated - 1  # the trainer's stateless rule names the same rollout
        window.append(buffer[step % steps_per_generation])
        in_epoch = step + 1 if epoch is None else step % epoch + 1
        if in_epoch % accumulation == 0 or in_epoch == epoch:
            updates.append(window)
            window = []
    return updates + ([window] if window else [])


SETTINGS = list(itertools.product([1, 2, 3, 4, 6], [1, 2, 3], [1, 2, 3, 4, 6]))


@pytest.mark.parametrize("rollouts_per_epoch", [None, 2, 3])
def test_refused_exactly_when_an_update_would_mix_phases(rollouts_per_epoch):
    seen = {True: 0, False: 0}
    for (generation, iterations, accumulation), inter in itertools.product(SETTINGS, range(5)):
        schedule = two_phase(2, inter)
        epoch = rollouts_per_epoch and rollouts_per_epoch * generation * iterations
        refused = bool(alignment_problems(schedule, generation * iterations, accumulation, epoch))
        updates = simulate(schedule, generation, iterations, accumulation, rollouts_per_epoch)
        mixed = any(len({stage for _, _, stage in update}) > 1 for update in updates)
        assert refused == mixed, (generation, iterations, accumulation, inter)
        seen[refused] += 1
        # whatever the windows are: every sample is consumed in the phase it was scored in, `iterations` times
        consumed = [entry for update in updates for entry in update]
        for rollout in range(ROLLOUTS):
            own = [entry for entry in consumed if entry[0] == rollout]
            assert {stage for _, _, stage in own} == {schedule.index(rollout)}
            assert len(own) == generation * iterations
            assert {part for _, part, _ in own} == set(range(generation))
    assert min(seen.values()) > 10


def test_ladder_switches_are_all_checked():
    for (generation, iterations, accumulation), rungs in itertools.product(
        SETTINGS, [((1, 1), (2, 2)), ((3, 2), (1, 1), (2, 1))]
    ):
        schedule = ladder(rungs)
        refused = bool(alignment_problems(schedule, generation * iterations, accumulation))
        updates = simulate(schedule, generation, iterations, accumulation)
        assert refused == any(len({stage for _, _, stage in update}) > 1 for update in updates)


def test_problem_names_numbers_and_a_remedy_that_works():
    (problem,) = alignment_problems(two_phase(6, 3), 2, 4)
    for part in ("3 rollout batches", "2 micro-batches", "= 6", "4 accumulated", "multiple of 2"):
        assert part in problem
    assert alignment_problems(two_phase(6, 4), 2, 4) == []


def test_two_phases():
    schedule = two_phase(6, 3)
    assert [schedule.at(r).layer for r in range(5)] == [6, 6, 6, None, None]
    assert [schedule.at(r).phase for r in (0, 2, 3)] == ["internal", "internal", "full"]
    assert [schedule.at(r).number for r in (0, 2, 3)] == [1, 1, 2]
    assert schedule.switches == (3,)
    assert schedule.layers == (6,)
    assert two_phase(6, 0) == two_phase(None, 0) == Schedule((Stage(),))


def test_ladder():
    schedule = ladder([(6, 2), (12, 1)], weight=0.5)
    assert [schedule.at(r).layer for r in range(5)] == [6, 6, 12, None, None]
    assert schedule.at(0).phase == "joint"
    assert schedule.switches == (2, 3)


@pytest.mark.parametrize(
    ("stages", "part"),
    [
        ((), "must have no end"),
        ((Stage(rollouts=2, layer=1),), "must have no end"),
        ((Stage(rollouts=0, layer=1), Stage()), "at least one rollout"),
        ((Stage(rollouts=1, layer=1, weight=0.0), Stage()), "weight"),
    ],
)
def test_wrong_schedules(stages, part):
    with pytest.raises(ConfigError, match=part):
        Schedule(stages)
