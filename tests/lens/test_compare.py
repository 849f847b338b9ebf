"""Comparing states of a model: definitions, paired changes, refusals."""

import json
import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from bupo.errors import InputError
from bupo.lens.batching import subsample_evenly
from bupo.lens.compare import compare_models, measure_layers
from tests.support.lens import moved, pairs
from tests.support.tiny import tiny_model
from tests.support.zoo_checks import stream


@torch.no_grad()
def plain(model, rollouts, layer):
    """Every quantity by its definition, response by response."""
    rows = {"logprob": [], "entropy": [], "divergence": [], "cosine": []}
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
        at = slice(len(rollout.prompt_ids) - 1, ids.shape[1] - 1)
        states = [s[0, at] for s in stream(model, ids)["layer"]]
        policies = [Categorical(logits=model.lm_head(s).double()) for s in states]
        policies.append(Categorical(logits=model(ids).logits[0, at].double()))
        rows["logprob"].append(policies[-1].log_prob(torch.tensor(rollout.response_ids)))
        rows["entropy"].append(torch.stack([p.entropy() for p in policies[:-1]]))
        chosen = policies[layer - 1]
        rows["divergence"].append(torch.stack([kl_divergence(chosen, p) for p in policies[layer:]]))
        cosines = [torch.stack([torch.cosine_similarity(a, b, dim=-1) for b in states]) for a in states]
        rows["cosine"].append(torch.stack(cosines).double())
    return {name: torch.cat(values, -1).mean(-1) for name, values in rows.items()}


def test_different_vocabularies_are_refused():
    measured = [(name, measure_layers(tiny_model(vocab_size=n), pairs(), 2)) for name, n in (("a", 97), ("b", 98))]
    with pytest.raises(InputError, match="vocabularies differ: a has 97 tokens and b has 98"):
        compare_models(measured)


@pytest.mark.parametrize("layer", [1, 2, 4])
def test_every_quantity_is_its_definition(monkeypatch, layer):
    monkeypatch.setattr("bupo.lens.compare._BATCH_TOKENS", 20)
    model, rollouts = tiny_model(spread=3.0), pairs()
    result = compare_models([("a", measure_layers(model, rollouts, layer))])
    (found,), want = result["models"], plain(model, rollouts, layer)
    assert found["perplexity"]["value"] == pytest.approx(math.exp(-want["logprob"]), rel=1e-3)
    got = {"entropy": found["entropy"]["mean"], "divergence": found["divergence"]["mean"], "cosine": found["cosine"]}
    for name, values in got.items():
        torch.testing.assert_close(torch.tensor(values).double(), want[name], rtol=1e-3, atol=1e-3)
    assert found["cosine_of_layer"]["mean"] == pytest.approx(found["cosine"][layer - 1], abs=1e-4)
    json.dumps(result, allow_nan=False)


def test_changes_are_paired_by_token():
    model, rollouts = tiny_model(spread=3.0), pairs([(3, 20), (6, 25), (1, 30)])
    readings = [("a", measure_layers(model, rollouts, 2)), ("b", measure_layers(moved(model), rollouts, 2))]
    one, two = compare_models(readings)["models"]
    change = two["change"]
    assert "change" not in one
    for name in ("entropy", "divergence", "cosine_of_layer"):
        for index, value in enumerate(change[name]["mean"]):
            assert value == pytest.approx(two[name]["mean"][index] - one[name]["mean"][index], abs=3e-6)
    ratio = two["perplexity"]["value"] / one["perplexity"]["value"]
    assert change["perplexity_ratio"]["value"] == pytest.approx(ratio, rel=1e-4)
    entropy = change["entropy"]  # the first layer is the same, at every token
    assert entropy["mean"][0] == entropy["standard_error"][0] == 0.0 != entropy["mean"][1]
    same = compare_models([readings[0], ("again", readings[0][1])])["models"][1]["change"]
    assert set(same["divergence"]["mean"]) == {0.0}


def test_the_same_tokens_are_drawn_for_every_model():
    part, again = (measure_layers(tiny_model(), pairs([(3, 40), (6, 25)]), 2, tokens=20, seed=4) for _ in range(2))
    assert part.counts == [len(t) for t in subsample_evenly([40, 25], 20, 4)]
    assert part.values.shape[1] == sum(part.counts) < 25
    assert torch.equal(part.values, again.values)


def test_other_depths_are_refused():
    rollouts = pairs()
    models = {"a": tiny_model(), "b": tiny_model(num_hidden_layers=3)}
    readings = [(name, measure_layers(model, rollouts, 2)) for name, model in models.items()]
    with pytest.raises(InputError, match="a has 4 layers and b has 3"):
        compare_models(readings)
