"""The whole path in small: analyse, train twice, evaluate three models, one page that says what was found."""

from __future__ import annotations

import json

import pytest

from bupo.cli import main
from bupo.cli.demo import Job, run_jobs
from bupo.errors import BupoError


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
    for run, expected in (("bupo", ["internal", "full"]), ("grpo", ["full", "full"])):
        phases = [json.loads(line)["phase"] for line in (folder / run / "log.jsonl").read_text().splitlines()]
        assert phases == expected
    names = {c["second"] for c in summary["comparisons"]} | {c["first"] for c in summary["comparisons"]}
    assert names == {"start", "GRPO", "BuPO"}
    assert main(["demo", "--output", str(folder), *sizes]) == 2  # the folder holds a run
    assert "--overwrite" in capsys.readouterr().err


def test_an_internal_phase_that_never_ends_is_refused(tmp_path, capsys):
    arguments = ["--output", str(tmp_path / "d"), "--rollouts", "3", "--internal-steps", "3"]
    assert main(["demo", *arguments]) == 2
    assert "fewer than the 3" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_jobs_run_side_by_side_and_log(tmp_path):
    jobs = [Job(name, ["--version"], tmp_path) for name in ("a", "b", "c")]
    run_jobs(jobs, at_once=2, quiet=True)
    assert all(job.log.read_text().startswith("bupo ") for job in jobs)
    assert all(job.seconds > 0 for job in jobs)


def test_a_failing_job_stops_the_others_and_its_message_is_shown(tmp_path):
    bad = Job("bad", ["analyze", "--model", "small", "--output", str(tmp_path / "o")], tmp_path)
    never = Job("never", ["--version"], tmp_path)
    with pytest.raises(BupoError, match="bad failed: pass either --dataset"):
        run_jobs([bad, never], at_once=1, quiet=True)
    assert not never.log.exists()


def test_progress_counts_whole_lines(tmp_path):
    job = Job("a", [], tmp_path, 3, tmp_path / "log")
    assert job.done == 0
    job.counted.write_text("a\nb\nhalf")
    assert job.done == 2
