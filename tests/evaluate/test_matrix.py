"""Every advantage estimator with every schedule: two rollout batches of each phase, and who learns in them."""

from __future__ import annotations

import math

import pytest
import torch

from bupo.train import advantages as estimators
from tests.support.training import losses, make_trainer
from tests.train.test_trainer import Gradients, above

SCHEDULES = {
    "two-phase": ({"internal_steps": 2}, [2, 2, None, None]),
    "ladder": ({"internal_layer": None, "internal_ladder": [[1, 1], [3, 1]]}, [1, 3, None, None]),
    "joint": ({"internal_steps": 2, "internal_weight": 0.4}, [4, 4, None, None]),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("estimator", estimators.NAMES)
def test_every_estimator_runs_with_every_schedule(tmp_path, estimator, schedule):
    settings, layers = SCHEDULES[schedule]
    seen = Gradients()
    trainer = make_trainer(
        tmp_path,
        estimator=estimator,
        num_generations=2,
        per_device_train_batch_size=2,
        updates_per_rollout=2,
        max_completion_length=3,
        max_steps=2 * len(layers),
        callbacks=[seen],
        **settings,
    )
    trainer.train()
    found = losses(trainer)
    assert len(found) == len(layers)
    assert all(math.isfinite(loss) for loss in found)
    phases = [row["phase"] for row in trainer.state.log_history[: len(layers)]]
    assert phases == [2 if layer is None else 1 for layer in layers]
    names = {name for name, _ in trainer.model.named_parameters()}
    for number, update in enumerate(seen.updates):
        layer = layers[number // 2]
        reached = names if schedule == "joint" or layer is None else {n for n in names if not above(n, layer)}
        assert update == reached, number
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert (trainer.critic is not None) == (estimator == "ppo")
