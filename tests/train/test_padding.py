"""Prompts of unequal length: scores in training, and the critic's values, are those of each response alone."""

from contextlib import nullcontext

import pytest
import torch

from bupo.errors import ConfigError
from bupo.models.internal_policy import internal_policy
from bupo.models.layout import context_length
from bupo.train.advantages import Critic
from bupo.train.schedule import FULL, Phase
from tests.support.tiny import tiny_model, tokens
from tests.support.training import make_trainer
from tests.support.zoo import BY_NAME, ZOO, zoo_model

REFUSED = ["recurrent_gemma", "minimax", "rwkv"]  # their samples depend on padding
LAYOUTS = [m.name for m in ZOO if m.name not in (*REFUSED, "llama4_text")]  # TRL finds no backbone in the last
COLUMNS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


def padded():
    """Prompts of 3 to 9 tokens, padded on the left as TRL does, with responses of 2 to 5, padded on the right."""
    batch = {"prompt_ids": tokens(4, 9), "completion_ids": tokens(4, 5, seed=1)}
    batch["prompt_mask"] = (torch.arange(9) >= torch.tensor([[6], [0], [4], [3]])).long()
    batch["completion_mask"] = (torch.arange(5) < torch.tensor([[5], [2], [5], [3]])).long()
    return {name: batch[name] * batch.get(name.replace("ids", "mask"), 1) for name in COLUMNS}


def lone_scores(model, batch, row):
    """Log-probabilities and entropies of a response without padding, from the model's own logits."""
    prompt, response = (
        batch[f"{part}_ids"][row][batch[f"{part}_mask"][row].bool()] for part in ("prompt", "completion")
    )
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, response])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    logps = logits.log_softmax(-1)
    return logps.gather(-1, response[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_scores_in_training_are_those_of_the_response_alone(tmp_path, name):
    batch, model = padded(), zoo_model(name)
    trainer = make_trainer(tmp_path, model=model, internal_steps=1)
    for phase in [FULL] if BY_NAME[name].unreadable else [FULL, Phase(2, 1)]:
        scores = trainer.score(batch, phase, compute_entropy=True)
        with nullcontext() if phase is FULL else internal_policy(model.eval(), 2):
            for row in range(4):
                for values, expected in zip(scores, lone_scores(model.eval(), batch, row), strict=True):
                    torch.testing.assert_close(values[row, : len(expected)], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "opt"])
def test_values_of_the_critic_are_those_of_the_response_alone(name):
    batch, critic = padded(), Critic(zoo_model(name))
    torch.nn.init.normal_(critic.head.weight)
    ids, mask = (torch.cat([batch[f"prompt_{kind}"], batch[f"completion_{kind}"]], 1) for kind in ("ids", "mask"))
    values = critic(ids, mask, 5)
    for row, n in enumerate(batch["completion_mask"].sum(1).tolist()):
        one = ids[row, mask[row].bool()][None]
        torch.testing.assert_close(values[row, :n], critic(one, torch.ones_like(one), n)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_models_whose_samples_depend_on_padding_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="takes the padding before shorter prompts for text when it samples"):
        make_trainer(tmp_path, model=zoo_model(name))


def test_a_fused_loss_that_bypasses_the_scores_is_refused_where_padding_counts(tmp_path):
    pytest.importorskip("liger_kernel")
    with pytest.raises(ConfigError, match="use_liger_kernel scores prompts behind padding"):
        make_trainer(tmp_path, model=zoo_model("gpt2"), use_liger_kernel=True)


def test_beyond_the_length_where_longrope_changes_sequences_are_refused():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    model = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=16)
    assert context_length(model.config) == 16
    ids, mask = torch.cat([tokens(2, 10), torch.zeros(2, 14, dtype=torch.long)], 1), torch.ones(2, 24)
    logits = [
        model(ids[:1, :10]),
        *(model(ids[:, :n], attention_mask=mask[:, :n] * (torch.arange(n) < 10)) for n in (16, 24)),
    ]
    first, fits, longer = (output.logits[0, :10] for output in logits)
    torch.testing.assert_close(fits, first, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(longer, first, rtol=1e-2, atol=1e-2)  # once it is, the limit can go


def test_models_to_which_padding_is_nothing_are_scored_as_trl_does(tmp_path):
    assert not make_trainer(tmp_path).aligned
