"""Language decoders inside multimodal models, quantised weights and models spread by a device map."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from bupo import internal_policy
from bupo.errors import InputError
from bupo.lens.analyze import analyze_rollouts
from bupo.models.layout import find_layout
from tests.support.tiny import COMMON, tiny_model, tokens
from tests.support.zoo_checks import Rollout, generated, greedy, read_all

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 4,  # as many as the text model: the tower must not be taken for it
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_VISION = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
ROLLOUTS = [Rollout([5, 6, 7], [8, 9, 10, 11])]
MULTIMODAL = {
    "gemma3": {
        "text_config": {**COMMON, "model_type": "gemma3_text", "sliding_window": 4},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
    },
    "llava": {
        "text_config": {**COMMON, "model_type": "qwen2"},
        "vision_config": {**VISION, "model_type": "clip_vision_model"},
    },
    "mistral3": {
        "text_config": {**COMMON, "model_type": "mistral"},
        "vision_config": {**VISION, "model_type": "pixtral"},
    },
    "paligemma": {
        "text_config": {**COMMON, "model_type": "gemma2"},
        "vision_config": {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        "projection_dim": 32,
    },
    "qwen2_vl": {
        "text_config": {**COMMON, **MROPE, "model_type": "qwen2_vl_text"},
        "vision_config": QWEN_VISION,
    },
}


def multimodal_model(family: str, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**MULTIMODAL[family], **changes})
    return AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()


def assert_reads(model):
    ids = tokens(2, 6)
    reading = read_all(model, ids)
    assert reading.deviation < 1e-5
    assert reading.wrong_layers == []
    with internal_policy(model, 2):
        assert torch.equal(generated(model, ids, 3), greedy(model, ids, 3))
    assert analyze_rollouts(model, ROLLOUTS)["layers"] == 4


@pytest.mark.parametrize("family", MULTIMODAL)
def test_the_language_decoder_of_a_multimodal_model_is_read(family):
    model = multimodal_model(family)
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


def test_a_saved_multimodal_model_loads(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from bupo.models.load import load_model

    multimodal_model("llava").save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), eos_token="a").save_pretrained(
        tmp_path
    )
    model, _ = load_model(str(tmp_path))
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert find_layout(model).n_layers == 4


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_weights_are_read_where_the_unembedding_is_not_packed(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

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


@pytest.mark.parametrize("away", [(), ("model.layers.1", "model.layers.3"), ("model.embed_tokens", "model.norm")])
def test_a_model_spread_by_a_device_map_is_read(tmp_path, away):
    from accelerate import dispatch_model

    places = {**MAP, **dict.fromkeys(away, "disk")}
    model = dispatch_model(tiny_model("llama"), places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert_reads(model)
    expected = analyze_rollouts(tiny_model("llama"), ROLLOUTS)
    assert analyze_rollouts(model, ROLLOUTS)["sites"] == expected["sites"]


def test_an_offloaded_unembedding_is_refused(tmp_path):
    from accelerate import dispatch_model

    places = {**MAP, "lm_head": "disk"}
    model = dispatch_model(tiny_model("llama"), places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    with pytest.raises(InputError, match="unembedding is offloaded"):
        analyze_rollouts(model, ROLLOUTS)
