"""The schedule against a simulation of TRL's buffering, over every combination of batch settings."""

import itertools
import json

import pytest

from bupo.train.schedule import FULL, Phase, Schedule, alignment_problems

ROLLOUTS = 7


def simulate(schedule, steps_per_generation, iterations, accumulation, rollouts_per_epoch=None):
    """TRL's loop: rollout batches are generated, buffered, consumed by micro-batches and grouped into updates.

    Returns the phases of each update.
    """
    generate_every = steps_per_generation * iterations
    epoch = None if rollouts_per_epoch is None else rollouts_per_epoch * generate_every
    updates, window, generated, buffer = [], [], 0, None
    for step in range(ROLLOUTS * generate_every):
        if step % generate_every == 0 or buffer is None:
            buffer = [schedule.at(generated)] * steps_per_generation
            generated += 1
        assert step // generate_every == generated - 1  # the trainer's stateless rule names the same rollout batch
        window.append(buffer[step % steps_per_generation])
        in_epoch = step + 1 if epoch is None else step % epoch + 1
        if in_epoch % accumulation == 0 or in_epoch == epoch:
            updates.append(window)
            window = []
    return updates + ([window] if window else [])


SETTINGS = list(itertools.product([1, 2, 3, 4, 6], [1, 2, 3], [1, 2, 3, 4, 6]))
SCHEDULES = [
    Schedule(),
    *(Schedule((Phase(2, rollouts),)) for rollouts in range(1, 5)),
    Schedule((Phase(1, 1), Phase(2, 2))),
    Schedule((Phase(3, 2), Phase(1, 1), Phase(2, 1))),
]


@pytest.mark.parametrize("rollouts_per_epoch", [None, 2, 3])
def test_refused_exactly_when_an_update_would_mix_phases(rollouts_per_epoch):
    seen = {True: 0, False: 0}
    for (generation, iterations, accumulation), schedule in itertools.product(SETTINGS, SCHEDULES):
        epoch = rollouts_per_epoch and rollouts_per_epoch * generation * iterations
        refused = bool(alignment_problems(schedule, generation * iterations, accumulation, epoch))
        updates = simulate(schedule, generation, iterations, accumulation, rollouts_per_epoch)
        mixed = any(len(set(update)) > 1 for update in updates)
        assert refused == mixed, (generation, iterations, accumulation, schedule)
        seen[refused] += 1
    assert min(seen.values()) > 10


def test_the_problem_names_numbers_and_a_remedy_that_works():
    (problem,) = alignment_problems(Schedule((Phase(6, 3),)), 2, 4)
    for part in ("3 rollout batches", "2 micro-batches", "= 6", "4 accumulated", "multiple of 2"):
        assert part in problem
    assert alignment_problems(Schedule((Phase(6, 4),)), 2, 4) == []


def test_phases_in_order_and_ended_early():
    schedule = Schedule.of([{"layer": 6, "rollouts": 2}, {"layer": "auto", "rollouts": 1, "weight": 0.5}])
    assert [schedule.at(r).layer for r in range(5)] == [6, 6, "auto", None, None]
    assert [schedule.at(r).name for r in (0, 2, 3)] == ["internal", "joint", "full"]
    assert schedule.ends == (2, 3)
    assert schedule.layers == (6,)
    found = schedule.with_layer(9)
    assert found.layers == (6, 9)
    assert Schedule.of(json.loads(json.dumps(found.phases))) == found
    assert Schedule().at(0) == FULL
    schedule = Schedule((Phase(1, 2), Phase(2, 3)))
    assert schedule.ended_before(1) == Schedule((Phase(1, 1),))
    assert schedule.ended_before(2) == Schedule((Phase(1, 2),))
    assert schedule.ended_before(4) == Schedule((Phase(1, 2), Phase(2, 2)))
