"""Agreement with the output against its definition, the knee on curves with a known answer, the block it makes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from bupo import internal_policy
from bupo.lens import agreement
from bupo.lens.agreement import Candidate, choose_layer, find_knee, knee_gradient, recommend
from bupo.lens.analyze import AnalysisOptions, analyze_rollouts
from tests.support.lens import pairs
from tests.support.tiny import tiny_model
from tests.support.zoo import zoo_model


def broken(layers: int, knee: float, low: float = 0.002, high: float = 0.08) -> list[float]:
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


def test_the_knee_moves_with_the_curve_as_its_gradient_says():
    curve, moved = (torch.tensor(broken(12, k), dtype=torch.float64) for k in (6, 6.2))
    assert (knee_gradient(curve, 6) @ (moved - curve)).item() == pytest.approx(0.2, abs=0.03)


def test_the_recommendation_is_the_papers_rule_then_the_knee_then_none():
    yes, no = Candidate(4, "because"), Candidate(None, "because not")
    knee = Candidate(7, "turns")
    found = [recommend(a, b) for a, b in ((yes, knee), (no, knee), (no, no))]
    assert [(f["layer"], f["criterion"]) for f in found] == [(4, "boundary"), (7, "knee"), (None, None)]
    assert "not tried in training" in found[1]["reason"]


@pytest.mark.parametrize(("analysed", "sampled"), [(50, 128), (1000, 128), (4800, 300), (10**6, 512)])
def test_the_sample_is_a_small_share_of_many_tokens(monkeypatch, analysed, sampled):
    asked = []
    monkeypatch.setattr(agreement, "subsample", lambda n, tokens, *_, **__: asked.append(tokens) or [[0], *[[]] * 2])
    model, responses = tiny_model(), pairs([(3, 9), (3, 4), (3, 12)])
    choose_layer(model, responses, {"tokens": analysed, "boundary_layer": None, "boundary_reason": "none"})
    assert asked == [sampled]


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

    def policies():
        logits = [
            model(torch.tensor([[*r.prompt_ids, *r.response_ids][:-1]])).logits[0, len(r.prompt_ids) - 1 :]
            for r in responses
        ]
        return Categorical(logits=torch.cat(logits).double())

    with torch.no_grad():
        final = policies()
        uniform = math.log(97) - final.entropy().mean()
        for layer in range(1, 5):
            for lens in ("raw", "norm"):
                with internal_policy(model, layer, norm=lens == "norm"):
                    through = policies()
                curve = {kind: values[layer - 1] for kind, values in block["curves"][lens].items()}
                kl = kl_divergence(final, through).mean().item()
                same = (through.probs.argmax(-1) == final.probs.argmax(-1)).double().mean()
                assert curve["entropy"] == pytest.approx(through.entropy().mean().item(), rel=1e-4, abs=2e-5)
                assert curve["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-4)
                assert curve["top1"] == pytest.approx(same.item(), abs=1e-6)
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
    assert {lens: set(kinds) for lens, kinds in block["curves"].items()} == {
        lens: set(kinds) for lens, kinds in block["standard_errors"].items()
    }
    fewer = [choose_layer(model, responses, analysis, tokens=8, seed=seed) for seed in (3, 4)]
    assert fewer[0]["tokens"] == 8
    assert fewer[0]["curves"] != fewer[1]["curves"]


def test_the_knee_has_a_standard_error_clustered_by_response(chosen, monkeypatch):
    model, responses, analysis, _ = chosen
    monkeypatch.setattr("bupo.lens.agreement.find_knee", lambda curve: Candidate(2, "turns"))
    knee = choose_layer(model, responses, analysis, tokens=25)["criteria"][1]
    assert knee["layer"] == 2
    assert knee["standard_error"] > 0


def test_one_token_gives_a_block_without_errors():
    model, responses = tiny_model("qwen2"), pairs([(3, 1)])
    block = choose_layer(model, responses, analyze_rollouts(model, responses))
    assert block["tokens"] == 1
    assert set(block["standard_errors"]["norm"]["kl"]) == {None}


@pytest.mark.parametrize("family", ["gemma2", "cohere", "gpt2", "falcon"])
def test_the_last_layer_through_the_final_norm_is_the_output(family):
    """With soft-capping, a logit scale, biased norms and tied embeddings."""
    model = zoo_model(family)
    responses = pairs([(3, 6), (3, 5)])
    block = choose_layer(model, responses, analyze_rollouts(model, responses), tokens=11)
    assert block["curves"]["norm"]["kl"][-1] == pytest.approx(0, abs=2e-4)
    assert block["curves"]["norm"]["top1"][-1] == 1
    assert block["curves"]["norm"]["recovered"][-1] == pytest.approx(1, abs=1e-3)
