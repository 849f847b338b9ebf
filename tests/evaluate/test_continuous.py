"""transformers' continuous batching as an engine: the same distribution, the same greedy text, repeatable."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from bupo.errors import InputError
from bupo.evaluate.engine_continuous import ContinuousEngine
from bupo.evaluate.engines import Batch, Sampling
from bupo.evaluate.hf_engine import TransformersEngine
from tests.support.tiny import tiny_model

PROMPTS = [[40, 41, 42], [43, 44], [45, 46, 47, 48, 49]]


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    from bupo.models.load import load_model

    return load_model(str(tiny_folder), device="cpu")


def answers(engine, sampling, samples=8):
    return [
        response
        for batch in engine.plan(len(PROMPTS), samples, sampling.seed)
        for response in engine.run(PROMPTS, batch, sampling)
    ]


def test_it_repeats_and_knows_its_seed(tiny):
    engine = ContinuousEngine(*tiny, batch_size=4)
    first = answers(engine, Sampling(12, seed=1))
    torch.rand(7)  # the caller's random state plays no part
    state = torch.get_rng_state()
    assert answers(engine, Sampling(12, seed=1)) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert answers(engine, Sampling(12, seed=2)) != first
    assert len(first) == 24
    assert all(r[-1] == 2 or len(r) == 12 for r in first)
    assert not any(2 in r[:-1] for r in first)


def test_greedy_text_is_that_of_the_plain_engine(tiny):
    sampling = Sampling(20, temperature=0)
    plain = TransformersEngine(*tiny, batch_size=24)
    assert answers(ContinuousEngine(*tiny, batch_size=2), sampling) == answers(plain, sampling)


def test_samples_follow_the_models_distribution(tiny):
    """First and second tokens against the softmax; a checkpoint's own top-k and penalties must not act."""
    model, tokenizer = tiny
    before = model.generation_config
    model.generation_config = GenerationConfig(top_k=1, repetition_penalty=5.0, eos_token_id=2)
    n = 3000
    try:
        engine = ContinuousEngine(model, tokenizer, batch_size=500)
        (batch,) = engine.plan(1, n, 5)
        responses = engine.run(PROMPTS, batch, Sampling(2, seed=5))
        assert model.generation_config.top_k == 1
    finally:
        model.generation_config = before
    with torch.no_grad():
        p = model(torch.tensor(PROMPTS[:1])).logits[0, -1].double().softmax(-1)
        following = torch.cat([torch.tensor([PROMPTS[0]]).repeat(97, 1), torch.arange(97)[:, None]], dim=1)
        q = model(following).logits[:, -1].double().softmax(-1)
    q[2] = torch.eye(97, dtype=torch.float64)[2]  # an end token ends the response
    for position, expected in ((0, p), (-1, p @ q)):
        probabilities = expected.numpy()
        counts = np.bincount([r[position] for r in responses], minlength=97)
        large = probabilities * n >= 5
        wanted = np.append(probabilities[large], probabilities[~large].sum()) * n
        observed = np.append(counts[large], counts[~large].sum())
        statistic = ((observed - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum()
        assert statistic < large.sum() + 4 * np.sqrt(2 * large.sum())


def test_an_evaluation_through_the_command(tiny_folder, tmp_path, capsys):
    from bupo.cli import main

    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(4)))
    command = ["eval", "--model", str(tiny_folder), "--tasks", str(path), "--k", "2", "--max-new-tokens", "4"]
    assert main([*command, "--engine", "continuous", "--output", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["engine"] == "continuous"
    assert results["tasks"]["sums"]["n_samples"] == 2
    capsys.readouterr()
    assert main([*command, "--engine", "continuous", "--internal-layer", "2", "--output", str(tmp_path / "no")]) == 2
    assert "cannot sample from an internal policy" in capsys.readouterr().err


def test_models_that_cannot_are_refused_in_one_line(tiny, capfd):
    from tests.support.zoo import zoo_model

    _, tokenizer = tiny
    with pytest.raises(InputError, match="use --engine transformers"):
        ContinuousEngine(zoo_model("bamba"), tokenizer).run(PROMPTS, Batch(((0, 0),), 1), Sampling(2))
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="use --engine transformers"):
        ContinuousEngine(broken, tokenizer).run(PROMPTS, Batch(((0, 0),), 1), Sampling(2))
    assert "Traceback" not in capfd.readouterr().err
