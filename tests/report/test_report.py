"""Figures, verdict, page and the command that makes it; no browser, no torch."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bupo.cli import main
from bupo.errors import InputError
from bupo.evaluate.results import task_results
from bupo.report import figures
from bupo.report.collect import collect
from bupo.report.curves import average_dots, pass_curves, training_curves
from bupo.report.html import write_report
from bupo.report.logs import last_internal_rollout, read_log, series, summary
from bupo.report.style import inline_svg, looks, role, save
from bupo.report.verdict import outcome, paired_comparisons, verdict

HOSTILE = '</script><script>document.title="owned"</script><img src="http://example.invalid/x.png" onerror=alert(1)>'


def analysis(layers: int = 6, boundary: int | None = 2, **more) -> dict:
    """A small analysis of schema 1 with the three regions."""
    wave = [math.sin(i / 2) for i in range(layers)]
    errors = [0.05] * layers
    return {
        "schema": 1, "model": "tiny", "layers": layers, "vocabulary": 97, "tokens": 120, "samples": 4,
        "dtype": "float32", "final_entropy": 0.7,
        "sites": {f"{m}_{end}": [2 + w for w in wave] for m in ("attn", "ffn", "layer") for end in ("in", "out")},
        "standard_errors": dict.fromkeys(("attn_out", "ffn_out", "layer_out"), errors),
        "entropy_change": dict.fromkeys(("attn", "ffn", "layer"), wave),
        "entropy_change_standard_errors": dict.fromkeys(("attn", "ffn", "layer"), errors),
        "residual_cosine": {"attn": wave, "ffn": [-w for w in wave]},
        "regions": {"exploration": [1, 2], "integration": [3, 4], "convergence": [5, layers]} if boundary else
                   {"exploration": None, "integration": None, "convergence": [1, layers]},
        "boundary_layer": boundary,
        "boundary_reason": "last positive change" if boundary else "the change is negative in every layer",
        **more,
    }  # fmt: skip


def log(internal: int = 0, rollouts: int = 10) -> list[dict]:
    rows = []
    for rollout in range(1, rollouts + 1):
        inside = rollout <= internal
        rows.append({
            "step": 4 * rollout, "rollout": rollout, "phase": "internal" if inside else "full",
            "layer": 3 if inside else None, "reward": rollout / rollouts, "entropy": 1 / rollout,
            "internal_entropy": 2.0 if inside else None, "mean_length": 20.0, "loss": 0.0, "seconds": 2.0 * rollout,
            "internal/clip_ratio/region_mean" if inside else "clip_ratio/region_mean": 0.01,
        })  # fmt: skip
    return rows


def results(right: int, problems: int = 40, samples: int = 4, task: str = "sums") -> dict:
    """Each problem has between 0 and ``samples`` right ones; ``right`` (0..10) moves all of them."""
    rows = [
        {"problem_id": f"{task}/{p}", "reward": float(ok), "status": "correct" if ok else "wrong", "length": 20,
         "finished": True}
        for p in range(problems) for s in range(samples) for ok in [(7 * p + 3 * s) % 11 < right]
    ]  # fmt: skip
    return {"schema": 1, "model": "tiny", "tasks": {task: task_results(rows, k=samples)}}


def comparison(low: float, high: float, p: float | None = 0.01, first: str = "grpo", second: str = "bupo") -> dict:
    return {"first": first, "second": second, "task": "sums", "difference": (low + high) / 2, "ci95": [low, high],
            "p_value": p, "problems": 40}  # fmt: skip


def write(folder: Path, name: str, value) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in value) if name.endswith("l") else json.dumps(value)
    (folder / name).write_text(text)
    return folder


# figures


def test_figures_are_written_twice_the_same(tmp_path):
    paths = figures.write_analysis_figures(analysis(), tmp_path / "a")
    again = figures.write_analysis_figures(analysis(), tmp_path / "b")
    assert [p.name for p in paths] == [
        f"{name}.{kind}" for name in ("entropy_flow", "entropy_change", "residual_cosine") for kind in ("png", "svg")
    ]
    for one, two in zip(paths, again, strict=True):
        assert one.read_bytes() == two.read_bytes()
        assert one.stat().st_size > 3000
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(p.name for p in paths)


def _texts(figure) -> str:
    return inline_svg(figure, "x", "figure")


def test_entropy_change_marks_the_boundary_or_says_why_there_is_none():
    marked, unmarked = (_texts(figures.entropy_change(analysis(boundary=b))) for b in (2, None))
    assert "boundary: layer 2" in marked
    assert "No boundary layer" not in marked
    assert "No boundary layer: the change is negative in every layer." in unmarked
    for region in ("exploration", "integration", "convergence"):
        assert region[:4] in marked


def test_entropy_flow_has_both_reference_lines_at_their_heights():
    figure = figures.entropy_flow(analysis())
    heights = [line.get_ydata()[0] for line in figure.axes[0].lines if len(set(line.get_ydata())) == 1]
    assert any(math.isclose(h, math.log(97)) for h in heights)
    assert any(math.isclose(h, 0.7) for h in heights)


def test_lines_carry_the_values_and_bands_two_standard_errors():
    given = analysis()
    axes = figures.entropy_change(given).axes[0]
    line = next(line for line in axes.lines if line.get_label() == "FFN")
    assert list(line.get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert list(line.get_ydata()) == given["entropy_change"]["ffn"]
    low, high = (f([v for path in axes.collections[1].get_paths() for v in path.vertices[:, 1]]) for f in (min, max))
    values = given["entropy_change"]["ffn"]
    assert low == pytest.approx(min(values) - 0.1)
    assert high == pytest.approx(max(values) + 0.1)


def test_overlay_uses_relative_depth_where_the_numbers_of_layers_differ():
    same = figures.overlay([("a", analysis()), ("b", analysis())])
    other = figures.overlay([("a", analysis()), ("b", analysis(12))])
    assert "layer" in {axes.get_xlabel() for axes in same.axes}
    assert "depth (layer / number of layers)" in {axes.get_xlabel() for axes in other.axes}
    assert max(max(line.get_xdata()) for line in other.axes[0].lines) == 1.0
    assert {"a", "b"} <= {line.get_label() for line in other.axes[0].lines}


@pytest.mark.parametrize(
    ("broken", "says"),
    [({"schema": 2}, "schema 1"), ({"layers": 0}, "number of layers"), ({"sites": {}}, "sites.attn_out"),
     ({"entropy_change": None}, "entropy_change"), ({"layers": 5}, "over its 5 layers")],
)  # fmt: skip
def test_what_is_no_analysis_is_refused_before_anything_is_written(tmp_path, broken, says):
    with pytest.raises(InputError, match=says):
        figures.write_analysis_figures({**analysis(), **broken}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_with_dollar_signs_and_a_single_layer_are_drawn(tmp_path):
    one = analysis(1, None, model="a$b$ <i>")
    assert len(figures.write_analysis_figures(one, tmp_path)) == 6
    assert "a$b$ &lt;i&gt;" in _texts(figures.entropy_flow(one))


# training logs


def test_series_take_every_known_name_and_average_a_rollout():
    rows = [
        {"step": 1, "rollout": 1, "rewards/mean": 1.0, "completions/mean_length": 10},
        {"step": 2, "rollout": 1, "reward": 0.0, "internal/clip_ratio/region_mean": 0.5, "internal/entropy": 3},
        {"step": 3, "reward": None, "entropy": float("nan")},
    ]
    assert series(rows, "reward") == ([1.0], [0.5])
    assert series(rows, "length") == ([1.0], [10.0])
    assert series(rows, "clip") == ([1.0], [0.5])
    assert series(rows, "internal_entropy") == ([1.0], [3.0])
    assert series(rows, "entropy") == ([], [])


@pytest.mark.parametrize(("internal", "expected"), [(0, None), (4, 4.0), (10, None)])
def test_the_phase_boundary_is_where_the_full_phase_begins(internal, expected):
    rows = log(internal)
    assert last_internal_rollout(rows) == expected
    lines = [line for axes in training_curves([("bupo", rows)]).axes for line in axes.lines]
    marks = {line.get_xdata()[0] for line in lines if "phase ends" in str(line.get_label())}
    assert marks == (set() if expected is None else {expected + 0.5})


def test_summary_compares_first_and_last_fifth():
    assert summary(log())["reward"] == pytest.approx([0.15, 0.95])
    assert summary(log())["rollouts"] == 10


def test_a_torn_last_line_is_left_out_and_other_rubbish_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    good = json.dumps(log()[0])
    path.write_text(good + '\n{"step": 2, "rew')
    assert len(read_log(path)) == 1
    for text, says in ((f"oops\n{good}\n", "line 1"), (f"[1]\n{good}\n", "line 1"), ('{"step": 1}\n', "no row")):
        path.write_text(text)
        with pytest.raises(InputError, match=says):
            read_log(path)


# evaluations and the verdict


def test_evaluation_figures_show_each_model_and_need_something_to_show(tmp_path):
    scored = [("start", results(3)), ("grpo", results(5))]
    shown = average_dots(scored)
    assert [tick.get_text() for tick in shown.axes[0].get_yticklabels()] == ["start", "grpo"]
    assert {line.get_label() for line in pass_curves(scored).axes[0].lines} == {"start", "grpo"}
    assert len(save(shown, tmp_path, "dots")) == 2
    assert average_dots([("start", {"tasks": {"sums": {"n_samples": 0, "reason": "none"}}})]) is None
    assert pass_curves([("start", results(3, samples=1))]) is None


def test_a_model_looks_the_same_whatever_stands_beside_it():
    assert looks(["start", "grpo"])["grpo"] == looks(["bupo", "grpo"])["grpo"]
    assert len(set(looks([f"grpo-{i}" for i in range(6)]).values())) == 6
    assert len({colour for colour, _ in looks(["start", "grpo", "bupo", "other", "another"]).values()}) == 5
    assert role("runs/BuPO-4") == "bupo"
    assert role("database") is None


@pytest.mark.parametrize(
    ("low", "high", "p", "expected"),
    [(0.01, 0.05, 0.01, "better"), (-0.05, -0.01, 0.01, "worse"), (-0.01, 0.05, 0.2, "open"), (0.0, 0.05, 0.01, "open"),
     (0.01, 0.05, 0.06, "open"), (0.01, 0.05, None, "better"), (0.01, 0.05, float("nan"), "open")],
)  # fmt: skip
def test_an_outcome_is_no_stronger_than_its_interval_and_p_value(low, high, p, expected):
    assert outcome(comparison(low, high, p)) == expected


def _judge(*comparisons: dict):
    return verdict([{"name": n, "results": results(5)} for n in ("start", "grpo", "bupo")], comparisons)


def test_verdict_says_better_only_with_the_whole_interval_above_zero():
    found = _judge(comparison(0.01, 0.05))
    assert found.tone == "better"
    assert found.headline == "BuPO is better than GRPO on sums: +3.0 points [+1.0, +5.0], p = 0.010."


@pytest.mark.parametrize(("low", "high", "words"), [(-0.02, 0.05, "not shown to be better"), (-0.05, -0.02, "worse")])
def test_verdict_says_plainly_where_bupo_is_not_better(low, high, words):
    found = _judge(comparison(low, high))
    assert "BuPO is not" in found.headline
    assert words in found.headline
    assert found.tone in ("open", "worse")


def test_verdict_turns_a_comparison_that_is_the_other_way_round():
    found = _judge(comparison(-0.05, -0.01, first="bupo", second="grpo"))
    assert found.tone == "better"
    assert "+3.0 points [+1.0, +5.0]" in found.headline
    assert any(line.startswith("sums: grpo is worse than bupo") for line in found.lines)


def test_verdict_over_several_tasks_is_better_only_if_all_are():
    one, two = comparison(0.01, 0.05), {**comparison(-0.02, 0.05), "task": "products"}
    found = _judge(one, two)
    assert found.tone == "open"
    assert "better on 1 of 2 (sums)" in found.headline
    assert "no difference shown on 1 of 2 (products)" in found.headline
    assert _judge(one, {**one, "task": "products"}).tone == "better"


def test_verdict_without_a_comparison_gives_none():
    assert "neither is called better" in _judge().headline
    assert verdict([], []).tone == "none"
    assert "not both among them" in verdict([{"name": "start", "results": results(5)}], []).headline
    assert _judge().tone == "none"


def test_verdict_warns_that_the_interval_is_not_over_training_seeds():
    assert any("another training seed" in line for line in _judge(comparison(0.01, 0.05)).caveats)


def test_pairs_are_compared_problem_by_problem_and_different_problems_are_not():
    named = [{"name": "grpo", "results": results(4)}, {"name": "bupo", "results": results(8)}]
    ((found,), notes) = paired_comparisons(named)
    means = [item["results"]["tasks"]["sums"]["avg_at_k"]["mean"] for item in named]
    assert found["difference"] == pytest.approx(means[1] - means[0])
    assert outcome(found) == "better"
    assert notes == []
    named[1]["results"] = results(8, problems=30)
    none, (note,) = paired_comparisons(named)
    assert none == []
    assert "different problems" in note


# the page


class _Page(HTMLParser):
    """Tags with attributes, ids, and the text outside script and style."""

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


def everything(name: str = "tiny") -> dict:
    evaluations = [{"name": n, "results": results(r)} for n, r in (("start", 3), ("grpo", 6), ("bupo", 6))]
    return {
        "title": f"Report on {name}",
        "analyses": [analysis(name=name), analysis(12, None, name=f"{name} 2")],
        "runs": [{"name": "grpo", "log": log(), "config": {}}, {"name": "bupo", "log": log(4), "config": {}}],
        "evaluations": evaluations,
        "comparisons": paired_comparisons(evaluations)[0],
        "notes": [f"a note on {name}"],
        "what_was_run": ["a sentence", {"name": name, "command": "eval", "argv": ["eval", name], "config": {"seed": 7},
                         "versions": {"python": "3.11"}, "machine": {"cores": 2}, "seconds": 12.5}],
        "samples": [{"problem_id": name, "prompt": [{"role": "user", "content": name}], "answer": name,
                     "responses": [{"model": "start", "response": name, "status": "wrong"}]}],
    }  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> _Page:
    return _Page(write_report(tmp_path_factory.mktemp("page") / "report.html", **everything()).read_text())


def test_page_holds_every_section_and_the_numbers(page):
    for heading in ("Verdict", "Internal policies", "Training", "Results", "Sample responses", "What was run"):
        assert heading in page.text
    assert "BuPO is not shown to be better than GRPO on sums" in page.text
    assert "layer 2 of 6: last positive change" in page.text
    assert "none: the change is negative in every layer" in page.text
    mean = results(6)["tasks"]["sums"]["avg_at_k"]["mean"]
    assert f"@4 {100 * mean:.1f}" in page.text
    assert "bupo eval tiny" in page.text
    assert "python 3.11" in page.text
    assert len([tag for tag, _ in page.tags if tag == "figure"]) == 1 + 6 + 1 + 2


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
    given = everything(HOSTILE)
    text = write_report(
        tmp_path / "report.html", **{**given, "analyses": given["analyses"][:1], "runs": []}
    ).read_text()
    page = _Page(text)
    assert page.text.count(HOSTILE) >= 5
    assert not [a for tag, a in page.tags if tag == "img" or "onerror" in a]
    assert "<script>document" not in text


def test_page_of_nothing_says_so(tmp_path):
    page = _Page(write_report(tmp_path / "report.html", title="Empty").read_text())
    assert "Nothing was evaluated" in page.text
    assert "No record of the commands" in page.text


# the command


@pytest.fixture
def folders(tmp_path) -> Path:
    run = {"schema": 1, "command": "x", "argv": ["x", "--seed", "1"], "config": {"seed": 1}}
    for name, file, value in (
        ("look", "analysis.json", analysis()), ("train/grpo", "log.jsonl", log()), ("train/bupo", "log.jsonl", log(3)),
        ("eval/grpo", "results.json", results(3)), ("eval/bupo", "results.json", results(8)),
    ):  # fmt: skip
        write(write(tmp_path / name, file, value), "run.json", run)
    return tmp_path


def test_command_recognises_each_folder_and_prints_the_verdict(folders, capsys, monkeypatch):
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
    assert Path("report.html").read_text() == page
    assert main([*arguments, "--overwrite"]) == 0
    assert "1 analysis, 2 training runs, 2 evaluations" in capsys.readouterr().out
    assert Path("report.html").read_text() == page


def test_folders_with_the_same_name_are_told_apart(folders):
    material = collect([str(folders / "train/grpo"), str(folders / "eval/grpo")])
    assert material.runs[0]["name"] == "train/grpo"
    assert material.evaluations[0]["name"] == "eval/grpo"


def test_the_start_comes_first_and_bupo_last_whatever_the_order_given(folders):
    write(folders / "eval/start", "results.json", results(2))
    material = collect([f"{n}={folders / 'eval' / n}" for n in ("bupo", "start", "grpo")])
    assert [e["name"] for e in material.evaluations] == ["start", "grpo", "bupo"]
    assert [(c["first"], c["second"]) for c in material.comparisons][-1] == ("grpo", "bupo")


def test_token_statistics_beside_an_analysis_are_shown(folders):
    tokens = {"schema": 1, "samples": [{"problem_id": "p", "tokens": ["a"], "layers": 1, "entropy": [[0.5]]}]}
    write(folders / "look", "tokens.json", tokens)
    material = collect([str(folders / "look")])
    assert [t["samples"] for t in material.tokens] == [tokens["samples"]]
    write(folders / "look", "tokens.json", {**tokens, "schema": 9})
    with pytest.raises(InputError, match=r"tokens\.json holds no token statistics of schema 1"):
        collect([str(folders / "look")])


def test_sample_responses_come_from_the_evaluation(folders):
    from bupo.evaluate.store import write_responses

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


@pytest.mark.parametrize(
    ("files", "argument", "says"),
    [
        ({}, "missing", "does not exist"),
        ({"a/other.txt": "x"}, "a", "holds no analysis.json"),
        ({"a/b/analysis.json": "{}"}, "a", "its folders b do"),
        ({"a/analysis.json": "{"}, "a", "cannot be read as JSON"),
        ({"a/analysis.json": "[1]"}, "a", "no JSON object"),
        ({"a/analysis.json": "{}"}, "a", "schema 1"),
        ({"a/results.json": '{"tasks": {}}'}, "a", "schema 1"),
        ({"a/results.json": '{"schema": 1, "tasks": [1]}'}, "a", "by task"),
        ({"a/results.json": '{"schema": 1, "tasks": {"t": {"avg_at_k": {"mean": 1}}}}'}, "a", "ci95"),
        ({"a/log.jsonl": "nothing\n\n"}, "a", "no row"),
        ({"a.json": '{"x": 1}'}, "a.json", "no analysis, no evaluation"),
    ],
)
def test_wrong_inputs_give_one_line_and_write_nothing(tmp_path, capsys, monkeypatch, files, argument, says):
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    assert main(["report", argument]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.strip().splitlines()) == 1
    assert not Path("report.html").exists()


def test_output_that_is_a_folder_or_given_twice_is_refused(folders, capsys):
    assert main(["report", str(folders / "look"), "--output", str(folders)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main(["report", str(folders / "look"), str(folders / "look"), "--output", str(folders / "r.html")]) == 2
    assert "given twice" in capsys.readouterr().err


def test_neither_help_nor_report_imports_what_it_does_not_need():
    code = (
        "import sys; from bupo.cli import main; main(['report', '--help']);"
        "bad = {'matplotlib', 'jinja2', 'torch'} & set(sys.modules); assert not bad, bad;"
        "import bupo.report.html, bupo.report.collect, bupo.report.figures, bupo.report.curves;"
        "bad = {'matplotlib', 'torch', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
