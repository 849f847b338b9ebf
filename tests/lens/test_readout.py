"""Tiled readings against torch.distributions; means and errors against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from bupo.lens.clustered import ClusterMeans
from bupo.lens.old_tokens import read_tokens
from bupo.lens.online import Extras, Running
from bupo.lens.softmax_stats import LOG2_E, entropy, group_entropies, read_group, read_states
from bupo.models.capture import LayerStates
from bupo.models.unembed import Unembedding


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
    running = Running((1,), "cpu")
    whole = torch.tensor([[0.0, 1.0, 80.0, 79.0, -3.0, 160.0, 161.0]])
    for tile in whole.split(2, dim=1):
        running.update_(tile * LOG2_E, torch.empty_like(tile))
    torch.testing.assert_close(running.entropy(), Categorical(logits=whole.double()).entropy(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("tile", "rows"), [(50, 100), (16, 3), (1, 5)])
def test_four_products_give_all_sites_of_a_group(rule, tile, rows):
    e = unembedding(**rule)
    layers = [LayerStates(torch.randn(4, 9, 7)) for _ in range(3)]
    stream = before = torch.randn(9, 7)
    got = group_entropies(before, layers, e, tile=tile, rows=rows)
    for index, layer in enumerate(layers):
        stream = stream + layer.attn_out + layer.ffn_out
        for site, state in enumerate((layer.attn_in, layer.attn_out, layer.ffn_in, layer.ffn_out, stream)):
            expected = Categorical(logits=logits_of(state, e)).entropy()
            torch.testing.assert_close(got[index, site], expected, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("tile", "rows"), [(50, 100), (16, 3), (1, 5)])
@pytest.mark.parametrize("spread", [0.1, 10.0])
def test_statistics_that_ride_along(rule, tile, rows, spread):
    # a saturated soft cap makes ties, in which a rank means nothing
    e = unembedding(spread=min(spread, 0.5) if "softcap" in rule else spread, **rule)
    layers = [LayerStates(torch.randn(4, 9, 7)) for _ in range(2)]
    stream = before = torch.randn(9, 7)
    final, targets = torch.randn(9, 7), torch.randint(50, (9,))
    last = Categorical(logits=logits_of(final, e))
    lse = logits_of(final, e).logsumexp(-1)
    torch.testing.assert_close(read_states(final[None], e, tile=tile, rows=rows)["lse"][0], lse, rtol=1e-5, atol=1e-5)
    extras = Extras(targets=targets, rank=True, varentropy=True, final=final, final_lse=lse, top=3)
    got = read_group(before, layers, e, extras, tile=tile, rows=rows)
    for index, layer in enumerate(layers):
        stream = stream + layer.attn_out + layer.ffn_out
        for site, state in enumerate((layer.attn_in, layer.attn_out, layer.ffn_in, layer.ffn_out, stream)):
            policy = Categorical(logits=logits_of(state, e))
            at = {name: values[index, site] for name, values in got.items()}
            surprisal = -policy.logits
            entropy = (policy.probs * surprisal).sum(-1)
            varentropy = (policy.probs * (surprisal - entropy[:, None]).square()).sum(-1)
            close = {"rtol": 2e-4, "atol": 2e-4}
            torch.testing.assert_close(at["entropy"], entropy, **close)
            torch.testing.assert_close(at["logprob"], policy.log_prob(targets), **close)
            torch.testing.assert_close(at["varentropy"], varentropy, **close)
            torch.testing.assert_close(at["kl"], kl_divergence(policy, last), **close)
            order = policy.logits.argsort(-1, descending=True)
            assert torch.equal(order.gather(1, at["rank"].long()[:, None] - 1).squeeze(1), targets)
            assert torch.equal(at["top"], order[:, :3])
            torch.testing.assert_close(at["top_probability"], policy.probs.gather(1, order[:, :3]), **close)


def test_sixteen_bit_weights_are_multiplied_as_they_are():
    e = unembedding(spread=3.0)
    half = Unembedding(e.weight.bfloat16(), low_precision=True)
    states = torch.randn(6, 7).bfloat16().float()
    expected = Categorical(logits=states.double() @ half.weight.double().T).entropy()
    torch.testing.assert_close(entropy(states, half, tile=8), expected, rtol=1e-5, atol=1e-5)
    assert (half.products, e.products) == ("bfloat16", "float32")


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


def test_drawn_tokens_estimate_all_of_them():
    """Over many draws: the mean is right, and its spread is the sampling error."""
    torch.manual_seed(2)
    sizes = (40, 15, 90)
    parts = [torch.randn(1, n, dtype=torch.float64) * (i + 1) + i for i, n in enumerate(sizes)]
    whole = torch.cat(parts, 1).mean()
    found, errors = [], []
    for _ in range(600):
        means = ClusterMeans(1)
        for i, part in enumerate(parts):
            order = torch.randperm(sizes[i])[: sizes[i] // 3]
            for some in order.split(4):  # in several calls
                means.add(part[:, some], response=i, size=sizes[i])
        found.append(means.mean())
        errors.append(means.sampling_error().square())
    spread = torch.cat(found)
    assert abs(spread.mean() - whole) < 4 * spread.std() / math.sqrt(600)
    torch.testing.assert_close(torch.cat(errors).mean().sqrt(), spread.std(), rtol=0.1, atol=0)


def test_all_tokens_leave_no_sampling_error_whatever_the_order():
    parts = [torch.randn(2, n, dtype=torch.float64) for n in (4, 9, 2)]
    one, two, three = (ClusterMeans(2) for _ in range(3))
    for i, part in enumerate(parts):
        one.add(part)
        (two if i % 2 else three).add(part[:, :1], response=i, size=part.shape[1])
        (two if i % 2 else three).add(part[:, 1:], response=i, size=part.shape[1])
    merged = ClusterMeans.merged(2, [two.state(), three.state()])
    for means in (one, merged):
        assert means.sampling_error().tolist() == [0.0, 0.0]
    torch.testing.assert_close(merged.mean(), one.mean())
    torch.testing.assert_close(merged.standard_error(), one.standard_error())
    torch.testing.assert_close(merged.bootstrap_means(20), one.bootstrap_means(20))


def test_one_response_falls_back_to_tokens_and_says_so():
    means = ClusterMeans(1)
    values = torch.randn(1, 50, dtype=torch.float64)
    means.add(values)
    torch.testing.assert_close(means.standard_error(), values.std(1) / math.sqrt(50))
    assert "single response" in means.method
