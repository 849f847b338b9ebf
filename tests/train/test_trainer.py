"""The trainer: what an internal phase changes and what it must not, on tiny random models."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from bupo.errors import ConfigError, InputError
from bupo.models.internal_policy import internal_policy
from bupo.train import trainer as trainer_module
from bupo.train.auto_layer import LayerChoice
from bupo.train.checkpoints import STATE_FILE, last_checkpoint, write_state
from bupo.train.probe import probe_rows, repeated_ngrams
from bupo.train.trainer import BuPOTrainer, TrainingStopped
from tests.support.tiny import tiny_model
from tests.support.training import a_copy, config, even_share, losses, make_trainer, prompts, same_weights, weights

L = 4


class Recorder(BuPOTrainer):
    """Keeps, for every micro-batch, the model before it, its inputs, the loss and the log-probabilities."""

    def _compute_loss(self, model, inputs):
        before = a_copy(self.model)
        loss = super()._compute_loss(model, inputs)
        self.__dict__.setdefault("seen", []).append((before, dict(inputs), loss.detach().clone(), self.latest))
        return loss

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.latest = found[0].detach().clone()
        return found


class Gradients(TrainerCallback):
    """Which parameters have a gradient, update by update."""

    def __init__(self):
        self.updates = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.updates.append({n for n, p in model.named_parameters() if p.grad is not None})


def trained(*makers):
    """Trainers made and trained one after the other: making one seeds the generators."""
    found = []
    for make in makers:
        found.append(make())
        found[-1].train()
    return found


def above(name, layer):
    return name.endswith("model.norm.weight") or any(f"layers.{k}." in name for k in range(layer, L))


# -- plain GRPO ----------------------------------------------------------------------------------------------------

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
    folder = tmp_path / "start"
    tiny_model("qwen3", spread=3.0).save_pretrained(folder)
    runs = []
    for kind, cls in ((GRPOConfig, GRPOTrainer), (None, BuPOTrainer)):
        args = config(tmp_path / cls.__name__, **({"kind": kind} if kind else {"internal_steps": 0}), **settings)
        trainer = make_trainer(tmp_path, cls, args, str(folder), train_dataset=data)
        trainer.train()
        runs.append((losses(trainer), weights(trainer.model), trainer.state.log_history))
    (theirs, their_weights, their_log), (ours, our_weights, our_log) = runs
    assert len(ours) == settings["max_steps"]
    assert ours == theirs
    assert same_weights(their_weights, our_weights)
    ours_too = {"phase", "rollout"}
    for a, b in zip(their_log[:-1], our_log[:-1], strict=True):
        assert {k: v for k, v in a.items() if k != "step_time"} == {
            k: v for k, v in b.items() if k not in ours_too | {"step_time"}
        }


# -- the internal phase --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_vanish_above_the_layer_in_phase_1_only(tmp_path, checkpointing):
    seen = Gradients()
    trainer = make_trainer(tmp_path, internal_steps=1, gradient_checkpointing=checkpointing, callbacks=[seen])
    before = weights(trainer.model)
    trainer.train()
    names = {name for name, _ in trainer.model.named_parameters()}
    assert len(seen.updates) == 8
    for update in seen.updates[:4]:
        assert update == {n for n in names if not above(n, 2)}
    for update in seen.updates[4:]:
        assert update == names
    assert not same_weights(before, weights(trainer.model))


def test_upper_layers_stay_bit_for_bit_in_phase_1(tmp_path):
    trainer = make_trainer(tmp_path, internal_steps=2, weight_decay=0.1)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    for name in before:
        assert torch.equal(before[name], after[name]) == above(name, 2), name


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 4}]
)
def test_ratio_is_exactly_one_before_the_first_update_of_a_rollout(tmp_path, settings):
    trainer = make_trainer(tmp_path, Recorder, internal_steps=1, **settings)
    trainer.train()
    accumulation = settings.get("gradient_accumulation_steps", 1)
    assert len(trainer.seen) == 8
    for start in (0, 4):
        for at in range(start, start + accumulation):
            _, inputs, _, logps = trainer.seen[at]
            mask = inputs["completion_mask"].bool()
            assert torch.equal(logps[mask], inputs["old_per_token_logps"][mask])
        _, inputs, _, logps = trainer.seen[start + 3]
        assert not torch.equal(logps, inputs["old_per_token_logps"])


def internal_logps(model, inputs, layer, norm=False):
    """log pi^l of the responses from an ordinary forward's hidden states, and its entropies."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    states = []
    hook = model.model.layers[layer - 1].register_forward_hook(lambda m, i, o: states.append(o))
    model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    hook.remove()
    state = model.model.norm(states[0]) if norm else states[0]
    logits = (state @ model.lm_head.weight.T)[:, inputs["prompt_ids"].size(1) - 1 : -1]
    logps = logits.log_softmax(-1)
    return logps.gather(-1, inputs["completion_ids"][..., None])[..., 0], -(logps.exp() * logps).sum(-1)


def surrogate(logps, old, inputs, loss_type, level, updates, max_length=6, low=0.2, high=0.2):
    """Eq. 9 written out, with the aggregation of each loss type."""
    mask, advantages = inputs["completion_mask"], inputs["advantages"][:, None]
    log_ratio = logps - old
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1))[:, None].expand_as(log_ratio)
    ratio = log_ratio.exp()
    token = -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages) * mask
    if loss_type == "grpo":
        return (token.sum(-1) / mask.sum(-1)).mean()
    if loss_type == "bnpo":
        return token.sum() / mask.sum()
    if loss_type == "dr_grpo":
        return token.sum() / (len(token) * max_length)
    return token.sum() / (inputs["num_items_in_batch"] / updates)  # dapo: the rollout batch's tokens an update


REFERENCE = [
    {"loss_type": "dapo"},
    {"loss_type": "grpo"},
    {"loss_type": "bnpo"},
    {"loss_type": "dr_grpo", "scale_rewards": "none"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"internal_layer": L},
    {"internal_layer": 1, "internal_norm": True},
    {"epsilon": 0.05, "epsilon_high": 0.1},
]


@pytest.mark.parametrize("settings", REFERENCE)
def test_phase_1_loss_is_the_clipped_surrogate_of_the_internal_policy(tmp_path, settings):
    settings = {"internal_layer": 2, "loss_type": "dapo", **settings}
    trainer = make_trainer(tmp_path, Recorder, internal_steps=1, max_steps=5, **settings)
    trainer.train()
    level = settings.get("importance_sampling_level", "token")
    low = settings.get("epsilon", 0.2)
    layer, norm = settings["internal_layer"], settings.get("internal_norm", False)
    clipped = 0
    start = trainer.seen[0][0]
    for model, inputs, loss, _ in trainer.seen[:4]:
        with torch.no_grad():
            old, _ = internal_logps(start, inputs, layer, norm)
            logps, _ = internal_logps(model, inputs, layer, norm)
            expected = surrogate(
                logps, old, inputs, settings["loss_type"], level, 4, low=low, high=settings.get("epsilon_high", low)
            )
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
        mask = inputs["completion_mask"].bool()
        torch.testing.assert_close(inputs["old_per_token_logps"][mask], old[mask], rtol=1e-4, atol=1e-5)
        clipped += ((logps - old).exp() - 1).abs()[mask].gt(low).sum().item()
    assert clipped > 0  # clipping was tested, not only ratio 1
    # and the fifth micro-batch, in phase 2, is the full policy's
    model, inputs, loss, _ = trainer.seen[4]
    with torch.no_grad():
        logps, _ = internal_logps(model, inputs, L, norm=True)
        expected = surrogate(logps, logps, inputs, settings["loss_type"], level, 4)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_phase_1_gradient_is_the_references(tmp_path):
    kept = {}

    class First(Gradients):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            kept.setdefault("grads", {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer = make_trainer(tmp_path, Recorder, internal_steps=1, max_steps=4, max_grad_norm=0.0, callbacks=[First()])
    trainer.train()
    model, inputs, _, _ = trainer.seen[0]
    model.zero_grad()
    logps, _ = internal_logps(model, inputs, 2)
    surrogate(logps, logps.detach(), inputs, "dapo", "token", 4).backward()
    for name, parameter in model.named_parameters():
        if above(name, 2):
            assert name not in kept["grads"]
        else:
            unit = parameter.grad.abs().max().item()
            torch.testing.assert_close(kept["grads"][name], parameter.grad, rtol=1e-3, atol=1e-5 * unit, msg=name)


def test_samples_and_advantages_are_the_full_policys(tmp_path):
    internal, plain = trained(
        lambda: make_trainer(tmp_path / "a", Recorder, internal_steps=2, max_steps=4),
        lambda: make_trainer(tmp_path / "b", Recorder, internal_steps=0, max_steps=4),
    )
    for (_, a, _, _), (_, b, _, _) in zip(internal.seen, plain.seen, strict=True):
        assert torch.equal(a["completion_ids"], b["completion_ids"])
        assert torch.equal(a["advantages"], b["advantages"])
        assert not torch.equal(a["old_per_token_logps"], b["old_per_token_logps"])


def test_phase_1_runs_no_upper_layer_but_for_sampling_and_the_probe(tmp_path):
    trainer = make_trainer(tmp_path, internal_steps=2, max_steps=8, probe_samples=4)
    calls = {"lower": 0, "upper": 0}
    sampling = []
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
    # a rollout batch: 4 micro-batches of old log-probabilities, 4 of the loss, and 1 probe by each policy; before the
    # second one also the full policy on the first one's probe, for the transfer
    assert calls == {"lower": 2 * (4 + 4 + 2) + 1, "upper": 2 * 1 + 1}


def test_metrics_carry_the_name_of_the_policy_they_are_of(tmp_path):
    trainer = make_trainer(tmp_path, Recorder, internal_steps=1, probe_samples=16)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert (first["phase"], first["rollout"], second["phase"], second["rollout"]) == (1, 1, 2, 2)
    internal, full = [], []
    for model, inputs, _, _ in trainer.seen[:4]:
        mask = inputs["completion_mask"].bool()
        with torch.no_grad():
            internal.append(internal_logps(model, inputs, 2)[1][mask])
            full.append(internal_logps(trainer.seen[0][0], inputs, L, norm=True)[1][mask])
    each = sum(e.mean() for e in internal) / 4  # the trainer averages over micro-batches
    assert first["internal/entropy"] == pytest.approx(each.item(), rel=1e-4)
    assert first["entropy"] == pytest.approx(torch.cat(full).mean().item(), rel=1e-4)
    start, surprisal, distance, tokens = trainer.seen[0][0], 0.0, 0.0, 0
    for _, inputs, _, _ in trainer.seen[:4]:
        mask = inputs["completion_mask"]
        with torch.no_grad():
            logps, old = internal_logps(start, inputs, L, norm=True)[0], internal_logps(start, inputs, 2)[0]
        surprisal -= (logps * mask).sum().item()
        distance += ((logps - old) * mask).sum().item()
        tokens += mask.sum().item()
    assert first["perplexity"] == pytest.approx(math.exp(surprisal / tokens), rel=1e-4)
    assert first["internal/divergence"] == pytest.approx(distance / tokens, rel=1e-4)
    assert 0 <= first["repetition"] <= 1
    assert "clip_ratio/region_mean" not in first
    assert first["internal/clip_ratio/region_mean"] > 0
    assert not any(name.startswith("internal/") for name in second)
    assert {"entropy", "clip_ratio/region_mean", "reward", "completions/mean_length"} <= set(second)


def test_evaluation_is_the_full_policys(tmp_path):
    args = config(tmp_path, internal_steps=5, max_steps=4, per_device_eval_batch_size=4)
    trainer = make_trainer(tmp_path, Recorder, args)
    trainer.train()
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
    trainer = make_trainer(
        tmp_path,
        internal_steps=1,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
        callbacks=[seen],
    )
    trainer.train()
    names = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora" in n for n in names)
    assert seen.updates[0] == {n for n in names if not above(n, 2)}
    assert seen.updates[4] == names


def test_mixture_of_experts_balances_the_layers_that_run(tmp_path, monkeypatch):
    from transformers.models.mixtral import modeling_mixtral

    routed = []
    original = modeling_mixtral.load_balancing_loss_func
    monkeypatch.setattr(
        modeling_mixtral,
        "load_balancing_loss_func",
        lambda logits, *a: routed.append(len(logits)) or original(logits, *a),
    )
    model = tiny_model(
        "qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        router_aux_loss_coef=0.01,
        spread=3.0,
    )
    trainer = make_trainer(tmp_path, model=model, internal_steps=1, updates_per_rollout=2, max_steps=4)
    trainer.train()
    assert routed == [2, 2, L, L]
    assert "aux_loss" in trainer.state.log_history[0]


# -- a layer found by analysis -------------------------------------------------------------------------------------


def test_auto_equals_naming_the_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "choose_layer", lambda model, batch, rule: LayerChoice(3, "because"))
    auto, named = trained(
        lambda: make_trainer(tmp_path / "a", internal_layer="auto", internal_steps=1),
        lambda: make_trainer(tmp_path / "b", internal_layer=3, internal_steps=1),
    )
    assert auto.schedule == named.schedule
    assert losses(auto) == losses(named)
    assert same_weights(weights(auto.model), weights(named.model))


def test_auto_analyses_the_first_rollouts(tmp_path):
    seen = []

    class Spy(BuPOTrainer):
        def _resolve_auto_layer(self, batch):
            choice = trainer_module.choose_layer(self.model, batch)
            seen.append(choice)
            return super()._resolve_auto_layer(batch)

    trainer = make_trainer(tmp_path, Spy, internal_layer="auto", internal_steps=1, max_steps=4)
    with contextlib.suppress(TrainingStopped):  # a random model may or may not have a boundary layer
        trainer.train()
    assert trainer.schedule.at(0).layer == (seen[0].layer or "auto")
    analysis = seen[0].analysis
    assert analysis["layers"] == L
    assert analysis["samples"] == 16
    assert trainer.model.training


@pytest.mark.parametrize("recommended", [3, None])
def test_auto_takes_the_layer_of_the_rule(tmp_path, monkeypatch, recommended):
    from bupo.lens import agreement as choice

    found = {"recommendation": {"layer": recommended, "reason": "a knee, or none"}}
    monkeypatch.setattr(choice, "choose_layer", lambda model, rollouts, analysis: found)
    settings = {"internal_layer": "auto", "internal_steps": 1, "max_steps": 2, "internal_rule": "recommended"}
    trainer = make_trainer(tmp_path, **settings)
    if recommended is None:
        with pytest.raises(TrainingStopped, match=r"auto: a knee, or none\. Set internal_layer to a number"):
            trainer.train()
    else:
        trainer.train()
        assert trainer.schedule.at(0).layer == 3
    assert trainer.auto_layer.analysis["layer_choice"] == found


def test_auto_without_a_boundary_stops_and_lists_the_alternatives(tmp_path):
    model = tiny_model("qwen3", spread=3.0)
    with torch.no_grad():
        for layer in model.model.layers:  # FFNs whose output is large: their policies have little entropy
            layer.mlp.down_proj.weight.mul_(40)
    trainer = make_trainer(tmp_path, model=model, internal_layer="auto", internal_steps=1)
    before = weights(trainer.model)
    with pytest.raises(TrainingStopped, match=r"internal_layer auto: .*number from 1 to 4 .layers with a positive FFN"):
        trainer.train()
    assert same_weights(before, weights(trainer.model))


# -- saving and resuming -------------------------------------------------------------------------------------------


def comparable(log):
    timed = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
    return [{k: v for k, v in row.items() if k not in timed} for row in log]


RESUME = [
    {},
    {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2},
    {"lr_scheduler_type": "linear", "internal_norm": True},
]


@pytest.mark.parametrize("settings", RESUME)
@pytest.mark.parametrize("at", [1, 2, 3], ids=["phase 1", "the switch", "phase 2"])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, settings, at):
    updates = 4 if settings.get("num_iterations") else 2
    settings = {
        "internal_steps": 2,
        "max_steps": 4 * updates,
        "save_strategy": "steps",
        "save_steps": updates,
        **settings,
    }
    settings = {"steps_per_generation": 2, **settings}
    # several passes over the data, begun before, with, or after the resumed run
    data = prompts(settings["steps_per_generation"] * (3 if at < 3 else 2))
    whole = make_trainer(tmp_path / "whole", train_dataset=data, **settings)
    whole.train()
    rest = make_trainer(tmp_path / "rest", train_dataset=data, model=tiny_model("qwen3", seed=9), **settings)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at * updates}"))
    assert rest.state.global_step == 4 * updates
    assert same_weights(weights(whole.model), weights(rest.model))
    assert comparable(whole.state.log_history) == comparable(rest.state.log_history)


def test_a_resumed_run_keeps_the_layer_that_auto_found(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "choose_layer", lambda model, batch, rule: LayerChoice(3, "because"))
    settings = {"internal_layer": "auto", "internal_steps": 3, "save_strategy": "steps", "save_steps": 4}
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    monkeypatch.setattr(trainer_module, "choose_layer", lambda model, batch, rule: LayerChoice(1, "another"))
    rest = make_trainer(tmp_path, model=tiny_model("qwen3", seed=9), **settings)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert rest.schedule.layers == (3,)
    assert same_weights(weights(whole.model), weights(rest.model))


def test_saves_move_to_the_end_of_the_rollout_batch(tmp_path):
    trainer = make_trainer(tmp_path, internal_steps=1, max_steps=11, save_strategy="steps", save_steps=3)
    trainer.train()
    states = {
        int(p.name.split("-")[1]): json.loads((p / STATE_FILE).read_text()) for p in tmp_path.glob("checkpoint-*")
    }
    assert sorted(states) == [4, 8, 11]  # 11: the end of training, in the middle of a rollout batch
    assert {step: state["between_rollouts"] for step, state in states.items()} == {4: True, 8: True, 11: False}
    assert states[4]["stages"] == [[1, 2, 1.0, 1.0], [None, None, 1.0, 1.0]]
    assert states[8]["micro_batch"] == 8
    again = make_trainer(tmp_path, internal_steps=1, max_steps=16)
    with pytest.raises(InputError, match="middle of a rollout batch"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-11"))


def test_incomplete_or_foreign_checkpoints_are_refused(tmp_path):
    settings = {"internal_steps": 1, "save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, **settings).train()
    assert last_checkpoint(tmp_path).name == "checkpoint-8"
    (tmp_path / "checkpoint-8" / STATE_FILE).unlink()
    assert last_checkpoint(tmp_path).name == "checkpoint-4"
    assert last_checkpoint(tmp_path / "nothing") is None
    with pytest.raises(InputError, match="checkpoint-8 cannot be resumed"):
        make_trainer(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    other = make_trainer(tmp_path, **{**settings, "internal_steps": 2, "seed": 4})
    with pytest.raises(ConfigError) as error:
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [problem.split(": ")[1].split(" was")[0] for problem in error.value.problems] == ["stages", "seed"]
    write_state(tmp_path / "checkpoint-8", {"between_rollouts": True})
    assert last_checkpoint(tmp_path).name == "checkpoint-8"


# -- what is refused -----------------------------------------------------------------------------------------------

HAZARDS = [
    ({"beta": 0.1}, "beta 0.1"),
    ({"entropy_coef": 0.01}, "entropy_coef"),
    ({"use_adaptive_entropy": True}, "use_adaptive_entropy"),
    ({"top_entropy_quantile": 0.2}, "top_entropy_quantile 0.2"),
    ({"loss_type": "vespo"}, "'vespo' mixes"),
    ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
    ({"use_liger_kernel": True}, "use_liger_kernel"),
    ({"torch_compile": True}, "torch_compile"),
    ({"ddp_find_unused_parameters": False}, "ddp_find_unused_parameters"),
    ({"ddp_static_graph": True}, "ddp_static_graph"),
    ({"internal_layer": None}, "internal_steps needs internal_layer"),
    ({"internal_layer": 0}, "layer from 1 to L"),
    ({"internal_layer": "first"}, "layer from 1 to L"),
    ({"internal_steps": -1}, "whole number from 0"),
    ({"internal_steps": 1.5}, "whole number from 0"),
    ({"probe_samples": 0}, "probe_samples"),
    ({"save_total_limit": 1}, "save_total_limit"),
    ({"updates_per_rollout": 0}, "updates_per_rollout"),
    ({"updates_per_rollout": 2, "steps_per_generation": 2}, "either updates_per_rollout or"),
    (
        {"internal_steps": 3, "steps_per_generation": 2, "gradient_accumulation_steps": 4},
        "inside an update of 4 accumulated",
    ),
]


@pytest.mark.parametrize(("settings", "part"), HAZARDS, ids=[",".join(s) for s, _ in HAZARDS])
def test_what_an_internal_phase_cannot_do_is_refused(tmp_path, settings, part):
    with pytest.raises(ConfigError) as error:
        config(tmp_path, **{"internal_steps": 2, "max_completion_length": 6, **settings})
    assert any(part in problem for problem in error.value.problems), error.value.problems


@pytest.mark.parametrize("settings", [s for s, _ in HAZARDS[:6]], ids=[",".join(s) for s, _ in HAZARDS[:6]])
def test_and_allowed_without_one(tmp_path, settings):
    config(tmp_path, internal_steps=0, **settings)


def test_problems_are_collected(tmp_path):
    with pytest.raises(ConfigError) as error:
        config(tmp_path, internal_steps=2, beta=0.1, entropy_coef=0.1, save_total_limit=1, probe_samples=0)
    assert len(error.value.problems) == 2  # what is plainly wrong first
    with pytest.raises(ConfigError) as error:
        config(tmp_path, internal_steps=2, beta=0.1, entropy_coef=0.1, torch_compile=True)
    assert len(error.value.problems) == 3


def test_reentrant_checkpointing_is_refused_under_ddp(tmp_path, monkeypatch):
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    config(tmp_path, internal_steps=2, **reentrant)  # one process: it works
    monkeypatch.setattr(trainer_module.BuPOConfig, "world_size", property(lambda self: 2))
    assert config(tmp_path, internal_steps=2).ddp_find_unused_parameters is True
    assert config(tmp_path, internal_steps=0).ddp_find_unused_parameters is None
    with pytest.raises(ConfigError, match="reentrant"):
        config(tmp_path, internal_steps=2, **reentrant)


@pytest.mark.parametrize("layer", [5, 99])
def test_a_layer_the_model_lacks(tmp_path, layer):
    with pytest.raises(ConfigError, match=f"layer {layer} does not exist: this model has layers 1 to 4"):
        make_trainer(tmp_path, internal_layer=layer, internal_steps=1)


def test_too_few_prompts(tmp_path):
    with pytest.raises(ConfigError, match="has 3 prompts, fewer than the 4"):
        make_trainer(tmp_path, train_dataset=prompts(3))


def test_a_switch_inside_the_last_short_update_of_a_pass(tmp_path):
    # with one rollout batch a pass (3 micro-batches: updates of 2 and of 1) every switch begins a pass;
    # with three a pass (9 micro-batches) the one after 4 falls into an update of the second pass
    settings = {"steps_per_generation": 3, "gradient_accumulation_steps": 2, "internal_steps": 2, "max_steps": 4}
    settings |= {"num_generations": 4}
    make_trainer(tmp_path, train_dataset=prompts(3), **settings)
    with pytest.raises(ConfigError, match="of a pass over the data"):
        make_trainer(tmp_path, train_dataset=prompts(9), **{**settings, "internal_steps": 4})


def test_other_settings_objects_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="needs a BuPOConfig, not GRPOConfig"):
        make_trainer(tmp_path, BuPOTrainer, config(tmp_path, kind=GRPOConfig))


def test_defaults_follow_the_paper(tmp_path):
    from bupo import BuPOConfig

    args = BuPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    assert args.steps_per_generation == 4 * args.gradient_accumulation_steps
    assert args.logging_steps == 4
    wanted = {
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "epsilon": 0.2,
        "beta": 0.0,
        "entropy_coef": 0.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "loss_type": "dapo",
        "scale_rewards": "group",
        "num_generations": 8,
        "num_iterations": 1,
        "internal_steps": 0,
    }
    assert {name: getattr(args, name) for name in wanted} == wanted


@pytest.mark.parametrize("phase", [0, 1])
def test_a_loss_that_is_not_finite_stops_with_the_update_named(tmp_path, phase):
    trainer = make_trainer(tmp_path, internal_steps=phase, max_steps=8)
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
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before.values(), after.values(), strict=True)
    )


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    trainer = make_trainer(tmp_path, internal_steps=1)
    trainer.model.model.layers[0].mlp.down_proj.weight.register_hook(lambda grad: grad * float("inf"))
    before = weights(trainer.model)
    with pytest.raises(TrainingStopped, match="non-finite gradient in update 1"):
        trainer.train()
    assert same_weights(before, weights(trainer.model))


# -- sampling-mismatch correction ----------------------------------------------------------------------------------


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
    trainer = make_trainer(tmp_path, Recorder, internal_steps=1, max_steps=8, rollout_func=sampler, **settings)
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
            torch.testing.assert_close(
                inputs["old_per_token_logps"][mask.bool()], old[mask.bool()], rtol=1e-4, atol=1e-5
            )
            ratio, advantages = (logps - old).exp(), inputs["advantages"][:, None]
            token = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) * correction * mask
            torch.testing.assert_close(loss, token.sum() / (inputs["num_items_in_batch"] / 4), rtol=1e-4, atol=1e-5)


def test_nothing_is_left_shadowed_after_an_error(tmp_path):
    trainer = make_trainer(tmp_path, internal_steps=2)

    def broken(completion_ids, **_):
        raise RuntimeError("reward broke")

    trainer.reward_funcs[0] = broken
    with pytest.raises(RuntimeError, match="reward broke"):
        trainer.train()
    assert trainer._reading is None
    with internal_policy(trainer.model, 1):  # not inside another context
        pass
    trainer.reward_funcs[0] = even_share


def test_repetition_counts_ngrams_said_before():
    assert repeated_ngrams([[1, 2, 3, 4, 1, 2, 3, 4, 1, 2], [5, 6, 7], [9] * 7]) == (3 + 3, 7 + 4)
    assert repeated_ngrams([[1, 2], []]) == (0, 0)
    assert probe_rows(8, 3).tolist() == [0, 4, 7]
    assert probe_rows(3, 9).tolist() == [0, 1, 2]
