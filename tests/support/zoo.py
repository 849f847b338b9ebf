"""Decoder-only families of transformers as tiny random models, each with the options that make its layout special."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.tiny import COMMON


@dataclass(frozen=True)
class ZooModel:
    """A family, or a variant of one."""

    name: str  # unique
    options: dict[str, Any] = field(default_factory=dict)  # changes to COMMON; None leaves the family's default
    note: str = ""  # what is special about it
    variant_of: str = ""  # its family, where the name is not that
    writes: tuple[str, str] = ("self_attn", "mlp")  # the expected A and F of the first layer, as strings
    refused: str | None = None  # words of the expected error about components, where the layers have no A and F
    unreadable: bool = False  # whether the states of its layers cannot be read either
    generates: bool = True  # whether the family itself decodes the same with and without a cache

    @property
    def family(self) -> str:
        """transformers' ``model_type``."""
        return self.variant_of or self.name


# A table, packed by hand.
# fmt: off
NO_DIM = {"head_dim": None}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    **NO_DIM, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
LIN, FULL, SLIDE = "linear_attention", "full_attention", "sliding_attention"
MIXED = {"layer_types": [SLIDE, FULL, SLIDE, FULL], "sliding_window": 4}
GRANITE = {"residual_multiplier": 0.22, "logits_scaling": 8.0, "embedding_multiplier": 12.0,
    "attention_multiplier": 0.2}
POST = ("post_attention_layernorm", "post_feedforward_layernorm")
ATTN, SELF, NEOX, FC2 = ("attn", "mlp"), ("self_attention", "mlp"), ("attention", "mlp"), ("self_attn", "fc2")
MAMBA, LINEAR_ATTN = ("mamba", "feed_forward"), ("linear_attn", "mlp")
SHARED = {"num_local_experts": 4, "shared_intermediate_size": 16}
THREE_OF_FOUR = {"layer_types": [LIN, LIN, LIN, FULL]}
ONE, NO_SUM = "layer 1 adds one contribution only", "layer 1: no submodules' outputs add up"
PLAIN = """qwen2 qwen3 llama ministral3 glm stablelm persimmon helium arcee apertus seed_oss ernie4_5 hunyuan_v1_dense
    diffllama nanochat"""

ZOO: tuple[ZooModel, ...] = (
    *map(ZooModel, PLAIN.split()),
    ZooModel("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 16}, "mixture of experts"),
    ZooModel("qwen3_moe", {**MOE, "mlp_only_layers": [1]}, "mixture of experts, one dense layer"),
    ZooModel("qwen3_next", {**MOE, **LINEAR, "shared_expert_intermediate_size": 16, **THREE_OF_FOUR},
        "linear attention in three of four layers", writes=LINEAR_ATTN),
    ZooModel("llama4_text", {"intermediate_size_mlp": 48, "num_local_experts": 4, "attention_chunk_size": 8,
        "interleave_moe_layer_step": 2}, "chunked attention, experts in every other layer", writes=("self_attn",
        "feed_forward")),
    ZooModel("mistral", {"sliding_window": 4}, "sliding window"),
    ZooModel("mixtral", EXPERTS, "mixture of experts"),
    ZooModel("ministral", MIXED, "masks by layer type"),
    ZooModel("gemma", note="embedding multiplier"),
    ZooModel("gemma2", {"sliding_window": 4, "final_logit_softcapping": 5.0}, "post-norms, soft-capping", writes=POST),
    ZooModel("gemma3_text", MIXED, "post-norms, two rotary bases", writes=POST),
    ZooModel("phi3", NO_DIM, "residual dropout modules"),
    ZooModel("phi", NO_DIM, "parallel residual, unembedding with a bias"),
    ZooModel("phimoe", {"num_local_experts": 4, **NO_DIM, "lm_head_bias": True},
        "LayerNorm, experts, unembedding bias"),
    ZooModel("olmo", NO_DIM, "norms without parameters"),
    ZooModel("olmo2", NO_DIM, "norms after the block only", writes=POST),
    ZooModel("olmo3", {**NO_DIM, **MIXED}, "norms after the block only", writes=POST),
    ZooModel("olmoe", {**NO_DIM, "num_experts": 4, "num_experts_per_tok": 2}, "mixture of experts"),
    ZooModel("olmo_hybrid", {**LINEAR, **NO_DIM, **THREE_OF_FOUR}, "linear attention layers", writes=LINEAR_ATTN),
    ZooModel("gpt2", {"n_inner": 48}, "learned positions", writes=ATTN),
    ZooModel("gpt_neo", {"attention_types": [[["global", "local"], 2]], "window_size": 4}, "local attention",
        writes=ATTN),
    ZooModel("gptj", {"rotary_dim": 4}, "parallel residual, unembedding with a bias", writes=ATTN),
    ZooModel("codegen", {"rotary_dim": 4}, "parallel residual", writes=ATTN),
    ZooModel("gpt_bigcode", {"n_inner": 48}, "multi-query attention", writes=ATTN),
    ZooModel("gpt_neox", note="parallel residual", writes=NEOX),
    ZooModel("gpt_neox_sequential", {"use_parallel_residual": False}, "sequential residual", variant_of="gpt_neox",
        writes=NEOX),
    ZooModel("falcon", {**NO_DIM, "multi_query": True, "parallel_attn": True}, "parallel residual added in place",
        writes=SELF),
    ZooModel("falcon_new", {**NO_DIM, "new_decoder_architecture": True, "num_kv_heads": 2},
        "two norms, parallel residual added in place", variant_of="falcon", writes=SELF),
    ZooModel("falcon_sequential", {**NO_DIM, "parallel_attn": False, "multi_query": False, "alibi": True, "bias": True},
        "sequential residual, ALiBi", variant_of="falcon", writes=SELF),
    ZooModel("cohere", {"logit_scale": 0.25}, "parallel residual, logit scale"),
    ZooModel("cohere2", {**MIXED, "logit_scale": 0.25}, "parallel residual, logit scale"),
    ZooModel("granite", GRANITE, "residual, logit and embedding multipliers", writes=("0.22 * self_attn",
        "0.22 * mlp")),
    ZooModel("granitemoe", {**GRANITE, "num_local_experts": 4}, "multipliers, experts", writes=("0.22 * self_attn",
        "0.22 * block_sparse_moe")),
    ZooModel("granitemoeshared", {**GRANITE, **SHARED}, "multipliers, experts and a shared FFN summed",
        writes=("0.22 * self_attn", "0.22 * block_sparse_moe + 0.22 * shared_mlp")),
    ZooModel("granitemoehybrid", {**GRANITE, **MAMBA2, **SHARED, "layer_types": ["mamba", "mamba", "attention",
        "mamba"]}, "Mamba-2 and attention layers", writes=("0.22 * mamba",
        "0.22 * block_sparse_moe + 0.22 * shared_mlp")),
    ZooModel("deepseek_v2", MLA, "latent attention, experts"),
    ZooModel("deepseek_v3", {**MLA, "n_group": 2, "topk_group": 1}, "latent attention, experts"),
    ZooModel("glm4", note="post-norms", writes=("post_self_attn_layernorm", "post_mlp_layernorm")),
    ZooModel("glm4_moe", {**MLA, "head_dim": 8, "num_key_value_heads": 2, "n_group": 2, "topk_group": 1}),
    ZooModel("starcoder2", NO_DIM, "LayerNorm"),
    ZooModel("smollm3", {"no_rope_layer_interval": 2}, "layers without rotary positions"),
    ZooModel("exaone4", MIXED, "norms after the block only", writes=POST),
    ZooModel("gpt_oss", {**MIXED, **EXPERTS}, "sinks, experts"),
    ZooModel("bamba", {**MAMBA2, "attn_layer_indices": [2], **NO_DIM}, "Mamba-2 and attention layers", writes=MAMBA),
    ZooModel("jamba", {"num_experts": 4, "attn_layer_period": 4, "attn_layer_offset": 2, "mamba_d_state": 8,
        "mamba_dt_rank": 4, "use_mamba_kernels": False, **NO_DIM}, "Mamba and attention layers, experts", writes=MAMBA),
    ZooModel("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "FFN without a module of its own", writes=FC2),
    ZooModel("bloom", {"n_head": 4}, "residual added inside the submodules", writes=("self_attention.dense",
        "mlp.dense_4h_to_h")),
    ZooModel("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 4, "expansion_ratio": 2}, "residual added in the FFN",
        writes=("attn.out_proj", "ffn.down_proj")),
    ZooModel("stablelm_parallel", {"use_parallel_residual": True}, "parallel residual", variant_of="stablelm"),
    ZooModel("nemotron", note="squared ReLU"),
    ZooModel("biogpt", note="FFN without a module of its own", writes=FC2),
    ZooModel("xglm", {"d_model": 32, "ffn_dim": 48, "num_layers": 4, "attention_heads": 4}, writes=FC2),
    ZooModel("hyperclovax", {"logits_scaling": 4.0}, "post-norms, logit multiplier", writes=("post_norm1",
        "post_norm2")),
    ZooModel("dots1", {**MLA, "head_dim": 8, "num_key_value_heads": 2, "n_group": 2, "topk_group": 1}),
    ZooModel("lfm2", {"layer_types": ["conv", "conv", FULL, "conv"]}, "short convolutions", writes=("conv",
        "feed_forward")),
    ZooModel("bitnet", note="norms inside attention and FFN"),
    ZooModel("vaultgemma", MIXED),
    ZooModel("falcon_h1", {**MAMBA2, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5, "attention_out_multiplier": 0.7},
        "Mamba-2 beside attention in every layer", writes=("mamba + 0.7 * self_attn", "feed_forward")),
    ZooModel("recurrent_gemma", {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 8,
        "intermediate_size": 96}, "linear recurrences", writes=("temporal_block", "mlp_block")),
    ZooModel("minimax", {"num_local_experts": 4, "block_size": 8, "layer_types": [LIN, FULL] * 2}, refused=NO_SUM),
    ZooModel("nemotron_h", {"layers_block_type": ["mamba", "attention", "moe", "mamba"], "mamba_num_heads": 4,
        "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8, "n_routed_experts": 4,
        "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16}, "one mixer per layer", refused=ONE),
    ZooModel("mamba", {"state_size": 8}, "one mixer per layer", refused=ONE),
    ZooModel("mamba2", {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}, refused=ONE),
    ZooModel("rwkv", {"attention_hidden_size": 32}, refused=NO_SUM, generates=False),
    ZooModel("zamba2", {"mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 4, "chunk_size": 8,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 1}, refused=ONE),
    ZooModel("gemma3n_text", {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
        "num_kv_shared_layers": 0, "activation_sparsity_pattern": None, **MIXED}, refused="final norm does not receive",
        unreadable=True),
)
# fmt: on
BY_NAME = {entry.name: entry for entry in ZOO}


def zoo_model(name: str, *, spread: float = 4.0) -> Any:
    """A random model in evaluation mode; ``spread`` widens the weights so that layers differ visibly."""
    torch.manual_seed(0)
    entry = BY_NAME[name]
    options = {k: v for k, v in {**COMMON, **entry.options}.items() if v is not None}
    config = AutoConfig.for_model(entry.family, **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for module in model.modules():
            for kind, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2 and kind == "weight" and isinstance(module, nn.Linear):
                    parameter.mul_(spread)
                elif kind == "weight" and parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
