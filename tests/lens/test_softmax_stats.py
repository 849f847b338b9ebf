"""Tiled statistics against torch.distributions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from bupo.lens.online import StatsRequest
from bupo.lens.softmax_stats import lens_stats, residual_group_stats
from bupo.models.unembed import Unembedding
from tests.support.lens import RULES, logits_of, unembedding


def entropy(states, e):
    return lens_stats(states[None], e)["entropy"][0]


@given(st.integers(2, 40), st.floats(1e-4, 30), st.sampled_from(RULES), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_entropy_is_the_categorical_distributions_between_zero_and_log_v(vocabulary, spread, rule, tile):
    e, states = unembedding(vocabulary, 3, spread=spread, **rule), torch.randn(5, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bupo.lens.softmax_stats.tile_size", lambda device: (4, tile))
        got = entropy(states, e)
    torch.testing.assert_close(got, Categorical(logits=logits_of(states, e)).entropy(), rtol=1e-4, atol=2e-6)
    assert ((got >= -1e-6) & (got <= math.log(vocabulary) + 1e-6)).all()
    flat = Unembedding(e.weight)
    torch.testing.assert_close(entropy(torch.zeros(2, 3), flat), torch.full((2,), math.log(vocabulary)).double())


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("size", [(100, 50), (3, 16), (5, 1)], ids=str)
@pytest.mark.parametrize("spread", [0.1, 10.0])
def test_every_statistic_of_every_site_is_its_definition(monkeypatch, rule, size, spread):
    monkeypatch.setattr("bupo.lens.softmax_stats.tile_size", lambda device: size)
    # a saturated soft cap makes ties, in which a rank means nothing
    e = unembedding(spread=min(spread, 0.3) if "softcap" in rule else spread, **rule)
    layers = [torch.randn(4, 9, 7) for _ in range(3)]
    stream = before = torch.randn(9, 7)
    final, targets = torch.randn(9, 7), torch.randint(50, (9,))
    last = Categorical(logits=logits_of(final, e))
    request = StatsRequest(targets, True, True, final, kl=True, kl_from_reference=True, top_k=3)
    first, group = residual_group_stats(before, layers, e, request, with_before=True)
    sites = [(before, {name: values[0] for name, values in first.items()})]
    for index, layer in enumerate(layers):
        stream = stream + layer[1] + layer[3]
        states = (*layer, stream)
        sites += [(s, {name: v[index, i] for name, v in group.items()}) for i, s in enumerate(states)]
    every = lens_stats(torch.stack([state for state, _ in sites]), e, request)
    sites += [(s, {name: values[i] for name, values in every.items()}) for i, (s, _) in enumerate(sites)]
    assert torch.equal(residual_group_stats(before, layers, e)[1]["entropy"], group["entropy"])
    for state, at in sites:
        policy = Categorical(logits=logits_of(state, e))
        order = policy.logits.argsort(-1, descending=True)
        torch.testing.assert_close(at["entropy"], policy.entropy(), rtol=1e-4, atol=5e-6)
        torch.testing.assert_close(at["lse"], logits_of(state, e).logsumexp(-1), rtol=1e-5, atol=1e-5)
        assert torch.equal(order.gather(1, at["rank"].long()[:, None] - 1).squeeze(1), targets)
        want = {
            "logprob": policy.log_prob(targets),
            "varentropy": (policy.probs * (policy.logits + policy.entropy()[:, None]).square()).sum(-1),
            "kl": kl_divergence(policy, last),
            "kl_from_reference": kl_divergence(last, policy),
            "top_probability": policy.probs.gather(1, order[:, :3]),
        }
        for name, values in want.items():
            torch.testing.assert_close(at[name], values, rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(policy.probs.gather(1, at["top"]), want["top_probability"], rtol=2e-4, atol=2e-4)


def test_sixteen_bit_weights_are_multiplied_as_they_are():
    e = unembedding(spread=3.0)
    half = Unembedding(e.weight.bfloat16(), low_precision=True)
    states = torch.randn(6, 7).bfloat16().float()
    expected = Categorical(logits=states.double() @ half.weight.double().T).entropy()
    torch.testing.assert_close(entropy(states, half), expected, rtol=1e-5, atol=1e-5)
    assert (half.products, e.products) == ("bfloat16", "float32")


def test_non_finite_logits_do_not_pass_as_numbers():
    states = torch.randn(3, 7)
    states[1, 2] = float("inf")
    assert torch.isfinite(entropy(states, unembedding())).tolist() == [True, False, True]
