"""The layer choice of `bupo analyze` as a user runs it: what is printed, what is written, what is refused."""

from __future__ import annotations

import json

import pytest

from tests.cli.test_cli_analyze import refused, run


@pytest.fixture(scope="module")
def responses(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "responses.jsonl"
    rows = [{"prompt_ids": [5, 6, 7], "response_ids": [8, 9, 10, 11]}, {"prompt_ids": [7], "response_ids": [9, 2]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_evidence_stands_beside_the_layer(capsys, tmp_path, responses):
    arguments = ("--model", "small", "--responses", responses, "--output")
    code, out, _ = run(capsys, *arguments, tmp_path / "a")
    assert code == 0
    out = " ".join(out.split())
    assert "6 random tokens of 2 responses" in out
    for words in ("agree %", "boundary (the paper's rule)", "knee of agreement", "--rule boundary"):
        assert words in out
    block = json.loads((tmp_path / "a" / "analysis.json").read_text())["layer_choice"]
    assert block["tokens"] == 6
    code, out, _ = run(capsys, *arguments, tmp_path / "b", "--rule", "recommended", "--choice-tokens", 4, "--json")
    assert code == 0
    summary = json.loads(out)
    assert summary["rule"] == "recommended"
    assert summary["layer"] == summary["recommendation"]["layer"]
    assert set(summary["recommendation"]) == {"layer", "criterion", "reason"}
    assert len(summary["criteria"]) == 2
    assert "layer_choice" not in summary
    assert json.loads((tmp_path / "b" / "analysis.json").read_text())["layer_choice"]["tokens"] == 4


def test_it_can_be_left_out(capsys, tmp_path, responses):
    arguments = ("--model", "small", "--responses", responses, "--no-choice", "--output", tmp_path / "a")
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert "recommended" not in out
    assert "layer_choice" not in json.loads((tmp_path / "a" / "analysis.json").read_text())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rule", "best"), "boundary or recommended"),
        (("--rule", "recommended", "--no-choice"), "leave out --no-choice"),
        (("--choice-tokens", 9, "--no-choice"), "leave out --no-choice"),
    ],
)
def test_options_that_do_not_go_together_are_refused(capsys, tmp_path, responses, options, words):
    line = refused(capsys, tmp_path / "o", "--model", "small", "--responses", responses, *options)
    assert words in line
