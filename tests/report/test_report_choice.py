"""The layer choice on figures and page: values, answers with their shares, refusals; no browser, no torch."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest

from bupo.errors import InputError
from bupo.report import figures
from bupo.report.choice import answer_text, check_choice, layer_choice, overlay, percent
from bupo.report.html import write_report
from bupo.report.style import inline_svg
from tests.report.test_report import HOSTILE, analysis


def block(layers: int = 6, layer: int | None = 3) -> dict:
    """A ``layer_choice`` of schema 1 whose numbers are all different."""
    rising = [round(0.1 + 0.9 * i / layers, 3) for i in range(1, layers + 1)]
    kl = [round(3 - 2.9 * r, 3) for r in rising]

    def reading(factor: float, **more) -> dict:
        return {
            "entropy": [factor * v for v in kl],
            "kl": [v / factor for v in kl],
            "top1": rising,
            "change": kl,
            **more,
        }

    temperature = [None, None, *[9.0 / i for i in range(1, layers - 1)]]
    fitted = {"temperature": temperature, "inverse_temperature": [0 if t is None else 1 / t for t in temperature]}
    own = {"layer": layer, "share": 0.7, "other": {"none" if layer else "2": 0.2, "4": 0.1}, "reason": "it turns there"}
    none = {"layer": None, "share": 1.0, "other": {}, "reason": "negative in every layer"}
    curves = {
        "raw": reading(1.5),
        "norm": reading(1.2),
        "fitted": reading(1.1, **fitted),
        "norm_fitted": reading(1.0, **fitted, recovered=rising),
    }
    errors = {n: {k: [0.01] * layers for k in c if k != "temperature"} for n, c in curves.items()}
    criteria = [("boundary", none), ("norm_entropy", none), ("fitted_entropy", none), ("knee", own)]
    return {
        "tokens": 40, "responses": 4, "seed": 0, "draws": 300, "bootstrap": "responses, then tokens within them",
        "recommendation": {**own, "criterion": "knee" if layer else None},
        "criteria": [{"name": name, "title": f"the {name}", **answer} for name, answer in criteria],
        "curves": curves, "standard_errors": errors,
    }  # fmt: skip


def chosen(layers: int = 6, layer: int | None = 3, **more) -> dict:
    return analysis(layers, None, layer_choice=block(layers, layer), **more)


def test_the_figure_carries_the_curves_and_marks_the_layer():
    given = chosen()
    agreement, divergence, entropies, temperatures, shares = layer_choice(given).axes
    curves = given["layer_choice"]["curves"]

    def line(axes, label):
        return list(next(line for line in axes.lines if line.get_label() == label).get_ydata())

    assert line(agreement, "recovered information") == [100 * v for v in curves["norm_fitted"]["recovered"]]
    assert line(agreement, "same top token") == [100 * v for v in curves["norm"]["top1"]]
    assert line(divergence, "as it is (Eq. 5)") == curves["raw"]["kl"]
    assert line(entropies, "fitted temperature") == curves["fitted"]["entropy"]
    assert line(temperatures, "state as it is")[2:] == curves["fitted"]["temperature"][2:]
    infinite = next(line for line in temperatures.lines if line.get_label() == "state as it is: infinite")
    assert list(infinite.get_xdata()) == [1, 2]
    for axes in (agreement, divergence, entropies, temperatures, shares):
        assert any(list(mark.get_xdata()) == [3, 3] for mark in axes.lines)
    heights = {round(bar.get_height() / 0.82, 3) for bar in shares.patches}
    assert heights == {0.7, 0.2, 0.1, 1.0}
    assert shares.get_xticklabels()[-1].get_text() == "none"
    none = layer_choice(chosen(layer=None))
    assert not any(len(set(mark.get_xdata())) == 1 for mark in none.axes[0].lines)
    assert "recommended is none" in none.axes[-1].get_title(loc="left")


@pytest.mark.parametrize("layers", [4, 8, 61])
def test_any_number_of_layers_is_drawn_without_labels_that_meet(layers):
    figure = layer_choice(chosen(layers))
    figure.canvas.draw()
    for axes in figure.axes:
        boxes = [t.get_window_extent() for t in axes.get_xticklabels() if t.get_text()]
        boxes.sort(key=lambda box: box.x0)
        assert all(a.x1 < b.x0 for a, b in pairwise(boxes))
        assert all(box.x1 <= figure.bbox.x1 + 1 for box in boxes)
    (right,) = figure.axes[-1].child_axes
    labels = [label for label in right.get_yticklabels() if label.get_text()]
    assert [label.get_text() for label in labels].count("layer 3: 70 %") == 2
    assert all(label.get_window_extent().x1 <= figure.bbox.x1 + 1 for label in labels)


def test_it_is_written_beside_the_other_figures(tmp_path):
    names = [path.name for path in figures.write_analysis_figures(chosen(), tmp_path)]
    assert len(names) == 8
    assert {"layer_choice.png", "layer_choice.svg"} <= set(names)


def test_answers_never_come_without_their_shares():
    assert answer_text(block()["recommendation"]) == "layer 3, in 70 % of bootstrap draws (none: 20 %, 4: 10 %)"
    assert answer_text(block(layer=None)["recommendation"]).startswith("none, in 70 %")
    assert [percent(v) for v in (1.0, 0.9999, 0.83, 0.002, 0.0)] == ["100 %", "100.0 %", "83 %", "0.2 %", "0 %"]


def test_several_models_are_laid_over_each_other():
    figure = overlay([("a", chosen()), ("b", chosen(12, 9))])
    left = figure.axes[0]
    assert left.get_xlabel().startswith("depth")
    marks = {line.get_xdata()[0] for line in left.lines if len(set(line.get_xdata())) == 1}
    assert marks == {3 / 6, 9 / 12}
    assert "recovered" in inline_svg(figure, "x", "figure")


def _broken(change) -> dict:
    given = copy.deepcopy(chosen())
    change(given["layer_choice"])
    return given


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.pop("curves"),
        lambda b: b["curves"]["raw"].pop("kl"),
        lambda b: b["curves"]["raw"]["kl"].pop(),
        lambda b: b["recommendation"].pop("share"),
        lambda b: b.update(criteria=[{"name": "knee"}]),
        lambda b: b.update(recommendation=None),
    ],
    ids=["curves", "kl", "length", "share", "criteria", "recommendation"],
)
def test_what_is_no_layer_choice_is_refused(change):
    with pytest.raises(InputError, match="layer_choice"):
        check_choice(_broken(change), "the analysis")


def test_the_page_shows_the_evidence_and_escapes_it(tmp_path):
    given = chosen(name="one")
    given["layer_choice"]["recommendation"]["reason"] = HOSTILE
    given["layer_choice"]["criteria"][0]["reason"] = HOSTILE
    text = write_report(tmp_path / "one.html", title="t", analyses=[given]).read_text()
    assert "<script>document.title" not in text
    assert "layer 3, in 70 % of bootstrap draws (none: 20 %, 4: 10 %)" in text
    assert "40 random tokens of 4 responses" in text
    assert 'id="fig-a1-choice"' in text
    assert 'id="fig-choices"' not in text
    assert "Nothing was evaluated" not in text
    assert "In short" in text
    two = [given, chosen(12, None, name="two"), analysis(8, 2, name="three")]
    text = write_report(tmp_path / "two.html", title="t", analyses=two).read_text()
    assert 'id="fig-choices"' in text
    assert "not looked at" in text
