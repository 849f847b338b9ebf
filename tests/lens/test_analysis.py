"""The analysis against a plain recomputation that keeps everything, and its refusals."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.distributions import Categorical

from bupo.errors import InputError
from bupo.lens.analyze import SITES, analyze_rollouts, batches
from bupo.models.load import load_model
from tests.models.test_early_exit import stream
from tests.support.tiny import LAYOUTS, tiny_model


@dataclass
class Pair:
    prompt_ids: list[int]
    response_ids: list[int]


def pairs(lengths=((3, 5), (6, 2), (1, 9), (4, 1)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Pair(*(torch.randint(3, 97, (n,), generator=generator).tolist() for n in pair)) for pair in lengths]


@torch.no_grad()
def plain(model, rollouts):
    """Every activation kept, every projection made whole, token by token: the definitions, written out."""
    rows = {key: [] for key in (*SITES, "cos_attn", "cos_ffn", "final")}
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
        states = stream(model, ids)
        inputs = [model.model.embed_tokens(ids), *states["layer"]]
        at = slice(len(rollout.prompt_ids) - 1, ids.shape[1] - 1)
        per = {key: [] for key in rows}
        for index, layer in enumerate(model.model.layers):
            before, a, f = inputs[index], states["attn"][index], states["ffn"][index]
            site = {
                "attn_in": layer.input_layernorm(before),
                "attn_out": a,
                "ffn_in": layer.post_attention_layernorm(before + a),
                "ffn_out": f,
                "layer_in": before,
                "layer_out": before + a + f,
            }
            for name, state in site.items():
                per[name].append(Categorical(logits=model.lm_head(state)[0, at].double()).entropy())
            per["cos_attn"].append(torch.cosine_similarity(a, before, dim=-1)[0, at].double())
            per["cos_ffn"].append(torch.cosine_similarity(f, before + a, dim=-1)[0, at].double())
        per["final"].append(Categorical(logits=model(ids).logits[0, at].double()).entropy())
        for key in rows:
            rows[key].append(torch.stack(per[key]))
    return {key: torch.cat(value, dim=1).mean(1) for key, value in rows.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("batch_tokens", "group"), [(1, 1), (30, 3), (1000, 9)])
def test_equals_the_plain_procedure(layout, tied, batch_tokens, group):
    model, rollouts = tiny_model(layout, tie_word_embeddings=tied), pairs()
    result = analyze_rollouts(model, rollouts, batch_tokens=batch_tokens, group=group)
    expected = plain(model, rollouts)
    for site in SITES:
        torch.testing.assert_close(
            torch.tensor(result["sites"][site]).double(), expected[site], rtol=1e-4, atol=1e-4, msg=site
        )
    for name, (out, into) in {"attn": ("attn_out", "attn_in"), "ffn": ("ffn_out", "ffn_in")}.items():
        torch.testing.assert_close(
            torch.tensor(result["entropy_change"][name]).double(), expected[out] - expected[into], rtol=1e-4, atol=2e-4
        )
        torch.testing.assert_close(
            torch.tensor(result["residual_cosine"][name]).double(), expected[f"cos_{name}"], rtol=1e-4, atol=1e-5
        )
    assert result["final_entropy"] == pytest.approx(expected["final"].item(), abs=1e-4)
    assert result["tokens"] == sum(len(r.response_ids) for r in rollouts)


def test_the_schema():
    model = tiny_model()
    result = analyze_rollouts(model, pairs(), name="tiny")
    json.loads(json.dumps(result, allow_nan=False))
    assert result["schema"] == 1
    assert result["model"] == "tiny"
    assert result["layers"] == 4
    assert result["samples"] == 4
    assert result["dtype"] == "float32"
    for group in ("sites", "standard_errors"):
        assert list(result[group]) == list(SITES)
        assert all(len(v) == 4 for v in result[group].values())
    assert set(result["entropy_change"]) == {"attn", "ffn", "layer"}
    assert set(result["residual_cosine"]) == {"attn", "ffn"}
    assert set(result["regions"]) == {"exploration", "integration", "convergence"}
    assert result["sites"]["layer_in"][1:] == result["sites"]["layer_out"][:-1]
    assert all(0 <= h <= math.log(97) for site in result["sites"].values() for h in site)
    assert all(-1 <= c <= 1 for v in result["residual_cosine"].values() for c in v)
    assert result["boundary_reason"]


def test_training_mode_is_restored_and_dropout_does_not_act():
    model = tiny_model("qwen3", attention_dropout=0.5).train()
    held = model.model.layers[0].eval()  # its owner may hold a part in another mode
    first, second = analyze_rollouts(model, pairs()), analyze_rollouts(model, pairs())
    assert first == second
    assert model.training
    assert model.model.layers[1].self_attn.training
    assert not any(module.training for module in held.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.layers.modules())


def test_batches_cover_every_response_once_within_the_limit():
    rollouts = pairs([(3, n) for n in (1, 9, 4, 4, 7, 2)])
    found = list(batches(rollouts, 20))
    assert sorted(i for batch in found for i in batch) == list(range(6))
    for batch in found:
        longest = max(len(rollouts[i].response_ids) + 2 for i in batch)
        assert len(batch) == 1 or longest * len(batch) <= 20


@pytest.mark.parametrize(
    ("rollouts", "words"),
    [
        ([], "no responses"),
        ([Pair([3], [])], "empty"),
        ([Pair([], [3])], "empty"),
        ([Pair([3] * 100, [4] * 29)], "129 tokens, more than the model's context of 128"),
        ([Pair([3], [97])], "vocabulary of 97"),
    ],
)
def test_unusable_responses_are_refused(rollouts, words):
    with pytest.raises(InputError, match=words):
        analyze_rollouts(tiny_model(), rollouts)


def test_non_finite_weights_are_refused():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="non-finite"):
        analyze_rollouts(model, pairs())


def test_bfloat16_model_is_close_to_float32():
    exact = analyze_rollouts(tiny_model(spread=3.0), pairs())
    rounded = analyze_rollouts(tiny_model(spread=3.0).bfloat16(), pairs())
    assert rounded["dtype"] == "bfloat16"
    for site in SITES:
        assert rounded["sites"][site] == pytest.approx(exact["sites"][site], abs=0.1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_smollm2_reproduces_the_reference(shared_data):
    """The acceptance check on a real model; needs `make smollm2`."""
    folder = Path(__file__).parent.parent.parent / "models" / "smollm2"
    if not (folder / "model.safetensors").exists():
        pytest.skip("models/smollm2 is absent (make smollm2)")
    reference = json.loads((shared_data / "smollm2_reference_entropy.json").read_text())
    lines = (shared_data / "smollm2_math500_responses.jsonl").read_text().splitlines()[:4]
    rows = [json.loads(line) for line in lines]
    model, _ = load_model(str(folder), dtype="float32")
    result = analyze_rollouts(model, [Pair(r["prompt_ids"], r["response_ids"]) for r in rows])
    assert result["tokens"] == reference["tokens"]
    for site in SITES:
        for got, want in zip(result["sites"][site], reference[site], strict=True):
            assert abs(got - want) <= max(0.02, 0.01 * abs(want)) * 0.1  # ten times closer than asked
    assert result["boundary_layer"] is None
    assert "negative in every layer" in result["boundary_reason"]
