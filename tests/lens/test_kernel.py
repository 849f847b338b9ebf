"""The Triton kernel in interpreter mode against float64; skips where triton is not installed."""

import os

import pytest
import torch
from torch.distributions import Categorical

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton decorates the kernel
pytest.importorskip("triton", reason="needs triton")
SIZES = [(1, 16, 16), (17, 33, 100), (16, 7, 129), (5, 64, 31)]  # most are no multiples of the blocks
DEVICE = "cuda" if torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] != "1" else "cpu"

from bupo.lens import softmax_stats, triton_kernel  # noqa: E402
from bupo.lens.online import StatsRequest  # noqa: E402
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


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [({"rule": rule, "spread": spread}, None) for rule in RULES for spread in (1e-3, 1.0, 20.0)]
    + [({"n": n, "d": d, "v": v}, parts) for n, d, v in SIZES for parts in (1, 3, None)]
    + [({"dtype": dtype}, None) for dtype in (torch.bfloat16, torch.float16)],
    ids=str,
)
def test_a_group_equals_float64(sizes, parts):
    before, states, e = setting(**{k: v for k, v in sizes.items() if k != "rule"}, **sizes.get("rule", {}))
    found = triton_kernel.read(before, states, e, parts)
    stream, sixteen = before.double(), e.weight.dtype != torch.float32
    for layer, every in enumerate(states.double()):
        stream = stream + every[1] + every[3]
        for site, state in enumerate(every if sixteen else (*every, stream)):
            z, (entropy, lse) = logits_of(state, e), (values[layer, site] for values in found)
            close = {"rtol": 1e-4, "atol": 5e-5 if sixteen else 2e-5}
            torch.testing.assert_close(entropy, Categorical(logits=z).entropy(), **close)
            torch.testing.assert_close(lse, z.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_non_finite_logits_do_not_pass_as_numbers():
    before, states, e = setting(layers=1)
    before[3, 2] = float("inf")
    entropy, _ = triton_kernel.read(before, states, e)
    assert torch.isfinite(entropy[0, 4]).tolist() == [i != 3 for i in range(9)]


def test_the_reader_uses_it_and_agrees(monkeypatch):
    before, states, rule = setting(scale=0.7)
    layers = list(states)
    plain = softmax_stats.residual_group_stats(before, layers, rule)[1]
    calls, real = [], triton_kernel.read
    monkeypatch.setattr(triton_kernel, "read", lambda *a, **k: calls.append(1) or real(*a, **k))
    monkeypatch.setattr(softmax_stats, "_kernel", lambda device: triton_kernel)
    fused = softmax_stats.residual_group_stats(before, layers, rule)[1]
    for name in ("entropy", "lse"):
        torch.testing.assert_close(fused[name], plain[name], rtol=1e-5, atol=1e-5)
    # what the kernel does not compute takes the other path
    extra = softmax_stats.residual_group_stats(before, layers, rule, StatsRequest(varentropy=True))[1]
    assert (len(calls), "varentropy" in extra) == (1, True)
