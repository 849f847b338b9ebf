"""The figures carry the values of the result files; what is incomplete is refused before anything is written."""

import json
import math
from itertools import pairwise

import pytest

from bupo.errors import InputError
from bupo.report import analysis_figures
from bupo.report.evaluations import average_dots, pass_curves
from bupo.report.inside_figures import training_curves, training_figure
from bupo.report.logs import TrainingRun
from bupo.report.page import collect
from bupo.report.results import Analysis, Evaluation, ExploredTokens, TrainingReading
from bupo.report.style import grid, inline_svg, legend_below, looks, role, save
from tests.support.results import TOKENS, analysis, evaluations, explored, layer_choice, log, results


def parsed(*args, **kwargs) -> Analysis:
    return Analysis.parse(analysis(*args, **kwargs))


def line(axes, label):
    return next(line for line in axes.lines if line.get_label() == label)


def text(figure) -> str:
    return inline_svg(figure, "x", "figure")


@pytest.mark.parametrize("chosen", [False, True])
def test_figures_are_written_twice_the_same(tmp_path, chosen):
    content = analysis(layer_choice=layer_choice() if chosen else None)
    paths, again = (analysis_figures.write_analysis_figures(content, tmp_path / folder) for folder in "ab")
    names = ["entropy_flow", "entropy_change", "residual_cosine", *(["layer_choice"] if chosen else [])]
    assert [p.name for p in paths] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert all(one.read_bytes() == two.read_bytes() for one, two in zip(paths, again, strict=True))
    assert len(list((tmp_path / "a").iterdir())) == len(paths)


def test_entropy_change_marks_the_boundary_or_gives_the_reason():
    marked, unmarked = (text(analysis_figures.entropy_change(parsed(boundary=b))) for b in (2, None))
    assert all(words in marked for words in ("boundary: layer 2", "explor", "integr", "conver"))
    assert "No boundary layer" not in marked
    assert "No boundary layer: the change is negative in every layer." in unmarked


def test_lines_carry_the_values_and_bands_two_standard_errors():
    content = analysis()
    flow = analysis_figures.entropy_flow(content).axes[0]
    heights = [line.get_ydata()[0] for line in flow.lines if len(set(line.get_ydata())) == 1]
    assert heights == [0.7, math.log(97)]
    axes = analysis_figures.entropy_change(Analysis.parse(content)).axes[0]
    values = content["entropy_change"]["ffn"]
    assert list(line(axes, "FFN").get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert list(line(axes, "FFN").get_ydata()) == values
    heights = [v for path in axes.collections[1].get_paths() for v in path.vertices[:, 1]]
    assert (min(heights), max(heights)) == pytest.approx((min(values) - 0.1, max(values) + 0.1))
    content["entropy_change_standard_errors"]["ffn"] = [None] * 6  # unknown, as for a single response
    assert len(analysis_figures.entropy_change(Analysis.parse(content)).axes[0].collections) == 1


def test_layer_choice_shows_every_lens_the_boundary_and_the_knees():
    content = analysis(boundary=2, layer_choice=layer_choice(knee=3))
    figure = analysis_figures.layer_choice(Analysis.parse(content))
    names = {"raw": "logit lens (Eq. 5)", "norm": "final norm", "ridge": "ridge", "other/lens": "other/lens"}
    kinds = {"recovered": 100, "top1": 100, "kl": 1, "entropy": 1, "change": 1}
    for axes, (kind, scale) in zip(figure.axes, kinds.items(), strict=True):
        for lens, label in names.items():
            values = [math.nan if v is None else scale * v for v in content["layer_choice"]["curves"][lens][kind]]
            assert list(line(axes, label).get_ydata()) == pytest.approx(values, nan_ok=True)
        assert len(axes.collections) == 4  # bands
        assert list(line(axes, "boundary: layer 2").get_xdata()) == [2, 2]
        assert list(line(axes, "knee (a candidate), ridge: layer 3").get_xdata()) == [3, 3]
        assert list(line(axes, "knee (a candidate), final norm: layer 4").get_xdata()) == [4, 4]
    overlaid = analysis_figures.overlay([("a", Analysis.parse(content)), ("b", parsed())]).axes
    titles = [axes.get_title(loc="left") for axes in overlaid]
    assert titles[4:] == [f"{what}, {lens}" for lens in names.values() for what in ("Recovered information", "Entropy")]
    none = parsed(boundary=None, layer_choice=layer_choice(knee=None))
    assert not any(len(set(mark.get_xdata())) == 1 for mark in analysis_figures.layer_choice(none).axes[0].lines)


@pytest.mark.parametrize("layers", [4, 8, 61])
def test_labels_of_layers_do_not_overlap(layers):
    figure = analysis_figures.layer_choice(parsed(layers, layer_choice=layer_choice(layers)))
    figure.canvas.draw()
    for axes in figure.axes:
        boxes = [t.get_window_extent() for t in axes.get_xticklabels() if t.get_text()]
        boxes.sort(key=lambda box: box.x0)
        assert all(a.x1 < b.x0 for a, b in pairwise(boxes))


@pytest.mark.parametrize(("second", "label", "last"), [(6, "layer", 6), (12, "depth (layer / number of layers)", 1)])
def test_overlay_uses_relative_depth_where_the_numbers_of_layers_differ(second, label, last):
    panels = analysis_figures.overlay([("a", parsed()), ("b", parsed(second))]).axes
    assert {axes.get_xlabel() for axes in panels} == {"", label}
    assert max(max(line.get_xdata()) for line in panels[0].lines) == last
    assert {"a", "b"} <= {line.get_label() for line in panels[0].lines}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "schema: Input should be 1"),
        ({"layers": 0}, "layers: Input should be greater"),
        ({"sites": {}}, "sites.attn_out is missing"),
        ({"entropy_change": None}, "entropy_change: Input should be"),
        ({"layers": 5}, "6 values for 5 layers"),
        ({"layer_choice": layer_choice(curves={})}, "layer_choice: curves.raw.entropy is missing"),
        ({"layer_choice": layer_choice(5)}, "5 values for 6 layers"),
        ({"layer_choice": layer_choice(knees={"norm": {}})}, "layer_choice.knees.norm.layer: Field required"),
    ],
)
def test_an_incomplete_analysis_is_refused_before_anything_is_written(tmp_path, change, words):
    with pytest.raises(InputError, match=f"{words}.*write it again with `bupo analyze`"):
        analysis_figures.write_analysis_figures({**analysis(), **change}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_incomplete_token_file_is_refused():
    whole = explored(TOKENS)["samples"][0]
    short, few = [*whole["kl"][:2], whole["kl"][2][:-1], *whole["kl"][3:]], whole["top"][:-1]
    for change, words in (
        ({"tokens": []}, "samples.0.tokens"), ({"entropy": None}, "samples.0.entropy: Input should be"),
        ({"kl": short}, "kl has 6 values for 7 tokens"), ({"top": few}, "top has 4 values for 5 layers"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            ExploredTokens.parse({"schema": 1, "samples": [{**whole, **change}]})


def test_a_name_with_dollar_signs_and_a_single_layer_are_drawn():
    assert "a$b$ &lt;i&gt;" in text(analysis_figures.entropy_flow(analysis(1, None, model="a$b$ <i>")))


def test_series_take_every_known_name_and_average_a_rollout():
    rows = [
        {"step": 1, "rollout": 1, "rewards/mean": 1.0, "completions/mean_length": 10},
        {"step": 2, "rollout": 1, "reward": 0.0, "internal/clip_ratio/region_mean": 0.5, "internal/entropy": 3},
        {"step": 3, "reward": None, "entropy": float("nan")},
    ]
    expected = {"reward": ([1.0], [0.5]), "length": ([1.0], [10.0]), "clip": ([1.0], [0.5]),
                "internal_entropy": ([1.0], [3.0]), "entropy": ([], [])}  # fmt: skip
    assert {name: TrainingRun(rows).series(name) for name in expected} == expected
    assert TrainingRun(log()).ends("reward") == pytest.approx((0.15, 0.95))  # the first and the last fifth


@pytest.mark.parametrize("phase", ["internal", "joint"])
@pytest.mark.parametrize(("internal", "expected"), [(0, None), (4, 4.0), (10, None)])
def test_the_phase_line_is_where_the_full_policy_takes_over(internal, expected, phase):
    run = TrainingRun(log(internal, phase=phase))
    assert run.switch == expected
    lines = [line for axes in training_curves([("bupo", run)]).axes for line in axes.lines]
    marks = {line.get_xdata()[0] for line in lines if "phase ends" in str(line.get_label())}
    assert marks == (set() if expected is None else {expected + 0.5})


def test_a_torn_last_line_is_left_out_and_other_rubbish_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    good = json.dumps(log()[0])
    path.write_text(good + '\n{"step": 2, "rew')
    assert len(TrainingRun.load(path).log) == 1
    assert collect([str(path)]).notes[0].startswith(f"{tmp_path.name}: the last line of its log is incomplete")
    path.write_text(good)
    assert not collect([str(path)]).notes
    bad_step = (f'{good}\n{{"step": "a"}}\n', "line 2: step must be a number, not 'a'")
    for content, words in (
        bad_step,
        (f"oops\n{good}\n", "line 1"),
        (f"[1]\n{good}\n", "line 1"),
        ('{"step": 1}\n', "no row"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=words):
            TrainingRun.load(path)
    path.write_text(good)
    reading = tmp_path / "inside" / "after-0001.json"
    reading.parent.mkdir()
    for content, words in (('{"schema": 2}', "is not a complete result"), ("{", "cannot be read as JSON")):
        reading.write_text(content)
        with pytest.raises(InputError, match=rf"after-0001\.json {words}"):
            TrainingRun.load(path)


def test_evaluation_figures_show_each_model_and_need_something_to_show(tmp_path):
    scored = evaluations(start=3, grpo=5)
    shown = average_dots(scored)
    assert [tick.get_text() for tick in shown.axes[0].get_yticklabels()] == ["start", "grpo"]
    assert {line.get_label() for line in pass_curves(scored).axes[0].lines} == {"start", "grpo"}
    assert len(save(shown, tmp_path, "dots")) == 2
    empty = Evaluation.parse({"schema": 1, "tasks": {"sums": {"n_problems": 0, "n_samples": 0, "reason": "none"}}})
    assert average_dots([("start", empty)]) is None
    assert pass_curves([("start", Evaluation.parse(results(3, samples=1)))]) is None


def test_a_model_looks_the_same_in_every_figure():
    assert looks(["start", "grpo"])["grpo"] == looks(["bupo", "grpo"])["grpo"]
    assert len(set(looks([f"grpo-{i}" for i in range(6)]).values())) == 6
    assert len({colour for colour, _ in looks(["start", "grpo", "bupo", "other", "another"]).values()}) == 5
    assert role("runs/BuPO-4") == "bupo"
    assert role("database") is None


@pytest.mark.parametrize("letters", [3, 30, 60])
def test_a_legend_of_long_names_is_as_wide_as_its_figure_at_most(letters):
    figure, (axes,) = grid(1, 1, 7.2, 3.9)
    for number in range(5):
        axes.plot([1, 2], label=f"{number}" * letters)
    legend_below(figure)
    [legend] = figure.legends
    assert legend.get_window_extent().width <= figure.bbox.width
    assert len(legend.get_texts()) == 5


def test_the_figure_averages_the_top_quarter():
    numbers = {"mean": [0.1 * i for i in range(8)], "standard_error": [0.01] * 8}
    content = {
        "schema": 1, "layer": 2, "layers": 8, "perplexity": {"value": 2.0, "standard_error": 0.1}, "entropy": numbers,
        "cosine_of_layer": numbers, "divergence": {"mean": [1.0] * 7, "standard_error": [0.1] * 7},
    }  # fmt: skip
    readings = [TrainingReading.parse({**content, "rollouts_done": done}) for done in (0, 4)]
    cosine, entropy, perplexity, divergence = training_figure([("one", readings, 2.0)]).axes
    assert list(cosine.lines[0].get_ydata()) == pytest.approx([0.65, 0.65])  # layers 7 and 8
    assert list(entropy.lines[0].get_ydata()) == pytest.approx([0.1, 0.1])
    assert list(perplexity.lines[0].get_xdata()) == [0, 4]
    assert len(divergence.lines) == 3  # output, next layer, the switch
