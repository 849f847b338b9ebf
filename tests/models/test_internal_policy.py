"""`internal_policy`: gradients, wrappers, what it restores and what it refuses; its logits are checked on the zoo."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from bupo import internal_policy
from bupo.errors import InputError
from bupo.models.residual import find_residual_writes
from tests.support.tiny import LAYOUTS, tiny_model, tokens
from tests.support.zoo_checks import stream

L = 4
EVERY = [(layout, tied) for layout in LAYOUTS for tied in (False, True)]


def test_last_layer_with_norm_is_the_model_itself():
    model, ids = tiny_model(), tokens()
    with torch.no_grad(), internal_policy(model, L, norm=True):
        inside = model(ids).logits
    assert torch.equal(inside, model(ids).logits)


def surrogate(logits, ids):
    """A scalar function of a policy's log-probabilities."""
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).square().mean()


@pytest.mark.parametrize(("layout", "tied"), EVERY)
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_gradients_equal_the_full_forward_and_vanish_above(layout, tied, checkpointing):
    ids = tokens()
    for layer in (1, 3, L):
        reference = tiny_model(layout, tie_word_embeddings=tied)
        surrogate(reference.lm_head(stream(reference, ids)["layer"][layer - 1]), ids).backward()
        expected = {name: p.grad for name, p in reference.named_parameters()}

        model = tiny_model(layout, tie_word_embeddings=tied).train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        with internal_policy(model, layer):
            loss = surrogate(model(ids, use_cache=False).logits, ids)
        loss.backward()  # outside the context
        for name, parameter in model.named_parameters():
            above = any(name.startswith(f"model.layers.{k}.") for k in range(layer, L)) or name == "model.norm.weight"
            if above:
                assert parameter.grad is None, name
                assert expected[name] is None or not expected[name].any(), name
            else:
                scale = expected[name].abs().max().item()
                torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("component", ["attn", "ffn"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_gradients_of_components(component, checkpointing):
    ids, layer = tokens(), 2
    reference = tiny_model("qwen3")
    states = stream(reference, ids, find_residual_writes(reference))
    surrogate(reference.lm_head(states[component][layer - 1]), ids).backward()
    model = tiny_model("qwen3").train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    with internal_policy(model, layer, component):
        loss = surrogate(model(ids, use_cache=False).logits, ids)
    loss.backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        if q.grad is None or not q.grad.any():
            assert p.grad is None or not p.grad.any(), name
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5 * q.grad.abs().max().item(), msg=name)


def test_left_padding_changes_nothing():
    model, ids = tiny_model(), tokens(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(9) >= 3).long()[None]
    with torch.no_grad(), internal_policy(model, 3):
        plain = model(ids).logits
        left = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 3:]
    torch.testing.assert_close(left, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())


def test_lora_model_is_its_internal_policy():
    base, ids = tiny_model(), tokens()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.eval()
    with torch.no_grad():
        expected = base.lm_head(stream(model, ids)["layer"][1])
        with internal_policy(model, 2):
            torch.testing.assert_close(model(ids).logits, expected)
    model.train()
    with internal_policy(model, 2):
        surrogate(model(ids).logits, ids).backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    assert reached
    assert all(".layers.0." in n or ".layers.1." in n for n in reached)
    assert all("lora_" in n for n in reached)


@pytest.mark.parametrize("component", ["layer", "attn", "ffn"])
def test_leaving_restores_exactly(component):
    model, ids = tiny_model(), tokens()
    before = model(ids, output_hidden_states=True)
    dictionaries = [dict(m.__dict__) for m in model.modules()]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), internal_policy(model, 2, component):
        assert set(model.state_dict()) == set(weights)  # the module tree stays whole
        raise RuntimeError("inside")
    for module, dictionary in zip(model.modules(), dictionaries, strict=True):
        assert module.__dict__.keys() == dictionary.keys()
        assert all(module.__dict__[k] is v for k, v in dictionary.items())
    after = model(ids, output_hidden_states=True)
    assert torch.equal(before.logits, after.logits)
    assert len(after.hidden_states) == L + 1
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_hidden_state_capture_first_used_inside_stays_whole_outside():
    model = tiny_model()
    with internal_policy(model, 2):
        model(tokens(), output_hidden_states=True)
    assert len(model(tokens(), output_hidden_states=True).hidden_states) == L + 1


def test_a_forward_patched_by_another_library_comes_back():
    model = tiny_model()
    patched = model.model.norm.forward
    model.model.norm.forward = patched  # as accelerate's device hooks do
    with internal_policy(model, 1):
        pass
    assert model.model.norm.__dict__["forward"] is patched


@pytest.mark.parametrize("layer", [0, -1, L + 1, 2.0, True, "2"])
def test_wrong_layer_names_the_range(layer):
    with pytest.raises(InputError, match=r"1 to 4"), internal_policy(tiny_model(), layer):
        pass


def test_unknown_component_names_the_choices():
    with pytest.raises(ValueError, match="layer, attn, ffn"), internal_policy(tiny_model(), 1, "mlp"):
        pass


def test_nesting_is_refused():
    model = tiny_model()
    with internal_policy(model, 2), pytest.raises(InputError, match="already"), internal_policy(model, 1):
        pass


@pytest.mark.parametrize("component", ["layer", "attn"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_a_copy_cannot_remain_an_internal_policy(component, duplicate):
    model = tiny_model()
    with internal_policy(model, 2, component), pytest.raises(InputError, match="outside"):
        duplicate(model)
    assert torch.equal(copy.deepcopy(model)(tokens()).logits, model(tokens()).logits)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1)), "encoder-decoder"),
        (lambda: BertForMaskedLM(BertConfig(**SMALL)), "not a decoder-only"),
        (lambda: AutoModel.from_config(tiny_model().config), "lm_head"),
        (lambda: torch.nn.Linear(2, 2), "not a Hugging Face model"),
    ],
    ids=["t5", "bert", "headless", "linear"],
)
def test_models_without_internal_policies_are_refused(make, words):
    with pytest.raises(InputError, match=words), internal_policy(make(), 1):
        pass


def test_the_probe_refuses_a_layer_that_adds_something_else():
    model = tiny_model()
    layer = model.model.layers[2]
    original = layer.forward
    layer.forward = lambda *a, **k: original(*a, **k) + 0.5
    with pytest.raises(InputError, match=r"layer 3.*deviation"):
        find_residual_writes(model)
