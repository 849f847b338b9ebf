"""The trainer: what an internal phase changes and what it must not, on tiny random models."""

import math
from unittest import mock

import pytest
import torch
from transformers.models.mixtral import modeling_mixtral
from trl import GRPOConfig, GRPOTrainer

from bupo.errors import ConfigError, TrainingStopped
from bupo.models.internal_policy import internal_policy
from bupo.train import trainer as trainer_module
from bupo.train.config import BuPOConfig
from bupo.train.diagnostics import LayerChoice
from bupo.train.schedule import FULL
from bupo.train.trainer import BuPOTrainer
from tests.support.distributed import responses
from tests.support.tiny import tiny_model
from tests.support.training import (
    LORA,
    Gradients,
    L,
    Recorder,
    above,
    config,
    even_share,
    internal_logps,
    losses,
    make_trainer,
    moved,
    phases,
    prompts,
    same_weights,
    surrogate,
    tiny_tokenizer,
    trained,
    untimed_log,
    weights,
)

SCALED = {"upper_learning_rate_scale": 0.1, "upper_learning_rate_above": 2}
SPANNING = {"steps_per_generation": 3, "gradient_accumulation_steps": 2}  # an update spans two rollout batches
FOREIGN = (torch.optim.SGD([torch.zeros(1)], 0.1), None)
PLAIN = [
    {"steps_per_generation": 4},
    {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 2},
    {"steps_per_generation": 1, "max_steps": 10},
    {"steps_per_generation": 2, "num_iterations": 2, "beta": 0.1, "entropy_coef": 0.01, "lr_scheduler_type": "linear"},
]


@pytest.mark.parametrize("settings", PLAIN)
def test_without_internal_steps_it_is_trls_trainer_bit_for_bit(tmp_path, settings):
    settings = {"lr_scheduler_type": "constant", "logging_steps": 1, "max_steps": 9, **settings}
    data = prompts(4 * 2)  # more than one pass over the data
    folder = str(tmp_path / "start")
    tiny_model("qwen3", spread=3.0).save_pretrained(folder)
    args = config(tmp_path / "theirs", kind=GRPOConfig, **settings)
    theirs = trained(tmp_path, GRPOTrainer, args, folder, train_dataset=data)
    ours = trained(tmp_path / "ours", BuPOTrainer, None, folder, train_dataset=data, internal_steps=0, **settings)
    assert len(losses(ours)) == settings["max_steps"]
    assert same_weights(weights(theirs.model), weights(ours.model))
    for a, b in zip(untimed_log(theirs), untimed_log(ours), strict=True):
        assert a == {k: v for k, v in b.items() if k not in ("phase", "rollout")}


def test_arguments_may_be_positional_or_left_out_as_for_trls_trainer(tmp_path, monkeypatch):
    class OnCpu(BuPOConfig):  # TRL's default dtype needs an accelerator
        def __init__(self, folder):
            super().__init__(folder, use_cpu=True, bf16=False)

    monkeypatch.setattr("bupo.train.trainer.BuPOConfig", OnCpu)
    args, data = OnCpu(str(tmp_path)), prompts(8)
    bare = BuPOTrainer(tiny_model(), even_share, train_dataset=data, processing_class=tiny_tokenizer())
    assert bare.args.output_dir == "model-BuPO"
    trainer = BuPOTrainer(tiny_model(), even_share, args, data, data, tiny_tokenizer())
    assert (trainer.train_dataset, trainer.eval_dataset, trainer.args) == (data, data, args)
    with pytest.raises(ConfigError, match="needs a BuPOConfig, not GRPOConfig"):
        make_trainer(tmp_path, BuPOTrainer, config(tmp_path, kind=GRPOConfig))


@pytest.mark.parametrize("settings", [{"weight_decay": 0.1}, {"gradient_checkpointing": True}, {"peft_config": LORA}])
def test_upper_layers_have_no_gradient_and_stay_bit_for_bit(tmp_path, settings):
    seen = Gradients()
    trainer = make_trainer(tmp_path, internal_steps=1, callbacks=[seen], **settings)
    start, middle = weights(trainer.model), {}
    trainer.on_rollout.append(lambda batch, rollout: rollout and middle.update(weights(trainer.model)))
    trainer.train()
    names = {name for name in start if "peft_config" not in settings or "lora" in name}
    used = {n for n in names if not above(n, 2)}
    assert [set(update) for update in seen.updates] == [used] * 4 + [names] * 4
    assert moved(start, middle) == used
    assert moved(middle, weights(trainer.model)) == names


REFERENCE = [
    {},
    {"loss_type": "grpo"},
    {"loss_type": "bnpo"},
    {"loss_type": "dr_grpo", "scale_rewards": "none"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"internal_layer": L},
    {"internal_layer": 1, "internal_lens": "norm"},
    {"internal_lens": "ridge", "internal_lens_tokens": 60},
    {"epsilon": 0.05, "epsilon_high": 0.1},
    {"internal_temperature": 2.0},
]


@pytest.mark.parametrize("settings", REFERENCE)
def test_the_loss_is_the_clipped_surrogate_of_the_internal_policy(tmp_path, settings):
    trainer = trained(tmp_path, Recorder, internal_steps=1, max_steps=5, **settings)
    loss_type, level = settings.get("loss_type", "dapo"), settings.get("importance_sampling_level", "token")
    low = settings.get("epsilon", 0.2)
    layer, norm = settings.get("internal_layer", 2), settings.get("internal_lens", "raw") != "raw"
    temperature, lens = settings.get("internal_temperature", 1.0), trainer.lens.lens
    clipped, (start, inputs, _, logps) = 0, trainer.seen[0]
    mask = inputs["completion_mask"].bool()
    assert torch.equal(logps[mask], inputs["old_per_token_logps"][mask])  # the ratio is exactly one before any update
    for model, inputs, loss, _ in trainer.seen[:4]:
        with torch.no_grad():
            old, logps = (internal_logps(one, inputs, layer, norm, temperature, lens)[0] for one in (start, model))
            high = settings.get("epsilon_high", low)
            expected = surrogate(logps, old, inputs, loss_type, level, low=low, high=high)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
        mask = inputs["completion_mask"].bool()
        torch.testing.assert_close(inputs["old_per_token_logps"][mask], old[mask], rtol=1e-4, atol=1e-5)
        clipped += ((logps - old).exp() - 1).abs()[mask].gt(low).sum().item()
    assert clipped > 0  # clipping was tested, not only ratio 1
    # the fifth micro-batch, in the full phase, is the full policy's
    model, inputs, loss, _ = trainer.seen[4]
    with torch.no_grad():
        logps, _ = internal_logps(model, inputs, L, norm=True)
        expected = surrogate(logps, logps, inputs, loss_type, level)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert trainer.state.log_history[0].get("internal/temperature", 1.0) == temperature


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with one internal rollout batch, measured on all its responses, and one of the full policy."""
    settings = {"internal_steps": 1, "probe_samples": 16, "max_grad_norm": 0.0, "per_device_eval_batch_size": 4}
    gradients = Gradients()
    trainer = trained(tmp_path_factory.mktemp("run"), Recorder, callbacks=[gradients], **settings)
    trainer.gradients = gradients.updates
    return trainer


def test_the_gradient_is_the_references(run):
    model, inputs, _, _ = run.seen[0]
    model.zero_grad()
    logps, _ = internal_logps(model, inputs, 2)
    surrogate(logps, logps.detach(), inputs).backward()
    for name, parameter in model.named_parameters():
        if not above(name, 2):
            unit = parameter.grad.abs().max().item()
            torch.testing.assert_close(run.gradients[0][name], parameter.grad, rtol=1e-3, atol=1e-5 * unit, msg=name)


def test_samples_and_advantages_are_the_full_policys(tmp_path, run):
    plain = trained(tmp_path, Recorder, internal_steps=0, max_steps=4)
    for (_, a, _, _), (_, b, _, _) in zip(run.seen[:4], plain.seen, strict=True):
        assert torch.equal(a["completion_ids"], b["completion_ids"])
        assert torch.equal(a["advantages"], b["advantages"])
        assert not torch.equal(a["old_per_token_logps"], b["old_per_token_logps"])


def test_upper_layers_run_for_sampling_and_monitoring_only(tmp_path):
    trainer = make_trainer(tmp_path, internal_steps=2, probe_samples=4, rollout_func=responses)
    calls = {1: 0, 2: 0}  # of layers 2 and 3
    for index in calls:
        trainer.model.model.layers[index].register_forward_hook(
            lambda *_, index=index: calls.__setitem__(index, calls[index] + 1)
        )
    trainer.train()
    # a rollout batch: 4 micro-batches of old log-probabilities, 4 of the loss, and 1 measurement by each policy; before
    # that of the second one also the full policy on the first one's measured responses, for the transfer
    assert calls == {1: 2 * (4 + 4 + 2) + 1, 2: 2 * 1 + 1}


def test_metrics_carry_the_name_of_the_policy_they_belong_to(run):
    first, second = run.state.log_history[:2]
    assert (first["phase"], first["rollout"], second["phase"], second["rollout"]) == (1, 1, 2, 2)
    start, internal, full = run.seen[0][0], [], []
    for model, inputs, _, _ in run.seen[:4]:
        mask = inputs["completion_mask"].bool()
        with torch.no_grad():
            internal.append(internal_logps(model, inputs, 2)[1][mask].mean().item())
            logps, entropies = internal_logps(start, inputs, L, norm=True)
            old, _ = internal_logps(start, inputs, 2)
        full.append(torch.stack([entropies, -logps, logps - old])[:, mask])
    entropy, surprisal, divergence = torch.cat(full, dim=1).mean(dim=1).tolist()
    assert first["internal/entropy"] == pytest.approx(sum(internal) / 4, rel=1e-4)  # mean over micro-batches
    assert first["entropy"] == pytest.approx(entropy, rel=1e-4)
    assert first["perplexity"] == pytest.approx(math.exp(surprisal), rel=1e-4)
    assert first["internal/divergence"] == pytest.approx(divergence, rel=1e-4)
    assert 0 <= first["repetition"] <= 1
    assert "clip_ratio/region_mean" not in first
    assert first["internal/clip_ratio/region_mean"] > 0
    assert not any(name.startswith("internal/") for name in second)
    assert {"entropy", "clip_ratio/region_mean", "reward", "completions/mean_length"} <= set(second)


def test_evaluation_is_the_full_policys(run, monkeypatch):
    monkeypatch.setattr(run, "phase", run.schedule.at(0))
    metrics = run.evaluate(prompts(2))
    model, inputs, _, logps = run.seen[-1]
    with torch.no_grad():
        expected, _ = internal_logps(model, inputs, L, norm=True)
    mask = inputs["completion_mask"].bool()
    torch.testing.assert_close(logps[mask], expected[mask], rtol=1e-4, atol=1e-5)
    assert "eval_entropy" in metrics
    assert not any("internal" in name for name in metrics)


def test_mixture_of_experts_balances_the_layers_that_run(tmp_path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.01}
    model = tiny_model("qwen3_moe", spread=3.0, **experts)
    balance = modeling_mixtral.load_balancing_loss_func
    with mock.patch.object(modeling_mixtral, "load_balancing_loss_func", wraps=balance) as called:
        trainer = trained(tmp_path, model=model, internal_steps=1, updates_per_rollout=2, max_steps=4)
    assert [len(call.args[0]) for call in called.call_args_list] == [2, 2, L, L]
    assert "aux_loss" in trainer.state.log_history[0]


def test_the_joint_loss_is_the_weighted_sum_of_both_surrogates(tmp_path):
    trainer = trained(tmp_path, Recorder, phases=[{"layer": 2, "rollouts": 1, "weight": 0.3}], max_steps=5)
    start, after = trainer.seen[0][0], trainer.seen[4][0]
    for model, inputs, loss, _ in trainer.seen[:4]:
        both = []
        for layer, norm in ((2, False), (L, True)):
            with torch.no_grad():
                old, _ = internal_logps(start, inputs, layer, norm)
                logps, _ = internal_logps(model, inputs, layer, norm)
                both.append(surrogate(logps, old, inputs))
        torch.testing.assert_close(loss, 0.3 * both[0] + 0.7 * both[1], rtol=1e-4, atol=1e-6)
    first = trainer.state.log_history[0]
    assert {"entropy", "internal/entropy", "clip_ratio/low_mean", "internal/clip_ratio/low_mean"} <= set(first)
    assert first["phase"] == 1
    assert moved(weights(start), weights(after)) == set(weights(start))  # every layer learns in the joint phase


def test_auto_without_a_boundary_stops_and_lists_the_candidates(tmp_path):
    model = tiny_model("qwen3", spread=3.0)
    with torch.no_grad():
        for layer in model.model.layers:  # FFNs whose output is large: their policies have little entropy
            layer.mlp.down_proj.weight.mul_(40)
    trainer = make_trainer(tmp_path, model=model, internal_layer="auto", internal_steps=1)
    with pytest.raises(TrainingStopped, match=r"auto: .*Candidates: .*layers with a positive FFN .*number up to 4"):
        trainer.train()
    assert (trainer.auto_layer.analysis["layers"], trainer.auto_layer.analysis["samples"]) == (L, 16)


def test_a_layer_found_by_analysis_that_is_frozen_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "choose_layer", lambda *_: LayerChoice(2, "boundary layer 2"))
    trainer = make_trainer(tmp_path, internal_layer="auto", internal_steps=1, frozen_layers="1-2")
    with pytest.raises(TrainingStopped, match="boundary layer 2; frozen_layers 1-2 freezes every layer"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"internal_layer": 5, "internal_steps": 1}, "layer 5 does not exist: this model has layers 1 to 4"),
        ({"phases": [{"layer": 1, "rollouts": 1}, {"layer": 9, "rollouts": 1}]}, "layer 9 does not exist"),
        ({"train_dataset": prompts(9), "internal_steps": 4, "max_steps": 6, **SPANNING}, "of a pass over the data"),
        ({"train_dataset": prompts(3)}, "has 3 prompts, fewer than the 4"),
        ({"use_transformers_continuous_batching": True, "bf16": True}, "would turn the trained weights to bfloat16"),
        ({"use_transformers_continuous_batching": True, "fp16": True}, "would turn the trained weights to float16"),
        ({"frozen_layers": "4-5"}, "frozen_layers: layer 5 does not exist: this model has layers 1 to 4"),
        ({**SCALED, "upper_learning_rate_above": 9}, "upper_learning_rate_above: layer 9"),
        ({**SCALED, "upper_learning_rate_above": 4}, "no layer is above 4; set a lower one"),
        ({**SCALED, "optimizers": FOREIGN}, "upper_learning_rate_scale needs the trainer's own optimizer; do not pass"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, settings, part):
    with pytest.raises(ConfigError, match=part):
        make_trainer(tmp_path, **settings)


@pytest.mark.parametrize("internal_steps", [0, 1])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_update(tmp_path, internal_steps):
    trainer, damaged = make_trainer(tmp_path, internal_steps=internal_steps), {}

    def damage(batch, rollout):
        with torch.no_grad():
            trainer.model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
        damaged.update(weights(trainer.model))

    trainer.on_rollout.append(damage)
    with pytest.raises(TrainingStopped, match=r"non-finite loss in update 1 \(rollout batch 1, (internal|full) phase"):
        trainer.train()
    torch.testing.assert_close(weights(trainer.model), damaged, rtol=0, atol=0, equal_nan=True)
    trainer = make_trainer(tmp_path, internal_steps=internal_steps)
    trainer.model.model.layers[0].mlp.down_proj.weight.register_hook(lambda grad: grad * float("inf"))
    before = weights(trainer.model)
    with pytest.raises(TrainingStopped, match="non-finite gradient in update 1"):
        trainer.train()
    assert same_weights(before, weights(trainer.model))


def test_nothing_is_left_shadowed_after_an_error(tmp_path):
    trainer = make_trainer(tmp_path, internal_steps=2)
    trainer.reward_funcs[0] = lambda **_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer._scored is FULL
    with internal_policy(trainer.model, 1):  # not inside another context
        pass


def sampler(trainer_prompts, trainer):
    """Stands in for another engine: samples from the full policy, with log-probabilities that are a little off."""
    sampled, logps = responses(trainer_prompts, trainer), []
    for prompt, response in zip(sampled["prompt_ids"], sampled["completion_ids"], strict=True):
        with torch.no_grad():
            logits = trainer.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        exact = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        logps.append([value + 0.03 * (token % 4) for value, token in zip(exact.tolist(), response, strict=True)])
    return {**sampled, "logprobs": logps}


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_the_sampling_correction_compares_sampler_and_full_policy_in_both_phases(tmp_path, mode):
    settings = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 3.0}
    trainer = make_trainer(tmp_path, Recorder, internal_steps=1, rollout_func=sampler, **settings)
    trainer.use_vllm = True  # as with the engine; its weights need no syncing here
    trainer._last_loaded_step = 0
    trainer.vllm_generation = type("Engine", (), {"sync_weights": lambda self: None})()
    trainer.train()
    for start, layer, norm in ((0, 2, False), (4, L, True)):
        model_then = trainer.seen[start][0]
        for model, inputs, loss, _ in trainer.seen[start : start + 4]:
            mask = inputs["completion_mask"]
            with torch.no_grad():
                full, _ = internal_logps(model_then, inputs, L, norm=True)
                old, _ = internal_logps(model_then, inputs, layer, norm)
                logps, _ = internal_logps(model, inputs, layer, norm)
            difference = (full - inputs["sampling_per_token_logps"]) * mask
            if mode == "sequence_mask":
                difference = difference.sum(-1, keepdim=True)
            correction = difference.exp()  # the clip at 3 is out of reach
            torch.testing.assert_close(inputs["importance_sampling_ratio"], correction, rtol=1e-4, atol=1e-5)
            scored = inputs["old_per_token_logps"][mask.bool()]
            torch.testing.assert_close(scored, old[mask.bool()], rtol=1e-4, atol=1e-5)
            expected = surrogate(logps, old, {**inputs, "completion_mask": mask * correction})
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_continuous_batching_samples_in_both_phases(tmp_path):
    cache = {"num_blocks": 64, "max_batch_tokens": 64}  # else it takes as much of the memory as it can
    engine = {"use_transformers_continuous_batching": True, "transformers_continuous_batching_config": cache}
    trainer = trained(tmp_path, internal_steps=1, **engine)
    assert phases(trainer) == [1, 2]
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
