"""The lens of an internal phase: when it is fitted, what it leaves alone, and its log."""

import torch

from bupo import Lens
from tests.support.training import Recorder, trained

RIDGE = {"internal_lens": "ridge", "internal_lens_tokens": 60}


def test_a_fit_leaves_the_runs_own_samples_alone_and_is_logged(tmp_path):
    runs = [trained(tmp_path / name, Recorder, internal_steps=2, max_steps=12, **settings)
            for name, settings in (("raw", {}), ("ridge", RIDGE))]  # fmt: skip
    first = [run.seen[0][1]["completion_ids"] for run in runs]
    assert torch.equal(*first)
    raw, ridge = ([row for row in run.state.log_history if "phase" in row] for run in runs)
    assert all("internal/lens_kl" not in row for row in raw)
    internal = [row for row in ridge if row["phase"] == 1]
    assert len(internal) == 2
    assert all(row["internal/lens_kl"] == row["internal/divergence"] for row in internal)
    assert all("internal/lens_kl" not in row for row in ridge if row["phase"] == 2)
    assert ridge[0]["internal/divergence"] < raw[0]["internal/divergence"]
    assert runs[1].lens.fitted == 0
    assert runs[1].lens.lens.card["tokens"] >= 60


def test_maps_are_fitted_again_between_rollout_batches(tmp_path, monkeypatch):
    at = []
    fit = Lens.fit
    monkeypatch.setattr(Lens, "fit", lambda *args, **more: at.append(1) or fit(*args, **more))
    run = trained(tmp_path, internal_steps=5, max_steps=20, internal_lens_refit=2, **RIDGE)
    assert (len(at), run.lens.fitted) == (3, 4)  # before the batches 1, 3 and 5


def test_a_saved_lens_is_used_as_it_is(tmp_path):
    first = trained(tmp_path / "first", internal_steps=1, max_steps=4, **RIDGE)
    first.lens.lens.save(tmp_path / "lens")
    run = trained(tmp_path / "second", internal_steps=1, max_steps=4, internal_lens=str(tmp_path / "lens"))
    assert run.lens.fitted is None
    assert torch.equal(run.lens.lens.maps, first.lens.lens.maps)
