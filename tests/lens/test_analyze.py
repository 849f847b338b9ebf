"""The analysis against a plain recomputation that keeps everything, and its refusals."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import socket
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from torch.distributions import Categorical

from bupo import internal_policy
from bupo.errors import InputError
from bupo.lens import analyze
from bupo.lens.analyze import SITES, AnalysisOptions, analyze_rollouts
from bupo.lens.tokens import explore_rollouts
from bupo.models.load import load_model
from bupo.models.residual import find_residual_writes
from tests.support.lens import Pair, pairs
from tests.support.tiny import LAYOUTS, tiny_model
from tests.support.zoo_checks import stream


@torch.no_grad()
def plain(model, responses):
    """Every activation kept, every projection made whole, token by token: the definitions, written out."""
    rows = {key: [] for key in (*SITES, "cos_attn", "cos_ffn", "final")}
    for response in responses:
        ids = torch.tensor([[*response.prompt_ids, *response.response_ids]])
        states = stream(model, ids, find_residual_writes(model))
        inputs = [model.model.embed_tokens(ids), *states["layer"]]
        at = slice(len(response.prompt_ids) - 1, ids.shape[1] - 1)
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
    for name, (out, into) in {"attn": ("attn_out", "attn_in"), "ffn": ("ffn_out", "ffn_in")}.items():
        check(result["entropy_change"][name], expected[out] - expected[into], 2e-4)
        check(result["residual_cosine"][name], expected[f"cos_{name}"], 1e-5)
    assert result["final_entropy"] == pytest.approx(expected["final"].item(), abs=1e-4)
    assert result["tokens"] == sum(len(r.response_ids) for r in responses)


def test_the_schema():
    result = analyze_rollouts(tiny_model(), pairs(), options=AnalysisOptions(name="tiny"))
    json.loads(json.dumps(result, allow_nan=False))
    expected = {"schema": 1, "model": "tiny", "layers": 4, "samples": 4, "dtype": "float32"}
    assert {key: result[key] for key in expected} == expected
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


def test_a_single_token_has_unknown_standard_errors():
    result = analyze_rollouts(tiny_model(), [([3, 4], [5])], statistics=["kl"])
    assert result["final_entropy_standard_error"] is None
    for key in ("standard_errors", "entropy_change_standard_errors", "residual_cosine_standard_errors"):
        assert all(errors == [None] * 4 for errors in result[key].values()), key
    assert result["statistics_standard_errors"]["kl"]["layer_out"] == [None] * 4
    json.dumps(result, allow_nan=False)


def test_training_mode_is_restored_and_dropout_does_not_act():
    model = tiny_model("qwen3", attention_dropout=0.5).train()
    held = model.model.layers[0].eval()  # its owner may hold a part in another mode
    first, second = analyze_rollouts(model, pairs()), analyze_rollouts(model, pairs())
    assert first == second
    assert model.training
    assert model.model.layers[1].self_attn.training
    assert not any(module.training for module in held.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.layers.modules())


def test_refusals():
    with pytest.raises(InputError, match="unknown statistic 'logits'"):
        analyze_rollouts(tiny_model(), pairs(), statistics=["logits"])
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
    exact = analyze_rollouts(tiny_model(spread=3.0), pairs())
    rounded = analyze_rollouts(tiny_model(spread=3.0).bfloat16(), pairs())
    assert rounded["dtype"] == "bfloat16"
    for site in SITES:
        assert rounded["sites"][site] == pytest.approx(exact["sites"][site], abs=0.1)


def test_statistics_are_those_of_single_tokens():
    model, responses = tiny_model(spread=3.0), pairs()
    result = analyze_rollouts(model, responses, statistics=["logprob", "rank", "kl", "varentropy", "top2", "top5"])
    tokens = explore_rollouts(model, responses, str)["samples"]
    for name in ("logprob", "rank", "kl"):
        for layer in range(4):
            every = [value for sample in tokens for value in sample[name][layer]]
            assert result["statistics"][name]["layer_out"][layer] == pytest.approx(sum(every) / len(every), abs=2e-3)
    for k in (2, 5):
        mass = [sum(share for _, share in cell[:k]) for sample in tokens for cell in sample["top"][2]]
        got = result["statistics"][f"top{k}_mass"]["layer_out"][2]
        assert got == pytest.approx(sum(mass) / len(mass), abs=1e-3)
    whole = analyze_rollouts(model, responses)
    assert {k: v for k, v in result.items() if not k.startswith("statistics")} == whole


def long_pairs(n=12):
    return pairs([(3, 60 + 5 * i) for i in range(n)])


def test_some_tokens_give_nearly_the_same_means():
    model, responses = tiny_model(spread=3.0), long_pairs()
    whole = analyze_rollouts(model, responses)
    assert analyze_rollouts(model, responses, max_tokens=10**6).pop("sampling")["tokens_used"] == whole["tokens"]
    part = analyze_rollouts(model, responses, max_tokens=400, seed=1)
    assert part["sampling"] == {"max_tokens": 400, "tokens_used": 400, "tokens_of_responses": whole["tokens"]}
    assert part["tokens"] == 400
    for site in SITES:
        rows = zip(part["sites"][site], whole["sites"][site], part["standard_errors"][site], strict=True)
        assert all(abs(got - want) <= 4 * error + 1e-6 for got, want, error in rows)
    assert part["sites"] != whole["sites"]
    assert part != analyze_rollouts(model, responses, max_tokens=400, seed=2)
    few = analyze_rollouts(model, responses, max_tokens=1)
    assert (few["tokens"], few["samples"], few["final_entropy_standard_error"]) == (1, 1, None)


def test_single_tokens_are_handed_out_once():
    rows = []

    def on_tokens(batch, stats):
        rows.extend((*place, token) for place, token in zip(batch.places.tolist(), batch.targets.tolist(), strict=True))
        assert stats["entropy"].shape == (6, 4, len(batch.targets))

    responses = pairs()
    analyze_rollouts(tiny_model(), responses, batch_tokens=20, options=AnalysisOptions(on_tokens=on_tokens))
    assert sorted(rows) == [
        (i, t, token) for i, r in enumerate(responses, 1) for t, token in enumerate(r.response_ids, 1)
    ]


KINDS = {"all": {}, "some": {"max_tokens": 150, "seed": 1, "statistics": ["kl", "rank"]}}


def _note(read, batch, stats):
    read.update(batch.places[:, 0].tolist())


def _one_of_two(rank: int, port: int, folder: str) -> None:
    """A process of an accelerate launch, forked from a warm one."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    PartialState._reset_state()
    for name, more in KINDS.items():
        read: set[int] = set()
        options = AnalysisOptions(on_tokens=partial(_note, read))
        result = analyze_rollouts(tiny_model(spread=3.0), long_pairs(5), share=True, options=options, **more)
        Path(folder, f"{name}-{rank}.json").write_text(json.dumps({**result, "read here": sorted(read)}))


def test_two_processes_give_one_process_s_result(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_one_of_two, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    for name, more in KINDS.items():
        alone = analyze_rollouts(tiny_model(spread=3.0), long_pairs(5), **more)
        both = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        assert all(found["read here"] for found in both)
        assert sorted(both[0]["read here"] + both[1]["read here"]) == [1, 2, 3, 4, 5]  # each response once
        for found in both:
            assert found["tokens"] == alone["tokens"]
            for group in ("sites", "standard_errors"):
                for site in SITES:
                    assert found[group][site] == pytest.approx(alone[group][site], abs=1e-6)
            assert found.get("statistics", {}) == alone.get("statistics", {})


def test_a_sharded_model_is_never_shared_out(monkeypatch):
    """Its forward passes are collective operations: every process must make the same ones."""
    model = tiny_model()
    model.model.norm.weight.full_tensor = lambda: None
    monkeypatch.setattr(analyze, "join_processes", lambda: pytest.fail("shared out"))
    assert analyze_rollouts(model, pairs(), share=True) == analyze_rollouts(model, pairs())


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
