"""The boundary rule on the paper's patterns and on the ones where it must refuse."""

from __future__ import annotations

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
    assert found.layer == 6
    assert found.exploration == (1, 6)
    assert found.integration == (7, 26)
    assert found.convergence == (27, 36)


def test_abrupt_as_in_llama():
    found = find_boundary(LLAMA_28, [0.01] * 28)
    assert found.layer == 26
    assert found.exploration == (1, 26)
    assert found.integration is None
    assert found.convergence == (27, 28)
    assert "abrupt" in found.reason


def test_a_single_weak_exception_does_not_hide_the_abrupt_pattern():
    change = list(LLAMA_28)
    change[12] = -0.03
    assert find_boundary(change, [0.005] * 28).layer == 26


def test_negative_everywhere_has_no_boundary():
    found = find_boundary([-1.8, -10.4, -3.0], [0.1] * 3)
    assert found.layer is None
    assert found.exploration is None
    assert "negative in every layer (1 to 3)" in found.reason


def test_positive_everywhere_has_no_boundary():
    found = find_boundary([0.07, 2.0, 10.6], [0.01] * 3)
    assert found.layer is None
    assert "positive in every layer (1 to 3)" in found.reason


def test_disorder_has_no_boundary_and_shows_the_signs():
    found = find_boundary([-1.0, 2.0, -2.0, 1.0, -1.0, 2.0, -1.5, 2.0, -1.0, 1.0])
    assert found.layer is None
    assert "-+-+-+-+-+" in found.reason


def test_noise_is_not_a_sign():
    found = find_boundary([0.5, 0.02, -3.0, -2.0], [0.5, 0.1, 0.1, 0.1])
    assert found.layer is None
    assert "exploration" in found.reason


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
