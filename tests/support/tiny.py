"""Tiny random-weight models of every layout, built in memory: no download, a few thousand parameters."""

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYOUTS = ("qwen2", "qwen3", "llama")


def tiny_config(layout: str = "qwen3", **changes):
    return AutoConfig.for_model(layout, **{**COMMON, **changes})


def tiny_model(layout: str = "qwen3", *, seed: int = 0, spread: float = 6.0, **changes):
    """A random model in evaluation mode; ``spread`` widens the weights so that layers differ visibly."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(layout, **changes), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(spread)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def word_tokenizer(words, unknown: str, splitter, *, fuse: bool = False, **more) -> PreTrainedTokenizerFast:
    """One token per word, from id 3 on; 0, 1 and 2 are padding, beginning and end."""
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": unknown}
    known = [*list(special.values())[:3], *words]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token=unknown))
    inner.pre_tokenizer = splitter
    if fuse:
        inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special, **more)


def tokens(batch: int = 2, length: int = 9, *, seed: int = 0, vocabulary: int = 97) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (batch, length), generator=generator)
