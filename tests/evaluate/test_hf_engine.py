"""Sampling with transformers: the model's distribution, repeatable, and the same for every layout of the zoo."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from bupo.errors import ConfigError, InputError
from bupo.evaluate import hf_engine
from bupo.evaluate.config import EvalConfig
from bupo.evaluate.engines import Batch, Sampling, cut_at_end
from bupo.evaluate.hf_engine import TransformersEngine, sample
from bupo.evaluate.run import choose_engine
from bupo.lens.maps import PLAIN
from bupo.models.load import load_model
from tests.support.lens import random_lens
from tests.support.zoo import ZOO, zoo_model

PROMPTS = [[40, 41, 42], [43, 44], [45, 46, 47, 48, 49]]


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load_model(str(tiny_folder), device="cpu")


def test_sampling_repeats_and_knows_its_seed(tiny):
    first = sample(*tiny, PROMPTS, Sampling(6, seed=1), samples=3, batch_size=4)
    torch.rand(7)  # the caller's random state plays no part, and is not changed
    state = torch.get_rng_state()
    assert sample(*tiny, PROMPTS, Sampling(6, seed=1), samples=3, batch_size=4) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert sample(*tiny, PROMPTS, Sampling(6, seed=2), samples=3, batch_size=4) != first
    assert [[1 <= len(response) <= 6 for response in group] for group in first] == [[True] * 3] * 3


def assert_drawn_from(tokens, p, spread=4):
    """Chi-square test of sampled tokens against their probabilities (V,); rare tokens count as one."""
    n, counts = len(tokens), np.bincount(tokens, minlength=p.size)
    large = p * n >= 5
    assert large.sum() >= 5
    expected = np.append(p[large], p[~large].sum()) * n
    observed = np.append(counts[large], counts[~large].sum())
    statistic = ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    degrees = len(expected) - 1
    assert statistic < degrees + spread * np.sqrt(2 * degrees)


def test_sampling_is_from_the_models_distribution(tiny, monkeypatch):
    """First tokens against the softmax; a checkpoint's own top-k and penalties must not act."""
    model, tokenizer = tiny
    own = GenerationConfig(top_k=1, repetition_penalty=5.0, min_p=0.5, eos_token_id=2)
    monkeypatch.setattr(model, "generation_config", own)
    (responses,) = sample(model, tokenizer, PROMPTS[:1], Sampling(1), samples=4000, batch_size=1000)
    assert model.generation_config is own
    with torch.no_grad():
        p = model(torch.tensor(PROMPTS[:1])).logits[0, -1].double().softmax(-1).numpy()
    assert_drawn_from([r[0] for r in responses], p)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [entry.name for entry in ZOO])
def test_a_batch_gives_what_each_prompt_gives_alone(name, monkeypatch):
    """Greedy, with prompts of unequal length, one of which ends early and leaves the batch."""
    model, tokenizer = zoo_model(name), SimpleNamespace(pad_token_id=0, eos_token_id=None)
    model.generation_config.eos_token_id = None
    monkeypatch.setattr(hf_engine, "_FIRST_STRETCH", 2)
    sampling, batch = Sampling(5, temperature=0), Batch(((0, 0), (1, 0), (2, 0)), 1)
    free = TransformersEngine(model, tokenizer).run(PROMPTS, batch, sampling)
    model.generation_config.eos_token_id = free[1][1]  # the second response ends here
    engine = TransformersEngine(model, tokenizer)
    together = engine.run(PROMPTS, batch, sampling)
    assert len(together[1]) <= 2
    assert together == [engine.run([prompt], Batch(((0, 0),), 1), sampling)[0] for prompt in PROMPTS]
    assert together == [cut_at_end(response, engine.end_ids) for response in free]
    assert [engine.is_finished(response) for response in together] == [free[1][1] in response for response in free]


@pytest.mark.parametrize("lens", [PLAIN["raw"], PLAIN["norm"], random_lens()], ids=lambda lens: lens.kind)
def test_internal_policy_is_what_is_sampled(tiny, lens):
    model, _ = tiny
    for layer in (1, 2, 3):
        engine = TransformersEngine(*tiny, internal_layer=layer, lens=lens)
        (response,) = engine.run(PROMPTS, Batch(((0, 0),), 1), Sampling(5, temperature=0))
        ids = list(PROMPTS[0])
        for token in response:
            with torch.no_grad():
                state = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0, -1]
                state = lens.transport(layer, state)
                state = model.model.norm(state) if lens.norm else state
                assert int(model.lm_head(state).argmax()) == token
            ids.append(token)


def test_wrong_settings():
    wrong = r"same name: sums, sums; top_p must.*; Avg@4 needs.*; --internal-lens needs.*; a shard"
    with pytest.raises(ConfigError, match=wrong):
        EvalConfig("m", ("sums.json", "a/sums.jsonl"), k=4, n=2, top_p=2, internal_lens="norm", shard="3/2")
    with pytest.raises(InputError, match="cannot sample from an internal policy"):
        choose_engine("vllm", internal_layer=3)


def test_non_finite_probabilities_are_one_clear_line(tiny_folder):
    model, tokenizer = load_model(str(tiny_folder), device="cpu")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        sample(model, tokenizer, PROMPTS, Sampling(2), samples=1)
