"""Fitted temperatures against their definition, criteria on curves with a known answer, the block of analysis.json."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from bupo import internal_policy
from bupo.errors import InputError
from bupo.lens import old_temperature as temperature
from bupo.lens.agreement import choose_layer, chosen_layer, pick_tokens, sample_size
from bupo.lens.analyze import analyze_rollouts
from bupo.lens.old_choice import NONE, Answer, bootstrap_weights, find_knee, knee_layers, recommend, shares
from bupo.lens.old_temperature import compare, read_final
from tests.lens.test_readout import RULES, logits_of, unembedding
from tests.support.tiny import tiny_model, tokens


@dataclass
class Row:
    prompt_ids: list[int]
    response_ids: list[int]


def rows(*lengths: int) -> list[Row]:
    ids = tokens(len(lengths), 3 + max(lengths)).tolist()
    return [Row(line[:3], line[3 : 3 + n]) for line, n in zip(ids, lengths, strict=True)]


# readings and temperatures


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_comparison_is_the_distributions(rule, monkeypatch):
    monkeypatch.setattr(temperature, "CHUNK", 120)  # two rows a product
    monkeypatch.setattr(temperature, "PIECE", 50)
    e = unembedding(**rule)
    final_states, states = torch.randn(2, 9, 7)
    final = read_final(final_states, e)
    p, z = Categorical(logits=logits_of(final_states, e)), logits_of(states, e)
    torch.testing.assert_close(final.entropy, p.entropy(), rtol=1e-5, atol=1e-5)
    for found in compare(states, final, e):
        b = torch.tensor(found.inverse_temperature, dtype=torch.float64, requires_grad=True)
        q = Categorical(logits=b * z)
        divergence = kl_divergence(p, q)
        torch.testing.assert_close(found.entropy, q.entropy().detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.kl, divergence.detach(), rtol=1e-4, atol=1e-4)
        slope = torch.autograd.grad(divergence.mean(), b, create_graph=True)[0]
        assert found.slope.mean().item() == pytest.approx(slope.item(), rel=1e-3, abs=1e-4)
        curvature = torch.autograd.grad(slope, b)[0]
        assert found.curvature.mean().item() == pytest.approx(curvature.item(), rel=1e-3, abs=1e-4)
        assert torch.equal(found.hit, (z.argmax(-1) == p.probs.argmax(-1)).double())


@given(st.floats(0.01, 200), st.floats(1e-3, 1e3), st.integers(0, 2**20))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_scaled_logits_are_fitted_their_scale(scale, start, seed):
    generator = torch.Generator().manual_seed(seed)
    e = unembedding()
    states = torch.randn(12, 7, generator=generator)
    _, fitted = compare(states * scale, read_final(states, e), e, start=start)
    assert 1 / fitted.inverse_temperature == pytest.approx(scale, rel=1e-3)
    assert fitted.kl.mean().item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_no_temperature_of_a_grid_is_nearer(rule, seed):
    torch.manual_seed(seed)
    e = unembedding(**rule)
    final_states = torch.randn(20, 7)
    states = 3 * final_states + 2 * torch.randn(20, 7)
    final = read_final(final_states, e)
    plain, fitted = compare(states, final, e)
    p, z = Categorical(logits=logits_of(final_states, e)), logits_of(states, e)
    grid = [kl_divergence(p, Categorical(logits=b * z)).mean() for b in torch.logspace(-3, 2, 400)]
    grid.append(kl_divergence(p, Categorical(logits=0 * z)).mean())
    assert fitted.kl.mean() <= min(grid) + 1e-6
    assert fitted.kl.mean() <= plain.kl.mean() + 1e-6
    assert fitted.kl.mean() >= min(grid) - 0.01


def test_a_state_that_says_nothing_gets_an_infinite_temperature():
    e = unembedding()
    states = torch.randn(30, 7)
    _, fitted = compare(-states, read_final(states, e), e)
    assert fitted.inverse_temperature == 0
    torch.testing.assert_close(fitted.entropy, torch.full((30,), math.log(50)).double())


def test_a_policy_sharper_than_any_reading_ends_at_the_bound():
    e = unembedding()
    states = torch.randn(6, 7)
    _, fitted = compare(states, read_final(1e7 * states, e), e)
    assert math.isfinite(fitted.inverse_temperature)
    assert fitted.kl.mean() < 1e-3


@pytest.mark.parametrize("rule", [{}, {"softcap": 5.0, "bias": True}], ids=str)
def test_logits_that_are_not_held_give_the_same(rule, monkeypatch):
    e = unembedding(**rule)
    states, final = torch.randn(11, 7), read_final(torch.randn(11, 7), e)
    held = compare(states, final, e)
    monkeypatch.setattr(temperature, "HELD", 0)
    monkeypatch.setattr(temperature, "CHUNK", 60)
    for one, two in zip(held, compare(states, final, e), strict=True):
        assert one.inverse_temperature == pytest.approx(two.inverse_temperature, rel=1e-5)
        torch.testing.assert_close(one.kl, two.kl, rtol=1e-5, atol=1e-5)


def test_the_entropys_influence_follows_the_refitted_temperature():
    """Counting tokens twice moves the entropy at the fitted temperature by their influence over their number."""
    torch.manual_seed(3)
    e = unembedding(spread=0.7)
    final_states = torch.randn(400, 7)
    states = 2 * final_states + torch.randn(400, 7)

    def fitted(index):
        return compare(states[index], read_final(final_states[index], e), e)[1]

    whole = fitted(torch.arange(400))
    influence = whole.entropy_influence() - whole.entropy.mean()
    extra = influence.abs().argsort(descending=True)[:20]  # twenty tokens whose influences do not cancel
    extra = extra[influence[extra] > 0]
    moved = fitted(torch.cat([torch.arange(400), extra])).entropy.mean() - whole.entropy.mean()
    expected = influence[extra].sum() / (400 + len(extra))
    assert moved.item() == pytest.approx(expected.item(), rel=0.15)
    without = (whole.entropy[extra] - whole.entropy.mean()).sum() / (400 + len(extra))
    assert abs(moved - expected) < abs(moved - without)  # the temperature's own movement matters


# criteria


def broken(layers: int, knee: int, low: float = 0.002, high: float = 0.08) -> list[float]:
    return [0.2 + low * min(i, knee) + high * max(0, i - knee) for i in range(1, layers + 1)]


@pytest.mark.parametrize("layers", [6, 12, 28])
def test_the_knee_of_two_lines_is_where_they_meet(layers):
    for knee in range(2, layers - 1):
        assert find_knee(broken(layers, knee)).layer == knee


@pytest.mark.parametrize(
    "curve",
    [
        [i / 12 for i in range(1, 13)],  # climbs evenly
        [1 - 0.7**i for i in range(1, 13)],  # fast, then slow
        [0.4] * 12,  # flat
        [1 - i / 12 for i in range(1, 13)],  # falls
        [abs(i - 5) / 12 for i in range(1, 13)],  # falls, then climbs
        broken(12, 5, 0.001, 0.005),  # too little in all
        [0.1, 0.1, 1.0],  # too few layers
    ],
    ids=["even", "concave", "flat", "falling", "valley", "small", "short"],
)
def test_a_curve_without_a_knee_has_none_and_says_why(curve):
    found = find_knee(curve)
    assert found.layer is None
    assert found.reason


def test_many_curves_at_once_are_as_one_by_one():
    torch.manual_seed(0)
    curves = torch.stack([torch.tensor(broken(14, k)) for k in range(2, 13)]) + 0.05 * torch.randn(11, 14)
    curves = torch.cat([curves, torch.rand(20, 14).cumsum(1) / 14, torch.rand(5, 14)])
    assert knee_layers(curves) == [find_knee(row.tolist()).layer for row in curves]
    assert knee_layers(torch.rand(2, 3)) == [None, None]


def test_the_recommendation_is_the_papers_rule_then_the_knee_then_none():
    yes, no = Answer(4, "because"), Answer(None, "because not")
    knee = Answer(7, "turns")
    assert (recommend(yes, knee).layer, recommend(yes, knee).criterion) == (4, "boundary")
    assert (recommend(no, knee).layer, recommend(no, knee).criterion) == (7, "knee")
    assert "not tried in training" in recommend(no, knee).reason
    assert (recommend(no, no).layer, recommend(no, no).criterion) == (None, None)


def test_bootstrap_draws_responses_and_tokens_within_them():
    counts = [4, 1, 7]
    weights = bootstrap_weights(counts, 200, seed=1)
    assert torch.equal(weights, bootstrap_weights(counts, 200, seed=1))
    assert not torch.equal(weights, bootstrap_weights(counts, 200, seed=2))
    parts = weights.split(counts, dim=1)
    for part, count in zip(parts, counts, strict=True):
        assert (part.sum(1) % count == 0).all()  # a response is drawn whole or not, so many times
    assert torch.equal(sum(p.sum(1) / n for p, n in zip(parts, counts, strict=True)), torch.full((200,), 3.0).double())
    assert weights.mean(0).sum().item() == pytest.approx(12, rel=0.1)
    alone = bootstrap_weights([5], 50, seed=0)
    assert torch.equal(alone.sum(1), torch.full((50,), 5.0).double())
    assert (alone.std(0) > 0).all()


def test_shares_sum_to_one():
    own, other = shares([3, 3, None, 4, 3], 3)
    assert (own, other) == (0.6, {NONE: 0.2, "4": 0.2})
    assert shares([3, None], None) == (0.5, {"3": 0.5})
    assert shares([2], 5) == (0.0, {"2": 1.0})


# on models


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 200), st.integers(0, 9))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_tokens_are_picked_once_in_order_and_over_all_responses(lengths, size, seed):
    found = pick_tokens(lengths, size, seed)
    assert found == pick_tokens(lengths, size, seed)
    assert list(found) == sorted(found)
    for response, places in found.items():
        assert places == sorted(set(places))
        assert places[0] >= 0
        assert places[-1] < lengths[response]
    taken = sum(map(len, found.values()))
    assert taken <= min(size, sum(lengths))
    if len(lengths) <= 32:
        assert taken == min(size, sum(lengths))


def test_the_sample_is_a_small_share_of_many_tokens():
    assert sample_size(50) == 50
    assert sample_size(1000) == 128
    assert sample_size(4800) == 300
    assert sample_size(10**6) == 512


@pytest.fixture(scope="module")
def chosen():
    model, responses = tiny_model("llama", spread=3.0), rows(9, 4, 12)
    analysis = analyze_rollouts(model, responses)
    return model, responses, analysis, choose_layer(model, responses, analysis, tokens=25, draws=50)


def test_every_reading_is_the_policy_it_names(chosen):
    """With all tokens in the sample: entropies of Eq. 5, and through the final norm, as the model itself makes them."""
    model, responses, analysis, block = chosen
    assert (block["tokens"], block["responses"]) == (25, 3)
    torch.testing.assert_close(
        torch.tensor(block["curves"]["raw"]["entropy"]),
        torch.tensor(analysis["sites"]["layer_out"]),
        rtol=1e-4,
        atol=2e-5,
    )

    def policies():
        logits = [
            model(torch.tensor([[*r.prompt_ids, *r.response_ids][:-1]])).logits[0, len(r.prompt_ids) - 1 :]
            for r in responses
        ]
        return Categorical(logits=torch.cat(logits).double())

    with torch.no_grad():
        final = policies()
        for layer in range(1, 5):
            with internal_policy(model, layer, norm=True):
                through = policies()
            norm = {kind: values[layer - 1] for kind, values in block["curves"]["norm"].items()}
            assert norm["entropy"] == pytest.approx(through.entropy().mean().item(), rel=1e-4, abs=2e-5)
            assert norm["kl"] == pytest.approx(kl_divergence(final, through).mean().item(), rel=1e-3, abs=1e-4)
            same = (through.probs.argmax(-1) == final.probs.argmax(-1)).double().mean()
            assert norm["top1"] == pytest.approx(same.item(), abs=1e-6)


def test_the_last_layer_through_the_final_norm_is_the_final_policy(chosen):
    curves, analysis = chosen[3]["curves"], chosen[2]
    assert curves["norm"]["kl"][-1] == pytest.approx(0, abs=1e-4)
    assert curves["norm"]["top1"][-1] == 1
    assert curves["norm"]["entropy"][-1] == pytest.approx(analysis["final_entropy"], abs=1e-4)
    assert curves["norm_fitted"]["recovered"][-1] == pytest.approx(1, abs=1e-4)
    assert curves["norm_fitted"]["temperature"][-1] == pytest.approx(1, abs=2e-3)
    for plain, fitted in (("raw", "fitted"), ("norm", "norm_fitted")):
        assert curves[plain]["top1"] == curves[fitted]["top1"]
        assert all(b <= a + 1e-5 for a, b in zip(curves[plain]["kl"], curves[fitted]["kl"], strict=True))


def test_the_block_is_strict_json_seeded_and_its_shares_sum_to_one(chosen):
    model, responses, analysis, block = chosen
    assert json.loads(json.dumps(block, allow_nan=False)) == block
    assert block == choose_layer(model, responses, analysis, tokens=25, draws=50)
    for found in (block["recommendation"], *block["criteria"]):
        assert found["share"] + sum(found["other"].values()) == pytest.approx(1, abs=1e-3)
        assert found["reason"]
    assert [c["name"] for c in block["criteria"]] == ["boundary", "norm_entropy", "fitted_entropy", "knee"]
    assert block["criteria"][0]["layer"] == analysis["boundary_layer"]
    fewer = choose_layer(model, responses, analysis, tokens=8, draws=5, seed=3)
    assert fewer["tokens"] == 8
    assert fewer["curves"] != choose_layer(model, responses, analysis, tokens=8, draws=5, seed=4)["curves"]


def test_one_response_of_one_token_gives_a_block():
    model, responses = tiny_model("qwen2"), rows(1)
    block = choose_layer(model, responses, analyze_rollouts(model, responses), draws=5)
    assert block["tokens"] == 1
    assert "single response" in block["bootstrap"]


@pytest.mark.parametrize("family", ["gemma2", "cohere", "gpt2", "falcon"])
def test_softcap_logit_scale_biased_norms_and_tied_embeddings(family):
    from tests.support.zoo import ZOO, zoo_model

    name = next(entry.name for entry in ZOO if entry.family == family)
    model, responses = zoo_model(name), rows(6, 5)
    block = choose_layer(model, responses, analyze_rollouts(model, responses), tokens=11, draws=5)
    assert block["curves"]["norm"]["kl"][-1] == pytest.approx(0, abs=2e-4)
    assert block["curves"]["norm"]["top1"][-1] == 1


def test_a_rule_names_its_layer(chosen):
    analysis = {**chosen[2], "boundary_layer": 3, "boundary_reason": "signs"}
    assert chosen_layer(analysis, "boundary") == (3, "signs")
    with pytest.raises(InputError, match="--no-choice"):
        chosen_layer(analysis, "recommended")
    found = {**analysis, "layer_choice": {"recommendation": {"layer": None, "reason": "no knee"}}}
    assert chosen_layer(found, "recommended") == (None, "no knee")
