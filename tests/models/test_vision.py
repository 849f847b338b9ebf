"""Internal policies of vision-language models whose prompts have images, against hooks on an ordinary forward."""

import pytest
import torch

from bupo import internal_policy
from bupo.errors import InputError
from tests.support.vision import model_inputs, vision_model
from tests.support.zoo_checks import layer_list


def states_of(model, inputs):
    """H^1 .. H^L of an ordinary forward."""
    states = []
    hooks = [layer.register_forward_hook(lambda m, i, out: states.append(out)) for layer in layer_list(model)]
    model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [state[0] if isinstance(state, tuple) else state for state in states]


def gradients(model, logits, inputs):
    """Gradients of the log-probability of the four response tokens, by parameter."""
    chosen = logits[:, -5:-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, -4:, None])
    model.zero_grad(set_to_none=True)
    chosen.sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["gemma3", "llava", "qwen2_vl"])
def test_internal_policies_see_the_images(family):
    model, inputs = vision_model(family, spread=3.0), model_inputs(family)
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    head, above = model.get_output_embeddings().weight, [id(p) for m in layer_list(model)[2:] for p in m.parameters()]
    for layer in (1, 2, 4):
        expected = states_of(model, inputs)[layer - 1] @ head.T
        with internal_policy(model, layer):
            logits, changed = (model(**one, use_cache=False).logits for one in (inputs, other))
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(logits[:, -5:], changed[:, -5:], atol=1e-3)
        if layer == 2:
            found, reference = gradients(model, logits, inputs), gradients(model, expected, inputs)
            assert found.keys() == reference.keys()
            torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-5)
            names = {name: id(p) for name, p in model.named_parameters()}
            assert not any(names[name] in above for name in found)
            assert any("vision" in name or "visual" in name for name in found)


def test_layers_after_which_a_model_adds_image_features_are_refused_with_images():
    """Qwen3-VL adds features of its vision tower to the stream after its first layers, two in this model."""
    model, inputs = vision_model("qwen3_vl"), model_inputs("qwen2_vl")
    for layer in (1, 2):
        with (
            internal_policy(model, layer),
            pytest.raises(InputError, match=f"what layer {layer} returns does not reach"),
        ):
            model(**inputs, use_cache=False)
    expected = states_of(model, inputs)[2] @ model.get_output_embeddings().weight.T
    with internal_policy(model, 3):
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, expected)
