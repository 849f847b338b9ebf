"""The Triton kernel in interpreter mode against float64; skips where triton is not installed."""

from __future__ import annotations

import os

import pytest
import torch
from torch.distributions import Categorical

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton decorates the kernel
pytest.importorskip("triton", reason="needs triton")
DEVICE = "cuda" if torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] != "1" else "cpu"

from bupo.lens import softmax_stats, triton_kernel  # noqa: E402
from bupo.lens.online import StatsRequest  # noqa: E402
from bupo.models.capture import LayerStates  # noqa: E402
from bupo.models.unembed import Unembedding  # noqa: E402
from tests.support.lens import RULES, logits_of  # noqa: E402


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for name in ("ROWS", "TILE", "WIDTH_TILE"):
        monkeypatch.setattr(triton_kernel, name, 16)


def setting(n=9, d=20, v=53, layers=2, spread=1.0, dtype=torch.float32, bias=False, **rule):
    torch.manual_seed(0)
    weight = (torch.randn(v, d) * spread).to(DEVICE, dtype)
    states = torch.randn(layers, 4, n, d, device=DEVICE).to(dtype)
    before = torch.randn(n, d, device=DEVICE).to(dtype)
    return before, states, Unembedding(weight, torch.randn(v, device=DEVICE) if bias else None, **rule)


def reference(state, e):
    z = logits_of(state, e)
    return Categorical(logits=z).entropy(), z.logsumexp(-1)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("spread", [1e-3, 1.0, 20.0])
def test_a_group_equals_float64(rule, spread):
    before, states, e = setting(spread=spread, **rule)
    entropy, lse = triton_kernel.read(before, states, e)
    stream = before.double()
    for layer, every in enumerate(states.double()):
        stream = stream + every[1] + every[3]
        for site, state in enumerate((*every, stream)):
            want = reference(state, e)
            torch.testing.assert_close(entropy[layer, site], want[0], rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(lse[layer, site], want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "d", "v"), [(1, 16, 16), (17, 33, 100), (16, 7, 129), (5, 64, 31)])
@pytest.mark.parametrize("parts", [1, 3, None])
def test_sizes_that_are_no_multiples_of_the_blocks(n, d, v, parts):
    before, states, e = setting(n=n, d=d, v=v, layers=1)
    entropy, lse = triton_kernel.read(before, states, e, parts)
    for site in range(4):
        want = reference(states[0, site], e)
        torch.testing.assert_close(entropy[0, site], want[0], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(lse[0, site], want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_numbers_are_summed_in_float32(dtype):
    before, states, e = setting(dtype=dtype, layers=1)
    entropy, _ = triton_kernel.read(before, states, e)
    for site in range(4):
        torch.testing.assert_close(entropy[0, site], reference(states[0, site], e)[0], rtol=1e-4, atol=5e-5)


def test_non_finite_logits_do_not_pass_as_numbers():
    before, states, e = setting(layers=1)
    before[3, 2] = float("inf")
    entropy, _ = triton_kernel.read(before, states, e)
    assert torch.isfinite(entropy[0, 4]).tolist() == [i != 3 for i in range(9)]


def test_the_reader_uses_it_and_agrees(monkeypatch):
    before, states, rule = setting(scale=0.7)
    layers = [LayerStates(stacked) for stacked in states]
    plain = softmax_stats.residual_group_stats(before, layers, rule)[1]
    calls = []
    real = triton_kernel.read
    monkeypatch.setattr(triton_kernel, "read", lambda *a, **k: calls.append(1) or real(*a, **k))
    monkeypatch.setattr(softmax_stats, "_kernel", lambda device: triton_kernel)
    fused = softmax_stats.residual_group_stats(before, layers, rule)[1]
    assert calls
    torch.testing.assert_close(fused["entropy"], plain["entropy"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused["lse"], plain["lse"], rtol=1e-5, atol=1e-5)
    # what the kernel does not compute takes the other path
    extra = softmax_stats.residual_group_stats(before, layers, rule, StatsRequest(varentropy=True))[1]
    assert len(calls) == 1
    assert "varentropy" in extra
