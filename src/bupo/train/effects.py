"""Settings of the trainer that a recipe would give in vain: each is refused, with what it needs."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

# what TRL's GRPO trainer or bupo decides in another way; no other setting makes a difference
NEVER = (
    "auto_find_batch_size average_tokens_across_devices batch_eval_metrics bf16_full_eval data_seed "
    "dataloader_drop_last disable_tqdm do_eval do_predict do_train eval_accumulation_steps eval_do_concat_batches "
    "eval_use_gather_object fp16_full_eval include_for_metrics include_num_input_tokens_seen "
    "label_names label_smoothing_factor length_column_name local_rank log_multimodal "
    "logging_nan_inf_filter max_tool_calling_iterations prediction_loss_only "
    "train_sampling_strategy"
)
_VLLM = (
    "vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_max_model_length vllm_model_impl vllm_tensor_parallel_size"
)
_SERVER = "vllm_group_port vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout"
_CORRECTION = " ".join(f"vllm_importance_sampling_{name}" for name in ("cap", "clip_max", "clip_min", "mode"))
_PHASE = "internal_layer internal_lens internal_lens_refit internal_lens_tokens internal_max_steps internal_temperature"
# what settings need, whether that is so, and their names
NEEDS: list[tuple[str, Callable[[Any], Any], str]] = [
    ("internal_steps (0 is plain GRPO) or phases", lambda s: s.internal_steps is not None or s.phases or s.inside_every,
     f"{_PHASE} probe_samples"),
    ("use_vllm", lambda s: s.use_vllm, f"vllm_mode {_VLLM} {_SERVER} {_CORRECTION} vllm_importance_sampling_correction "
     "vllm_structured_outputs_regex"),
    ("vllm_mode server", lambda s: s.vllm_mode == "server", _SERVER),
    ("vllm_mode colocate", lambda s: s.vllm_mode == "colocate", _VLLM),
    ("vllm_importance_sampling_correction", lambda s: s.vllm_importance_sampling_correction, _CORRECTION),
    ("use_vllm false", lambda s: not s.use_vllm, "cache_implementation use_transformers_continuous_batching"),
    ("use_transformers_continuous_batching", lambda s: s.use_transformers_continuous_batching,
     "transformers_continuous_batching_config"),
    ("loss_type sapo", lambda s: s.loss_type == "sapo", "sapo_temperature_neg sapo_temperature_pos"),
    ("loss_type vespo", lambda s: s.loss_type == "vespo", "vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos"),
    ("a loss_type that clips", lambda s: s.loss_type not in ("sapo", "vespo"), "epsilon epsilon_high"),
    ("a loss_type that clips on both sides", lambda s: s.loss_type not in ("sapo", "vespo", "cispo"), "delta"),
    ("epsilon_high left out, as loss_type cispo clips above only", lambda s: s.loss_type != "cispo" or
     s.epsilon_high is None, "epsilon"),
    ("beta above 0", lambda s: s.beta, "sync_ref_model use_bias_correction_kl"),
    ("sync_ref_model", lambda s: s.sync_ref_model, "ref_model_mixup_alpha ref_model_sync_steps"),
    ("use_adaptive_entropy", lambda s: s.use_adaptive_entropy,
     "entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target"),
    ("an lr_scheduler_type that warms up, such as constant_with_warmup",
     lambda s: s.lr_scheduler_type not in ("constant", "reduce_lr_on_plateau"), "warmup_steps"),
    ("an lr_scheduler_type other than constant", lambda s: s.lr_scheduler_type != "constant", "lr_scheduler_kwargs"),
    ("an optim other than adamw_torch and adafactor",
     lambda s: s.optim not in ("adamw_torch", "adamw_torch_fused", "adafactor"), "optim_args"),
    ("a galore or apollo optim", lambda s: s.optim.startswith(("galore", "apollo")), "optim_target_modules"),
    ("gradient_checkpointing", lambda s: s.gradient_checkpointing, "gradient_checkpointing_kwargs"),
    ("use_liger_kernel", lambda s: s.use_liger_kernel, "liger_kernel_config"),
    ("fsdp", lambda s: s.fsdp, "fsdp_config"),
    ("dataloader_num_workers", lambda s: s.dataloader_num_workers, "dataloader_multiprocessing_context "
     "dataloader_persistent_workers dataloader_prefetch_factor"),
    ("log_completions", lambda s: s.log_completions, "log_completions_hub_repo log_unique_prompts "
     "num_completions_to_print"),
    ("push_to_hub", lambda s: s.push_to_hub, "hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy "
     "hub_token"),
    ("report_to", lambda s: s.report_to, "run_name"),
    ("report_to trackio", lambda s: "trackio" in s.report_to, "project trackio_bucket_id trackio_space_id "
     "trackio_static_space_id"),
    ("eval", lambda s: s.eval, "eval_delay eval_on_start load_best_model_at_end"),
    ("load_best_model_at_end", lambda s: s.load_best_model_at_end, "greater_is_better metric_for_best_model"),
]  # fmt: skip


def without_effect(given: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """One message for each setting in ``given`` that differs from its default and has no effect beside the others."""
    settings, changed = SimpleNamespace(**{**defaults, **given}), {n for n in given if given[n] != defaults.get(n)}
    problems = [f"{name} has no effect in bupo train; leave it out" for name in sorted(changed & {*NEVER.split()})]
    for need, holds, names in NEEDS:
        unused = [] if holds(settings) else sorted(changed & set(names.split()))
        problems += [f"{name} has no effect without {need}" for name in unused]
    return problems
