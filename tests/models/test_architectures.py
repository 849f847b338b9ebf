"""Every family of the zoo: residual writes, internal policies, decoding, analysis, and the errors of those refused."""

import functools

import pytest
import torch

from bupo import internal_policy
from bupo.data.rollouts import Rollout
from bupo.errors import InputError
from bupo.lens.analyze import analyze_rollouts
from bupo.models.residual import find_residual_writes
from tests.support.tiny import tokens
from tests.support.zoo import BY_NAME, ZOO, zoo_model
from tests.support.zoo_checks import decodes_alike, read, read_all, stream

WHOLE = [m.name for m in ZOO if m.refused is None]
LAYER_ONLY = [m.name for m in ZOO if m.refused is not None and not m.unreadable]
UNREADABLE = [m.name for m in ZOO if m.unreadable]
ROLLOUTS = [Rollout([5, 6, 7], [8, 9, 10, 11]), Rollout([5, 6], [8, 90, 10])]
# parallel and sequential, post-norms, soft-capping, logit scale, residual multipliers, bias, three contributions,
# a norm used twice, the sum computed inside a submodule, a logit multiplier
RECOMPUTED = ["qwen3_next", "gemma2", "cohere2", "granitemoehybrid", "phi", "falcon", "falcon_h1", "nanochat", "bloom"]
RECOMPUTED += ["hyperclovax"]
model_of = functools.cache(zoo_model)


@pytest.mark.parametrize("name", WHOLE)
def test_layers_add_what_the_probe_finds(name):
    writes = find_residual_writes(model_of(name))
    assert len(writes) == 4
    assert max(layer.deviation for layer in writes) < 1e-6
    assert (str(writes[0].attn), str(writes[0].ffn)) == BY_NAME[name].writes


@pytest.mark.parametrize("name", WHOLE + LAYER_ONLY)
def test_internal_policies_equal_an_independent_reading(name):
    model, ids = model_of(name), tokens(2, 7)

    def condition():
        return [(set(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    with torch.no_grad():
        before, logits = condition(), model(input_ids=ids, use_cache=False).logits
        deviation, wrong_layers = read_all(model, ids, ("layer", "attn", "ffn") if name in WHOLE else ("layer",))
        assert deviation < 1e-5
        assert wrong_layers == []
        assert condition() == before
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)


@pytest.mark.parametrize("name", [name for name in WHOLE + LAYER_ONLY if BY_NAME[name].generates])
@pytest.mark.parametrize("layer", [1, 3])
def test_decoding_with_a_cache_equals_decoding_without(name, layer):
    with internal_policy(model_of(name), layer) as model:
        assert decodes_alike(model, tokens(2, 5), 4)


@pytest.mark.parametrize("name", WHOLE)
def test_analysis_runs(name):
    result = analyze_rollouts(model_of(name), ROLLOUTS)
    assert result["layers"] == 4
    assert result["tokens"] == 7
    if name in RECOMPUTED:
        assert_entropies(model_of(name), result)


def assert_entropies(model, result):
    """Means over response tokens of the entropies of an independent reading's logits, sites that are contributions."""
    writes = find_residual_writes(model)
    sums = {site: torch.zeros(4, dtype=torch.float64) for site in ("layer", "attn", "ffn")}
    for rollout in ROLLOUTS:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        with torch.no_grad():
            states = stream(model, ids, writes)
        for site in sums:
            for layer, logits in enumerate(read(model, ids, states[site])):
                chosen = logits[0, len(rollout.prompt_ids) - 1 : -1].double().log_softmax(-1)
                sums[site][layer] += -(chosen.exp() * chosen).sum()
    for site, key in (("layer", "layer_out"), ("attn", "attn_out"), ("ffn", "ffn_out")):
        got = torch.tensor(result["sites"][key], dtype=torch.float64)
        torch.testing.assert_close(got, sums[site] / 7, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYER_ONLY + UNREADABLE)
def test_layouts_without_two_contributions_are_refused(name):
    model, words = model_of(name), BY_NAME[name].refused
    with pytest.raises(InputError, match=words), internal_policy(model, 1, "ffn"):
        pass
    with pytest.raises(InputError, match=words if name in LAYER_ONLY else "cannot be read"):
        analyze_rollouts(model, ROLLOUTS)
    for lens in ("raw", "norm") if name in UNREADABLE else ():
        with (
            pytest.raises(InputError, match="what layer 2 returns does not reach"),
            internal_policy(model, 2, lens=lens),
        ):
            model(input_ids=tokens(), use_cache=False)


@pytest.mark.parametrize("name", ["granite", "gemma2", "granitemoeshared", "falcon"])
def test_the_probe_works_in_bfloat16(name):
    writes = find_residual_writes(zoo_model(name).bfloat16())
    assert (str(writes[0].attn), str(writes[0].ffn)) == BY_NAME[name].writes
    assert max(layer.deviation for layer in writes) < 2e-2
