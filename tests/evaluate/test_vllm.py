"""Real vLLM on the CPU: against transformers on SmolLM2 (`make smollm2`), and as the sampler of a training run."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.generation.vllm_generation import VLLMGeneration

from bupo.data.prompts import prompt_ids
from bupo.evaluate.engines import Sampling
from bupo.evaluate.metrics import compare
from experiments import engines_agree
from tests.evaluate.test_hf_engine import assert_drawn_from
from tests.support.tiny import tiny_model
from tests.support.training import make_trainer, tiny_tokenizer

MODEL = Path(__file__).parents[2] / "models" / "smollm2"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(not MODEL.is_dir(), reason="needs models/smollm2 (make smollm2)"),
]


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    questions = engines_agree.write_questions(tmp_path_factory.mktemp("data"), 8)
    return {name: engines_agree.load(name, str(MODEL), questions, 8, 24) for name in ("vllm", "transformers")}


def test_first_tokens_come_from_the_models_distribution(engines):
    """Samples of one request against the softmax that transformers computes for the same prompt token ids."""
    (_, vllm), model = engines["vllm"], engines["transformers"][1].model
    prompt, n = prompt_ids([{"role": "user", "content": "Name a colour."}], vllm.tokenizer), 300
    (batch,) = vllm.plan(1, n, 3)
    responses = vllm.run([prompt], batch, Sampling(1, seed=3))
    assert [len(response) for response in responses] == [1] * n
    assert vllm.run([prompt], batch, Sampling(1, seed=3)) == responses  # the same seed, the same samples
    with torch.no_grad():
        p = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1).numpy()
    assert_drawn_from([r[0] for r in responses], p, spread=5)


def test_the_engines_agree(engines, tmp_path):
    """The same prompt token ids, and accuracies that differ by no more than sampling explains."""
    shares, prompts = {}, {}
    for name, loaded in engines.items():
        prompts[name], shares[name], results = engines_agree.measure(loaded, tmp_path / name)
        assert results["engine"] == name
    assert 0 < np.mean(shares["transformers"]) < 1
    assert prompts["vllm"] == prompts["transformers"]
    assert compare(shares["transformers"], shares["vllm"])["p_value"] > 0.001


@pytest.fixture
def vllm_trains_on_a_cpu(monkeypatch):
    """TRL builds its engine for a GPU; on a CPU, packed linear weights could not be loaded again after an update."""
    import vllm
    import vllm.model_executor.layers.utils as layers

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")

    def plain(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    build = vllm.LLM.__init__

    def for_a_cpu(self, **options):
        longest = max(options["max_num_batched_tokens"], options["max_model_len"])
        more = {"enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": longest}
        build(self, **{**options, **more, "dtype": "float32"})

    monkeypatch.setattr(layers, "dispatch_cpu_unquantized_gemm", plain)
    monkeypatch.setattr(vllm.LLM, "__init__", for_a_cpu)


@pytest.mark.parametrize("synced", [True, False], ids=["synced", "control"])
def test_training_samples_from_the_full_policy_in_both_phases(tmp_path, vllm_trains_on_a_cpu, monkeypatch, synced):
    """Colocated vLLM's log-probabilities are the updated full policy's; in the control it does not get the weights."""
    tiny_model("qwen3", spread=3.0, head_dim=32).save_pretrained(tmp_path / "start")
    tiny_tokenizer().save_pretrained(tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    if not synced:
        monkeypatch.setattr(VLLMGeneration, "sync_weights", lambda self: None)
    sampler = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 64}
    trainer = make_trainer(tmp_path, model=model, internal_steps=2, max_steps=16, **sampler)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "phase" in row]
    assert [row["phase"] for row in rows] == [1, 1, 2, 2]
    first, *later = [row["sampling/sampling_logp_difference/max"] for row in rows]
    assert first < 1e-4
    assert max(later) < 1e-4 if synced else min(later) > 1e-2
