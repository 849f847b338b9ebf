"""The statistics of sweeps against hand-worked values, definitions and simulations."""

import numpy as np
import pytest
import scipy.stats

from bupo.errors import InputError
from bupo.sweep import statistics
from tests.support.sweeps import a_row


def test_holm_against_a_hand_worked_example():
    given = {"a": 0.01, "b": 0.04, "none": None, "c": 0.03, "d": 0.005}
    # in order: 0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 x 1, which may not be below the one before
    wanted = {"a": 0.03, "b": 0.06, "none": None, "c": 0.06, "d": 0.02}
    assert statistics.holm(given) == pytest.approx(wanted)
    assert statistics.holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize("seeds", [3, 5, 10, 40])
def test_over_both_is_students_interval_where_all_problems_are_the_same(seeds):
    values = np.random.default_rng(seeds).normal(0.5, 0.1, seeds)
    wanted = scipy.stats.ttest_1samp(values, 0).confidence_interval()
    assert statistics.student(values) == pytest.approx(tuple(wanted))
    both = statistics.over_both(np.repeat(values[:, None], 7, axis=1))
    width = wanted.high - wanted.low
    assert both == pytest.approx(tuple(wanted), abs=(0.1 if seeds == 3 else 0.06) * width)


def test_over_both_is_the_interval_over_problems_where_all_seeds_are_the_same():
    values = np.tile(np.random.default_rng(0).random(60), (4, 1))
    low, high = statistics.over_problems(values)
    assert statistics.over_both(values) == pytest.approx((low, high), abs=0.08 * (high - low))
    assert statistics.over_both(values[:1]) is statistics.student(values[0, :1]) is None


@pytest.mark.parametrize(
    ("seeds", "of_seeds", "of_problems", "samples"),
    [(5, 0.05, 0.15, 8), (5, 0.0, 0.2, 8), (10, 0.01, 0.05, 2), (4, 0.1, 0.0, 64)],
)
def test_over_both_covers_both_and_is_no_wider_than_it_must(seeds, of_seeds, of_problems, samples):
    draw, runs, problems, covered, widths = np.random.default_rng(0), 250, 40, 0, []
    for _ in range(runs):
        chance = 0.5 + draw.normal(0, of_seeds, (seeds, 1)) + draw.normal(0, of_problems, (1, problems))
        low, high = statistics.over_both(draw.binomial(samples, chance.clip(0, 1)) / samples)
        covered += low <= 0.5 <= high
        widths.append(high - low)
    noise = (0.25 - of_seeds**2 - of_problems**2) / samples
    known = 2 * scipy.stats.t.ppf(0.975, seeds - 1)  # the width if the variances were known, with Student's factor
    known *= (of_seeds**2 / seeds + of_problems**2 / problems + noise / seeds / problems) ** 0.5
    assert 0.92 <= covered / runs <= 0.985
    assert np.mean(widths) < 1.05 * known


def test_power_against_a_simulation():
    n = statistics.seeds_needed(0.8, 1.0, 0.8)
    draw = np.random.default_rng(0).normal(0.8, 1.0, (20_000, n))
    for seeds in (n, n - 1):
        shown = scipy.stats.ttest_1samp(draw[:, :seeds], 0, axis=1).pvalue < 0.05
        assert statistics.power_of(0.8, 1.0, seeds) == pytest.approx(shown.mean(), abs=0.01)
    assert statistics.power_of(0.8, 1.0, n) >= 0.8 > statistics.power_of(0.8, 1.0, n - 1)
    assert statistics.seeds_needed(100.0, 1.0, 0.8) == 2
    assert statistics.seeds_needed(0.01, 1.0, 0.8) == pytest.approx(78_491, abs=3)  # (1.960 + 0.842)^2 / 0.01^2


@pytest.mark.parametrize("seeds", [2, 3, 5, 10, 30, 1000])
def test_the_detectable_difference_has_the_power_that_was_asked_for(seeds):
    for power in (0.5, 0.8, 0.99):
        assert statistics.power_of(statistics.detectable(seeds, 2.5, power), 2.5, seeds) == pytest.approx(
            power, abs=1e-6
        )


def test_the_deviation_has_its_chi_square_interval():
    deviation, (low, high) = statistics.deviation_of([-1.0, -1.0, 0.0, 1.0, 1.0])  # a variance of 1
    assert (deviation, low, high) == pytest.approx((1.0, 0.599, 2.874), abs=1e-3)


def test_arms_are_compared_by_seed_and_problem_and_corrected_as_one_family():
    rows = {
        "start": {0: a_row("start", 0, [0, 0])},
        "a": {s: a_row("a", s, [4, s % 2]) for s in range(4)},
        "grpo": {s: a_row("grpo", s, [2, 0], update_seconds=10.0 + s) for s in range(3)},
        "b": {s: a_row("b", s, [2, s]) for s in (1, 2, 9)},
        "same": {s: a_row("same", s, [2, 0]) for s in range(3)},
    }
    assert statistics.baseline_of(rows) == "grpo"
    assert statistics.baseline_of({"start": {}, "x": {}}) == "x"
    start, a, grpo, b, same = statistics.compare_arms(rows, "t", "grpo")
    assert (start["difference"], grpo["difference"], grpo["update_seconds"]) == (None, None, 11.0)
    assert (grpo["mean"], a["mean"], start["ci_seeds"]) == (0.25, 0.5625, None)
    assert a["difference"]["seeds"] == [0, 1, 2]
    assert a["difference"]["mean"] == pytest.approx((0.25 + 0.375 + 0.25) / 3)
    own = scipy.stats.ttest_1samp([0.25, 0.375, 0.25], 0).pvalue
    assert a["difference"]["p_holm"] == pytest.approx(2 * own)  # a family of two: the third has no p-value
    assert (b["difference"]["seeds"], b["difference"]["mean"]) == ([1, 2], pytest.approx(0.1875))
    assert (same["difference"]["p_holm"], same["difference"]["ci_both"]) == (None, (0.0, 0.0))
    rows["b"][1] = a_row("b", 1, [2, 2, 2])
    with pytest.raises(InputError, match="arm b was evaluated on t with 3 problems with seed 1 and 2 with seed 2"):
        statistics.compare_arms(rows, "t", "grpo")
    rows["b"] = {s: a_row("b", s, [2, 2, 2]) for s in range(3)}
    with pytest.raises(InputError, match="arms b and grpo were evaluated on 3 and 2 problems of t"):
        statistics.compare_arms(rows, "t", "grpo")


def layer_rows(**changes) -> dict:
    """Layer 1 adds 1 of 4 to each problem, layer 2 nothing, all layers together 2."""
    rows = {"start": {0: a_row("start", 0, [1, 1, 2])}}
    rows["grpo"] = {s: a_row("grpo", s, [3, 3, 4]) for s in range(3)}
    for layer, counts in ((2, [1, 1, 2]), (1, [2, 2, 3])):
        chosen = {"trained_layers": [layer] if layer == 2 else "1", **changes}
        rows[f"l{layer}"] = {s: {**a_row(f"l{layer}", s, counts), "changes": chosen} for s in range(3)}
    return rows


def test_a_layer_map_has_each_layers_contribution_and_share():
    one, two = statistics.layer_map(layer_rows(), "t", "grpo")
    assert (one["layer"], one["mean"], one["share"]) == (1, 0.25, 0.5)
    assert (one["ci_both"], one["ci_share"]) == (pytest.approx((0.25, 0.25)), pytest.approx((0.5, 0.5)))
    assert (two["layer"], two["mean"], two["share"]) == (2, 0.0, 0.0)
    assert statistics.layer_map(layer_rows(rollouts=3), "t", "grpo") == []  # differs from the baseline elsewhere
    rows = layer_rows(internal_steps=0, internal_layer=None)
    for row in rows["grpo"].values():
        row["changes"] = {"internal_steps": 0, "internal_layer": 4}  # without an internal phase, the layer says nothing
    rows["other"] = {0: {**a_row("other", 0, [1, 1, 1]), "changes": {"rollouts": 9}}}  # is no part of the map
    assert [row["layer"] for row in statistics.layer_map(rows, "t", "grpo")] == [1, 2]
    assert statistics.layer_map(layer_rows(trained_layers="1-2"), "t", "grpo") == []
    rows = layer_rows()
    rows["grpo"] = {s: a_row("grpo", s, [s, 2 - s, 2]) for s in range(3)}  # gains nothing for certain: no share
    assert [row["share"] for row in statistics.layer_map(rows, "t", "grpo")] == [None, None]
    assert statistics.layer_map({arm: rows[arm] for arm in ("grpo", "l1", "l2")}, "t", "grpo") == []
