"""PPO: generalised advantages against enumerated small cases, and the critic in training."""

import itertools

import pytest
import torch

from bupo.errors import TrainingStopped
from bupo.train.advantages import Critic, clipped_value_loss, gae
from tests.support.tiny import tiny_model
from tests.support.training import (
    LORA,
    L,
    Recorder,
    even_share,
    internal_logps,
    make_trainer,
    moved,
    resumed,
    same_weights,
    surrogate,
    trained,
    weights,
)

V = torch.tensor([[0.5, 0.2, -0.1, 0.4, 7.0, 7.0], [1.0, 2.0, 3.0, 9.0, 9.0, 9.0], [0.5, 8.0, 9.0, 0.2, 0.3, 7.0]])
REWARDS = torch.tensor([1.0, 2.0, 0.5])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 1, 0]])  # the third has a tool's output


@pytest.mark.parametrize(("gamma", "lam"), list(itertools.product([1.0, 0.8], [0.0, 0.5, 0.95, 1.0])))
def test_gae_is_the_weighted_sum_of_differences(gamma, lam):
    advantages, returns = gae(REWARDS, V, MASK, gamma, lam)
    for row, mask in enumerate(MASK.bool()):
        values = [*V[row, mask].tolist(), 0.0]
        delta = [gamma * after - before for before, after in itertools.pairwise(values)]
        delta[-1] += REWARDS[row].item()
        expected = [sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(delta))]
        torch.testing.assert_close(advantages[row, mask], torch.tensor(expected))
        torch.testing.assert_close(returns[row, mask], torch.tensor(expected) + V[row, mask])
    assert not torch.stack([advantages, returns])[:, ~MASK.bool()].any()
    assert not torch.stack(gae(REWARDS * torch.nan, V, 0 * MASK, gamma, lam)).any()  # responses without a reward


def test_clipped_value_loss_by_hand():
    values, old, returns = torch.tensor([1.0, 1.0, 3.0]), torch.tensor([0.9, 0.0, 0.0]), torch.tensor([2.0, 2.0, 2.0])
    # moved little: plain; moved far: the greater of (1-2)^2 and (0.5-2)^2; of (3-2)^2 and (0.5-2)^2
    expected = 0.5 * torch.tensor([1.0, 1.5**2, 1.5**2])
    torch.testing.assert_close(clipped_value_loss(values, old, returns, 0.5), expected)


def test_values_are_of_the_states_before_the_tokens():
    model = tiny_model()
    critic = Critic(model).eval()
    assert len(critic.backbone.layers) == L
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


SETTINGS = {"estimator": "ppo", "critic_learning_rate": 1e-2}


def lessons(*arguments, **settings):
    """A trained trainer, and for every rollout batch the critic's targets, its weights afterwards and the batch."""
    trainer, seen = make_trainer(*arguments, **SETTINGS, **settings), []
    trainer.on_rollout.append(
        lambda batch, rollout: seen.append((trainer.critic.targets, weights(trainer.critic.critic), dict(batch)))
    )
    trainer.train()
    return trainer, seen


@pytest.mark.parametrize("settings", [{}, {"gae_lambda": 0.8, "gae_gamma": 0.9, "critic_clip": 0.1}])
def test_both_phases_use_whitened_advantages_of_the_critic(tmp_path, settings):
    trainer, seen = lessons(tmp_path, Recorder, internal_steps=1, **settings)
    gamma, lam = settings.get("gae_gamma", 1.0), settings.get("gae_lambda", 1.0)
    assert len(seen) == 2
    assert {n for n in seen[0][1] if "embed" not in n} <= moved(seen[0][1], seen[1][1])
    for rollout, (targets, _, batch) in enumerate(seen):
        ids = [row[m.bool()].tolist() for row, m in zip(batch["completion_ids"], batch["completion_mask"], strict=True)]
        mask = batch["completion_mask"].float()
        raw, returns = gae(torch.tensor(even_share(ids)), targets["values"], mask, gamma, lam)
        chosen = raw[mask.bool()]
        whitened = (raw - chosen.mean()) / (chosen.var() + 1e-8).sqrt() * mask
        torch.testing.assert_close(batch["advantages"], whitened, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(targets["returns"], returns, rtol=1e-5, atol=1e-6)
        assert targets["values"].any() == (rollout > 0)
    start = trainer.seen[0][0]
    for model, inputs, loss, _ in trainer.seen[:4]:  # IPA with these advantages
        with torch.no_grad():
            old, logps = internal_logps(start, inputs, 2)[0], internal_logps(model, inputs, 2)[0]
        torch.testing.assert_close(loss, surrogate(logps, old, inputs), rtol=1e-4, atol=1e-6)
    log = trainer.state.log_history[0]
    assert {"critic/loss", "critic/grad_norm", "critic/clip_ratio", "critic/value"} <= set(log)
    shown = torch.tensor(list(trainer._logs["advantages"]))
    means = (batch["advantages"] * batch["completion_mask"]).sum(1) / batch["completion_mask"].sum(1)
    torch.testing.assert_close(shown, means)


def test_the_critic_does_not_depend_on_the_policy_in_the_ratio(tmp_path):
    (_, critic_a, a), (_, critic_b, b) = (lessons(tmp_path, internal_steps=n, max_steps=4)[1][0] for n in (0, 1))
    assert torch.equal(a["advantages"], b["advantages"])
    assert same_weights(critic_a, critic_b)


def fixed_batch(rows=16):
    """A batch and the rewards of its responses."""
    generator = torch.Generator().manual_seed(1)
    batch = {
        "prompt_ids": torch.randint(3, 97, (rows, 4), generator=generator),
        "prompt_mask": torch.ones(rows, 4, dtype=torch.long),
        "completion_ids": torch.randint(3, 97, (rows, 6), generator=generator),
        "completion_mask": torch.ones(rows, 6, dtype=torch.long),
    }
    batch["completion_mask"][::3, 4:] = 0
    return batch, (batch["completion_ids"][:, 0] % 2).float()


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_do_not_change_an_update(tmp_path, micro):
    batch, rewards = fixed_batch()
    ppo, other = (make_trainer(tmp_path, **SETTINGS).critic for _ in range(2))
    ppo.advantages(batch, rewards)
    ppo.args.per_device_train_batch_size = micro
    ppo.update(batch, slice(0, 4), "a test")
    old, returns, mask = (target[:4] for target in ppo.targets.values())
    token = clipped_value_loss(other.values(batch, slice(0, 4)), old, returns, 0.5)
    ((token * mask).sum() / mask.sum()).backward()
    torch.nn.utils.clip_grad_norm_(other.critic.parameters(), 1.0)
    other.optimizer.step()
    torch.testing.assert_close(weights(ppo.critic), weights(other.critic), rtol=1e-4, atol=1e-5)


def test_responses_that_could_not_be_scored_count_nowhere(tmp_path):
    ppo = make_trainer(tmp_path, estimator="ppo").critic
    batch, rewards = fixed_batch()
    rewards[3] = torch.nan
    advantages, _ = ppo.advantages(batch, rewards)
    assert not advantages[3].any()
    assert not ppo.targets["mask"][3].any()
    kept = torch.arange(16) != 3
    alone, _ = ppo.advantages({k: v[kept] for k, v in batch.items()}, rewards[kept])
    torch.testing.assert_close(advantages[kept], alone)


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    settings = {"gradient_accumulation_steps": 2, "updates_per_rollout": 2, "num_iterations": 2, "max_steps": 12}
    settings |= {"internal_steps": 2, "save_strategy": "steps", "save_steps": 4, "weight_decay": 0.1, **SETTINGS}
    whole = trained(tmp_path, **settings)
    rest = resumed(tmp_path / "rest", whole, 4, **settings)
    assert same_weights(weights(whole.critic.critic), weights(rest.critic.critic))
    first, second = (t.critic.optimizer.state_dict()["state"] for t in (whole, rest))
    assert all(torch.equal(first[i][k], second[i][k]) for i in first for k in first[i])


def test_with_lora_the_critic_learns_adapters_and_its_head(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=LORA, gradient_checkpointing=True, internal_steps=1, **SETTINGS)
    critic = trainer.critic.critic
    before = weights(critic)
    trainer.train()
    assert moved(before, weights(critic)) == {n for n in before if "lora_" in n or n.startswith("head.")}
    assert not {id(p) for p in critic.parameters()} & {id(p) for p in trainer.model.parameters()}


def test_a_critic_that_diverges_stops_before_its_weights_are_touched(tmp_path):
    trainer = make_trainer(tmp_path, **SETTINGS)
    critic, policy = trainer.critic.critic, weights(trainer.model)
    critic.head.weight.register_hook(lambda grad: grad * float("nan"))
    before = weights(critic)
    with pytest.raises(TrainingStopped, match=r"critic in update 1 \(rollout batch 1, .*lower critic_learning_rate"):
        trainer.train()
    assert same_weights(before, weights(critic))
    assert same_weights(policy, weights(trainer.model))
