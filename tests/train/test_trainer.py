"""The trainer: what an internal phase changes and what it must not, on tiny random models."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from bupo.errors import ConfigError, TrainingStopped
from bupo.models.internal_policy import internal_policy
from bupo.train import trainer as trainer_module
from bupo.train.auto_layer import LayerChoice
from bupo.train.schedule import FULL
from bupo.train.trainer import BuPOTrainer
from tests.support.tiny import tiny_model
from tests.support.training import (
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

# -- plain GRPO ------------------------------------------------------------------------------------------------------

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
    added = {"phase", "rollout"}
    for a, b in zip(untimed_log(theirs), untimed_log(ours), strict=True):
        assert a == {k: v for k, v in b.items() if k not in added}


def test_arguments_may_be_positional_as_for_trls_trainer(tmp_path):
    args, data = config(tmp_path), prompts(8)
    trainer = BuPOTrainer(tiny_model(), even_share, args, data, data, tiny_tokenizer())
    assert (trainer.train_dataset, trainer.eval_dataset, trainer.args) == (data, data, args)


# -- the internal phase ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_upper_layers_have_no_gradient_and_stay_bit_for_bit(tmp_path, checkpointing):
    seen = Gradients()
    trainer = make_trainer(
        tmp_path, internal_steps=1, gradient_checkpointing=checkpointing, weight_decay=0.1, callbacks=[seen]
    )
    start = weights(trainer.model)
    middle = {}
    trainer.on_rollout.append(lambda batch, rollout: rollout and middle.update(weights(trainer.model)))
    trainer.train()
    names = {name for name, _ in trainer.model.named_parameters()}
    used = {n for n in names if not above(n, 2)}
    assert [set(update) for update in seen.updates] == [used] * 4 + [names] * 4
    assert moved(start, middle) == used
    assert moved(middle, weights(trainer.model)) == names


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 4}]
)
def test_the_ratio_is_exactly_one_before_the_first_update_of_a_rollout_batch(tmp_path, settings):
    trainer = trained(tmp_path, Recorder, internal_steps=1, **settings)
    accumulation = settings.get("gradient_accumulation_steps", 1)
    assert len(trainer.seen) == 8
    for start in (0, 4):
        for at in range(start, start + accumulation):
            _, inputs, _, logps = trainer.seen[at]
            mask = inputs["completion_mask"].bool()
            assert torch.equal(logps[mask], inputs["old_per_token_logps"][mask])
        _, inputs, _, logps = trainer.seen[start + 3]
        assert not torch.equal(logps, inputs["old_per_token_logps"])


REFERENCE = [
    {},
    {"loss_type": "grpo"},
    {"loss_type": "bnpo"},
    {"loss_type": "dr_grpo", "scale_rewards": "none"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"internal_layer": L},
    {"internal_layer": 1, "internal_norm": True},
    {"epsilon": 0.05, "epsilon_high": 0.1},
    {"internal_temperature": 2.0},
]


@pytest.mark.parametrize("settings", REFERENCE)
def test_the_loss_is_the_clipped_surrogate_of_the_internal_policy(tmp_path, settings):
    trainer = trained(tmp_path, Recorder, internal_steps=1, max_steps=5, **settings)
    loss_type, level = settings.get("loss_type", "dapo"), settings.get("importance_sampling_level", "token")
    low = settings.get("epsilon", 0.2)
    layer, norm = settings.get("internal_layer", 2), settings.get("internal_norm", False)
    temperature = settings.get("internal_temperature", 1.0)

    def reference(model, inputs):
        if temperature == 1.0:
            return internal_logps(model, inputs, layer, norm)[0]
        with torch.no_grad():
            model.lm_head.weight.div_(temperature)
            logps = internal_logps(model, inputs, layer, norm)[0]
            model.lm_head.weight.mul_(temperature)
        return logps

    clipped, start = 0, trainer.seen[0][0]
    for model, inputs, loss, _ in trainer.seen[:4]:
        with torch.no_grad():
            old, logps = reference(start, inputs), reference(model, inputs)
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
    first = trainer.state.log_history[0]
    assert first.get("internal/temperature", 1.0) == temperature


def test_the_gradient_is_the_references(tmp_path):
    seen = Gradients()
    trainer = trained(tmp_path, Recorder, internal_steps=1, max_steps=4, max_grad_norm=0.0, callbacks=[seen])
    model, inputs, _, _ = trainer.seen[0]
    model.zero_grad()
    logps, _ = internal_logps(model, inputs, 2)
    surrogate(logps, logps.detach(), inputs).backward()
    for name, parameter in model.named_parameters():
        if not above(name, 2):
            unit = parameter.grad.abs().max().item()
            torch.testing.assert_close(seen.updates[0][name], parameter.grad, rtol=1e-3, atol=1e-5 * unit, msg=name)


def test_samples_and_advantages_are_the_full_policys(tmp_path):
    internal = trained(tmp_path / "a", Recorder, internal_steps=2)
    plain = trained(tmp_path / "b", Recorder, internal_steps=0, max_steps=4)
    for (_, a, _, _), (_, b, _, _) in zip(internal.seen[:4], plain.seen, strict=True):
        assert torch.equal(a["completion_ids"], b["completion_ids"])
        assert torch.equal(a["advantages"], b["advantages"])
        assert not torch.equal(a["old_per_token_logps"], b["old_per_token_logps"])


def test_upper_layers_run_for_sampling_and_monitoring_only(tmp_path):
    trainer = make_trainer(tmp_path, internal_steps=2, probe_samples=4)
    calls, sampling = {"lower": 0, "upper": 0}, []
    generate = trainer.model.generate

    def counted(*args, **kwargs):
        sampling.append(1)
        try:
            return generate(*args, **kwargs)
        finally:
            sampling.pop()

    trainer.model.generate = counted
    for where, index in (("lower", 1), ("upper", 2)):
        trainer.model.model.layers[index].register_forward_hook(
            lambda m, i, o, where=where: calls.__setitem__(where, calls[where] + (not sampling))
        )
    trainer.train()
    # a rollout batch: 4 micro-batches of old log-probabilities, 4 of the loss, and 1 measurement by each policy; before
    # the second one also the full policy on the first one's measured responses, for the transfer
    assert calls == {"lower": 2 * (4 + 4 + 2) + 1, "upper": 2 * 1 + 1}


def test_metrics_carry_the_name_of_the_policy_they_belong_to(tmp_path):
    trainer = trained(tmp_path, Recorder, internal_steps=1, probe_samples=16)
    first, second = trainer.state.log_history[:2]
    assert (first["phase"], first["rollout"], second["phase"], second["rollout"]) == (1, 1, 2, 2)
    start, surprisal, distance, tokens, internal, full = trainer.seen[0][0], 0.0, 0.0, 0, [], []
    for model, inputs, _, _ in trainer.seen[:4]:
        mask = inputs["completion_mask"]
        with torch.no_grad():
            internal.append(internal_logps(model, inputs, 2)[1][mask.bool()].mean())
            logps, entropies = internal_logps(start, inputs, L, norm=True)
            old, _ = internal_logps(start, inputs, 2)
        full.append(entropies[mask.bool()])
        surprisal -= (logps * mask).sum().item()
        distance += ((logps - old) * mask).sum().item()
        tokens += mask.sum().item()
    assert first["internal/entropy"] == pytest.approx(sum(internal).item() / 4, rel=1e-4)  # mean over micro-batches
    assert first["entropy"] == pytest.approx(torch.cat(full).mean().item(), rel=1e-4)
    assert first["perplexity"] == pytest.approx(math.exp(surprisal / tokens), rel=1e-4)
    assert first["internal/divergence"] == pytest.approx(distance / tokens, rel=1e-4)
    assert 0 <= first["repetition"] <= 1
    assert "clip_ratio/region_mean" not in first
    assert first["internal/clip_ratio/region_mean"] > 0
    assert not any(name.startswith("internal/") for name in second)
    assert {"entropy", "clip_ratio/region_mean", "reward", "completions/mean_length"} <= set(second)


def test_evaluation_is_the_full_policys(tmp_path):
    args = config(tmp_path, internal_steps=1, max_steps=4, per_device_eval_batch_size=4)
    trainer = trained(tmp_path, Recorder, args)
    trainer.eval_dataset = prompts(2)
    trainer.seen.clear()
    metrics = trainer.evaluate()
    model, inputs, _, logps = trainer.seen[0]
    with torch.no_grad():
        expected, _ = internal_logps(model, inputs, L, norm=True)
    mask = inputs["completion_mask"].bool()
    torch.testing.assert_close(logps[mask], expected[mask], rtol=1e-4, atol=1e-5)
    assert "eval_entropy" in metrics
    assert not any("internal" in name for name in metrics)


def test_lora_trains_adapters_up_to_the_layer(tmp_path):
    seen = Gradients()
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    trainer = trained(tmp_path, internal_steps=1, peft_config=lora, callbacks=[seen])
    names = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora" in n for n in names)
    assert set(seen.updates[0]) == {n for n in names if not above(n, 2)}
    assert set(seen.updates[4]) == names


def test_mixture_of_experts_balances_the_layers_that_run(tmp_path, monkeypatch):
    from transformers.models.mixtral import modeling_mixtral

    routed, balance = [], modeling_mixtral.load_balancing_loss_func

    def counted(logits, *more):
        routed.append(len(logits))
        return balance(logits, *more)

    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", counted)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.01}
    model = tiny_model("qwen3_moe", spread=3.0, **experts)
    trainer = trained(tmp_path, model=model, internal_steps=1, updates_per_rollout=2, max_steps=4)
    assert routed == [2, 2, L, L]
    assert "aux_loss" in trainer.state.log_history[0]


# -- several phases, and the joint objective -------------------------------------------------------------------------


def test_phases_train_one_layer_after_the_other(tmp_path):
    seen = Gradients()
    several = [{"layer": 1, "rollouts": 1}, {"layer": 3, "rollouts": 2}]
    trainer = trained(tmp_path, phases=several, updates_per_rollout=2, callbacks=[seen])
    names = {name for name, _ in trainer.model.named_parameters()}
    for update, layer in zip(seen.updates, (1, 1, 3, 3, 3, 3, None, None), strict=True):
        assert set(update) == {n for n in names if layer is None or not above(n, layer)}
    assert phases(trainer) == [1, 1, 1, 2]


def test_internal_layer_and_steps_are_the_short_form_of_one_phase(tmp_path):
    one = trained(tmp_path / "a", phases=[{"layer": 2, "rollouts": 1}])
    two = trained(tmp_path / "b", internal_steps=1)
    assert losses(one) == losses(two)
    assert same_weights(weights(one.model), weights(two.model))


def test_the_joint_loss_is_the_weighted_sum_of_both_surrogates(tmp_path):
    trainer = make_trainer(tmp_path, Recorder, phases=[{"layer": 2, "rollouts": 1, "weight": 0.3}], max_steps=5)
    before = weights(trainer.model)
    trainer.train()
    start = trainer.seen[0][0]
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
    assert moved(before, weights(trainer.seen[4][0])) == set(before)  # every layer learns in the joint phase


# -- a layer found by analysis ---------------------------------------------------------------------------------------


def choose(monkeypatch, layer):
    monkeypatch.setattr(trainer_module, "choose_layer", lambda *_: LayerChoice(layer, f"boundary layer {layer}"))


def test_auto_equals_naming_the_layer(tmp_path, monkeypatch):
    choose(monkeypatch, 3)
    auto = trained(tmp_path / "a", internal_layer="auto", internal_steps=1)
    named = trained(tmp_path / "b", internal_layer=3, internal_steps=1)
    assert auto.schedule == named.schedule
    assert losses(auto) == losses(named)
    assert same_weights(weights(auto.model), weights(named.model))


def test_auto_without_a_boundary_stops_and_lists_the_candidates(tmp_path):
    model = tiny_model("qwen3", spread=3.0)
    with torch.no_grad():
        for layer in model.model.layers:  # FFNs whose output is large: their policies have little entropy
            layer.mlp.down_proj.weight.mul_(40)
    trainer = make_trainer(tmp_path, model=model, internal_layer="auto", internal_steps=1)
    before = weights(trainer.model)
    candidates = r"internal_layer auto: .*Candidates: .*layers with a positive FFN .*number up to 4"
    with pytest.raises(TrainingStopped, match=candidates):
        trainer.train()
    assert same_weights(before, weights(trainer.model))
    assert trainer.auto_layer.analysis["layers"] == L
    assert trainer.auto_layer.analysis["samples"] == 16
    assert trainer.model.training


def test_a_layer_found_by_analysis_that_is_frozen_stops(tmp_path, monkeypatch):
    choose(monkeypatch, 2)
    trainer = make_trainer(tmp_path, internal_layer="auto", internal_steps=1, frozen_layers=2)
    with pytest.raises(TrainingStopped, match="boundary layer 2; frozen_layers 2 freezes every layer"):
        trainer.train()


# -- what does not fit the model or the data -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"internal_layer": 5, "internal_steps": 1}, "layer 5 does not exist: this model has layers 1 to 4"),
        ({"phases": [{"layer": 1, "rollouts": 1}, {"layer": 9, "rollouts": 1}]}, "layer 9 does not exist"),
        ({"train_dataset": prompts(3)}, "has 3 prompts, fewer than the 4"),
        ({"use_transformers_continuous_batching": True, "bf16": True}, "would turn the trained weights to bfloat16"),
        ({"use_transformers_continuous_batching": True, "fp16": True}, "would turn the trained weights to float16"),
        ({"frozen_layers": 5}, "frozen_layers: layer 5 does not exist: this model has layers 1 to 4"),
        ({"upper_learning_rate_scale": 0.1, "upper_learning_rate_above": 9}, "upper_learning_rate_above: layer 9"),
        ({"upper_learning_rate_scale": 0.1, "upper_learning_rate_above": 4}, "no layer is above 4; set a lower one"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, settings, part):
    with pytest.raises(ConfigError, match=part):
        make_trainer(tmp_path, **settings)


def test_a_switch_inside_the_last_short_update_of_a_pass(tmp_path):
    # with one rollout batch per pass (3 micro-batches: updates of 2 and of 1) every switch begins a pass;
    # with three per pass (9 micro-batches) the one after 4 falls into an update of the second pass
    settings = {"steps_per_generation": 3, "gradient_accumulation_steps": 2, "internal_steps": 2, "max_steps": 6}
    make_trainer(tmp_path, train_dataset=prompts(3), **settings)
    with pytest.raises(ConfigError, match="of a pass over the data"):
        make_trainer(tmp_path, train_dataset=prompts(9), **{**settings, "internal_steps": 4})


def test_other_settings_objects_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="needs a BuPOConfig, not GRPOConfig"):
        make_trainer(tmp_path, BuPOTrainer, config(tmp_path, kind=GRPOConfig))


# -- training that must stop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("internal_steps", [0, 1])
def test_a_loss_that_is_not_finite_stops_with_the_update_named(tmp_path, internal_steps):
    trainer = make_trainer(tmp_path, internal_steps=internal_steps)
    before = {}

    class Damage(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
                before.update(weights(model))

    trainer.add_callback(Damage())
    with pytest.raises(TrainingStopped, match=r"non-finite loss in update 3 \(rollout batch 1, (internal|full) phase"):
        trainer.train()
    after = weights(trainer.model)
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    trainer = make_trainer(tmp_path, internal_steps=1)
    trainer.model.model.layers[0].mlp.down_proj.weight.register_hook(lambda grad: grad * float("inf"))
    before = weights(trainer.model)
    with pytest.raises(TrainingStopped, match="non-finite gradient in update 1"):
        trainer.train()
    assert same_weights(before, weights(trainer.model))


def test_nothing_is_left_shadowed_after_an_error(tmp_path):
    trainer = make_trainer(tmp_path, internal_steps=2)

    def broken(completion_ids, **_):
        raise RuntimeError("reward broke")

    trainer.reward_funcs[0] = broken
    with pytest.raises(RuntimeError, match="reward broke"):
        trainer.train()
    assert trainer._scored is FULL
    with internal_policy(trainer.model, 1):  # not inside another context
        pass


# -- sampling by another engine --------------------------------------------------------------------------------------


def sampler(trainer_prompts, trainer):
    """Stands in for another engine: samples from the full policy, with log-probabilities that are a little off."""
    generator = torch.Generator().manual_seed(len(trainer_prompts))
    ids = [trainer.processing_class(p)["input_ids"] for p in trainer_prompts]
    responses = [torch.randint(3, 97, (3 + i % 3,), generator=generator).tolist() for i in range(len(ids))]
    logps = []
    for prompt, response in zip(ids, responses, strict=True):
        with torch.no_grad():
            logits = trainer.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        exact = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        logps.append((exact + 0.1 * torch.rand(len(response), generator=generator)).tolist())
    return {"prompt_ids": ids, "completion_ids": responses, "logprobs": logps}


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
            ratio, advantages = (logps - old).exp(), inputs["advantages"][:, None]
            token = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) * correction * mask
            torch.testing.assert_close(loss, token.sum() / (inputs["num_items_in_batch"] / 4), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_continuous_batching_samples_in_both_phases(tmp_path):
    cache = {"num_blocks": 64, "max_batch_tokens": 64}  # else it takes as much of the memory as it can
    engine = {"use_transformers_continuous_batching": True, "transformers_continuous_batching_config": cache}
    trainer = trained(tmp_path, internal_steps=1, **engine)
    assert phases(trainer) == [1, 2]
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
