"""The analysis against a plain recomputation that keeps everything, and its refusals."""

import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.distributions import Categorical

from bupo import internal_policy
from bupo.errors import InputError
from bupo.lens import analyze
from bupo.lens.analyze import SITES, AnalysisOptions, analyze_rollouts
from bupo.lens.tokens import explore_rollouts
from bupo.models.load import load_model
from bupo.models.residual import find_residual_writes
from tests.support.lens import pairs
from tests.support.tiny import LAYOUTS, tiny_model
from tests.support.zoo_checks import stream


@torch.no_grad()
def plain(model, responses):
    """Every activation kept, every projection made whole, token by token: the definitions, written out."""
    rows = {key: [] for key in (*SITES, "cos_attn", "cos_ffn", "final")}
    for response in responses:
        ids = torch.tensor([[*response.prompt_ids, *response.response_ids]])
        states, at = stream(model, ids, find_residual_writes(model)), slice(len(response.prompt_ids) - 1, -1)
        inputs = [model.model.embed_tokens(ids), *states["layer"][:-1]]
        found = {key: [] for key in rows}
        for layer, before, a, f in zip(model.model.layers, inputs, states["attn"], states["ffn"], strict=True):
            normed = (layer.input_layernorm(before), layer.post_attention_layernorm(before + a))
            for site, state in zip(SITES, (normed[0], a, normed[1], f, before, before + a + f), strict=True):
                found[site].append(Categorical(logits=model.lm_head(state)[0, at].double()).entropy())
            found["cos_attn"].append(torch.cosine_similarity(a, before, dim=-1)[0, at].double())
            found["cos_ffn"].append(torch.cosine_similarity(f, before + a, dim=-1)[0, at].double())
        found["final"].append(Categorical(logits=model(ids).logits[0, at].double()).entropy())
        for key, values in found.items():
            rows[key].append(torch.stack(values))
    return {key: torch.cat(value, dim=1).mean(1) for key, value in rows.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("batch_tokens", "group_bytes"), [(1, 1), (30, 40_000), (1000, 2**28)])
def test_equals_the_plain_procedure(monkeypatch, layout, tied, batch_tokens, group_bytes):
    monkeypatch.setattr(analyze, "_STATES_BYTES", group_bytes)
    model, responses = tiny_model(layout, tie_word_embeddings=tied), pairs()
    result = analyze_rollouts(model, responses, batch_tokens=batch_tokens)
    expected = plain(model, responses)

    def check(got, want, atol):
        torch.testing.assert_close(torch.tensor(got).double(), want, rtol=1e-4, atol=atol)

    for site in SITES:
        check(result["sites"][site], expected[site], 1e-4)
    for name in ("attn", "ffn"):
        check(result["entropy_change"][name], expected[f"{name}_out"] - expected[f"{name}_in"], 2e-4)
        check(result["residual_cosine"][name], expected[f"cos_{name}"], 1e-5)
    assert result["final_entropy"] == pytest.approx(expected["final"].item(), abs=1e-4)
    assert result["tokens"] == sum(len(r.response_ids) for r in responses)


def test_the_schema_and_unknown_standard_errors():
    result = analyze_rollouts(tiny_model(), pairs(), options=AnalysisOptions(name="tiny"))
    expected = {"schema": 1, "model": "tiny", "layers": 4, "samples": 4, "dtype": "float32"}
    assert {key: result[key] for key in expected} == expected
    for group in ("sites", "standard_errors"):
        assert {site: len(values) for site, values in result[group].items()} == dict.fromkeys(SITES, 4)
    assert set(result["entropy_change"]) == {*result["residual_cosine"], "layer"} == {"attn", "ffn", "layer"}
    assert set(result["regions"]) == {"exploration", "integration", "convergence"}
    assert result["sites"]["layer_in"][1:] == result["sites"]["layer_out"][:-1]
    assert all(0 <= h <= math.log(97) for site in result["sites"].values() for h in site)
    assert all(-1 <= c <= 1 for v in result["residual_cosine"].values() for c in v)
    assert result["boundary_reason"]
    single = analyze_rollouts(tiny_model(), pairs(), statistics=["kl"], max_tokens=1)
    assert (single["tokens"], single["samples"]) == (1, 1)
    assert single["final_entropy_standard_error"] is None
    for key in ("standard_errors", "entropy_change_standard_errors", "residual_cosine_standard_errors"):
        assert all(errors == [None] * 4 for errors in single[key].values()), key
    assert single["statistics_standard_errors"]["kl"]["layer_out"] == [None] * 4
    assert all(json.loads(json.dumps(one, allow_nan=False)) == one for one in (result, single))


def test_training_mode_is_restored_and_dropout_does_not_act():
    model = tiny_model("qwen3", attention_dropout=0.5).train()
    model.model.layers[0].eval()  # its owner may hold a part in another mode
    before = [module.training for module in model.modules()]
    assert analyze_rollouts(model, pairs()) == analyze_rollouts(model, pairs())
    assert [module.training for module in model.modules()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.layers.modules())


def test_refusals():
    with pytest.raises(InputError, match="max_tokens must be at least 1, not 0"):
        analyze_rollouts(tiny_model(), pairs(), max_tokens=0)
    model = tiny_model()
    with internal_policy(model, 2, "ffn"), pytest.raises(InputError, match=r"inside internal_policy\(model, 2\)"):
        analyze_rollouts(model, pairs())
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="non-finite"):
        analyze_rollouts(model, pairs())


def test_bfloat16_model_is_close_to_float32():
    exact, rounded = (analyze_rollouts(tiny_model(spread=3.0).to(d), pairs()) for d in (torch.float32, torch.bfloat16))
    assert rounded["dtype"] == "bfloat16"
    assert all(rounded["sites"][site] == pytest.approx(exact["sites"][site], abs=0.1) for site in SITES)


def test_statistics_are_those_of_single_tokens_which_are_handed_out_once():
    places = []

    def on_tokens(batch, stats):
        places.extend(zip(batch.places.tolist(), batch.targets.tolist(), strict=True))
        assert stats["entropy"].shape == (6, 4, len(batch.targets))

    model, responses, names = tiny_model(spread=3.0), pairs(), ["logprob", "rank", "kl", "varentropy", "top2", "top5"]
    options = AnalysisOptions(on_tokens=on_tokens)
    result = analyze_rollouts(model, responses, statistics=names, batch_tokens=20, options=options)
    every = [([i, t], token) for i, r in enumerate(responses, 1) for t, token in enumerate(r.response_ids, 1)]
    assert sorted(places) == every
    tokens = explore_rollouts(model, responses, str)["samples"]
    for name, layer in product(("logprob", "rank", "kl"), range(4)):
        values = [value for sample in tokens for value in sample[name][layer]]
        assert result["statistics"][name]["layer_out"][layer] == pytest.approx(sum(values) / len(values), abs=2e-3)
    for k in (2, 5):
        mass = [sum(share for _, share in cell[:k]) for sample in tokens for cell in sample["top"][2]]
        got = result["statistics"][f"top{k}_mass"]["layer_out"][2]
        assert got == pytest.approx(sum(mass) / len(mass), abs=1e-3)
    whole = analyze_rollouts(model, responses, batch_tokens=20)
    assert {k: v for k, v in result.items() if not k.startswith("statistics")} == whole


LONG = pairs([(3, 60 + 5 * i) for i in range(12)])


def test_some_tokens_give_nearly_the_same_means():
    model, responses = tiny_model(spread=3.0), LONG
    whole = analyze_rollouts(model, responses)
    every = analyze_rollouts(model, responses, max_tokens=10**6)
    assert every == {**whole, "sampling": {**every["sampling"], "tokens_used": whole["tokens"]}}
    part = analyze_rollouts(model, responses, max_tokens=400, seed=1)
    assert part["sampling"] == {"max_tokens": 400, "tokens_used": 400, "tokens_of_responses": whole["tokens"]}
    for site in SITES:
        rows = zip(part["sites"][site], whole["sites"][site], part["standard_errors"][site], strict=True)
        assert all(abs(got - want) <= 4 * error + 1e-6 for got, want, error in rows)
    assert part["sites"] != whole["sites"]
    assert part != analyze_rollouts(model, responses, max_tokens=400, seed=2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_smollm2_reproduces_the_reference(shared_data):
    """The acceptance check on a real model; needs `make smollm2`."""
    folder = Path(__file__).parent.parent.parent / "models" / "smollm2"
    if not (folder / "model.safetensors").exists():
        pytest.skip("models/smollm2 is absent (make smollm2)")
    reference = json.loads((shared_data / "smollm2_reference_entropy.json").read_text())
    lines = (shared_data / "smollm2_math500_responses.jsonl").read_text().splitlines()[:4]
    model, _ = load_model(str(folder), dtype="float32")
    result = analyze_rollouts(model, [json.loads(line) for line in lines])
    assert result["tokens"] == reference["tokens"]
    for site in SITES:
        for got, want in zip(result["sites"][site], reference[site], strict=True):
            assert abs(got - want) <= max(0.02, 0.01 * abs(want)) * 0.1  # ten times closer than asked
    assert result["boundary_layer"] is None
    assert "negative in every layer" in result["boundary_reason"]
