"""Language decoders inside multimodal models, quantised weights and models spread by a device map."""

import pytest
import torch
from accelerate import dispatch_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from bupo import internal_policy, load_model
from bupo.data.rollouts import Rollout
from bupo.errors import InputError
from bupo.lens.analyze import analyze_rollouts
from bupo.models.layout import find_layout
from bupo.models.load import load_tokenizer
from tests.support.tiny import COMMON, tiny_model, tokens
from tests.support.vision import MULTIMODAL, VISION, vision_model
from tests.support.zoo_checks import decodes_alike, read_all

ROLLOUTS = [Rollout([5, 6, 7], [8, 9, 10, 11])]


def assert_reads(model):
    deviation, wrong_layers = read_all(model, tokens(2, 6))
    assert deviation < 1e-5
    assert wrong_layers == []
    with internal_policy(model, 2):
        assert decodes_alike(model, tokens(2, 6), 3)
    assert analyze_rollouts(model, ROLLOUTS)["layers"] == 4


@pytest.mark.parametrize("family", MULTIMODAL)
def test_the_language_decoder_of_a_multimodal_model_is_read(family):
    model = vision_model(family)
    assert find_layout(model).backbone is model.get_decoder()
    assert_reads(model)


def test_layers_that_text_alone_skips_are_refused():
    config = AutoConfig.for_model(
        "mllama",
        text_config={**{k: v for k, v in COMMON.items() if k != "head_dim"}, "cross_attention_layers": [2]},
        vision_config={**VISION, "attention_heads": 2},
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    with pytest.raises(InputError, match="layer 3 did not run"), internal_policy(model, 3, "attn"):
        pass
    with pytest.raises(InputError, match="what layer 3 returns does not reach"), internal_policy(model, 3):
        model(input_ids=tokens(), use_cache=False)


def test_a_saved_multimodal_model_loads(tmp_path, tiny_folder):
    vision_model("llava").save_pretrained(tmp_path)
    load_tokenizer(str(tiny_folder)).save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path))
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert find_layout(model).n_layers == 4


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_weights_are_read_where_the_unembedding_is_not_packed(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    tiny_model("llama", hidden_size=64, head_dim=16, intermediate_size=64, spread=3.0).save_pretrained(tmp_path)

    def load(**options):
        config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **options)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
        return model.eval()

    assert_reads(load())
    with pytest.raises(InputError, match="unembedding is quantised"):
        find_layout(load(llm_int8_skip_modules=["none"]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_linear_maps_without_parameters_are_read():
    whole = tiny_model("llama")
    packed = torch.ao.quantization.quantize_dynamic(whole, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(InputError, match="unembedding is quantised"):
        analyze_rollouts(packed, ROLLOUTS)
    packed.lm_head = whole.lm_head
    assert_reads(packed)


def test_a_gguf_unembedding_left_packed_is_refused():
    module = pytest.importorskip("transformers.integrations.gguf.utils")
    model = tiny_model("llama")
    model.lm_head = module.GgufLinear(32, 97, 8)  # Q8_0 blocks, as bytes
    with pytest.raises(InputError, match=r"unembedding is quantised \(torch.uint8\)"):
        find_layout(model)


MAP = {f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb", *(f"layers.{i}" for i in range(4)))}
MAP["lm_head"] = "cpu"


def spread(folder, away=()):
    """A model with accelerate's hooks, and some of its modules on disk."""
    places = {**MAP, **dict.fromkeys(away, "disk")}
    return dispatch_model(tiny_model("llama"), places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("away", [(), ("model.layers.1", "model.layers.3"), ("model.embed_tokens", "model.norm")])
def test_a_model_spread_by_a_device_map_is_read(tmp_path, away):
    model = spread(tmp_path, away)
    assert_reads(model)
    assert analyze_rollouts(model, ROLLOUTS)["sites"] == analyze_rollouts(tiny_model("llama"), ROLLOUTS)["sites"]


def test_an_offloaded_unembedding_is_refused(tmp_path):
    with pytest.raises(InputError, match="unembedding is offloaded"):
        analyze_rollouts(spread(tmp_path, ["lm_head"]), ROLLOUTS)
