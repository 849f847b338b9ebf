"""`bupo sweep` and `bupo power`, with a stand-in for the commands that a sweep runs."""

import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bupo.cli import main
from bupo.errors import BupoError, InputError
from bupo.report.page import collect
from bupo.sweep import run
from bupo.sweep.rows import append_row, is_rows, read_rows
from tests.support import sweeps
from tests.support.sweeps import a_row, write_rows

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "small.yaml"


@pytest.fixture
def sweep(tmp_path, monkeypatch, capfd):
    """A function of arms and options that runs a sweep of seeds 0 and 1; returns code, output, errors and folder."""
    monkeypatch.setattr(run, "PROGRAM", [sys.executable, sweeps.__file__])

    def start(arms: str, *options: str):
        grid, out = tmp_path / "grid.yaml", tmp_path / "out"
        evaluate = "evaluate: {tasks: arithmetic, limit: 2, k: 2}"
        grid.write_text(f"recipe: {RECIPE}\nseeds: [0, 1]\n{evaluate}\narms: {{{arms}}}\n")
        code = main(["sweep", str(grid), "--output", str(out), *options])
        return code, *capfd.readouterr(), out

    return start


def test_a_sweep_writes_a_row_per_run_and_skips_what_has_one(sweep):
    code, said, _, out = sweep("start: {seeds: [0]}, grpo: {learning_rate: 0.125}", "--workers", "2", "--keep")
    assert (code, "3 of 3 runs" in said) == (0, True)
    assert {arm: sorted(own) for arm, own in read_rows(out).items()} == {"start": [0], "grpo": [0, 1]}
    row = read_rows(out)["grpo"][1]
    assert row["changes"] == {"learning_rate": 0.125}
    assert row["curves"] == {"reward": [0.25], "entropy": [1.0], "update_seconds": [2.0]}
    assert row["update_seconds"] == 2.0
    assert list(row["tasks"]["arithmetic"].values()) == [2, 0.5, "1 2", 3.0, 0.0, 0.0]
    assert "commit" not in row  # the grid lies in no repository
    assert (out / "models" / "grpo-1" / "weights").read_text() == "1"
    assert not (out / "unfinished").exists()
    assert json.loads((out / "run.json").read_text())["command"] == "sweep"
    code, said, _, _ = sweep("start: {seeds: [0]}, grpo: {learning_rate: 0.125}")
    assert (code, "0 of 3 runs" in said) == (0, True)
    code, said, _, _ = sweep("start: {seeds: [0]}, grpo: {learning_rate: 0.1}")
    assert (code, "note: arm grpo, seed 1 was run with learning_rate 0.125, in the grid it is 0.1" in said) == (0, True)


def test_a_run_that_fails_is_reported_and_the_others_go_on(sweep):
    code, said, errors, out = sweep("bad: {learning_rate: 0.5}, good: {learning_rate: 0.125}", "--seeds", "1")
    assert code == 1
    assert "bad, seed 1: failed: bupo train: the rate is too high (all of its output: " in said
    assert "a line before" in (out / "unfinished" / "bad-1" / "log").read_text()
    assert "1 of 2 runs failed" in errors
    assert read_rows(out).keys() == {"good"}


def test_ctrl_c_stops_in_order_and_the_same_command_continues(sweep, tmp_path):
    def press() -> None:
        while len(list(tmp_path.glob("out/unfinished/*/train/log.jsonl"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    arms = "slow: {learning_rate: 0.25}, later: {learning_rate: 0.125}"
    code, said, errors, out = sweep(arms, "--workers", "2", "--only", "slow")
    assert (code, "failed" in said) == (130, False)
    assert "2 runs have no row in" in errors.split("the same command continues")[0]
    assert sorted(p.name for p in (out / "unfinished").iterdir()) == ["slow-0", "slow-1"]
    code, *_ = sweep(arms)
    rows = read_rows(out)
    assert (code, {arm: len(own) for arm, own in rows.items()}) == (0, {"slow": 2, "later": 2})
    assert rows["slow"][0]["update_seconds"] == 5.0 + 3.0 - 2 * 1.0  # of both attempts
    seconds = rows["slow"][0]["curves"]["update_seconds"]
    assert (seconds, seconds[-1]) == (sorted(seconds), 6.0)
    assert rows["slow"][0]["seconds"] >= rows["slow"][0]["train_seconds"] > 0


def test_runs_at_the_same_time_have_gpus_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 2)
    assert run.gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    wait = "import os, pathlib, sys, time; p = pathlib.Path(sys.argv[1]); e = os.environ\n"
    wait += "(p / e['CUDA_VISIBLE_DEVICES']).write_text(e['OMP_NUM_THREADS'])\n"
    wait += "while len(list(p.iterdir())) < 2: time.sleep(0.01)"  # until both have been here
    monkeypatch.setattr(run, "PROGRAM", [sys.executable, "-c", wait])
    (seen := tmp_path / "seen").mkdir()
    commands = run.Commands(2, 0)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda log: commands.run(tmp_path / log, seen), "ab"))
    assert {path.name: path.read_text() for path in seen.iterdir()} == {"3": "7", "5": "7"}
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 0)
    assert run.gpus() == []


def test_two_sweeps_do_not_share_a_folder(sweep, tmp_path):
    with run.locked(tmp_path / "out"):
        code, _, errors, _ = sweep("grpo: ")
    assert (code, "another sweep, or a run that it started" in errors) == (2, True)
    (tmp_path / "out" / "run.json").write_text('{"command": "train"}')
    code, _, errors, _ = sweep("grpo: ")
    assert (code, "is not empty and holds no sweep" in errors) == (2, True)


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [("limit: 2", "evaluate lacks tasks"), ("tasks: arithmetic, kk: 2", "No such option"),
     ("tasks: arithmetic, k: many", "evaluate: Invalid value for '--k'"), ("tasks: nothing.jsonl", "nothing.jsonl"),
     ("tasks: arithmetic, k: 4, n: 2", "Avg@4 needs at least 4 samples")],
)  # fmt: skip
def test_an_evaluation_that_would_fail_is_refused_before_training(evaluate, said, tmp_path, capsys):
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"recipe: {RECIPE}\nseeds: 0\nevaluate: {{{evaluate}}}\narms: {{grpo: }}\n")
    assert main(["sweep", str(grid), "--output", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_finished_training_without_its_log_gives_no_row(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "run.json").write_text(json.dumps({"result": {"model": "m", "phase_end": None, "internal_layer": 1}}))
    with pytest.raises(BupoError, match=r"log\.jsonl is missing or empty; remove .* to train again"):
        run._of_training(tmp_path)


def test_rows_are_never_torn(tmp_path):
    path = tmp_path / "runs.jsonl"
    append_row(path, a_row("a", 0, [1]))
    path.write_text(path.read_text() + '{"arm": "a", "se')  # killed while it wrote
    assert list(read_rows(path)["a"]) == [0]
    append_row(path, a_row("a", 1, [1]))
    path.write_text(path.read_text().rstrip())  # by an editor: the row is whole
    append_row(path, a_row("a", 2, [1]))
    assert list(read_rows(path)["a"]) == [0, 1, 2]
    (tmp_path / "cut.jsonl").write_text('{"arm"')
    assert read_rows(tmp_path / "cut.jsonl") == {}
    with pytest.raises(InputError, match="holds no row of a sweep yet"):
        collect([str(tmp_path / "cut.jsonl")])
    assert is_rows(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [("{}", "arm is missing"), ("[1]", "the row must be"), ("nonsense", "is not JSON"),
     (json.dumps(a_row("a", 0, [5])), "correct must hold a number from 0 to 4"),
     (json.dumps(a_row("a", 0, [])), "correct must hold"), (json.dumps(a_row("b", 0, [1])), "repeats arm b, seed 0"),
     (json.dumps(a_row("a", 0, [1], update_seconds="x")), "update_seconds must be"),
     (json.dumps(a_row("a", "x", [1])), "seed must be a whole number")],
)  # fmt: skip
def test_what_is_not_a_row_is_named_with_its_line(line, said, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [a_row("b", 0, [1])])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match="line 2") as error:
        read_rows(path)
    assert said in str(error.value)


def test_power_says_how_many_seeds_a_difference_needs(tmp_path, capsys):
    rows = [
        a_row(arm, s, [10 + s * gain] * 10, samples=100) for arm, gain in (("grpo", 0), ("bupo", 1)) for s in range(3)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    command = ["power", str(path), "--arms", "bupo,grpo"]
    assert main([*command, "--difference", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["each"], found["mean"]) == (pytest.approx([0, 1, 2]), pytest.approx(1))
    assert [found["deviation"], *found["deviation_ci95"]] == pytest.approx([1, 0.5207, 6.2847], abs=1e-3)
    assert (found["needed"], found["needed_ci95"]) == (10, [5, 312])
    assert (found["shown"][1]["seeds"], found["shown"][1]["detectable"]) == (10, pytest.approx(0.9964, abs=1e-3))
    assert main([*command, "--difference", "1"]) == 0
    assert "10 seeds show 1 points with probability 0.8; 5 to 312 at the ends" in capsys.readouterr().out
    wrong = {"bupo": "two different arms", "bupo,grp": "no arm grp (did you mean grpo?)"}
    for arms, more, why in (
        *((arms, [], why) for arms, why in wrong.items()),
        ("bupo,grpo", ["--task", "x"], "have: t"),
    ):
        assert main(["power", str(path), "--arms", arms, *more]) == 2
        assert why in capsys.readouterr().err
