"""`internal_policy`: gradients, wrappers, what it restores and what it refuses; its logits are checked on the zoo."""

import copy
import math
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
POLICIES = [{"layer": 1}, {"layer": 3}, {"layer": L}, {"layer": 2, "component": "attn"},
            {"layer": 2, "component": "ffn"}, {"layer": 3, "temperature": 0.3},
            {"layer": 2, "component": "attn", "lens": "norm", "temperature": 2.5},
            {"layer": 3, "lens": "norm", "temperature": 7.0}]  # fmt: skip


@torch.no_grad()
def logits(model, *arguments, **more):
    with internal_policy(model, *arguments, **more):
        return model(tokens()).logits


def test_last_layer_with_norm_is_the_model_itself():
    model = tiny_model()
    assert torch.equal(logits(model, L, lens="norm"), model(tokens()).logits)


def test_assisted_decoding_is_greedy_decoding():
    model, ids, how = tiny_model(), tokens(1), {"max_new_tokens": 12, "do_sample": False}
    for layer in (2, L):
        with internal_policy(model, layer):
            greedy = model.generate(ids, **how)
            for assistant in (tiny_model(seed=1), tiny_model()):
                assert torch.equal(model.generate(ids, assistant_model=assistant, **how), greedy)


def surrogate(logits, ids):
    """A scalar function of a policy's log-probabilities."""
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).square().mean()


@pytest.mark.parametrize(("layout", "tied"), EVERY)
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_values_and_gradients_are_those_of_the_definition_and_vanish_above(layout, tied, checkpointing, policy):
    ids, reference = tokens(), tiny_model(layout, tie_word_embeddings=tied)
    states = stream(reference, ids, find_residual_writes(reference))
    state = states[policy.get("component", "layer")][policy["layer"] - 1]
    state = reference.model.norm(state) if policy.get("lens") else state
    expected = surrogate(reference.lm_head(state) / policy.get("temperature", 1.0), ids)
    expected.backward()
    model = tiny_model(layout, tie_word_embeddings=tied).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    with internal_policy(model, **policy):
        loss = surrogate(model(ids, use_cache=False).logits, ids)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    loss.backward()  # outside the context
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, name
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
    assert torch.equal(logits(model, 2, temperature=4.0), logits(model, 2) / 4.0)
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


def test_hidden_state_capture_first_used_inside_and_a_patched_forward_stay_whole():
    model = tiny_model()
    patched = model.model.norm.forward
    model.model.norm.forward = patched  # as accelerate's device hooks do
    with internal_policy(model, 2):
        model(tokens(), output_hidden_states=True)
    assert len(model(tokens(), output_hidden_states=True).hidden_states) == L + 1
    assert model.model.norm.__dict__["forward"] is patched


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *(({"layer": layer}, "1 to 4") for layer in (0, -1, L + 1, 2.0, True, "2")),
        ({"layer": 1, "component": "mlp"}, "layer, attn, ffn"),
        *(({"layer": 1, "temperature": t}, "number above 0") for t in (0.0, -1.0, math.inf, math.nan)),
    ],
    ids=str,
)
def test_wrong_arguments_name_the_valid_ones(arguments, words):
    with pytest.raises(InputError, match=words), internal_policy(tiny_model(), **arguments):
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
