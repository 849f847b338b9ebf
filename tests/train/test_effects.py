"""Every setting of the trainer that a recipe accepts changes the trained weights or the log of a tiny run."""

import pytest

from tests.support.training import same_weights, trained, untimed_log, weights

CISPO, SAPO, VESPO = {"loss_type": "cispo"}, {"loss_type": "sapo"}, {"loss_type": "vespo"}
ADAPTIVE = {"use_adaptive_entropy": True, "entropy_target": 9.0}
# what a setting needs, and the setting
CASES = [
    *(({}, {name: value}) for name, value in {
        "lr_scheduler_type": "cosine", "optim": "adafactor", "weight_decay": 0.5, "adam_beta1": 0.5, "adam_beta2": 0.5,
        "adam_epsilon": 1e-2, "max_grad_norm": 0.01, "neftune_noise_alpha": 5.0, "shuffle_dataset": False,
        "pad_to_multiple_of": 32, "temperature": 0.7, "top_p": 0.5, "top_k": 3, "min_p": 0.3, "num_iterations": 2,
        "generation_kwargs": {"num_beams": 2}, "epsilon": 0.001, "epsilon_high": 0.001, "delta": 1.0001,
        "loss_type": "dr_grpo", "importance_sampling_level": "sequence", "reward_weights": [2.0],
        "multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none", "seed": 4,
        "mask_truncated_completions": True, "top_entropy_quantile": 0.3, "entropy_coef": 0.1,
        "use_adaptive_entropy": True, "off_policy_mask_threshold": 0.001, "logging_steps": 2,
        "logging_first_step": True, "max_completion_length": 5, "num_generations": 2, "steps_per_generation": 2,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "trained_layers": "2", "frozen_layers": "1-2",
        "internal_steps": 1, "estimator": "rloo",
    }.items()),
    ({"lr_scheduler_type": "linear"}, {"warmup_steps": 3}), (CISPO, {"epsilon_high": 0.001}),
    (SAPO, {"sapo_temperature_neg": 3.0}), (SAPO, {"sapo_temperature_pos": 3.0}),
    (SAPO, {"importance_sampling_level": "sequence"}), (VESPO, {"vespo_k_pos": 5.0}), (VESPO, {"vespo_k_neg": 5.0}),
    (VESPO, {"vespo_lambda_pos": 5.0}), (VESPO, {"vespo_lambda_neg": 5.0}), (ADAPTIVE, {"entropy_coef_delta": 0.1}),
    (ADAPTIVE, {"entropy_target": 0.1}), ({"use_adaptive_entropy": True}, {"entropy_coef_min": 0.5}),
    ({**ADAPTIVE, "entropy_coef_delta": 0.1}, {"entropy_coef_max": 0.01}),
    ({"lr_scheduler_type": "polynomial"}, {"lr_scheduler_kwargs": {"power": 3.0}}),
    ({"optim": "sgd"}, {"optim_args": "momentum=0.9"}),
    ({"internal_steps": 1}, {"internal_layer": 3}), ({"internal_steps": 1}, {"internal_temperature": 2.0}),
    ({"internal_steps": 1}, {"internal_lens": "norm"}),
    ({"upper_learning_rate_above": 2, "upper_learning_rate_scale": 0.5}, {"upper_learning_rate_scale": 0.1}),
    ({"upper_learning_rate_scale": 0.5, "upper_learning_rate_above": 2}, {"upper_learning_rate_above": 3}),
]  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Weights and log of a run, made once per collection of settings."""
    made = {}

    def run(settings):
        if (key := str(sorted(settings.items()))) not in made:
            folder = tmp_path_factory.mktemp("run")
            trainer = trained(folder, **{"internal_steps": 0, "max_steps": 4, **settings})
            log = [
                {k: v for k, v in row.items() if not k.startswith(("train_", "epoch"))} for row in untimed_log(trainer)
            ]
            made[key] = weights(trainer.model), log
        return made[key]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("needed", "setting"), CASES, ids=lambda value: ",".join(value) or "-")
def test_a_setting_has_an_effect(measured, needed, setting):
    before, after = measured(needed), measured({**needed, **setting})
    assert not same_weights(before[0], after[0]) or before[1] != after[1]
