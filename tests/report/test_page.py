"""What evaluations show in words, the page, and the command that makes it; no browser, no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bupo.cli import main
from bupo.errors import InputError
from bupo.report.collect import ReportData, collect
from bupo.report.conclusion import compare_evaluations, conclude, outcome
from bupo.report.page import write_page
from bupo.report.results import Analysis, Evaluation
from tests.support.results import HOSTILE, analysis, evaluations, everything, layer_choice, log, results, write


def difference(low: float, high: float, p: float | None = 0.01, **more) -> dict:
    return {"first": "grpo", "second": "bupo", "task": "sums", "difference": (low + high) / 2, "ci95": [low, high],
            "p_value": p, "problems": 40, **more}  # fmt: skip


def judge(*differences: dict):
    return conclude(evaluations(start=5, grpo=5, bupo=5), differences)


@pytest.mark.parametrize(
    ("low", "high", "p", "expected"),
    [(0.01, 0.05, 0.01, "better"), (-0.05, -0.01, 0.01, "worse"), (-0.01, 0.05, 0.2, "open"), (0.0, 0.05, 0.01, "open"),
     (0.01, 0.05, 0.06, "open"), (0.01, 0.05, None, "better"), (0.01, 0.05, float("nan"), "open")],
)  # fmt: skip
def test_an_outcome_is_no_stronger_than_its_interval_and_p_value(low, high, p, expected):
    assert outcome(difference(low, high, p)) == expected


@pytest.mark.parametrize(
    ("low", "high", "tone", "headline"),
    [
        (0.01, 0.05, "better", "BuPO is better than GRPO on sums: +3.0 points [+1.0, +5.0], p = 0.010."),
        (-0.02, 0.05, "open", "BuPO is not shown to be better than GRPO on sums: +1.5 points [−2.0, +5.0], p = 0.010."),
        (-0.05, -0.02, "worse", "BuPO is not better than GRPO on sums; it is worse: −3.5 points [−5.0, −2.0], "
         "p = 0.010."),
    ],
)  # fmt: skip
def test_the_headline_says_what_is_shown(low, high, tone, headline):
    conclusion = judge(difference(low, high))
    assert (conclusion.tone, conclusion.headline) == (tone, headline)
    assert any("another training seed" in line for line in conclusion.caveats)


def test_a_difference_the_other_way_round_is_turned():
    conclusion = judge(difference(-0.05, -0.01, first="bupo", second="grpo"))
    assert conclusion.tone == "better"
    assert "+3.0 points [+1.0, +5.0]" in conclusion.headline
    assert any(line.startswith("sums: grpo is worse than bupo") for line in conclusion.lines)


def test_the_headline_over_several_tasks_is_better_only_if_all_are():
    one, two = difference(0.01, 0.05), difference(-0.02, 0.05, task="products")
    conclusion = judge(one, two)
    assert conclusion.tone == "open"
    assert "better on 1 of 2 (sums)" in conclusion.headline
    assert "no difference shown on 1 of 2 (products)" in conclusion.headline
    assert judge(one, {**one, "task": "products"}).tone == "better"


def test_without_a_comparison_nothing_is_called_better():
    assert "not evaluated on the same problems, so neither is called better" in judge().headline
    assert "bupo eval" in conclude([], []).headline
    assert "nothing to compare" in conclude(evaluations(start=5), []).headline


@pytest.mark.parametrize("names", [("start", "sft", "mymethod"), ("a", "b")])
def test_the_headline_does_not_need_known_names(names):
    scored = evaluations(**{name: 2 + 3 * i for i, name in enumerate(names)})
    conclusion = conclude(scored, compare_evaluations(scored)[0])
    assert conclusion.tone == "better"
    assert names[0] in conclusion.headline
    assert names[-1] in conclusion.headline


def test_pairs_are_compared_problem_by_problem_and_different_problems_are_not():
    named = evaluations(grpo=4, bupo=8)
    ((found,), notes) = compare_evaluations(named)
    means = [evaluation.tasks["sums"].avg_at_k.mean for _, evaluation in named]
    assert found["difference"] == pytest.approx(means[1] - means[0])
    assert outcome(found) == "better"
    assert notes == []
    named[1] = ("bupo", Evaluation.parse(results(8, problems=30)))
    none, (note,) = compare_evaluations(named)
    assert none == []
    assert "different problems" in note


def test_of_many_evaluations_bupo_is_still_compared_with_grpo():
    scored = evaluations(start=2, a=3, b=4, c=5, GRPO=5, BuPO=9)
    differences, _ = compare_evaluations(scored)
    assert len(differences) == 6
    assert conclude(scored, differences).headline.startswith("BuPO is better than GRPO on sums")
    scored = evaluations(start=2, grpo_0=3, grpo_1=4, bupo_0=5, bupo_1=5, sft=1)
    pairs = [(d["first"], d["second"]) for d in compare_evaluations(scored)[0]]
    assert pairs[5:] == [("grpo-0", "bupo-0"), ("grpo-1", "bupo-1")]


class _Page(HTMLParser):
    """Tags with attributes, and the text outside script and style."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self._hidden = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        if not self._hidden:
            self.text += data


def page_of(path: Path, data: ReportData) -> _Page:
    return _Page(write_page(path / "report.html", "Report", data).read_text())


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> _Page:
    data = everything()
    data.analyses.append(("second", Analysis.parse(analysis(12, None))))
    return page_of(tmp_path_factory.mktemp("page"), data)


def test_page_holds_every_section_and_the_numbers(page):
    for heading in ("In short", "Internal policies", "Training", "Results", "Sample responses", "What was run"):
        assert heading in page.text
    assert "BuPO is not shown to be better than GRPO on sums" in page.text
    assert "layer 2 of 6: last positive change" in page.text
    assert "none, because the change is negative in every layer" in page.text
    assert "layer 3 ± 0.4 (standard error): it turns there" in page.text
    assert "40 random tokens of 4 responses" in page.text
    assert f"@4 {100 * results(6)['tasks']['sums']['avg_at_k']['mean']:.1f}" in page.text
    assert "bupo eval tiny" in page.text
    assert "python 3.11" in page.text
    assert len([tag for tag, _ in page.tags if tag == "figure"]) == 1 + 4 + 3 + 1 + 2


def test_page_is_accessible_and_self_contained(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    images = [a for tag, a in page.tags if tag == "svg"]
    assert images
    assert all(a.get("role") == "img" and len(a.get("aria-label", "")) > 20 for a in images)
    assert all("scope" in a for tag, a in page.tags if tag == "th")
    assert len([1 for tag, _ in page.tags if tag == "caption"]) == len([1 for tag, _ in page.tags if tag == "table"])
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "img")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
            if name in attributes:
                assert attributes[name][1:] in ids


def test_page_escapes_everything_that_comes_from_outside(tmp_path):
    data = everything(HOSTILE)
    choice = layer_choice(criteria=[{"name": "knee", "layer": 3, "reason": HOSTILE}])
    data.analyses = [(HOSTILE, Analysis.parse(analysis(boundary_reason=HOSTILE, layer_choice=choice)))]
    page = page_of(tmp_path, data)
    assert page.text.count(HOSTILE) >= 8
    assert not [a for tag, a in page.tags if tag == "img" or "onerror" in a]
    assert "<script>document" not in (tmp_path / "report.html").read_text()


def test_page_without_evaluations_names_the_boundary_layer_and_runs_no_script(tmp_path):
    assert "No record of the commands" in page_of(tmp_path, ReportData()).text
    data = ReportData(analyses=[("one", Analysis.parse(analysis()))])
    assert "one: boundary layer 2 of 6: last positive change." in page_of(tmp_path, data).text
    text = (tmp_path / "report.html").read_text()
    assert "script-src 'none'" in text
    assert "<script" not in text


@pytest.fixture
def folders(tmp_path) -> Path:
    run = {"schema": 1, "command": "x", "argv": ["x", "--seed", "1"], "config": {"seed": 1}}
    for name, file, value in (
        ("look", "analysis.json", analysis()), ("train/grpo", "log.jsonl", log()), ("train/bupo", "log.jsonl", log(3)),
        ("eval/grpo", "results.json", results(3)), ("eval/bupo", "results.json", results(8)),
    ):  # fmt: skip
        write(write(tmp_path / name, file, value), "run.json", run)
    return tmp_path


def test_command_recognises_each_folder_and_prints_the_headline(folders, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    arguments = ["report", "look", "train/grpo", "train/bupo", "grpo=eval/grpo", "bupo=eval/bupo/results.json"]
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["tone"] == "better"
    assert printed["headline"].startswith("BuPO is better than GRPO on sums")
    assert printed["comparisons"][0]["problems"] == 40
    page = Path("report.html").read_text()
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert "1 analysis, 2 training runs, 2 evaluations" in capsys.readouterr().out
    assert Path("report.html").read_text() == page


def test_names_and_order(folders):
    data = collect([str(folders / "train/grpo"), str(folders / "eval/grpo")])
    assert [data.runs[0][0], data.evaluations[0][0]] == ["train/grpo", "eval/grpo"]
    write(folders / "eval/start", "results.json", results(2))
    data = collect([f"{n}={folders / 'eval' / n}" for n in ("bupo", "start", "grpo")])
    assert [name for name, _ in data.evaluations] == ["start", "grpo", "bupo"]
    assert [(d["first"], d["second"]) for d in data.differences][-1] == ("grpo", "bupo")
    with pytest.raises(InputError, match="two evaluations are named a"):
        collect([f"a={folders / 'eval' / n}" for n in ("bupo", "grpo")])


def test_token_statistics_beside_an_analysis_are_shown(folders):
    tokens = {"schema": 1, "samples": [{"problem_id": "p", "tokens": ["a"], "layers": 1, "entropy": [[0.5]]}]}
    write(folders / "look", "tokens.json", tokens)
    ((_, found),) = collect([str(folders / "look")]).tokens
    assert found.samples[0].entropy == [[0.5]]


def test_sample_responses_come_from_the_evaluation(folders):
    from bupo.evaluate.responses import write_responses

    for model in ("grpo", "bupo"):
        rows = [
            {"task": "sums", "problem_id": f"sums/{p}", "prompt": "1+1", "response": f"{model} {s}", "answer": "2",
             "source": "", "metadata": "{}", "status": "correct", "extracted": "2", "prompt_ids": [1],
             "response_ids": [2], "sample": s, "length": 1, "finished": True, "reward": 1.0}
            for p in range(5) for s in range(2)
        ]  # fmt: skip
        write_responses(folders / "eval" / model / "responses.parquet", rows)
    samples = collect([f"{m}={folders / 'eval' / m}" for m in ("grpo", "bupo")]).samples
    assert [s["problem_id"] for s in samples] == ["sums/0", "sums/1", "sums/2"]
    assert [r["response"] for r in samples[0]["responses"]] == ["grpo 0", "bupo 0"]


SCORE = '{"schema": 1, "tasks": {"t": {"avg_at_k": {"mean": 1}}}}'


@pytest.mark.parametrize(
    ("files", "argument", "words"),
    [
        ({}, "missing", "does not exist"),
        ({"a/other.txt": "x"}, "a", "contains none of analysis.json"),
        ({"a/b/analysis.json": "{}"}, "a", "its folders b do"),
        ({"a/analysis.json": "{"}, "a", "cannot be read as JSON"),
        ({"a/analysis.json": "[1]"}, "a", "does not contain a JSON object"),
        ({"a/analysis.json": "{}"}, "a", "schema: Field required; write it again with `bupo analyze`"),
        ({"a/results.json": '{"tasks": {}}'}, "a", "schema: Field required; write it again with `bupo eval`"),
        ({"a/results.json": '{"schema": 1, "tasks": [1]}'}, "a", "tasks: Input should be a valid dictionary"),
        ({"a/results.json": SCORE}, "a", "tasks.t.avg_at_k.k: Field required"),
        ({"a/compare.json": '{"schema": 1}'}, "a", "layer: Field required; write it again with `bupo compare`"),
        ({"a/tokens.json": '{"schema": 9, "samples": []}'}, "a", "`bupo analyze --explore N`"),
        ({"a/log.jsonl": "nothing\n\n"}, "a", "no row"),
        ({"a.json": '{"x": 1}'}, "a.json", "not an analysis, an evaluation"),
    ],
)
def test_wrong_inputs_give_one_line_and_write_nothing(tmp_path, capsys, monkeypatch, files, argument, words):
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    assert main(["report", argument]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not Path("report.html").exists()


def test_output_that_is_a_folder_or_given_twice_is_refused(folders, capsys):
    assert main(["report", str(folders / "look"), "--output", str(folders)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main(["report", str(folders / "look"), str(folders / "look"), "--output", str(folders / "r.html")]) == 2
    assert "given twice" in capsys.readouterr().err


def test_the_report_needs_no_torch():
    code = (
        "import sys, bupo.report.page, bupo.report.inside_figures;"
        "bad = {'torch', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
