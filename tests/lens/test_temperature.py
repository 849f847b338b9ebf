"""The internal policy's temperature: `internal_policy(temperature=T)`, the fit, and training with it."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from bupo import internal_policy
from bupo.errors import ConfigError, InputError
from bupo.recipe import parse
from bupo.train.auto_temperature import NoTemperature, fit_temperature
from tests.models.test_early_exit import EVERY, stream, surrogate
from tests.support.tiny import tiny_model, tokens
from tests.support.training import config, losses, make_trainer, same_weights, weights
from tests.train.test_trainer import L, Recorder, internal_logps
from tests.train.test_trainer import surrogate as clipped_surrogate

BASE = {"model": "small", "dataset": "arithmetic"}


# -- the context ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "tied"), EVERY)
@pytest.mark.parametrize("norm", [False, True])
def test_logits_are_divided_by_it(layout, tied, norm):
    model, ids = tiny_model(layout, tie_word_embeddings=tied), tokens()
    for component in ("layer", "attn", "ffn"):
        with torch.no_grad():
            with internal_policy(model, 2, component, norm=norm):
                plain = model(ids).logits
            with internal_policy(model, 2, component, norm=norm, temperature=2.5):
                warm = model(ids).logits
        torch.testing.assert_close(warm, plain / 2.5, rtol=1e-5, atol=1e-5 * plain.abs().max().item())


def test_one_changes_nothing_at_all():
    model, ids = tiny_model(), tokens()
    with torch.no_grad():
        with internal_policy(model, 2):
            plain = model(ids).logits
        with internal_policy(model, 2, temperature=1.0):
            assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("temperature", [0.3, 7.0])
def test_gradients_are_those_of_the_definition(norm, checkpointing, temperature):
    ids, layer = tokens(), 3
    reference = tiny_model()
    state = stream(reference, ids)["layer"][layer - 1]
    state = reference.model.norm(state) if norm else state
    surrogate(reference.lm_head(state) / temperature, ids).backward()
    model = tiny_model().train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    with internal_policy(model, layer, norm=norm, temperature=temperature):
        loss = surrogate(model(ids, use_cache=False).logits, ids)
    loss.backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        if q.grad is None or not q.grad.any():
            assert p.grad is None, name
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5 * q.grad.abs().max().item(), msg=name)


def test_with_lora():
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    with torch.no_grad():
        with internal_policy(model, 2):
            plain = model(tokens()).logits
        with internal_policy(model, 2, temperature=4.0):
            assert torch.equal(model(tokens()).logits, plain / 4.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_wrong_temperatures(temperature):
    with pytest.raises(InputError, match="number above 0"), internal_policy(tiny_model(), 1, temperature=temperature):
        pass


# -- the fit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("true", [0.004, 0.7, 1.0, 30.0, 2500.0])
def test_the_fit_finds_the_temperature_that_samples_were_drawn_at(true):
    """Expected surprisal of softmax(z / true) under softmax(z / T) is smallest at T = true (Gibbs)."""
    z = torch.randn(200, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * true
    target = (z / true).softmax(-1)
    fit = fit_temperature(lambda t: -(target * (z / t).log_softmax(-1)).sum(-1).mean().item())
    assert fit.temperature == pytest.approx(true, rel=0.01)
    entropy = -(target * target.log()).sum(-1).mean().item()
    assert fit.after == pytest.approx(entropy, abs=1e-3)
    assert fit.before >= fit.after - 1e-4  # T to one percent


def test_a_policy_that_prefers_other_tokens_has_none():
    z = torch.randn(50, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    worst = z.argmin(-1, keepdim=True)
    with pytest.raises(NoTemperature, match="better than chance"):
        fit_temperature(lambda t: -(z / t).log_softmax(-1).gather(-1, worst).mean().item())


def test_a_policy_that_is_right_but_tiny_has_none():
    z = 1e-5 * torch.eye(20, dtype=torch.float64)
    with pytest.raises(NoTemperature, match="below"):
        fit_temperature(lambda t: -(z / t).log_softmax(-1).diagonal().mean().item())


# -- in training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
def test_the_internal_loss_is_read_at_that_temperature(tmp_path, norm):
    trainer = make_trainer(
        tmp_path, Recorder, internal_steps=1, internal_temperature=5.0, internal_norm=norm, max_steps=5
    )
    trainer.train()
    scaled = [a_copy for a_copy, *_ in trainer.seen]
    start = scaled[0]
    for model, inputs, loss, _ in trainer.seen[:4]:
        both = []
        for which in (start, model):
            head = which.lm_head.weight.data
            head.div_(5.0)  # softmax(H E_u^T / T), by other means
            with torch.no_grad():
                both.append(internal_logps(which, inputs, 2, norm)[0])
            head.mul_(5.0)
        expected = clipped_surrogate(both[1], both[0], inputs, "dapo", "token", 4)
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)
    model, inputs, loss, _ = trainer.seen[4]  # the full policy has none
    with torch.no_grad():
        logps, _ = internal_logps(model, inputs, L, norm=True)
    torch.testing.assert_close(loss, clipped_surrogate(logps, logps, inputs, "dapo", "token", 4), rtol=1e-4, atol=1e-5)
    first, second = trainer.state.log_history[:2]
    assert first["internal/temperature"] == 5.0
    assert "internal/temperature" not in second


def likely_model():
    """A random model whose layers hardly change the embedding, tied: every layer prefers the token before."""
    model = tiny_model("qwen3", spread=1.0, tie_word_embeddings=True)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.div_(embedding.norm(dim=-1, keepdim=True).clamp(min=1e-3))
        model.model.norm.weight.fill_(3.0 / 32**0.5)  # a certainty of its own: about 0.15 for the likeliest token
    return model


FIT = {"internal_temperature": "auto", "internal_steps": 1, "updates_per_rollout": 2, "max_steps": 6}
SAVED = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize(
    "more", [{}, {"internal_layer": None, "internal_steps": 0, "internal_ladder": [[1, 1], [3, 1]]}]
)
def test_auto_minimises_the_surprisal_of_the_full_policys_tokens(tmp_path, more):
    trainer = make_trainer(tmp_path, Recorder, model=likely_model(), **{**FIT, **more})
    trainer.train()
    start = trainer.seen[0][0]
    layers = [stage.layer for stage in trainer.schedule.stages[:-1]]
    assert sorted(trainer.temperature_fits) == layers
    for stage in trainer.schedule.stages[:-1]:

        def surprisal(temperature, layer=stage.layer):
            total = count = 0.0
            for _, inputs, _, _ in trainer.seen[:2]:
                ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
                mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
                with torch.no_grad(), internal_policy(start, layer):
                    state = start.model(ids, attention_mask=mask).last_hidden_state
                logits = (state @ start.lm_head.weight.T)[:, inputs["prompt_ids"].size(1) - 1 : -1]
                logps = (logits / temperature).log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
                total -= (logps * inputs["completion_mask"]).sum().item()
                count += inputs["completion_mask"].sum().item()
            return total / count

        fit = trainer.temperature_fits[stage.layer]
        assert stage.temperature == fit.temperature
        assert fit.after == pytest.approx(surprisal(fit.temperature), rel=1e-4)
        assert fit.before == pytest.approx(surprisal(1.0), rel=1e-4)
        for factor in (0.8, 1.25):
            assert surprisal(fit.temperature * factor) > fit.after
    assert trainer.state.log_history[0]["internal/temperature"] == trainer.schedule.stages[0].temperature
    assert trainer.schedule.stages[-1].temperature == 1.0


def test_a_resumed_run_keeps_the_fit(tmp_path):
    settings = {**FIT, **SAVED, "internal_steps": 2}
    whole = make_trainer(tmp_path, model=likely_model(), **settings)
    whole.train()
    rest = make_trainer(tmp_path, model=tiny_model("qwen3", seed=9, tie_word_embeddings=True), **settings)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rest.temperature_fits is None  # not fitted again
    assert rest.schedule == whole.schedule
    assert losses(whole) == losses(rest)
    assert same_weights(weights(whole.model), weights(rest.model))
    with pytest.raises(ConfigError, match="stages was"):
        make_trainer(tmp_path, model=likely_model(), **{**settings, "internal_temperature": 3.0}).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_auto_equals_naming_the_number(tmp_path):
    auto = make_trainer(tmp_path / "a", model=likely_model(), **FIT)
    auto.train()
    number = auto.schedule.stages[0].temperature
    named = make_trainer(tmp_path / "b", model=likely_model(), **{**FIT, "internal_temperature": number})
    named.train()
    assert auto.schedule == named.schedule
    assert losses(auto) == losses(named)
    assert same_weights(weights(auto.model), weights(named.model))


@pytest.mark.parametrize("value", [0, -1.0, True, "fit", math.inf])
def test_wrong_settings(tmp_path, value):
    with pytest.raises(ConfigError, match="internal_temperature must be a number above 0 or auto"):
        config(tmp_path, internal_steps=1, internal_temperature=value)


def test_it_belongs_to_an_internal_phase(tmp_path):
    with pytest.raises(ConfigError, match="internal_temperature is that of an internal phase"):
        config(tmp_path, internal_steps=0, internal_temperature=2.0)
    with pytest.raises(ConfigError, match="internal_temperature is that of an internal phase"):
        parse({**BASE, "internal_temperature": "auto"})
    with pytest.raises(ConfigError, match="internal_temperature must be above 0"):
        parse({**BASE, "internal_temperature": 0, "internal_layer": 2, "internal_steps": 2})
    recipe = parse({**BASE, "internal_temperature": "auto", "internal_layer": 2, "internal_steps": 2})
    assert recipe.trainer_settings(1)["internal_temperature"] == "auto"
