"""`bupo eval --harness`; the parts that need lm-evaluation-harness run where it is installed."""

from __future__ import annotations

import importlib.util
import json

import pytest

from bupo.cli import main

installed = importlib.util.find_spec("lm_eval") is not None


@pytest.mark.skipif(installed, reason="lm-evaluation-harness is installed")
def test_without_the_harness_there_is_a_clear_line(tiny_folder, tmp_path, capsys):
    assert main(["eval", "--model", str(tiny_folder), "--harness", "gpqa", "--output", str(tmp_path / "out")]) == 2
    assert "install bupo[harness]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_that_do_not_go_together(tiny_folder, tmp_path, capsys):
    command = ["eval", "--model", str(tiny_folder), "--harness", "arc", "--output", str(tmp_path / "out")]
    assert main([*command, "--tasks", "math500", "--k", "4", "--temperature", "0.5"]) == 2
    assert "--harness takes no --k, --tasks, --temperature" in capsys.readouterr().err
    assert main([*command, "--template", "qwen-math"]) == 2
    assert "--harness takes no --template qwen-math" in capsys.readouterr().err


@pytest.mark.skipif(not installed, reason="lm-evaluation-harness is not installed")
def test_a_harness_task_from_a_local_file(tiny_folder, tmp_path, capsys):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"question": f"{i} + 1 =", "choices": [str(i), str(i + 1)], "label": 1} for i in range(6)]
    (tasks / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "sums.yaml").write_text(
        "task: tiny_sums\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tasks / 'sums.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: label\n'
        "metric_list:\n  - metric: acc\n"
    )
    output = tmp_path / "out"
    command = ["eval", "--model", str(tiny_folder), "--harness-tasks", str(tasks), "--output", str(output)]
    assert main([*command, "--harness", "no_such_task"]) == 2
    assert "has no task no_such_task" in capsys.readouterr().err
    assert main([*command, "--harness", "humaneval"]) == 2
    assert "--unsafe-code" in capsys.readouterr().err
    assert not output.exists()
    assert main([*command, "--harness", "tiny_sums", "--json"]) == 0
    results = json.loads((output / "harness.json").read_text())
    assert 0 <= results["tasks"]["tiny_sums"]["acc,none"] <= 1
    assert results["samples"] == {"tiny_sums": 6}
    assert json.loads((output / "run.json").read_text())["command"] == "eval --harness"
