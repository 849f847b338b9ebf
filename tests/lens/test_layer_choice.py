"""The boundary rule on the paper's patterns, the knee on curves with a known answer, agreement by its definition."""

import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from bupo import internal_policy
from bupo.lens import layer_choice
from bupo.lens.analyze import AnalysisOptions, analyze_rollouts
from bupo.lens.layer_choice import Candidate, choose_layer, find_boundary, find_knee, knee_gradient, recommend
from tests.support.lens import pairs
from tests.support.tiny import tiny_model
from tests.support.zoo import zoo_model

FALLING = [-0.5, -0.8, -1.1, -0.9, -1.4, -2.0, -2.2, -1.8, -3.0, -2.5]
QWEN3_4B = [0.8, 1.2, 0.9, 1.5, 0.7, 0.6, *[0.05, -0.04] * 10, *FALLING]
LLAMA_28 = [*[0.1, 0.08, 0.12, 0.05] * 6, 0.07, 0.06, -2.5, -4.0]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (QWEN3_4B, [[1, 6], [7, 26], [27, 36]]),
        (LLAMA_28, [[1, 26], None, [27, 28]]),
        ([*LLAMA_28[:12], -0.03, *LLAMA_28[13:]], [[1, 26], None, [27, 28]]),  # a weak exception
    ],
    ids=["qwen3", "llama", "exception"],
)
def test_the_papers_patterns_have_their_regions_at_any_scale(change, expected, scale):
    change = [c * scale for c in change]
    (layer, reason), regions = find_boundary(change, [0.005 * scale] * len(change))
    assert (layer, list(regions.values())) == (expected[0][1], expected)
    assert ("abrupt" in reason) == (expected[1] is None)
    assert find_boundary(change, [math.nan] * len(change)) == find_boundary(change)  # unknown errors count as none


@pytest.mark.parametrize(
    ("change", "errors", "words"),
    [
        ([-1.8, -10.4, -3.0], [0.1] * 3, "negative in every layer (1 to 3)"),
        ([0.07, 2.0, 10.6], [0.01] * 3, "positive in every layer (1 to 3)"),
        ([-1.0, 2.0, -2.0, 1.0, -1.0, 2.0, -1.5, 2.0, -1.0, 1.0], None, "4 positive, 5 negative, 6 positive, ..."),
        ([0.5, 0.02, -3.0, -2.0], [0.5, 0.1, 0.1, 0.1], "no exploration region"),
        ([0.5, 0.02, -0.1, -0.2], [0.1, 0.1, 0.1, 0.2], "no convergence region"),
        ([-0.5, -0.2, -0.1, 2.0], None, "only the last layer is positive: 1 to 3 negative, 4 positive"),
    ],
    ids=["negative", "positive", "disorder", "noise", "no fall", "last"],
)
def test_other_patterns_have_no_boundary_and_say_why(change, errors, words):
    (layer, reason), _ = find_boundary(change, errors)
    assert (layer, words in reason) == (None, True)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40))
def test_what_it_returns_is_consistent(change):
    (layer, reason), regions = find_boundary(change)
    assert 0 < len(reason) < 400
    if layer is not None:
        assert change[layer - 1] > 0
        covered = [region for region in regions.values() if region is not None]
        assert (covered[0], covered[-1][1]) == ([1, layer], len(change))
        assert all(a[1] + 1 == b[0] for a, b in pairwise(covered))


def broken(layers: int, knee: float, low: float = 0.002, high: float = 0.08) -> list[float]:
    return [0.2 + low * min(i, knee) + high * max(0, i - knee) for i in range(1, layers + 1)]


def test_the_knee_is_where_two_lines_meet_and_moves_with_the_curve():
    for layers, knee in ((n, knee) for n in (6, 12, 28) for knee in range(2, n - 1)):
        assert find_knee(broken(layers, knee)).layer == knee
    curve, moved = (torch.tensor(broken(12, k), dtype=torch.float64) for k in (6, 6.2))
    assert (knee_gradient(curve, 6) @ (moved - curve)).item() == pytest.approx(0.2, abs=0.03)


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
)
def test_a_curve_without_a_knee_has_none_and_says_why(curve):
    layer, reason = find_knee(curve)
    assert (layer, bool(reason)) == (None, True)


def test_the_recommendation_is_the_papers_rule_then_the_knee_then_none():
    yes, no, knee = Candidate(4, "because"), Candidate(None, "because not"), Candidate(7, "turns")
    found = [recommend(a, b) for a, b in ((yes, knee), (no, knee), (no, no))]
    assert [(f["layer"], f["criterion"]) for f in found] == [(4, "boundary"), (7, "knee"), (None, None)]
    assert "not tried in training" in found[1]["reason"]


@pytest.fixture(scope="module")
def chosen():
    model, responses = tiny_model("llama", spread=3.0), pairs([(3, 9), (3, 4), (3, 12)])
    analysis = analyze_rollouts(model, responses)
    return model, responses, analysis, choose_layer(model, responses, analysis, tokens=25)


def test_every_curve_is_its_definition(chosen):
    model, responses, analysis, block = chosen
    assert (block["tokens"], block["responses"]) == (25, 3)  # all of them
    raw = torch.tensor(block["curves"]["raw"]["entropy"])
    torch.testing.assert_close(raw, torch.tensor(analysis["sites"]["layer_out"]), rtol=1e-4, atol=2e-5)

    def policies():  # every prompt has three tokens
        logits = [model(torch.tensor([[*r.prompt_ids, *r.response_ids][:-1]])).logits[0, 2:] for r in responses]
        return Categorical(logits=torch.cat(logits).double())

    with torch.no_grad():
        final = policies()
        uniform = math.log(97) - final.entropy().mean()
        for layer in range(1, 5):
            for lens in ("raw", "norm"):
                with internal_policy(model, layer, lens=lens):
                    through = policies()
                curve = {kind: values[layer - 1] for kind, values in block["curves"][lens].items()}
                kl = kl_divergence(final, through).mean().item()
                same = (through.probs.argmax(-1) == final.probs.argmax(-1)).double().mean().item()
                assert curve["entropy"] == pytest.approx(through.entropy().mean().item(), rel=1e-4, abs=2e-5)
                assert (curve["kl"], curve["top1"]) == pytest.approx((kl, same), rel=1e-3, abs=1e-4)
            assert curve["recovered"] == pytest.approx(1 - kl / uniform.item(), rel=1e-3, abs=1e-4)


def test_the_block_is_strict_json_and_seeded(chosen):
    model, responses, analysis, block = chosen
    assert json.loads(json.dumps(block, allow_nan=False)) == block
    assert block == choose_layer(model, responses, analysis, tokens=25)
    options = AnalysisOptions(layer_choice=True, choice_tokens=25)
    assert analyze_rollouts(model, responses, options=options) == {**analysis, "layer_choice": block}
    assert set(block["recommendation"]) == {"layer", "criterion", "reason"}
    assert [c["name"] for c in block["criteria"]] == ["boundary", "knee"]
    assert block["criteria"][0]["layer"] == analysis["boundary_layer"]
    named = [{lens: set(kinds) for lens, kinds in block[key].items()} for key in ("curves", "standard_errors")]
    assert named[0] == named[1]
    fewer = [choose_layer(model, responses, analysis, tokens=8, seed=seed) for seed in (3, 4)]
    assert (fewer[0]["tokens"], fewer[0]["curves"] == fewer[1]["curves"]) == (8, False)


@pytest.mark.parametrize(("analysed", "sampled"), [(50, 128), (1000, 128), (4800, 300), (10**6, 512)])
def test_the_sample_is_a_small_share_of_many_tokens_and_the_knee_has_an_error(chosen, monkeypatch, analysed, sampled):
    model, responses, analysis, block = chosen
    asked, draw = [], layer_choice.subsample
    monkeypatch.setattr(layer_choice, "subsample", lambda n, size, *a, **k: asked.append(size) or draw(n, 25, *a, **k))
    monkeypatch.setattr(layer_choice, "find_knee", lambda curve: Candidate(2, "turns"))
    found = choose_layer(model, responses, {**analysis, "tokens": analysed})
    assert (asked, found["curves"]) == ([sampled], block["curves"])
    assert (found["criteria"][1]["layer"], found["criteria"][1]["standard_error"] > 0) == (2, True)


def test_one_token_gives_a_block_without_errors():
    options = AnalysisOptions(layer_choice=True)
    block = analyze_rollouts(tiny_model("qwen2"), pairs([(3, 1)]), options=options)["layer_choice"]
    assert (block["tokens"], set(block["standard_errors"]["norm"]["kl"])) == (1, {None})


@pytest.mark.parametrize("family", ["gemma2", "cohere", "gpt2", "falcon"])
def test_the_last_layer_through_the_final_norm_is_the_output(family):
    """With soft-capping, a logit scale, biased norms and tied embeddings."""
    model, responses = zoo_model(family), pairs([(3, 6), (3, 5)])
    curves = choose_layer(model, responses, analyze_rollouts(model, responses), tokens=11)["curves"]["norm"]
    last = [curves[kind][-1] for kind in ("kl", "top1", "recovered")]
    assert last == pytest.approx([0, 1, 1], abs=2e-4)
