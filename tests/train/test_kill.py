"""`kill -9` at any point of a run, then --resume, until it ends: the same weights and log as the run left in peace."""

import random
import signal

import pytest
from safetensors.torch import load_file

from bupo.train.checkpoint import last_checkpoint
from tests.cli.test_cli_train import rows, write_recipe
from tests.support.processes import attempt
from tests.support.training import same_weights

GUARDED = {"internal_steps": "auto", "internal_max_steps": 6, "rollouts": 8}
KILLED = -signal.SIGKILL
SHORT = {"rollouts": 3, "keep_checkpoints": 2}


class Runs:
    """The runs of one recipe, in folders of their own."""

    def __init__(self, folder, tiny_folder, **changes):
        self.folder = folder
        self.recipe = write_recipe(folder, model=str(tiny_folder), **{**SHORT, **changes})
        self.whole = self.attempt("whole", code=0)

    def attempt(self, run, code=None, **how):
        """Start or go on with a run; its exit code (which must be the one given), operations and seconds."""
        folder, log = self.folder / run, self.folder / f"{run}.txt"
        if not (folder / "run.json").exists() or last_checkpoint(folder / "checkpoints") is None:  # begin again
            arguments = [str(self.recipe), "--output", str(folder), *(["--overwrite"] if folder.exists() else [])]
        else:
            arguments = ["--resume", "--output", str(folder)]
        found = attempt(arguments, log, folder, **how)
        assert found[0] in ((0, KILLED) if code is None else (code,)), log.read_text()
        return found


def the_same(one, two):
    assert rows(one) == rows(two)
    assert same_weights(*(load_file(f / "model" / "model.safetensors") for f in (one, two)))
    assert sorted(p.name for p in one.rglob("*")) == sorted(p.name for p in two.rglob("*"))


def test_killed_three_times(tmp_path, tiny_folder):
    """One run, killed at three of its operations on files, each in another part of what is left of it."""
    runs = Runs(tmp_path, tiny_folder)
    for share in (0.4, 0.55, 0.3):  # each resumed run has less to do
        event = round(share * runs.whole[1])
        assert runs.attempt("short", KILLED, event=event)[1] == event - 1
    runs.attempt("short", 0)
    the_same(tmp_path / "short", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", ["event", "seconds"])
@pytest.mark.parametrize("changes", [{}, GUARDED], ids=["fixed", "guarded"])
def test_twenty_random_kills(tmp_path, tiny_folder, kind, changes):
    """At random operations on files, or at random times; runs are begun until twenty kills have come."""
    draw = random.Random(f"{kind} {len(changes)}")
    runs, killed, finished = Runs(tmp_path, tiny_folder, **changes), 0, 0
    _, events, seconds = runs.whole
    while killed < 20 or (tmp_path / f"run-{finished}").exists():
        how = {kind: draw.randint(1, events) if kind == "event" else draw.uniform(0.05, seconds)}
        code, *_ = runs.attempt(f"run-{finished}", **(how if killed < 20 else {}))
        if code == KILLED:
            killed += 1
        else:
            the_same(tmp_path / f"run-{finished}", tmp_path / "whole")
            finished += 1
