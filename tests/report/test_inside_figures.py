"""Figures of what training did inside, and the files they are drawn from."""

from __future__ import annotations

import pytest

from bupo.errors import InputError
from bupo.report.inside_figures import training_figure
from bupo.report.results import TrainingReading, load_readings


def test_a_broken_reading_is_named(tmp_path):
    (tmp_path / "after-0001.json").write_text('{"schema": 2}')
    with pytest.raises(InputError, match=r"after-0001\.json is not a complete result"):
        load_readings(tmp_path)
    (tmp_path / "after-0001.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        load_readings(tmp_path)


def test_the_figure_averages_the_top_quarter():
    def reading(done: int) -> TrainingReading:
        numbers = {"mean": [0.1 * i for i in range(8)], "standard_error": [0.01] * 8}
        later = {"mean": [1.0] * 7, "standard_error": [0.1] * 7}
        content = {
            "schema": 1, "rollouts_done": done, "layer": 2, "layers": 8,
            "perplexity": {"value": 2.0, "standard_error": 0.1},
            "entropy": numbers, "cosine_of_layer": numbers, "divergence": later,
        }  # fmt: skip
        return TrainingReading.parse(content)

    figure = training_figure([("one", [reading(0), reading(4)], 2.0)])
    cosine, entropy, perplexity, divergence = figure.axes
    assert list(cosine.lines[0].get_ydata()) == pytest.approx([0.65, 0.65])  # layers 7 and 8
    assert list(entropy.lines[0].get_ydata()) == pytest.approx([0.1, 0.1])
    assert list(perplexity.lines[0].get_xdata()) == [0, 4]
    assert len(divergence.lines) == 3  # output, next layer, the switch
