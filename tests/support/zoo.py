"""Decoder-only families of transformers, each as a tiny random model with the options that make its layout special."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.tiny import COMMON


@dataclass(frozen=True)
class Species:
    """A family, or a variant of one.

    Attributes:
        name: unique, used as a test id and in the table.
        family: transformers' ``model_type``.
        options: changes to the common tiny configuration; ``None`` leaves an option at the family's default.
        note: what is special about it.
        found: what the probe finds for A and F in the first layer.
        refused: words of the error that reading its components must give, where its layers have no A and F.
        unreadable: whether not even its layers' states can be read.
        generates: whether the family itself decodes with a cache (compared with decoding without one).
    """

    name: str
    family: str
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    found: tuple[str, str] = ("self_attn", "mlp")
    refused: str | None = None
    unreadable: bool = False
    generates: bool = True


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": None,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
LIN, FULL, SLIDE = "linear_attention", "full_attention", "sliding_attention"
MIXED = {"layer_types": [SLIDE, FULL, SLIDE, FULL], "sliding_window": 4}
GRANITE = {
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.2,
}

POST = ("post_attention_layernorm", "post_feedforward_layernorm")

ZOO: tuple[Species, ...] = (
    Species("qwen2", "qwen2"),
    Species("qwen2_moe", "qwen2_moe", {**MOE, "shared_expert_intermediate_size": 16}, "mixture of experts"),
    Species("qwen3", "qwen3"),
    Species("qwen3_moe", "qwen3_moe", {**MOE, "mlp_only_layers": [1]}, "mixture of experts, one dense layer"),
    Species(
        "qwen3_next",
        "qwen3_next",
        {**MOE, **LINEAR, "shared_expert_intermediate_size": 16, "layer_types": [LIN, LIN, LIN, FULL]},
        "linear attention in three of four layers",
        found=("linear_attn", "mlp"),
    ),
    Species("llama", "llama"),
    Species(
        "llama4_text",
        "llama4_text",
        {
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "attention_chunk_size": 8,
            "interleave_moe_layer_step": 2,
        },
        "chunked attention, experts in every other layer",
        found=("self_attn", "feed_forward"),
    ),
    Species("mistral", "mistral", {"sliding_window": 4}, "sliding window"),
    Species("mixtral", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, "mixture of experts"),
    Species("ministral", "ministral", MIXED, "masks by layer type"),
    Species("ministral3", "ministral3"),
    Species("gemma", "gemma", note="embedding multiplier"),
    Species(
        "gemma2",
        "gemma2",
        {"sliding_window": 4, "final_logit_softcapping": 5.0},
        "post-norms, soft-capping",
        found=POST,
    ),
    Species("gemma3_text", "gemma3_text", MIXED, "post-norms, two rotary bases", found=POST),
    Species("phi3", "phi3", {"head_dim": None}, "residual dropout modules"),
    Species("phi", "phi", {"head_dim": None}, "parallel residual, unembedding with a bias"),
    Species(
        "phimoe",
        "phimoe",
        {"num_local_experts": 4, "head_dim": None, "lm_head_bias": True},
        "LayerNorm, experts, unembedding bias",
    ),
    Species("olmo", "olmo", {"head_dim": None}, "norms without parameters"),
    Species("olmo2", "olmo2", {"head_dim": None}, "norms after the block only", found=POST),
    Species("olmo3", "olmo3", {"head_dim": None, **MIXED}, "norms after the block only", found=POST),
    Species("olmoe", "olmoe", {"head_dim": None, "num_experts": 4, "num_experts_per_tok": 2}, "mixture of experts"),
    Species(
        "olmo_hybrid",
        "olmo_hybrid",
        {**LINEAR, "head_dim": None, "layer_types": [LIN, LIN, LIN, FULL]},
        "linear attention layers",
        found=("linear_attn", "mlp"),
    ),
    Species("gpt2", "gpt2", {"n_inner": 48}, "learned positions", found=("attn", "mlp")),
    Species(
        "gpt_neo",
        "gpt_neo",
        {"attention_types": [[["global", "local"], 2]], "window_size": 4},
        "local attention",
        found=("attn", "mlp"),
    ),
    Species("gptj", "gptj", {"rotary_dim": 4}, "parallel residual, unembedding with a bias", found=("attn", "mlp")),
    Species("codegen", "codegen", {"rotary_dim": 4}, "parallel residual", found=("attn", "mlp")),
    Species("gpt_bigcode", "gpt_bigcode", {"n_inner": 48}, "multi-query attention", found=("attn", "mlp")),
    Species("gpt_neox", "gpt_neox", note="parallel residual", found=("attention", "mlp")),
    Species(
        "gpt_neox_sequential",
        "gpt_neox",
        {"use_parallel_residual": False},
        "sequential residual",
        found=("attention", "mlp"),
    ),
    Species(
        "falcon",
        "falcon",
        {"head_dim": None, "multi_query": True, "parallel_attn": True},
        "parallel residual added in place",
        found=("self_attention", "mlp"),
    ),
    Species(
        "falcon_new",
        "falcon",
        {"head_dim": None, "new_decoder_architecture": True, "num_kv_heads": 2},
        "two norms, parallel residual added in place",
        found=("self_attention", "mlp"),
    ),
    Species(
        "falcon_sequential",
        "falcon",
        {"head_dim": None, "parallel_attn": False, "multi_query": False, "alibi": True, "bias": True},
        "sequential residual, ALiBi",
        found=("self_attention", "mlp"),
    ),
    Species("cohere", "cohere", {"logit_scale": 0.25}, "parallel residual, logit scale"),
    Species("cohere2", "cohere2", {**MIXED, "logit_scale": 0.25}, "parallel residual, logit scale"),
    Species(
        "granite",
        "granite",
        GRANITE,
        "residual, logit and embedding multipliers",
        found=("0.22 * self_attn", "0.22 * mlp"),
    ),
    Species(
        "granitemoe",
        "granitemoe",
        {**GRANITE, "num_local_experts": 4},
        "multipliers, experts",
        found=("0.22 * self_attn", "0.22 * block_sparse_moe"),
    ),
    Species(
        "granitemoeshared",
        "granitemoeshared",
        {**GRANITE, "num_local_experts": 4, "shared_intermediate_size": 16},
        "multipliers, experts and a shared FFN summed",
        found=("0.22 * self_attn", "0.22 * block_sparse_moe + 0.22 * shared_mlp"),
    ),
    Species(
        "granitemoehybrid",
        "granitemoehybrid",
        {
            **GRANITE,
            **MAMBA2,
            "num_local_experts": 4,
            "shared_intermediate_size": 16,
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
        },
        "Mamba-2 and attention layers",
        found=("0.22 * mamba", "0.22 * block_sparse_moe + 0.22 * shared_mlp"),
    ),
    Species("deepseek_v2", "deepseek_v2", MLA, "latent attention, experts"),
    Species("deepseek_v3", "deepseek_v3", {**MLA, "n_group": 2, "topk_group": 1}, "latent attention, experts"),
    Species("glm", "glm"),
    Species("glm4", "glm4", note="post-norms", found=("post_self_attn_layernorm", "post_mlp_layernorm")),
    Species("glm4_moe", "glm4_moe", {**MLA, "head_dim": 8, "num_key_value_heads": 2, "n_group": 2, "topk_group": 1}),
    Species("starcoder2", "starcoder2", {"head_dim": None}, "LayerNorm"),
    Species("smollm3", "smollm3", {"no_rope_layer_interval": 2}, "layers without rotary positions"),
    Species("exaone4", "exaone4", MIXED, "norms after the block only", found=POST),
    Species("gpt_oss", "gpt_oss", {**MIXED, "num_local_experts": 4, "num_experts_per_tok": 2}, "sinks, experts"),
    Species(
        "bamba",
        "bamba",
        {**MAMBA2, "attn_layer_indices": [2], "head_dim": None},
        "Mamba-2 and attention layers",
        found=("mamba", "feed_forward"),
    ),
    Species(
        "jamba",
        "jamba",
        {
            "num_experts": 4,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
            "head_dim": None,
        },
        "Mamba and attention layers, experts",
        found=("mamba", "feed_forward"),
    ),
    Species(
        "opt",
        "opt",
        {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "FFN without a module of its own",
        found=("self_attn", "fc2"),
    ),
    Species(
        "bloom",
        "bloom",
        {"n_head": 4},
        "residual added inside the submodules",
        found=("self_attention.dense", "mlp.dense_4h_to_h"),
    ),
    Species(
        "mpt",
        "mpt",
        {"d_model": 32, "n_heads": 4, "n_layers": 4, "expansion_ratio": 2},
        "residual added in the FFN",
        found=("attn.out_proj", "ffn.down_proj"),
    ),
    Species("stablelm", "stablelm"),
    Species("stablelm_parallel", "stablelm", {"use_parallel_residual": True}, "parallel residual"),
    Species("nemotron", "nemotron", note="squared ReLU"),
    Species("persimmon", "persimmon"),
    Species("biogpt", "biogpt", note="FFN without a module of its own", found=("self_attn", "fc2")),
    Species(
        "xglm",
        "xglm",
        {"d_model": 32, "ffn_dim": 48, "num_layers": 4, "attention_heads": 4},
        found=("self_attn", "fc2"),
    ),
    Species("helium", "helium"),
    Species("arcee", "arcee"),
    Species("apertus", "apertus"),
    Species("seed_oss", "seed_oss"),
    Species("ernie4_5", "ernie4_5"),
    Species("hunyuan_v1_dense", "hunyuan_v1_dense"),
    Species("diffllama", "diffllama"),
    Species("dots1", "dots1", {**MLA, "head_dim": 8, "num_key_value_heads": 2, "n_group": 2, "topk_group": 1}),
    Species(
        "lfm2",
        "lfm2",
        {"layer_types": ["conv", "conv", FULL, "conv"]},
        "short convolutions",
        found=("conv", "feed_forward"),
    ),
    Species("bitnet", "bitnet", note="norms inside attention and FFN"),
    Species("vaultgemma", "vaultgemma", {**MIXED}),
    Species("nanochat", "nanochat"),
    Species(
        "falcon_h1",
        "falcon_h1",
        {**MAMBA2, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5, "attention_out_multiplier": 0.7},
        "Mamba-2 beside attention in every layer",
        found=("mamba + 0.7 * self_attn", "feed_forward"),
    ),
    Species(
        "recurrent_gemma",
        "recurrent_gemma",
        {
            "block_types": ["recurrent", "attention"],
            "lru_width": 32,
            "attention_window_size": 8,
            "intermediate_size": 96,
        },
        "linear recurrences",
        found=("temporal_block", "mlp_block"),
    ),
    Species(
        "minimax",
        "minimax",
        {"num_local_experts": 4, "block_size": 8, "layer_types": [LIN, FULL] * 2},
        refused="layer 1: no submodules' outputs add up",
    ),
    Species(
        "nemotron_h",
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "moe", "mamba"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
        "one mixer a layer",
        refused="layer 1 adds one contribution only",
    ),
    Species("mamba", "mamba", {"state_size": 8}, "one mixer a layer", refused="layer 1 adds one contribution only"),
    Species(
        "mamba2",
        "mamba2",
        {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
        refused="layer 1 adds one contribution only",
    ),
    Species(
        "rwkv", "rwkv", {"attention_hidden_size": 32}, refused="layer 1: no submodules' outputs add up", generates=False
    ),
    Species(
        "zamba2",
        "zamba2",
        {
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "n_mamba_heads": 4,
            "chunk_size": 8,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "num_mem_blocks": 1,
        },
        refused="layer 1 adds one contribution only",
    ),
    Species(
        "gemma3n_text",
        "gemma3n_text",
        {
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": None,
            **MIXED,
        },
        refused="final norm does not receive",
        unreadable=True,
    ),
)
BY_NAME = {species.name: species for species in ZOO}


def species_config(species: Species, **changes: Any):
    options = {**COMMON, **species.options, **changes}
    return AutoConfig.for_model(species.family, **{k: v for k, v in options.items() if v is not None})


def species_model(species: Species, *, seed: int = 0, spread: float = 4.0, **changes: Any) -> Any:
    """A random model in evaluation mode; ``spread`` widens the weights so that layers differ visibly."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(species_config(species, **changes), attn_implementation="eager")
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2 and name == "weight" and isinstance(module, nn.Linear):
                    parameter.mul_(spread)
                elif name == "weight" and parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
