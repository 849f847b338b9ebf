from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from bupo.cli import main


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(4)))
    return path


def arguments(folder, questions, output, *more):
    required = ["eval", "--model", str(folder), "--tasks", str(questions), "--output", str(output)]
    return [*required, "--n", "2", "--k", "2", "--max-new-tokens", "4", *more]


def test_a_whole_evaluation(tiny_folder, questions, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(arguments(tiny_folder, questions, output, "--json")) == 0
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads((output / "results.json").read_text())
    assert results["tasks"]["sums"]["n_problems"] == 4
    assert results["engine"] == "transformers"
    assert results["revision"]
    assert results["dtype"] == "float32"
    assert main(["eval", "--regrade", str(output)]) == 0
    assert "sums" in capsys.readouterr().out
    assert json.loads((output / "results.json").read_text()) == results


def test_internal_layer(tiny_folder, questions, tmp_path):
    responses = []
    for layer in ("1", "4"):
        output = tmp_path / layer
        assert main(arguments(tiny_folder, questions, output, "--n", "10", "--internal-layer", layer)) == 0
        assert json.loads((output / "results.json").read_text())["sampling"]["internal_layer"] == int(layer)
        responses.append((output / "responses.parquet").read_bytes())
    assert responses[0] != responses[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "no/such-model"], "cannot"),
        (["--model", "./nowhere"], "does not exist"),
        (["--tasks", "missing.jsonl"], "no such file: missing.jsonl"),
        (["--tasks", "mathh"], "unknown dataset 'mathh'"),
        (["--tasks", "math500"], "math500.parquet or .jsonl in --data-dir"),
        (["--tasks", "math500", "--data-dir", "nowhere"], "data folder nowhere does not exist"),
        (["--internal-layer", "5"], "layers 1 to 4"),
        (["--engine", "tgi"], "unknown engine"),
        (["--template", "chatml"], "unknown template"),
        (["--template", "chat"], "no chat template"),
        (["--n", "1"], "needs at least 2 samples"),
        (["--max-new-tokens", "600"], "context of 512"),
        (["--top-p", "2"], "top_p must lie in"),
        (["--dtype", "int3"], "int3"),
        (["--regrade", "x"], "--regrade takes no --k, --max-new-tokens, --model, --n, --output, --tasks"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(tiny_folder, questions, tmp_path, capsys, change, message):
    output = tmp_path / "out"
    assert main(arguments(tiny_folder, questions, output, *change)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bupo: error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not output.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"text": "a", "label": "b"}), "columns found: text, label"),
        ("", "is empty"),
        ("{", "cannot be read"),
    ],
)
def test_wrong_files(tiny_folder, tmp_path, capsys, content, message):
    questions = tmp_path / "bad.jsonl"
    questions.write_text(content)
    assert main(arguments(tiny_folder, questions, tmp_path / "out")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_touched(tiny_folder, questions, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    assert main(arguments(tiny_folder, questions, output)) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(arguments(tiny_folder, questions, output, "--overwrite")) == 0
    assert (output / "notes.txt").read_text() == "mine"
    assert main(["eval"]) == 2
    assert "needs --model, --tasks, --output" in capsys.readouterr().err


def test_ctrl_c_says_that_the_same_command_continues(tiny_folder, questions, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("bupo.evaluate.run.evaluate", interrupt)
    assert main(arguments(tiny_folder, questions, tmp_path / "out")) == 130
    assert "Responses so far are saved; the same command continues." in capsys.readouterr().err


def test_a_launcher_is_refused(tiny_folder, questions, tmp_path, capsys, monkeypatch):
    """Its processes would all write the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments(tiny_folder, questions, tmp_path / "out")) == 2
    assert "the launcher started 2; start one process per GPU with --shard 1/n to n/n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_process_killed_while_sampling_goes_on(tiny_folder, questions, tmp_path):
    """The real thing: SIGKILL in the middle, the same command again, the results of an uninterrupted run."""
    settings = ["--n", "15", "--max-new-tokens", "30", "--batch-size", "4", "--engine", "transformers"]
    program = "import sys; from bupo.cli import main; sys.exit(main())"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-c", program, *arguments(tiny_folder, questions, killed, *settings)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    partial = killed / "responses.partial.jsonl"
    until = time.monotonic() + 120
    while not (partial.exists() and partial.stat().st_size > 0) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert partial.exists()
    assert not (killed / "results.json").exists()
    kept = len(partial.read_bytes().splitlines())
    assert 0 < kept < 60
    assert main(arguments(tiny_folder, questions, killed, *settings)) == 0
    assert main(arguments(tiny_folder, questions, whole, *settings)) == 0
    assert json.loads((killed / "results.json").read_text()) == json.loads((whole / "results.json").read_text())
