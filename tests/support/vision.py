"""Tiny random vision-language models of three kinds, their processors, and prompts with images."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForImageTextToText, Gemma3Processor, LlavaProcessor, Qwen2VLProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from tests.support.tiny import COMMON, word_tokenizer

MARKS = {"<image>": 90, "<soft>": 91, "<end>": 92, "<vision>": 93, "<|image_pad|>": 94, "<|video_pad|>": 95}
# A table, packed by hand.
# fmt: off
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
    "num_hidden_layers": 4}  # as many as the text model: the tower must not be taken for it
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
QWEN_VISION = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
QWEN = {"image_token_id": 94, "video_token_id": 95, "vision_start_token_id": 93}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
MULTIMODAL = {  # by family: text_config, vision_config, other settings
    "gemma3": ({"model_type": "gemma3_text", "sliding_window": 4}, SIGLIP,
        {"mm_tokens_per_image": 4, "image_token_index": 91, "boi_token_index": 90, "eoi_token_index": 92}),
    "llava": ({"model_type": "qwen2"}, {**VISION, "model_type": "clip_vision_model"}, {"image_token_index": 90}),
    "mistral3": ({"model_type": "mistral"}, {**VISION, "model_type": "pixtral"}, {"image_token_index": 90}),
    "paligemma": ({"model_type": "gemma2"}, SIGLIP, {"projection_dim": 32, "image_token_index": 90}),
    "qwen2_vl": ({**MROPE, "model_type": "qwen2_vl_text"}, QWEN_VISION, QWEN),
    "qwen3_vl": ({**MROPE, "model_type": "qwen3_vl_text"}, {**QWEN_VISION, "hidden_size": 16, "out_hidden_size": 32,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}, QWEN),
}
# fmt: on


def vision_model(family: str, *, spread: float = 1.0) -> Any:
    """A random model with four text layers; ``spread`` widens the weights so that layers differ visibly."""
    torch.manual_seed(0)
    text, vision, more = MULTIMODAL[family]
    config = AutoConfig.for_model(family, text_config={**COMMON, **text}, vision_config=vision, **more)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.ndim >= 2):
            if not parameter.any():  # as Gemma-3's projection of images begins
                parameter.normal_(std=0.1)
            parameter.mul_(spread)
    return model


class _Qwen(Qwen2VLProcessor):
    """Without a video processor, which needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: Any = None):
        self.image_token, self.video_token, self.image_token_id, self.video_token_id = *list(MARKS)[4:], 94, 95
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def processor(family: str) -> Any:
    """One token per word, of which three stand around and for an image."""
    mark = {"gemma3": " <image> ", "llava": " <image> ", "qwen2_vl": " <vision> <|image_pad|> "}[family]
    template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{{ '"
        + mark
        + "' if part.type == 'image' else part.text }}{% endfor %}{% endif %} {% endfor %}"
    )
    words = [f"w{i}" for i in range(3, 90)] + list(MARKS) + ["w96"]
    named = {"image_token": "<soft>", "boi_token": "<image>", "eoi_token": "<end>"} if family == "gemma3" else {}
    tokenizer = word_tokenizer(words, "w3", WhitespaceSplit(), extra_special_tokens=named, padding_side="left")
    tokenizer.add_tokens(list(MARKS), special_tokens=True)
    size = {"height": 8, "width": 8}
    if family == "gemma3":
        return Gemma3Processor(Gemma3ImageProcessorPil(size=size), tokenizer, template, image_seq_length=4)
    if family == "llava":
        images = CLIPImageProcessorPil(size=size, crop_size=size)
        more = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return LlavaProcessor(images, tokenizer, patch_size=4, chat_template=template, **more)
    return _Qwen(Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=256), tokenizer, template)


def image(seed: int, size: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8))


def image_prompts(n: int = 24) -> Dataset:
    """Conversations of one to three words with one image each, which differ in size."""
    rows = [" ".join(f"w{3 + (7 * i + 5 * j) % 80}" for j in range(1 + i % 3)) for i in range(n)]
    return Dataset.from_dict({
        "prompt": [[{"role": "user", "content": row}] for row in rows],
        "image": [image(i, 8 + 8 * (i % 2)) for i in range(n)],
    })  # fmt: skip


def model_inputs(family: str) -> dict[str, torch.Tensor]:
    """What a model is called with for two prompts with images and responses of four tokens."""
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": image(i, 8 + 8 * i)}, {"type": "text", "text": text}]}]
        for i, text in enumerate(("w5 w6", "w7 w8"))
    ]
    options = {"tokenize": True, "return_dict": True, "processor_kwargs": {"padding": True, "return_tensors": "pt"}}
    inputs = dict(processor(family).apply_chat_template(conversations, **options))
    response = torch.tensor([[8, 9, 10, 11], [20, 21, 22, 23]])
    more = {"input_ids": response, "attention_mask": torch.ones_like(response)}
    of_tokens = [name for name, value in inputs.items() if value.shape == inputs["input_ids"].shape]
    joined = {n: torch.cat([inputs[n], more.get(n, torch.zeros_like(response))], dim=1) for n in of_tokens}
    return {**inputs, **joined}
