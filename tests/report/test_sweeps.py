"""The page of a sweep: tables, verdicts no stronger than their intervals, figures, layer map."""

import json

import pytest

from bupo.cli import main
from bupo.report.evaluations import outcome
from bupo.report.sweeps import Sweep, conclude
from tests.support.results import HOSTILE, analysis, layer_choice
from tests.support.sweeps import a_row, write_rows
from tests.sweep.test_statistics import layer_rows


@pytest.mark.parametrize(
    ("ends", "p", "found"),
    [((0.01, 0.05), 0.01, "better"), ((-0.05, -0.01), 0.01, "worse"), ((-0.01, 0.05), 0.01, "open"),
     ((0.01, 0.05), 0.06, "open"), ((0.01, 0.05), None, "open"), (None, None, "open")],
)  # fmt: skip
def test_a_verdict_needs_the_interval_and_the_p_value(ends, p, found):
    assert outcome(ends, p) == found


def test_a_page_of_a_sweep(tmp_path, capsys):
    more = {"curves": {"reward": [0.1, 0.2, 0.3]}}
    problems = range(30)
    rows = [a_row("start", 0, [i % 3 for i in problems])]
    for seed in range(4):  # with several workers, the baseline need not end first
        rows.append(a_row("up", seed, [i % 3 + 1 + (i < seed) for i in problems], update_seconds=20.0, **more))
        rows.append(a_row("grpo", seed, [i % 3 for i in problems], update_seconds=10.0 + seed, **more))
        rows.append(a_row("even", seed, [(i + seed) % 3 for i in problems], update_seconds=20.0, **more))
    rows.append(a_row(HOSTILE, 0, [1 for _ in problems]))
    write_rows(tmp_path / "runs.jsonl", rows)
    page = tmp_path / "page.html"
    assert main(["report", f"mine={tmp_path}", "--output", str(page)]) == 0
    assert "better in 1 of 3; not shown to differ in 2 of 3" in capsys.readouterr().out
    text = page.read_text()
    for words in ("Seeds and arms", "Holm", "t: up is better than grpo: +2", "t: even is not shown to differ from grpo",
                  'id="fig-w1-cost"', 'id="fig-w1-curves"', "with one seed, which says nothing of others"):  # fmt: skip
        assert words in text
    assert text.index('text">start</th>') < text.index('text">grpo</th>') < text.index('text">up</th>')
    assert "<script>" not in text
    assert "Layer map" not in text
    renamed = (tmp_path / "runs.jsonl").rename(tmp_path / "other.jsonl")
    assert main(["report", str(renamed), "--output", str(page), "--overwrite"]) == 0


def test_a_sweep_over_layers_has_a_map(tmp_path):
    rows = layer_rows()
    write_rows(tmp_path / "runs.jsonl", [row for own in rows.values() for row in own.values()])
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "Layer map: t" in text
    assert 'id="fig-w1-layers1"' in text
    assert "seconds of updates, so effect against cost is not drawn" in text
    assert "that its policy recovers" not in text
    for name, layers in (("deeper", 3), ("fits", 2)):
        (tmp_path / name).mkdir()
        look = analysis(layers, None, layer_choice=layer_choice(layers))
        (tmp_path / name / "analysis.json").write_text(json.dumps(look))
    assert (
        main(["report", *(str(tmp_path / p) for p in ("", "deeper", "fits")), "--output", str(tmp_path / "2.html")])
        == 0
    )
    assert "<td>51.1 %</td>" in (tmp_path / "2.html").read_text()  # what ridge recovers at layer 1 of the one that fits
    assert conclude([("x", Sweep({"start": rows["start"]}))]).tone == "none"
