from __future__ import annotations

import json
from itertools import combinations, product
from math import comb

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from bupo.errors import ConfigError, InputError
from bupo.evaluate.metrics import bootstrap, compare, pass_at_k, pass_curve


def test_pass_at_k_equals_enumeration_of_subsets():
    for n in range(1, 8):
        for correct, k in product(range(n + 1), range(1, n + 1)):
            samples = [True] * correct + [False] * (n - correct)
            subsets = list(combinations(samples, k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
@settings(max_examples=200)
def test_pass_at_k_equals_exact_binomials(case):
    n, correct, k = case
    exact = 1 - comb(n - correct, k) / comb(n, k)
    assert pass_at_k(n, correct, k) == pytest.approx(exact, abs=1e-9)


def test_pass_at_k_is_unbiased():
    """Its mean over draws is 1 - (1-p)^k."""
    generator = np.random.default_rng(0)
    p, n, k = 0.1, 20, 8
    draws = generator.binomial(n, p, size=20_000)
    table = np.array([pass_at_k(n, c, k) for c in range(n + 1)])[draws]
    assert abs(table.mean() - (1 - (1 - p) ** k)) < 4 * table.std() / np.sqrt(draws.size)


@pytest.mark.parametrize("case", [(0, 0, 1), (4, 5, 1), (4, 1, 0), (4, 1, 5), (4, -1, 1)])
def test_pass_at_k_refuses_nonsense(case):
    with pytest.raises(ValueError, match="need 0 <= correct"):
        pass_at_k(*case)


def test_curve_has_only_the_ks_that_the_samples_allow():
    curve = pass_curve([0, 4, 16], 16)
    assert [k for k, _ in curve] == [1, 4, 16]
    assert curve[0][1].mean == pytest.approx(np.mean([0, 4 / 16, 1]))
    assert curve[-1][1].mean == pytest.approx(2 / 3)


def simulated_means(generator, problems, samples):
    """Share of right samples per problem where problems differ in difficulty (mean 2/7)."""
    return generator.binomial(samples, generator.beta(2, 5, size=problems)) / samples


def test_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(400):
        estimate = bootstrap(simulated_means(generator, 60, 8), resamples=600, seed=trial)
        covered += estimate.low <= 2 / 7 <= estimate.high
    assert 0.91 <= covered / 400 <= 0.98  # 95 % within three standard errors, less what the percentile method loses


def test_interval_is_of_problems_not_of_samples():
    """Treating the samples of a problem as independent would give an interval far too narrow."""
    generator = np.random.default_rng(2)
    shares = (generator.random(50) < 0.5).astype(float)  # every problem is always or never solved
    estimate = bootstrap(shares)
    by_samples = 2 * 1.96 * np.sqrt(0.25 / (50 * 16))
    assert estimate.high - estimate.low > 3 * by_samples


def test_bootstrap_edge_cases():
    assert bootstrap([0.5]).to_json() == {"mean": 0.5, "ci95": [0.5, 0.5]}
    assert bootstrap([1, 0, 1], seed=3) == bootstrap([1, 0, 1], seed=3)
    with pytest.raises(ValueError, match="at least one problem"):
        bootstrap([])


def test_comparison_finds_a_difference_and_keeps_its_level():
    generator = np.random.default_rng(3)
    rejected = 0
    for trial in range(200):  # no difference
        difficulty = generator.beta(2, 5, size=40)
        first, second = generator.binomial(8, difficulty) / 8, generator.binomial(8, difficulty) / 8
        rejected += compare(first, second, resamples=500, seed=trial).p_value < 0.05
    assert rejected / 200 <= 0.10  # 5 % and three standard errors
    difficulty = generator.beta(2, 5, size=40)
    better = compare(generator.binomial(8, difficulty) / 8, generator.binomial(8, np.minimum(difficulty + 0.2, 1)) / 8)
    assert better.p_value < 0.01
    assert better.low > 0


def test_comparison_equals_enumerated_sign_flips():
    first, second = [0.0, 0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 0.5, 0.25, 1.0]
    differences = np.subtract(second, first)
    flips = [abs(np.dot(signs, differences)) for signs in product((1, -1), repeat=5)]
    exact = np.mean([flip >= abs(differences.sum()) - 1e-12 for flip in flips])
    assert compare(first, second, resamples=50_000).p_value == pytest.approx(exact, abs=0.01)
    with pytest.raises(ValueError, match="same problems: 5 and 4"):
        compare(first, second[:4])


# --- engine -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    from bupo.models.load import load_model

    return load_model(str(tiny_folder), device="cpu")


PROMPTS = [[40, 41, 42], [43, 44], [45, 46, 47, 48, 49]]


def test_sampling_repeats_and_knows_its_seed(tiny):
    from bupo.evaluate.hf_engine import sample

    options = {"samples": 3, "max_new_tokens": 6, "batch_size": 4}
    first = sample(*tiny, PROMPTS, seed=1, **options)
    torch.rand(7)  # the caller's random state plays no part
    state = torch.get_rng_state()
    assert sample(*tiny, PROMPTS, seed=1, **options) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert sample(*tiny, PROMPTS, seed=2, **options) != first
    assert [len(group) for group in first] == [3, 3, 3]
    assert all(1 <= len(response) <= 6 for group in first for response in group)


def test_sampling_is_from_the_models_distribution(tiny):
    """First tokens against the softmax; a checkpoint's own top-k and penalties must not act."""
    from bupo.evaluate.hf_engine import sample

    model, tokenizer = tiny
    before = model.generation_config
    model.generation_config = GenerationConfig(top_k=1, repetition_penalty=5.0, min_p=0.5, eos_token_id=2)
    try:
        (responses,) = sample(model, tokenizer, PROMPTS[:1], samples=4000, max_new_tokens=1, batch_size=1000)
        assert model.generation_config.top_k == 1
    finally:
        model.generation_config = before
    with torch.no_grad():
        p = model(torch.tensor(PROMPTS[:1])).logits[0, -1].double().softmax(-1).numpy()
    counts = np.bincount([r[0] for r in responses], minlength=97)
    large = p * 4000 >= 5
    expected = np.append(p[large], p[~large].sum()) * 4000
    observed = np.append(counts[large], counts[~large].sum())
    statistic = ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    degrees = len(expected) - 1
    assert statistic < degrees + 4 * np.sqrt(2 * degrees)


def test_a_batch_gives_what_each_prompt_gives_alone(tiny):
    from bupo.evaluate.hf_engine import sample

    together = sample(*tiny, PROMPTS, samples=1, max_new_tokens=8, temperature=0, batch_size=3)
    alone = [sample(*tiny, [p], samples=1, max_new_tokens=8, temperature=0)[0] for p in PROMPTS]
    assert together == alone


def test_responses_end_with_their_end_token(tiny):
    from bupo.evaluate.engines import cut_at_end
    from bupo.evaluate.hf_engine import TransformersEngine, sample

    assert cut_at_end([5, 2, 0, 0], frozenset({2})) == [5, 2]
    assert cut_at_end([5, 6], frozenset({2})) == [5, 6]
    engine = TransformersEngine(*tiny)
    responses = [r for group in sample(*tiny, PROMPTS, samples=40, max_new_tokens=30) for r in group]
    ended = [r for r in responses if 2 in r]
    assert ended
    assert all(r.index(2) == len(r) - 1 and engine.is_finished(r) for r in ended)
    assert not any(engine.is_finished(r) for r in responses if 2 not in r)


def test_internal_policy_is_what_is_sampled(tiny):
    from bupo.evaluate.engines import Batch, Sampling
    from bupo.evaluate.hf_engine import TransformersEngine

    model, _ = tiny
    sampling = Sampling(5, temperature=0)
    with pytest.raises(InputError, match="layers 1 to 4"):
        TransformersEngine(*tiny, internal_layer=5)
    for layer in (1, 2, 3):
        (response,) = TransformersEngine(*tiny, internal_layer=layer).run(PROMPTS, Batch(((0, 0),), 1), sampling)
        ids = list(PROMPTS[0])
        for token in response:
            with torch.no_grad():
                state = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0, -1]
                assert int(model.lm_head(state).argmax()) == token
            ids.append(token)


def test_wrong_sampling_settings():
    from bupo.evaluate.engines import Sampling, choose_engine

    with pytest.raises(ConfigError, match=r"max_new_tokens must be at least 1.*temperature.*top_p"):
        Sampling(0, temperature=-1, top_p=2)
    with pytest.raises(InputError, match="unknown engine"):
        choose_engine("vlm")
    for name in ("vllm", "continuous"):
        with pytest.raises(InputError, match="cannot sample from an internal policy"):
            choose_engine(name, internal_layer=3)


def test_non_finite_probabilities_are_one_clear_line(tiny_folder):
    from bupo.evaluate.hf_engine import sample
    from bupo.models.load import load_model

    model, tokenizer = load_model(str(tiny_folder), device="cpu")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="non-finite"):
        sample(model, tokenizer, PROMPTS, samples=1, max_new_tokens=2)


# --- runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(5)] + [{"prompt": "?", "answer": "\\frac{"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(output, tiny_folder, questions, *, engine=None, **changes):
    from bupo.evaluate.hf_engine import TransformersEngine
    from bupo.evaluate.run import EvalConfig, evaluate
    from bupo.models.load import load_model

    settings = {"model": "tiny", "tasks": (str(questions),), "n": 4, "k": 2, "max_new_tokens": 5, "batch_size": 3}
    config = EvalConfig(**{**settings, **changes})
    if engine is None:
        engine = TransformersEngine(*load_model(str(tiny_folder), device="cpu"), batch_size=config.batch_size)
    return evaluate(config, engine, engine.tokenizer, output)


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path, tiny_folder, questions):
    from bupo.evaluate.hf_engine import TransformersEngine
    from bupo.models.load import load_model

    whole = run(tmp_path / "whole", tiny_folder, questions)
    table = pyarrow.parquet.read_table(tmp_path / "whole" / "responses.parquet")
    assert table.num_rows == 24
    assert table.column("status").to_pylist().count("bad_gold") == 4
    model, tokenizer = load_model(str(tiny_folder), device="cpu")

    class Fragile(TransformersEngine):
        left = 0
        made = 0

        def run(self, prompts, batch, sampling):
            if Fragile.left == 0:
                raise Killed
            Fragile.left -= 1
            Fragile.made += len(batch.items)
            return super().run(prompts, batch, sampling)

    output = tmp_path / "killed"
    for _ in range(3):  # each start is killed after two batches; the kill also cuts off a line
        Fragile.left = 2
        with pytest.raises(Killed):
            run(output, tiny_folder, questions, engine=Fragile(model, tokenizer, batch_size=3))
        assert not (output / "results.json").exists()
        partial = output / "responses.partial.jsonl"
        partial.write_bytes(partial.read_bytes()[:-4])
    Fragile.left = -1
    resumed = run(output, tiny_folder, questions, engine=Fragile(model, tokenizer, batch_size=3))
    assert resumed == whole
    assert pyarrow.parquet.read_table(output / "responses.parquet").equals(table)
    assert Fragile.made == 24 + 3 * 3  # the cut-off batch of each kill, and nothing else, was made twice
    assert sorted(p.name for p in output.iterdir()) == ["responses.parquet", "results.json", "run.json"]


def test_an_unfinished_run_with_other_settings_is_not_mixed(tmp_path, tiny_folder, questions):
    output = tmp_path / "out"
    run(output, tiny_folder, questions)
    with pytest.raises(InputError, match="already holds a run"):
        run(output, tiny_folder, questions)
    (output / "results.json").unlink()
    with pytest.raises(InputError, match=r"other settings .seed: 0 then, 1 now"):
        run(output, tiny_folder, questions, seed=1)


def test_results_say_what_they_should(tmp_path, tiny_folder, questions):
    results = run(tmp_path / "out", tiny_folder, questions)
    (task,) = results["tasks"].values()
    assert results["schema"] == 1
    assert (task["n_problems"], task["n_samples"]) == (5, 4)
    assert task["left_out"] == ["sums/5"]
    assert [entry["k"] for entry in task["pass_at_k"]] == [1, 2, 4]
    assert task["avg_at_k"]["k"] == 2
    assert task["avg_at_k"]["mean"] == pytest.approx(task["pass_at_k"][0]["mean"])
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    run_file = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run_file["command"] == "eval"
    assert run_file["config"]["temperature"] == 1.0


def test_regrading_equals_the_first_grading(tmp_path, tiny_folder, questions):
    from bupo.evaluate.run import regrade

    output = tmp_path / "out"
    first = run(output, tiny_folder, questions)
    table = pyarrow.parquet.read_table(output / "responses.parquet")
    assert regrade(output) == first
    assert pyarrow.parquet.read_table(output / "responses.parquet").equals(table)
    rows = table.to_pylist()
    for row in rows:  # a response that is right is found by regrading
        row["response"] = f"\\boxed{{{row['answer']}}}"
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=table.schema), output / "responses.parquet")
    (task,) = regrade(output)["tasks"].values()
    assert task["avg_at_k"]["mean"] == 1.0
    assert task["left_out"] == ["sums/5"]
    with pytest.raises(InputError, match="no finished evaluation"):
        regrade(tmp_path)


def test_reasoning_gym_runs_and_regrades(tmp_path, tiny_folder):
    from bupo.evaluate.run import regrade

    model_says = run(
        tmp_path / "out", tiny_folder, "reasoning_gym/chain_sum", limit=2, n=2, template="raw", max_new_tokens=3
    )
    assert regrade(tmp_path / "out") == model_says


def test_responses_are_read_back_by_the_analysis_reader(tmp_path, tiny_folder, questions):
    from bupo.data.rollouts import read_responses

    run(tmp_path / "out", tiny_folder, questions)
    rollouts = read_responses(tmp_path / "out" / "responses.parquet")
    assert len(rollouts) == 24
    assert rollouts[5].problem_id == "sums/1"
    assert rollouts[5].sample == 1


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, tiny_folder, questions):
    with pytest.raises(InputError, match=r"longest prompt has 4 tokens.*context of 512"):
        run(tmp_path / "out", tiny_folder, questions, max_new_tokens=509)
    assert not (tmp_path / "out").exists()


def test_results_need_equal_samples_and_survive_no_usable_problem():
    from bupo.evaluate.results import task_results

    row = {"problem_id": "a", "reward": 0.0, "status": "wrong", "length": 3, "finished": True}
    with pytest.raises(ValueError, match="different numbers of samples"):
        task_results([row, row, {**row, "problem_id": "b"}], k=1)
    empty = task_results([{**row, "status": "bad_gold"}], k=1)
    assert empty["n_problems"] == 0
    assert empty["left_out"] == ["a"]


def test_every_task_of_the_paper_loads_from_a_folder(shared_data):
    from bupo.evaluate.tasks import TASKS, task_problems

    sizes = {"math500": 500, "amc23": 40, "aime24": 30, "aime25": 30}
    for name, size in sizes.items():
        problems = task_problems(TASKS[name], data_dir=shared_data)
        assert len(problems) == size
        assert problems[0].id == f"{name}/0"
    assert {name: TASKS[name].k for name in sizes} == {"math500": 16, "amc23": 16, "aime24": 32, "aime25": 32}
    with pytest.raises(InputError, match=r"task minerva: .*not in .* either.*minerva.parquet"):
        task_problems(TASKS["minerva"], data_dir=shared_data)


def test_hub_benchmarks_are_read_by_their_columns(monkeypatch):
    """No hub here: rows with the columns of the real datasets, under the task's own name."""
    import datasets

    from bupo.evaluate.tasks import TASKS, task_problems

    rows = {
        "HuggingFaceH4/MATH-500": {
            "problem": "1+1?",
            "solution": "so \\boxed{2}",
            "answer": "2",
            "unique_id": "a/1.json",
        },
        "math-ai/amc23": {"id": 0, "question": "1+1?", "answer": "2.0", "url": "u"},
        "math-ai/aime24": {"id": 60, "problem": "1+1?", "solution": "\\boxed{002}", "url": "u"},
        "math-ai/aime25": {"problem": "1+1?", "answer": "2", "id": "0"},
        "math-ai/minervamath": {"question": "1+1?", "answer": "2"},
        "math-ai/olympiadbench": {"id": 1606, "question": "1+1?", "solution": ["..."], "final_answer": ["2", "3"]},
    }
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["test"])
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config, split: datasets.Dataset.from_list([rows[name]], split=split)
    )
    found = {name: task_problems(task)[0] for name, task in TASKS.items() if task.hub}
    assert {name: problem.answer for name, problem in found.items()} == {
        "math500": "2", "amc23": "2.0", "aime24": "002", "aime25": "2", "minerva": "2", "olympiadbench": "2, 3",
    }  # fmt: skip
    assert found["math500"].id == "math500/a/1.json"
    assert found["aime24"].id == "aime24/60"
    assert all(problem.prompt[-1]["content"] == "1+1?" for problem in found.values())
