"""Pass@K, intervals and paired tests against enumeration and simulation."""

from itertools import combinations, product
from math import comb

import numpy as np
import pytest
import scipy.stats

from bupo.evaluate.metrics import bootstrap, compare, pass_at_k, share_interval, task_results


def test_pass_at_k_equals_enumeration_of_subsets():
    for n in range(1, 8):
        for correct, k in product(range(n + 1), range(1, n + 1)):
            samples = [True] * correct + [False] * (n - correct)
            subsets = list(combinations(samples, k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)
    for n, correct, k in [(2000, 3, 700), (2000, 700, 3), (1999, 1000, 1), (1500, 20, 1480), (300, 299, 2)]:
        assert pass_at_k(n, correct, k) == pytest.approx(1 - comb(n - correct, k) / comb(n, k), abs=1e-9)
    for case in [(0, 0, 1), (4, 5, 1), (4, 1, 0), (4, 1, 5), (4, -1, 1)]:
        with pytest.raises(ValueError, match="need 0 <= correct"):
            pass_at_k(*case)


def rows(correct, samples, **changes):
    row = {"reward": 0.0, "length": 3, "finished": True, **changes}
    return [
        {"problem_id": str(problem), "status": "correct" if sample < right else "wrong", **row}
        for problem, right in enumerate(correct)
        for sample in range(samples)
    ]


def test_results_have_only_the_ks_that_the_samples_allow():
    results = task_results(rows([0, 4, 16], 16), k=8)
    curve = results["pass_at_k"]
    assert [entry["k"] for entry in curve] == [1, 4, 8, 16]
    assert curve[0]["mean"] == results["avg_at_k"]["mean"] == pytest.approx(np.mean([0, 4 / 16, 1]))
    assert curve[-1]["mean"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="different numbers of samples"):
        task_results(rows([0, 0], 2)[:3], k=1)
    empty = task_results(rows([0], 1, status="bad_gold"), k=1)
    assert (empty["n_problems"], empty["left_out"]) == (0, ["0"])


def test_interval_covers_the_truth_as_often_as_it_says():
    """Problems differ in difficulty (mean 2/7); an interval over samples would be far too narrow."""
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(400):
        estimate = bootstrap(generator.binomial(8, generator.beta(2, 5, size=60)) / 8, resamples=600, seed=trial)
        covered += estimate["ci95"][0] <= 2 / 7 <= estimate["ci95"][1]
    assert 0.91 <= covered / 400 <= 0.98  # 95 % within three standard errors, less what the percentile method loses
    assert bootstrap([0.5]) == {"mean": 0.5, "ci95": [0.5, 0.5]}
    with pytest.raises(ValueError, match="at least one problem"):
        bootstrap([])


def test_problems_that_all_agree_do_not_promise_the_same_of_others():
    assert share_interval([1.0] * 10)["ci95"] == pytest.approx([1 - scipy.stats.beta.ppf(0.975, 1, 10), 1])
    assert share_interval([0.0] * 40)["ci95"] == pytest.approx([0, scipy.stats.beta.ppf(0.975, 1, 40)])
    assert share_interval([0.5])["ci95"] == pytest.approx([0.0125, 0.9875])
    assert share_interval([0.25, 0.75]) == bootstrap([0.25, 0.75])
    row = {"problem_id": "a", "reward": 1.0, "status": "correct", "length": 2, "finished": True}
    found = task_results([row, row], k=2)
    intervals = [found["avg_at_k"]["ci95"], *(one["ci95"] for one in found["pass_at_k"])]
    assert intervals == [pytest.approx([0.025, 1.0])] * len(intervals)


def test_comparison_finds_a_difference_and_keeps_its_level():
    generator = np.random.default_rng(3)
    rejected = 0
    for trial in range(200):  # no difference
        difficulty = generator.beta(2, 5, size=40)
        first, second = generator.binomial(8, difficulty) / 8, generator.binomial(8, difficulty) / 8
        rejected += compare(first, second, resamples=500, seed=trial)["p_value"] < 0.05
    assert rejected / 200 <= 0.10  # 5 % and three standard errors
    difficulty = generator.beta(2, 5, size=40)
    better = compare(generator.binomial(8, difficulty) / 8, generator.binomial(8, np.minimum(difficulty + 0.2, 1)) / 8)
    assert better["p_value"] < 0.01
    assert better["ci95"][0] > 0


def test_comparison_equals_enumerated_sign_flips():
    first, second = [0.0, 0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 0.5, 0.25, 1.0]
    differences = np.subtract(second, first)
    flips = [abs(np.dot(signs, differences)) for signs in product((1, -1), repeat=5)]
    exact = np.mean([flip >= abs(differences.sum()) - 1e-12 for flip in flips])
    assert compare(first, second, resamples=50_000)["p_value"] == pytest.approx(exact, abs=0.01)
    with pytest.raises(ValueError, match="same problems, not 5 and 4"):
        compare(first, second[:4])
