"""The whole path in small: analyse, train twice, evaluate three models, one page that says what was found."""

import json

import pytest

from bupo.cli import main
from bupo.cli.demo import run_jobs
from bupo.errors import BupoError


def test_demo_from_end_to_end(tmp_path, capsys, monkeypatch):
    """With its commands in this process, which saves six starts; as it is, it runs in tests/test_wheel.py."""

    def run_here(jobs, *about, **more):
        return {name: float(1 + main(list(arguments))) for name, arguments in jobs.items()}

    monkeypatch.setattr("bupo.cli.demo.run_jobs", run_here)
    folder = tmp_path / "demo"
    sizes = ["--rollouts", "2", "--internal-steps", "1", "--limit", "6", "--samples", "2"]
    assert main(["demo", "--output", str(folder), *sizes, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
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
    assert main(["demo", "--output", str(tmp_path / "d"), "--rollouts", "3", "--internal-steps", "3"]) == 2
    assert "fewer than the 3" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_jobs_log_and_a_failing_one_stops_the_others(tmp_path, monkeypatch):
    jobs = {name: ["--version"] for name in ("a", "b c")}
    assert all(seconds > 0 for seconds in run_jobs(jobs, tmp_path, 1, quiet=True).values())
    assert all((tmp_path / f"{name}.log").read_text().startswith("bupo ") for name in ("a", "b-c"))
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # one at a time
    bad = ["analyze", "--model", "small", "--output", str(tmp_path / "o")]
    with pytest.raises(BupoError, match="bad failed: pass either --dataset"):
        run_jobs({"bad": bad, "never": ["--version"]}, tmp_path, 1, quiet=True)
    assert not (tmp_path / "never.log").exists()
