"""PPO: advantages against enumerated small cases, and the critic in training."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from bupo.errors import ConfigError
from bupo.train.build import check_recipe
from bupo.train.critic import Critic, CriticDiverged
from bupo.train.gae import clipped_value_loss, gae, outcome_rewards
from bupo.train.trainer import BuPOTrainer
from tests.support.tiny import tiny_model
from tests.support.training import config, even_share, losses, make_trainer, same_weights, weights
from tests.train.test_trainer import L, Recorder, internal_logps, surrogate

# -- advantages ----------------------------------------------------------------------------------------------------

V = torch.tensor([[0.5, 0.2, -0.1, 0.4], [1.0, 2.0, 3.0, 9.0]])
REWARDS = torch.tensor([[0.0, 0.1, 0.0, 1.0], [0.0, 0.0, 2.0, 7.0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])  # the second response has three tokens


def test_gae_by_hand():
    found, returns = gae(REWARDS[:1, 2:], V[:1, 2:], MASK[:1, 2:], gamma=0.9, lam=0.5)
    last = 1.0 - 0.4
    first = 0.0 + 0.9 * 0.4 - (-0.1) + 0.9 * 0.5 * last
    torch.testing.assert_close(found, torch.tensor([[first, last]]))
    torch.testing.assert_close(returns, torch.tensor([[first - 0.1, 1.0]]))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_1_is_the_return_minus_the_value(gamma):
    found, returns = gae(REWARDS, V, MASK, gamma, 1.0)
    for row, length in ((0, 4), (1, 3)):
        for t in range(length):
            whole = sum(gamma ** (k - t) * REWARDS[row, k] for k in range(t, length))
            assert found[row, t] == pytest.approx((whole - V[row, t]).item(), abs=1e-5)
            assert returns[row, t] == pytest.approx(whole.item(), abs=1e-5)
    assert found[1, 3] == returns[1, 3] == 0


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_0_is_the_one_step_difference(gamma):
    found, _ = gae(REWARDS, V, MASK, gamma, 0.0)
    for row, length in ((0, 4), (1, 3)):
        for t in range(length):
            following = V[row, t + 1] if t + 1 < length else 0.0
            assert found[row, t] == pytest.approx(float(REWARDS[row, t] + gamma * following - V[row, t]), abs=1e-6)


@pytest.mark.parametrize(("gamma", "lam"), list(itertools.product([1.0, 0.8], [0.0, 0.5, 0.95, 1.0])))
def test_gae_is_the_weighted_sum_of_differences(gamma, lam):
    found, _ = gae(REWARDS, V, MASK, gamma, lam)
    for row, length in ((0, 4), (1, 3)):
        delta = [
            REWARDS[row, t] + gamma * (V[row, t + 1] if t + 1 < length else 0.0) - V[row, t] for t in range(length)
        ]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
            assert found[row, t] == pytest.approx(float(expected), abs=1e-5)


def test_tokens_of_a_tool_are_stepped_over():
    gap = torch.tensor([[1, 0, 0, 1, 1, 0]])
    values, rewards = torch.tensor([[0.5, 8.0, 9.0, 0.2, 0.3, 7.0]]), torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 0.0]])
    kept = gap.bool()[0]
    found, returns = gae(rewards, values, gap, 0.9, 0.7)
    alone, alone_returns = gae(rewards[:, kept], values[:, kept], gap[:, kept], 0.9, 0.7)
    torch.testing.assert_close(found[:, kept], alone)
    torch.testing.assert_close(returns[:, kept], alone_returns)
    assert not found[:, ~kept].any()
    assert not returns[:, ~kept].any()


def test_the_reward_is_at_the_last_token():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0]])
    placed = outcome_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), mask)
    assert placed.tolist() == [[0, 1, 0], [0, 0, 2], [3, 0, 0], [0, 4, 0]]
    assert not outcome_rewards(torch.tensor([5.0]), torch.zeros(1, 3)).any()


def test_clipped_value_loss_by_hand():
    values, old, returns = torch.tensor([1.0, 1.0, 3.0]), torch.tensor([0.9, 0.0, 0.0]), torch.tensor([2.0, 2.0, 2.0])
    # moved little: plain; moved far: the greater of (1-2)^2 and (0.5-2)^2; of (3-2)^2 and (0.5-2)^2
    expected = 0.5 * torch.tensor([1.0, 1.5**2, 1.5**2])
    torch.testing.assert_close(clipped_value_loss(values, old, returns, 0.5), expected)


# -- the critic ----------------------------------------------------------------------------------------------------


def test_values_are_of_the_states_before_the_tokens():
    model = tiny_model()
    critic = Critic(model).eval()
    ids, mask = torch.randint(3, 97, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    assert not critic(ids, mask, 3).any()  # a head of zeros
    with torch.no_grad():
        critic.head.weight.normal_()
        critic.head.bias.fill_(0.3)
        states = model.model(ids).last_hidden_state
        torch.testing.assert_close(critic(ids, mask, 3), (states @ critic.head.weight.T)[:, 3:6, 0] + 0.3)
        changed = ids.clone()
        changed[:, -1] = 5  # the last token is in no state that is read
        assert torch.equal(critic(changed, mask, 3), critic(ids, mask, 3))
    assert {n for n, _ in critic.named_parameters()} == {
        *(f"backbone.{n}" for n, _ in model.model.named_parameters()),
        "head.weight",
        "head.bias",
    }


PPO = {"estimator": "ppo", "critic_learning_rate": 1e-2}


class Watched(Recorder):
    """Keeps what the critic was given, rollout batch by rollout batch, and its weights before and after."""

    def _train_critic(self, batch):
        known = {k: v.clone() for k, v in batch["critic"].items()}
        before = weights(self.critic)
        super()._train_critic(batch)
        self.__dict__.setdefault("taught", []).append((known, before, weights(self.critic), dict(batch)))


@pytest.mark.parametrize("settings", [{}, {"gae_lambda": 0.8, "gae_gamma": 0.9, "critic_clip": 0.1}])
def test_both_phases_use_whitened_advantages_of_the_critic(tmp_path, settings):
    trainer = make_trainer(tmp_path, Watched, internal_steps=1, **PPO, **settings)
    trainer.train()
    gamma, lam = settings.get("gae_gamma", 1.0), settings.get("gae_lambda", 1.0)
    assert len(trainer.taught) == 2
    for rollout, (known, before, after, batch) in enumerate(trainer.taught):
        ids = [row[m.bool()].tolist() for row, m in zip(batch["completion_ids"], batch["completion_mask"], strict=True)]
        mask = batch["completion_mask"].float()
        rewards = outcome_rewards(torch.tensor(even_share(ids)), mask)
        raw, returns = gae(rewards, known["values"], mask, gamma, lam)
        chosen = raw[mask.bool()]
        whitened = (raw - chosen.mean()) / (chosen.var() + 1e-8).sqrt() * mask
        torch.testing.assert_close(batch["advantages"], whitened, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(known["returns"], returns, rtol=1e-5, atol=1e-6)
        assert known["values"].any() == (rollout > 0)
        assert not any(torch.equal(before[n], after[n]) for n in before if "embed" not in n)
    start = trainer.seen[0][0]
    for model, inputs, loss, _ in trainer.seen[:4]:  # IPA with these advantages
        with torch.no_grad():
            old, logps = internal_logps(start, inputs, 2)[0], internal_logps(model, inputs, 2)[0]
        one_row_each = {**inputs, "completion_mask": inputs["completion_mask"][:, None]}
        expected = surrogate(logps[:, None], old[:, None], one_row_each, "dapo", "token", 4)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    log = trainer.state.log_history[0]
    assert {"critic/loss", "critic/grad_norm", "critic/clip_ratio", "critic/value"} <= set(log)
    shown = torch.tensor(list(trainer._logs["advantages"]))
    _, _, _, batch = trainer.taught[-1]
    torch.testing.assert_close(
        shown, (batch["advantages"] * batch["completion_mask"]).sum(1) / batch["completion_mask"].sum(1)
    )


def test_advantages_do_not_depend_on_the_policy_in_the_ratio(tmp_path):
    found = []
    for name, steps in (("a", 1), ("b", 0)):
        trainer = make_trainer(tmp_path / name, Watched, internal_steps=steps, max_steps=4, **PPO)
        trainer.train()
        found.append(trainer.taught[0])
    (_, _, critic_a, a), (_, _, critic_b, b) = found
    assert torch.equal(a["advantages"], b["advantages"])
    assert same_weights(critic_a, critic_b)


def test_the_policy_is_untouched_by_the_critics_updates(tmp_path):
    class Spy(BuPOTrainer):
        def _train_critic(self, batch):
            before = weights(self.model)
            super()._train_critic(batch)
            assert same_weights(before, weights(self.model))
            assert all(p.grad is None for p in self.model.parameters())

    make_trainer(tmp_path, Spy, internal_steps=1, **PPO).train()


def fixed_batch(trainer, rows=16, fill=True):
    generator = torch.Generator().manual_seed(1)
    batch = {
        "prompt_ids": torch.randint(3, 97, (rows, 4), generator=generator),
        "prompt_mask": torch.ones(rows, 4, dtype=torch.long),
        "completion_ids": torch.randint(3, 97, (rows, 6), generator=generator),
        "completion_mask": torch.ones(rows, 6, dtype=torch.long),
    }
    batch["completion_mask"][::3, 4:] = 0
    rewards = (batch["completion_ids"][:, 0] % 2).float()
    if not fill:
        return batch, rewards
    trainer._set_critic_advantages(batch, rewards)
    return batch


def test_the_value_loss_falls_on_a_fixed_batch(tmp_path):
    trainer = make_trainer(tmp_path, estimator="ppo", critic_learning_rate=3e-3, critic_clip=10.0)
    batch = fixed_batch(trainer)
    found = []
    for _ in range(25):
        known = dict(batch["critic"])
        trainer._train_critic(batch)
        found.append(trainer._metrics["train"]["critic/loss"][-1])
        batch["critic"] = known
    assert found[-1] < 0.1 * found[0]
    with torch.no_grad():
        values = trainer._values(batch)
    good, bad = (values[:, 1][known["returns"][:, 1] == r].mean() for r in (1.0, 0.0))
    assert good > bad + 0.5


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_do_not_change_an_update(tmp_path, micro):
    trainer = make_trainer(tmp_path, estimator="ppo", critic_learning_rate=1e-2)
    batch = fixed_batch(trainer)
    trainer.args.per_device_train_batch_size = micro
    trainer._update_critic(batch, batch["critic"], 0, 4)
    parts = weights(trainer.critic)
    other = make_trainer(tmp_path, estimator="ppo", critic_learning_rate=1e-2)
    known, mask = batch["critic"], batch["critic"]["mask"][:4]
    token = clipped_value_loss(other._values(batch, slice(0, 4)), known["values"][:4], known["returns"][:4], 0.5)
    ((token * mask).sum() / mask.sum()).backward()
    torch.nn.utils.clip_grad_norm_(other.critic.parameters(), 1.0)
    other.critic_optimizer.step()
    for name, value in weights(other.critic).items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_responses_that_could_not_be_scored_count_nowhere(tmp_path):
    trainer = make_trainer(tmp_path, estimator="ppo")
    batch = fixed_batch(trainer)
    rewards = (batch["completion_ids"][:, 0] % 2).float()
    rewards[3] = torch.nan
    trainer._set_critic_advantages(batch, rewards)
    assert not batch["advantages"][3].any()
    assert not batch["critic"]["mask"][3].any()
    kept = torch.arange(16) != 3
    some = {k: v[kept] for k, v in batch.items() if isinstance(v, torch.Tensor)}
    trainer._set_critic_advantages(some, rewards[kept])
    torch.testing.assert_close(batch["advantages"][kept], some["advantages"])


RESUME = [
    {"updates_per_rollout": 2, "max_steps": 6},
    {
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "num_iterations": 2,
        "max_steps": 12,
        "weight_decay": 0.1,
    },
]


@pytest.mark.parametrize("settings", RESUME)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, settings):
    each = settings["max_steps"] // 3
    settings = {**PPO, "internal_steps": 2, "save_strategy": "steps", "save_steps": each, **settings}
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    rest = make_trainer(tmp_path, model=tiny_model("qwen3", seed=9), **settings)
    rest.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{each}"))
    assert losses(whole) == losses(rest)
    assert same_weights(weights(whole.model), weights(rest.model))
    assert same_weights(weights(whole.critic), weights(rest.critic))
    first, second = (t.critic_optimizer.state_dict()["state"] for t in (whole, rest))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[i][k], second[i][k]) for i in first for k in first[i])
    other = make_trainer(tmp_path, **{**settings, "gae_lambda": 0.5})
    with pytest.raises(ConfigError, match="critic was"):
        other.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{each}"))


# with so large an epsilon a step is proportional to the gradient; else Adam would blow up its rounding errors
LINEAR = {"estimator": "ppo", "critic_learning_rate": 0.1, "adam_epsilon": 1.0}


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    trainer = make_trainer(tmp_path, **LINEAR)
    batch, rewards = fixed_batch(trainer, fill=False)
    start = weights(trainer.critic)
    for _ in range(3):
        trainer._set_critic_advantages(batch, rewards)
        trainer._train_critic(batch)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(Path(__file__).parents[1] / "support" / "critic_processes.py"), str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, timeout=500)
    for number in range(2):
        theirs = load_file(tmp_path / f"critic-{number}.safetensors")
        for name, value in weights(trainer.critic).items():
            moved = (value - start[name]).abs().max().item()
            assert moved > 0
            torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-3 * moved + 1e-6)
        mine = torch.tensor([i for i in range(16) if i % 4 // 2 == number])
        advantages = load_file(tmp_path / f"advantages-{number}.safetensors")["advantages"]
        torch.testing.assert_close(advantages, batch["advantages"][mine], rtol=1e-4, atol=1e-4)


def test_with_lora_the_critic_learns_adapters_and_its_head(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trainer = make_trainer(tmp_path, peft_config=lora, gradient_checkpointing=True, internal_steps=1, **PPO)
    before = weights(trainer.critic)
    trainer.train()
    after = weights(trainer.critic)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {n for n in before if "lora_" in n or n.startswith("head.")}
    policy = dict(trainer.model.named_parameters())
    assert not {id(p) for p in trainer.critic.parameters()} & {id(p) for p in policy.values()}


def test_a_critic_that_diverges_stops_before_its_weights_are_touched(tmp_path):
    trainer = make_trainer(tmp_path, **PPO)
    trainer.critic.head.weight.register_hook(lambda grad: grad * float("nan"))
    before = weights(trainer.critic)
    with pytest.raises(CriticDiverged, match="critic in rollout batch 1; lower critic_learning_rate"):
        trainer.train()
    assert same_weights(before, weights(trainer.critic))


WRONG = [
    ({"critic_clip": 0.2, "estimator": "rloo"}, "critic_clip goes with estimator ppo, not rloo"),
    ({"gae_lambda": 0.9}, "gae_lambda goes with estimator ppo, not grpo"),
    ({"estimator": "ppo", "gae_lambda": 1.1}, "gae_lambda must be from 0 to 1"),
    ({"estimator": "ppo", "gae_gamma": -0.1}, "gae_gamma must be from 0 to 1"),
    ({"estimator": "ppo", "critic_learning_rate": 0.0}, "critic_learning_rate must be above 0"),
    ({"estimator": "ppo", "scale_rewards": "batch"}, "estimator ppo sets scale_rewards"),
    ({"estimator": "ppo", "steps_per_generation": 3, "gradient_accumulation_steps": 2}, "needs whole updates"),
]


@pytest.mark.parametrize(("settings", "part"), WRONG)
def test_wrong_settings(tmp_path, settings, part):
    with pytest.raises(ConfigError, match=part):
        config(tmp_path, **settings)


def test_recipes():
    recipe = check_recipe({"model": "small", "dataset": "arithmetic", "estimator": "ppo", "critic_learning_rate": 1e-4})
    found = recipe.trainer_settings(1)
    assert json.loads(json.dumps({k: found[k] for k in ("estimator", "critic_learning_rate", "gae_lambda")})) == {
        "estimator": "ppo",
        "critic_learning_rate": 1e-4,
        "gae_lambda": 1.0,
    }


def test_the_whole_model_is_l_layers():
    assert len(Critic(tiny_model()).backbone.layers) == L
