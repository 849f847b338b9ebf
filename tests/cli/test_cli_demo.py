"""The whole path in small: analyse, train twice, evaluate three models, one page that says what it found."""

from __future__ import annotations

import json

import pytest

from bupo.cli import main


@pytest.mark.timeout(900)
def test_demo_from_end_to_end(tmp_path, capsys):
    folder = tmp_path / "demo"
    sizes = ["--rollouts", "2", "--internal-steps", "1", "--problems", "6", "--samples", "2"]
    assert main(["demo", "--output", str(folder), *sizes, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["headline"]
    page = (folder / "report.html").read_text()
    for words in ("GRPO", "BuPO", "start", "<svg", summary["layer_reason"].split(" (")[0]):
        assert words in page
    assert "https://" not in page.replace("https://www.w3.org", "").replace("https://arxiv.org", "")
    phases = [json.loads(line)["phase"] for line in (folder / "bupo" / "log.jsonl").read_text().splitlines()]
    assert phases == ["internal", "full"]
    phases = [json.loads(line)["phase"] for line in (folder / "grpo" / "log.jsonl").read_text().splitlines()]
    assert phases == ["full", "full"]
    names = {c["second"] for c in summary["comparisons"]} | {c["first"] for c in summary["comparisons"]}
    assert names == {"start", "GRPO", "BuPO"}
    assert main(["demo", "--output", str(folder), *sizes]) == 2  # holds a run
    assert "--overwrite" in capsys.readouterr().err


def test_an_internal_phase_that_never_ends_is_refused(tmp_path, capsys):
    arguments = ["--output", str(tmp_path / "d"), "--rollouts", "3", "--internal-steps", "3"]
    assert main(["demo", *arguments]) == 2
    assert "fewer than the 3" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
