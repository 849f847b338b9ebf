"""The boundary rule on the paper's patterns and on the ones where it must refuse."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bupo.lens.boundary import find_boundary

FALLING = [-0.5, -0.8, -1.1, -0.9, -1.4, -2.0, -2.2, -1.8, -3.0, -2.5]
QWEN3_4B = [0.8, 1.2, 0.9, 1.5, 0.7, 0.6, *[0.05, -0.04] * 10, *FALLING]
LLAMA_28 = [*[0.1, 0.08, 0.12, 0.05] * 6, 0.07, 0.06, -2.5, -4.0]


def test_three_stages_as_in_qwen3():
    found = find_boundary(QWEN3_4B, [0.01] * 36)
    assert (found.layer, found.exploration, found.integration, found.convergence) == (6, (1, 6), (7, 26), (27, 36))


@pytest.mark.parametrize("exception", [0.1, -0.03])
def test_abrupt_as_in_llama_with_or_without_a_weak_exception(exception):
    change = [*LLAMA_28[:12], exception, *LLAMA_28[13:]]
    found = find_boundary(change, [0.005] * 28)
    assert (found.layer, found.exploration, found.integration, found.convergence) == (26, (1, 26), None, (27, 28))
    assert "abrupt" in found.reason


@pytest.mark.parametrize(
    ("change", "errors", "words"),
    [
        ([-1.8, -10.4, -3.0], [0.1] * 3, "negative in every layer (1 to 3)"),
        ([0.07, 2.0, 10.6], [0.01] * 3, "positive in every layer (1 to 3)"),
        ([-1.0, 2.0, -2.0, 1.0, -1.0, 2.0, -1.5, 2.0, -1.0, 1.0], None, "-+-+-+-+-+"),
        ([0.5, 0.02, -3.0, -2.0], [0.5, 0.1, 0.1, 0.1], "no exploration region"),
        ([0.5, 0.02, -0.1, -0.2], [0.1, 0.1, 0.1, 0.2], "no convergence region"),
        ([-0.5, -0.2, -0.1, 2.0], None, "only the last layer is positive: ---+"),
    ],
    ids=["negative", "positive", "disorder", "noise", "no fall", "last"],
)
def test_other_patterns_have_no_boundary_and_say_why(change, errors, words):
    found = find_boundary(change, errors)
    assert found.layer is None
    assert words in found.reason


def test_unknown_errors_count_as_none():
    assert find_boundary(QWEN3_4B, [math.nan] * 36) == find_boundary(QWEN3_4B)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_scale_free(scale):
    assert find_boundary([c * scale for c in QWEN3_4B]).layer == 6


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40))
def test_what_it_returns_is_consistent(change):
    found = find_boundary(change)
    n = len(change)
    assert found.reason
    if found.layer is None:
        return
    assert change[found.layer - 1] > 0
    covered = [r for r in (found.exploration, found.integration, found.convergence) if r is not None]
    assert covered[0] == (1, found.layer)
    assert covered[-1][1] == n
    assert all(a[1] + 1 == b[0] for a, b in pairwise(covered))
    assert len(found.reason) < 400
