"""`internal_policy(temperature=T)`: logits, gradients, wrappers and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from bupo import internal_policy
from bupo.errors import InputError
from tests.models.test_internal_policy import EVERY, surrogate
from tests.support.tiny import tiny_model, tokens
from tests.support.zoo_checks import stream


@torch.no_grad()
def logits(model, *arguments, **more):
    with internal_policy(model, 2, *arguments, **more):
        return model(tokens()).logits


@pytest.mark.parametrize(("layout", "tied"), EVERY)
@pytest.mark.parametrize("norm", [False, True])
def test_logits_are_divided_by_it(layout, tied, norm):
    model = tiny_model(layout, tie_word_embeddings=tied)
    for component in ("layer", "attn", "ffn"):
        plain, warm = (logits(model, component, norm=norm, **more) for more in ({}, {"temperature": 2.5}))
        torch.testing.assert_close(warm, plain / 2.5, rtol=1e-5, atol=1e-5 * plain.abs().max().item())
        assert torch.equal(logits(model, component, norm=norm, temperature=1.0), plain)


def test_with_lora():
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    assert torch.equal(logits(model, temperature=4.0), logits(model) / 4.0)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("temperature", [0.3, 7.0])
def test_gradients_are_those_of_the_definition(norm, checkpointing, temperature):
    ids, layer = tokens(), 3
    reference = tiny_model()
    state = stream(reference, ids)["layer"][layer - 1]
    state = reference.model.norm(state) if norm else state
    surrogate(reference.lm_head(state) / temperature, ids).backward()
    model = tiny_model().train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    with internal_policy(model, layer, norm=norm, temperature=temperature):
        loss = surrogate(model(ids, use_cache=False).logits, ids)
    loss.backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        if q.grad is None or not q.grad.any():
            assert p.grad is None, name
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5 * q.grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_wrong_temperatures(temperature):
    with pytest.raises(InputError, match="number above 0"), internal_policy(tiny_model(), 1, temperature=temperature):
        pass
