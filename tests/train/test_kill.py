"""`kill -9` at any point of a run, then --resume, until it ends: the same weights and log as the run left in peace."""

from __future__ import annotations

import json
import random

import pytest
import yaml
from safetensors.torch import load_file

from bupo.train.checkpoint import last_checkpoint
from tests.cli.test_cli_train import RECIPE, rows
from tests.support.training import same_weights

GUARDED = {"internal_steps": "auto", "internal_max_steps": 6, "rollouts": 8}
SHORT = {**RECIPE, "rollouts": 3, "keep_checkpoints": 2}


class Runs:
    """The runs of one recipe, in folders of their own."""

    def __init__(self, warm, folder, tiny_folder, **changes):
        self.warm, self.folder = warm, folder
        data = folder / "sums.jsonl"
        data.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(6)))
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump({"model": str(tiny_folder), "dataset": str(data), **SHORT, **changes}))

    def attempt(self, run, **how):
        """Start or go on with a run; what became of it."""
        folder = self.folder / run
        if not (folder / "run.json").exists() or last_checkpoint(folder / "checkpoints") is None:  # begin again
            arguments = [str(self.recipe), "--output", str(folder), *(["--overwrite"] if folder.exists() else [])]
        else:
            arguments = ["--resume", "--output", str(folder)]
        log = str(self.folder / f"{run}.txt")
        return self.warm.call("killing:attempt", arguments=arguments, log=log, folder=str(folder), **how)

    def told(self, run):
        return (self.folder / f"{run}.txt").read_text()


def the_same(one, two):
    assert rows(one) == rows(two)
    assert same_weights(*(load_file(f / "model" / "model.safetensors") for f in (one, two)))
    assert sorted(p.name for p in one.rglob("*")) == sorted(p.name for p in two.rglob("*"))


@pytest.fixture(scope="module")
def runs(warm, tmp_path_factory, tiny_folder):
    return Runs(warm, tmp_path_factory.mktemp("killed"), tiny_folder)


@pytest.fixture(scope="module")
def whole(runs):
    found = runs.attempt("whole")
    assert found["code"] == 0, runs.told("whole")
    return found


def test_killed_three_times(runs, whole):
    """One run, killed at three of its operations on files, each in another part of what is left of it."""
    for share in (0.4, 0.55, 0.3):  # each resumed run has less to do
        event = round(share * whole["events"])
        found = runs.attempt("short", event=event)
        assert found["code"] is None, runs.told("short")
        assert found["events"] == event - 1
    assert runs.attempt("short")["code"] == 0, runs.told("short")
    the_same(runs.folder / "short", runs.folder / "whole")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", ["event", "seconds"])
@pytest.mark.parametrize("changes", [{}, GUARDED], ids=["fixed", "guarded"])
def test_twenty_random_kills(warm, tmp_path, tiny_folder, kind, changes):
    """At random operations on files, or at random times; runs are begun until twenty kills have come."""
    draw = random.Random(f"{kind} {len(changes)}")
    made = Runs(warm, tmp_path, tiny_folder, **changes)
    whole = made.attempt("whole")
    assert whole["code"] == 0, made.told("whole")
    killed = finished = 0
    while killed < 20 or (tmp_path / f"run-{finished}").exists():
        run, how = f"run-{finished}", {}
        if killed < 20:
            most = whole[{"event": "events"}.get(kind, kind)]
            how = {kind: draw.randint(1, most) if kind == "event" else draw.uniform(0.05, most)}
        before = last_checkpoint(tmp_path / run / "checkpoints")
        found = made.attempt(run, **how)
        print(run, how, before and before.name, found)
        assert found["code"] in (0, None), made.told(run)
        if found["code"] is None:
            killed += 1
        else:
            the_same(tmp_path / run, tmp_path / "whole")
            finished += 1
    assert killed == 20
    print(f"{killed} kills in {finished} runs")
