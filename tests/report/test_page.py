"""What evaluations show in words, the page, and the command that makes it; no browser, no torch."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bupo.cli import main
from bupo.errors import InputError
from bupo.evaluate.responses import write_responses
from bupo.report.evaluations import compare_evaluations, conclude, outcome
from bupo.report.page import ReportData, collect, data_block, render
from bupo.report.results import Analysis, Evaluation, ExploredTokens
from bupo.run_folder import write_text
from tests.support import results as files
from tests.support.results import HOSTILE, TOKENS, analysis, evaluations, everything, layer_choice, results, write


def difference(low: float, high: float, p: float = 0.01, **more) -> dict:
    return {"first": "grpo", "second": "bupo", "task": "sums", "difference": (low + high) / 2, "ci95": [low, high],
            "p_value": p, "problems": 40, **more}  # fmt: skip


def judge(*differences: dict):
    return conclude(evaluations(start=5, grpo=5, bupo=5), differences)


@pytest.mark.parametrize(
    ("low", "high", "p", "tone", "said"),
    [
        (0.01, 0.05, 0.01, "better", "better than GRPO on sums: +3.0 points [+1.0, +5.0], p = 0.010."),
        (-0.03, -0.01, 0, "worse", "not better than GRPO on sums; it is worse: −2.0 points [−3.0, −1.0], p < 0.001."),
        (-0.02, 0.05, 0.01, "open", "not shown to be better than GRPO on sums: +1.5 points [−2.0, +5.0], p = 0.010."),
        (0.0, 0.05, 0.01, "open", "not shown to be better than GRPO on sums: +2.5 points [+0.0, +5.0], p = 0.010."),
        (0.01, 0.05, 0.06, "open", "not shown to be better than GRPO on sums: +3.0 points [+1.0, +5.0], p = 0.060."),
    ],
)
def test_the_headline_is_no_stronger_than_the_interval_and_the_p_value(low, high, p, tone, said):
    found = difference(low, high, p)
    conclusion = judge(found)
    assert (outcome(found["ci95"], p), conclusion.tone, conclusion.headline) == (tone, tone, f"BuPO is {said}")


def test_the_headline_over_several_tasks_is_better_only_if_all_are():
    one, two = difference(0.01, 0.05), difference(-0.02, 0.05, task="products")
    parts = "better on 1 of 2 (sums); no difference shown on 1 of 2 (products)"
    assert judge(one, two).headline == f"BuPO against GRPO: {parts}."
    assert [judge(one, two).tone, judge(one, {**one, "task": "products"}).tone] == ["open", "better"]


def test_the_headline_without_a_comparison_or_without_known_names():
    assert "not evaluated on the same problems, so neither is called better" in judge().headline
    assert "bupo eval" in conclude([], []).headline
    assert "nothing to compare" in conclude(evaluations(start=5), []).headline
    for names in (("start", "sft", "mymethod"), ("a", "b")):
        scored = evaluations(**{name: 2 + 3 * i for i, name in enumerate(names)})
        conclusion = conclude(scored, compare_evaluations(scored)[0])
        assert conclusion.tone == "better"
        assert all(name in conclusion.headline for name in (names[0], names[-1]))


def test_pairs_are_compared_problem_by_problem_and_different_problems_are_not():
    named = evaluations(grpo=4, bupo=8)
    ((found,), notes) = compare_evaluations(named)
    means = [evaluation.tasks["sums"].avg_at_k.mean for _, evaluation in named]
    assert found["difference"] == pytest.approx(means[1] - means[0])
    assert (outcome(found["ci95"], found["p_value"]), notes) == ("better", [])
    named[1] = ("bupo", Evaluation.parse(results(8, problems=30)))
    why = "sums: grpo and bupo were evaluated on different problems, so they are not compared."
    assert compare_evaluations(named) == ([], [why])


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
        self.feed(re.sub(r"<style>.*?</style>", "", text, flags=re.S))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def page_of(path: Path, data: ReportData) -> _Page:
    return _Page(write_text(path / "report.html", render("Report", data)).read_text())


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> _Page:
    data = everything()
    data.analyses.append(("second", Analysis.parse(analysis(12, None))))
    return page_of(tmp_path_factory.mktemp("page"), data)


def test_page_holds_every_section_and_the_numbers(page):
    for text in (
        "In short", "Internal policies", "Training", "Results", "Sample responses", "What was run",
        "BuPO is not shown to be better than GRPO on sums", "layer 2 of 6: last positive change",
        "none, because the change is negative in every layer", "layer 3 ± 0.4 (standard error): it turns there",
        "40 random tokens of 4 responses", f"@4 {100 * results(6)['tasks']['sums']['avg_at_k']['mean']:.1f}",
        "bupo eval tiny", "python 3.11", "another training seed",
        "bupo: rollout batch 1 (internal phase, layer 3)", "reward 1, advantage +0.70, 11 tokens, cut off",
        "reward 0, advantage −0.70, 10 tokens", "reward none, advantage +0.00, 12 tokens", "prompt 1 tiny", "tiny 2",
    ):  # fmt: skip
        assert text in page.text
    assert len([tag for tag, _ in page.tags if tag == "figure"]) == 1 + 4 + 3 + 1 + 2


def test_page_is_accessible_and_self_contained(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    tags = [tag for tag, _ in page.tags]
    assert len(ids) == len(set(ids))
    assert tags.count("svg") > 5
    assert tags.count("caption") == tags.count("table")
    assert all(a.get("role") == "img" and len(a.get("aria-label", "")) > 20 for tag, a in page.tags if tag == "svg")
    assert all("scope" in a for tag, a in page.tags if tag == "th")
    assert not {"link", "iframe", "object", "embed", "img"} & set(tags)
    targets = {a[name] for _, a in page.tags for name in ("src", "href", "xlink:href") if name in a}
    assert targets <= {f"#{one}" for one in ids}


def test_page_escapes_everything_that_comes_from_outside(tmp_path):
    data = everything(HOSTILE)
    choice = layer_choice(knees={"norm": {"layer": 3, "reason": HOSTILE}})
    data.analyses = [(HOSTILE, Analysis.parse(analysis(boundary_reason=HOSTILE, layer_choice=choice)))]
    page = page_of(tmp_path, data)
    assert page.text.count(HOSTILE) >= 8
    assert not [a for tag, a in page.tags if tag == "img" or "onerror" in a]
    assert "<script>document" not in (tmp_path / "report.html").read_text()


def test_page_without_evaluations_names_the_boundary_layer_and_runs_no_script(tmp_path):
    assert "No record of the commands" in page_of(tmp_path, ReportData()).text
    for boundary, said in ((2, "2 of 6: r at layer 2"), (None, "none, because r at layer 2")):
        content = analysis(boundary=boundary, boundary_reason="r at layer 2")
        page = page_of(tmp_path, ReportData(analyses=[("one", Analysis.parse(content))]))
        assert f"one: boundary layer {said}." in page.text
    assert "script" not in [tag for tag, _ in page.tags]
    assert "script-src 'none'" in (tmp_path / "report.html").read_text()


def test_the_first_a_middle_and_the_last_rollout_batch_are_shown(folders):
    for rollout in (1, 2, 3, 20, 10000):
        write(
            folders / "train/bupo/rollouts",
            f"rollout-{rollout:04d}.jsonl",
            files.sampled("x" * 5000, rollout, groups=6),
        )
    ((_, run),) = collect([str(folders / "train/bupo")]).runs
    assert [groups[0][0].rollout for groups in run.batches] == [1, 3, 10000]
    assert [[row.group for row in group] for group in run.batches[0]] == [[n] * 3 for n in range(4)]
    page = page_of(folders, collect([str(folders / "train/bupo")]))
    assert page.text.count("[... 1,002 characters left out ...]\n") == 3 * 4 * 3
    assert [tag for tag, _ in page.tags].count("script") == 1
    [policy] = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    script = (folders / "report.html").read_text().split("<script>")[1].split("</script>")[0]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    path = folders / "train/bupo/rollouts/rollout-0001.jsonl"
    for text, words in (("{", "Invalid JSON"), ('{"rollout": 1}', "0: group: Field required")):
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            collect([str(folders / "train/bupo")])


def test_the_data_block_cannot_be_left_and_comes_back_whole():
    content = files.explored(TOKENS)
    text = str(data_block([("tiny", ExploredTokens.parse(content))]))
    assert not set("<>&\u2028\u2029") & set(text)
    assert text.isascii()
    assert json.loads(text)["models"] == [{"name": "tiny", "samples": content["samples"]}]


@pytest.fixture
def folders(tmp_path) -> Path:
    run = {"schema": 1, "command": "x", "argv": ["x", "--seed", "1"], "config": {"seed": 1}}
    for name, file, value in (
        ("look", "analysis.json", analysis()),
        ("train/grpo", "log.jsonl", files.log()), ("train/bupo", "log.jsonl", files.log(3)),
        ("eval/grpo", "results.json", results(3)), ("eval/bupo", "results.json", results(8)),
    ):  # fmt: skip
        write(write(tmp_path / name, file, value), "run.json", run)
    return tmp_path


def test_command_recognises_each_folder_and_prints_the_headline(folders, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    arguments = ["report", "look", "train/grpo", "train/bupo", "grpo=eval/grpo", "bupo=eval/bupo/results.json"]
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["headline"].startswith("BuPO is better than GRPO on sums")
    assert (printed["tone"], printed["comparisons"][0]["problems"]) == ("better", 40)
    page = Path("report.html").read_text()
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert "1 analysis, 2 training runs, 2 evaluations" in capsys.readouterr().out
    assert Path("report.html").read_text() == page


def test_names_order_and_what_lies_beside_an_analysis(folders):
    data = collect([str(folders / "train/grpo"), str(folders / "eval/grpo")])
    assert [data.runs[0][0], data.evaluations[0][0]] == ["train/grpo", "eval/grpo"]
    write(folders / "eval/start", "results.json", results(2))
    data = collect([f"{n}={folders / 'eval' / n}" for n in ("bupo", "start", "grpo")])
    assert [name for name, _ in data.evaluations] == ["start", "grpo", "bupo"]
    assert [(d["first"], d["second"]) for d in data.differences][-1] == ("grpo", "bupo")
    write(folders / "look", "tokens.json", files.explored(["a"]))
    ((_, found),) = collect([str(folders / "look")]).tokens
    assert found.samples[0].entropy[0] == [1.0]
    with pytest.raises(InputError, match="two evaluations are named a"):
        collect([f"a={folders / 'eval' / n}" for n in ("bupo", "grpo")])


def test_sample_responses_come_from_the_evaluation(folders):
    row = dict.fromkeys(("prompt", "answer", "source", "metadata", "status", "extracted"), "x")
    row |= {"task": "sums", "prompt_ids": [1], "response_ids": [2], "length": 1, "finished": True, "reward": 1.0}
    for model in ("grpo", "bupo"):
        rows = [{**row, "problem_id": f"sums/{p}", "response": f"{model} {s}", "sample": s}
                for p in range(5) for s in range(2)]  # fmt: skip
        write_responses(folders / "eval" / model / "responses.parquet", rows)
    samples = collect([f"{m}={folders / 'eval' / m}" for m in ("grpo", "bupo")]).samples
    assert list(samples) == [("sums", f"sums/{p}") for p in range(3)]
    assert [row["response"] for row in samples["sums", "sums/0"]] == ["grpo 0", "bupo 0"]


@pytest.mark.parametrize(
    ("content", "argument", "words"),
    [
        ({}, "missing", "does not exist"),
        ({"a/other.txt": "x"}, "a", "contains none of analysis.json"),
        ({"a/b/analysis.json": "{}"}, "a", "its folders b do"),
        ({"a/analysis.json": "{"}, "a", "cannot be read as JSON"),
        ({"a/analysis.json": "[1]"}, "a", "does not contain a JSON object"),
        ({"a/analysis.json": "{}"}, "a", "schema: Field required; write it again with `bupo analyze`"),
        ({"a/results.json": '{"tasks": {}}'}, "a", "schema: Field required; write it again with `bupo eval`"),
        ({"a/results.json": '{"schema": 1, "tasks": [1]}'}, "a", "tasks: Input should be a valid dictionary"),
        ({"a/results.json": '{"schema": 1, "tasks": {"t": {}}}'}, "a", "tasks.t.n_problems: Field required"),
        ({"a/compare.json": '{"schema": 1}'}, "a", "layer: Field required; write it again with `bupo compare`"),
        ({"a/tokens.json": '{"schema": 9, "samples": []}'}, "a", "`bupo analyze --explore N`"),
        ({"a/log.jsonl": "nothing\n\n"}, "a", "no row"),
        ({"a.json": '{"x": 1}'}, "a.json", "not an analysis, an evaluation"),
    ],
)
def test_wrong_inputs_give_one_line_and_write_nothing(tmp_path, capsys, monkeypatch, content, argument, words):
    monkeypatch.chdir(tmp_path)
    for name, text in content.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    assert main(["report", argument]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not Path("report.html").exists()


def test_output_that_is_a_folder_or_given_twice_is_refused(folders, capsys):
    look = str(folders / "look")
    for arguments, words in (([look, "--output", str(folders)], "is a folder"), ([look, look], "given twice")):
        assert main(["report", "--output", str(folders / "r.html"), *arguments]) == 2
        assert words in capsys.readouterr().err
