"""Commands run beside each other: all succeed, or the failing one's message comes up and the rest are stopped."""

from __future__ import annotations

import pytest

from bupo.cli.jobs import Job, lines_in, run_jobs
from bupo.errors import BupoError


def job(tmp_path, name, *arguments):
    return Job(name, list(arguments), tmp_path / f"{name}.log", lambda: (0, 1))


def test_all_run_and_log(tmp_path):
    jobs = [job(tmp_path, name, "--version") for name in ("a", "b", "c")]
    run_jobs(jobs, at_once=2, quiet=True)
    assert all(j.log.read_text().startswith("bupo ") for j in jobs)
    assert all(j.seconds > 0 for j in jobs)


def test_a_failure_stops_the_others_and_says_why(tmp_path):
    bad = job(tmp_path, "bad", "analyze", "--model", "small", "--output", str(tmp_path / "o"))
    never = job(tmp_path, "never", "--version")
    with pytest.raises(BupoError, match="bad failed: pass either --dataset"):
        run_jobs([bad, never], at_once=1, quiet=True)
    assert not never.log.exists()


def test_lines_in_counts_whole_lines(tmp_path):
    path = tmp_path / "log"
    assert lines_in(path, 3) == (0, 3)
    path.write_text("a\nb\nhalf")
    assert lines_in(path, 3) == (2, 3)
