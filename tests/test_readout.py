"""Tiled readings against torch.distributions; means and errors against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from bupo.policy.readout import LayerStates, RunningEntropy, Unembedding, entropy, group_entropies
from bupo.policy.statistics import ClusterMeans
from bupo.policy.tokens import read_tokens


def unembedding(vocabulary=50, width=7, *, scale=1.0, softcap=None, bias=False, spread=1.0):
    torch.manual_seed(1)
    weight = torch.randn(vocabulary, width) * spread
    return Unembedding(weight, torch.randn(vocabulary) if bias else None, scale, softcap)


def logits_of(states, e):
    z = e.scale * (states.double() @ e.weight.double().T)
    if e.bias is not None:
        z = z + e.bias.double()
    return z if e.softcap is None else e.softcap * torch.tanh(z / e.softcap)


RULES = [{}, {"bias": True}, {"scale": 0.3}, {"softcap": 5.0}, {"scale": 2.0, "softcap": 3.0, "bias": True}]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("tile", [1, 7, 50, 999])
@pytest.mark.parametrize("spread", [1e-4, 1.0, 30.0])
def test_entropy_is_the_categorical_distributions(rule, tile, spread):
    e = unembedding(spread=spread, **rule)
    states = torch.randn(11, 7)
    got = entropy(states, e, tile=tile, rows=4)
    torch.testing.assert_close(got, Categorical(logits=logits_of(states, e)).entropy(), rtol=1e-4, atol=2e-6)


@given(st.integers(2, 40), st.floats(0.01, 100), st.integers(1, 41), st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_entropy_lies_between_zero_and_log_v(vocabulary, spread, tile, seed):
    generator = torch.Generator().manual_seed(seed)
    e = Unembedding(torch.randn(vocabulary, 3, generator=generator) * spread)
    got = entropy(torch.randn(5, 3, generator=generator), e, tile=tile)
    assert (got >= -1e-6).all()
    assert (got <= math.log(vocabulary) + 1e-6).all()


def test_zero_state_is_uniform():
    e = unembedding(vocabulary=37)
    torch.testing.assert_close(entropy(torch.zeros(2, 7), e, tile=5), torch.full((2,), math.log(37)).double())


def test_a_later_larger_maximum_rescales_what_was_summed():
    running = RunningEntropy((1,), "cpu")
    whole = torch.tensor([[0.0, 1.0, 80.0, 79.0, -3.0, 160.0, 161.0]])
    for tile in whole.split(2, dim=1):
        running.update_(tile.clone(), torch.empty_like(tile))
    torch.testing.assert_close(running.entropy(), Categorical(logits=whole.double()).entropy())


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("tile", "rows"), [(50, 100), (16, 3), (1, 5)])
def test_four_products_give_all_sites_of_a_group(rule, tile, rows):
    e = unembedding(**rule)
    layers = [LayerStates(*torch.randn(4, 9, 7)) for _ in range(3)]
    stream = before = torch.randn(9, 7)
    got = group_entropies(before, layers, e, tile=tile, rows=rows)
    for index, layer in enumerate(layers):
        stream = stream + layer.attn_out + layer.ffn_out
        for site, state in enumerate((layer.attn_in, layer.attn_out, layer.ffn_in, layer.ffn_out, stream)):
            expected = Categorical(logits=logits_of(state, e)).entropy()
            torch.testing.assert_close(got[index, site], expected, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_single_tokens_equal_torch_distributions(rule):
    e = unembedding(**rule)
    states, final, targets = torch.randn(3, 9, 7), torch.randn(9, 7), torch.randint(50, (9,))
    got = read_tokens(states, final, targets, e, top=4, rows=4)
    last = Categorical(logits=logits_of(final, e))
    for layer, state in enumerate(states):
        policy = Categorical(logits=logits_of(state, e))
        torch.testing.assert_close(got.entropy[layer], policy.entropy(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.logprob[layer], policy.log_prob(targets), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.kl[layer], kl_divergence(policy, last), rtol=1e-4, atol=1e-4)
        order = policy.probs.argsort(-1, descending=True)
        assert torch.equal(got.top[layer], order[:, :4])
        assert torch.equal(order.gather(1, got.rank[layer][:, None] - 1).squeeze(1), targets)


def test_non_finite_logits_do_not_pass_as_numbers():
    states = torch.randn(3, 7)
    states[1, 2] = float("inf")
    got = entropy(states, unembedding(), tile=8)
    assert torch.isfinite(got).tolist() == [True, False, True]


def test_cluster_means_and_errors_by_their_formulas():
    torch.manual_seed(0)
    parts = [torch.randn(3, n, dtype=torch.float64) + i for i, n in enumerate((4, 9, 2, 7))]
    means = ClusterMeans(3)
    for part in parts:
        means.add(part)
    tokens = torch.cat(parts, 1)
    torch.testing.assert_close(means.mean(), tokens.mean(1))
    residual = torch.stack([(p - tokens.mean(1, keepdim=True)).sum(1) for p in parts])
    expected = (residual.square().sum(0) * 4 / 3).sqrt() / 22
    torch.testing.assert_close(means.standard_error(), expected)
    # whole responses duplicated as clusters: correlated tokens do not shrink the error by their number
    draws = means.bootstrap_means(4000).std(0)
    torch.testing.assert_close(draws, expected * math.sqrt(3 / 4), rtol=0.25, atol=0)


def test_one_response_falls_back_to_tokens_and_says_so():
    means = ClusterMeans(1)
    values = torch.randn(1, 50, dtype=torch.float64)
    means.add(values)
    torch.testing.assert_close(means.standard_error(), values.std(1) / math.sqrt(50))
    assert "single response" in means.method
