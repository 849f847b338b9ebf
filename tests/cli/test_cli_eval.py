"""`bupo eval` as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(4)))
    return path


def arguments(folder, questions, *more):
    required = ["eval", "--model", str(folder), "--tasks", str(questions)]
    return [*required, "--samples", "2", "--k", "2", "--max-new-tokens", "4", *more]


def test_a_whole_evaluation(tiny_folder, questions, tmp_path, bupo):
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    command = arguments(tiny_folder, questions, "--output", output)
    code, _, err = bupo(*command)
    assert code == 2
    assert "is not empty" in err
    code, out, _ = bupo(*command, "--overwrite", "--json")
    assert code == 0
    assert (output / "notes.txt").read_text() == "mine"
    results = json.loads(out)
    assert results == json.loads((output / "results.json").read_text())
    assert results["tasks"]["sums"]["n_problems"] == 4
    assert (results["engine"], results["dtype"]) == ("transformers", "float32")
    assert results["revision"]
    code, out, _ = bupo("eval", "--regrade", output)
    assert code == 0
    assert "sums" in out
    assert json.loads((output / "results.json").read_text()) == results
    code, _, err = bupo("eval")
    assert code == 2
    assert "needs --model, --tasks, --output" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--tasks", "missing.jsonl"], "no such file: missing.jsonl"),
        (["--tasks", "columns.jsonl"], "columns found: text, label"),
        (["--tasks", "mathh"], "unknown dataset 'mathh'"),
        (["--tasks", "math500"], "math500.parquet or .jsonl in --data-dir"),
        (["--tasks", "math500", "--data-dir", "nowhere"], "data folder nowhere does not exist"),
        (["--internal-layer", "5"], "layers 1 to 4"),
        (["--engine", "tgi"], "unknown engine"),
        (["--template", "chat"], "no chat template"),
        (["--n", "1"], "needs at least 2 samples"),
        (["--max-new-tokens", "600"], "context of 512"),
        (["--top-p", "2"], "top_p must lie in"),
        (["--top-p", "0.9", "--temperature", "0"], "top_p has no effect with temperature 0"),
        (["--data-dir", "."], "data_dir holds benchmarks; name one as a task"),
        (["--revision", "main"], "takes no --revision: it is not on the hub"),
        (["--dtype", "int3"], "unknown dtype 'int3'; choose one of auto, float32"),
        (["--regrade", "x"], "--regrade takes no --k, --max-new-tokens, --model, --n, --output, --tasks"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    tiny_folder, questions, tmp_path, refused, monkeypatch, change, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "columns.jsonl").write_text('{"text": "a", "label": "b"}')
    assert message in refused(*arguments(tiny_folder, questions, *change), output=tmp_path / "out")


def test_ctrl_c_says_that_the_same_command_continues(tiny_folder, questions, tmp_path, bupo, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("bupo.evaluate.run.evaluate", interrupt)
    code, _, err = bupo(*arguments(tiny_folder, questions, "--output", tmp_path / "out"))
    assert code == 130
    assert "Responses so far are saved; the same command continues." in err


def test_a_process_killed_while_sampling_goes_on(tiny_folder, questions, tmp_path, bupo):
    """The real thing: SIGKILL in the middle, the same command again, the results of an uninterrupted run."""
    settings = ["--n", "15", "--max-new-tokens", "30", "--batch-size", "4", "--engine", "transformers", "--output"]
    whole, killed = (arguments(tiny_folder, questions, *settings, str(tmp_path / name)) for name in ("a", "b"))
    process = subprocess.Popen([sys.executable, "-m", "bupo", *killed], stderr=subprocess.DEVNULL)
    partial = tmp_path / "b" / "responses.partial.jsonl"
    until = time.monotonic() + 120
    while not (partial.exists() and partial.stat().st_size > 0) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "b" / "results.json").exists()
    assert 0 < len(partial.read_bytes().splitlines()) < 60
    assert bupo(*killed)[0] == bupo(*whole)[0] == 0
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("a", "b"))
    assert one == two
