"""Whole evaluations: results, continuing after a kill, shards, and grading again."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from bupo.data.rollouts import read_responses
from bupo.errors import InputError
from bupo.evaluate.config import TASKS, EvalConfig, Task, task_problems
from bupo.evaluate.hf_engine import TransformersEngine
from bupo.evaluate.responses import regrade
from bupo.evaluate.run import evaluate
from bupo.models.load import load_model


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load_model(str(tiny_folder), device="cpu")


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(5)] + [{"prompt": "?", "answer": "\\frac{"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(output, tiny, questions, *, engine=None, **changes):
    settings = {"model": "tiny", "tasks": (str(questions),), "n": 4, "k": 2, "max_new_tokens": 5, "batch_size": 3}
    config = EvalConfig(**{**settings, **changes})
    engine = engine or TransformersEngine(*tiny, batch_size=config.batch_size)
    return evaluate(config, lambda: engine, output)


def rows_of(folder):
    return pyarrow.parquet.read_table(folder / "responses.parquet")


def read(folder, name="results.json"):
    return json.loads((folder / name).read_text())


class Fragile(TransformersEngine):
    """Is killed after ``left`` batches, and counts the responses made."""

    left = made = 0

    def run(self, prompts, batch, sampling):
        if Fragile.left == 0:
            raise KeyboardInterrupt
        Fragile.left -= 1
        Fragile.made += len(batch.items)
        return super().run(prompts, batch, sampling)


def test_a_killed_run_continues_and_ends_the_same(tmp_path, tiny, questions):
    whole = run(tmp_path / "whole", tiny, questions)
    table = rows_of(tmp_path / "whole")
    assert table.column("status").to_pylist().count("bad_gold") == 4
    output = tmp_path / "killed"
    for _ in range(3):  # each start is killed after two batches; the kill also cuts off a line
        Fragile.left = 2
        with pytest.raises(KeyboardInterrupt):
            run(output, tiny, questions, engine=Fragile(*tiny, batch_size=3))
        assert not (output / "results.json").exists()
        partial = output / "responses.partial.jsonl"
        partial.write_bytes(partial.read_bytes()[:-4])
    Fragile.left = -1
    assert run(output, tiny, questions, engine=Fragile(*tiny, batch_size=3)) == whole
    assert rows_of(output).equals(table)
    assert Fragile.made == 24 + 3 * 3  # the cut-off batch of each kill, and nothing else, was made twice
    assert sorted(p.name for p in output.iterdir()) == ["responses.parquet", "results.json", "run.json"]
    with pytest.raises(InputError, match="already holds a run"):
        run(output, tiny, questions)
    (output / "results.json").unlink()
    with pytest.raises(InputError, match=r"other settings .seed: 0 then, 1 now"):
        run(output, tiny, questions, seed=1)


def test_shards_are_merged_by_the_last_to_finish(tmp_path, tiny, questions):
    output = tmp_path / "out"
    first = run(output, tiny, questions, shard="2/2")
    assert first["tasks"]["sums"]["n_problems"] == 2
    assert not (output / "results.json").exists()
    merged = run(output, tiny, questions, shard="1/2")
    assert merged == read(output) == regrade(output)
    assert [merged["tasks"]["sums"][name] for name in ("n_problems", "n_samples", "left_out")] == [5, 4, ["sums/5"]]
    ids = [f"sums/{problem}" for problem in range(6) for _ in range(4)]
    assert rows_of(output).column("problem_id").to_pylist() == ids
    parts = [rows_of(output / f"shard-{number}-of-2") for number in (1, 2)]
    assert pa.concat_tables(parts).equals(rows_of(output))
    with pytest.raises(InputError, match="already holds a run"):
        run(output, tiny, questions, shard="1/2")
    with pytest.raises(InputError, match="has 6 problems, too few for 7 shards"):
        run(tmp_path / "no", tiny, questions, shard="1/7")
    (tmp_path / "run.json").write_text('{"command": "train"}')
    with pytest.raises(InputError, match="already holds a run"):
        run(tmp_path, tiny, questions, shard="1/2")
    run(tmp_path / "mixed", tiny, questions, shard="1/2")
    with pytest.raises(InputError, match=r"shard-2-of-2 was evaluated with other settings"):
        run(tmp_path / "mixed", tiny, questions, shard="2/2", seed=1)


def test_results_hold_what_they_should_and_are_the_same_when_graded_again(tmp_path, tiny, questions, monkeypatch):
    monkeypatch.setattr("bupo.evaluate.run.find_task", lambda spec: Task("sums", spec=spec, template="raw"))
    output = tmp_path / "out"
    results = run(output, tiny, questions)
    (task,) = results["tasks"].values()
    assert (results["schema"], results["sampling"]["template"]) == (1, "raw")  # the task's own, as it was used
    assert (task["n_problems"], task["n_samples"], task["left_out"]) == (5, 4, ["sums/5"])
    assert [entry["k"] for entry in task["pass_at_k"]] == [1, 2, 4]
    assert task["avg_at_k"] == {**task["pass_at_k"][0], "k": 2}
    run_file = read(output, "run.json")
    assert (run_file["command"], run_file["config"]["temperature"]) == ("eval", 1.0)
    rollouts = read_responses(output / "responses.parquet")
    assert (len(rollouts), rollouts[5].problem_id) == (24, "sums/1")
    table = rows_of(output)
    assert read(output) == results == regrade(output) == read(output)
    assert rows_of(output).equals(table)
    rows = [{**row, "response": f"\\boxed{{{row['answer']}}}"} for row in table.to_pylist()]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=table.schema), output / "responses.parquet")
    (task,) = regrade(output)["tasks"].values()
    assert (task["avg_at_k"]["mean"], task["left_out"]) == (1.0, ["sums/5"])
    with pytest.raises(InputError, match="no finished evaluation"):
        regrade(tmp_path)
    with pytest.raises(InputError, match=r"longest prompt has 4 tokens.*context of 512"):
        run(tmp_path / "long", tiny, questions, max_new_tokens=509)
    assert not (tmp_path / "long").exists()
    monkeypatch.undo()
    results = run(tmp_path / "gym", tiny, "reasoning_gym/chain_sum", limit=2, n=2, template="raw", max_new_tokens=3)
    assert regrade(tmp_path / "gym") == results


def test_every_task_of_the_paper_loads_from_a_folder(shared_data):
    sizes = {"math500": 500, "amc23": 40, "aime24": 30, "aime25": 30}
    for name, size in sizes.items():
        problems = task_problems(TASKS[name], data_dir=shared_data)
        assert (len(problems), problems[0].id) == (size, f"{name}/0")
    assert {name: TASKS[name].k for name in sizes} == {"math500": 16, "amc23": 16, "aime24": 32, "aime25": 32}
    with pytest.raises(InputError, match=r"task minerva: .*not in .*minerva.parquet"):
        task_problems(TASKS["minerva"], data_dir=shared_data)


def test_hub_benchmarks_are_read_by_their_columns(monkeypatch):
    """No hub here: rows with the columns of the real datasets, under the task's own name."""
    rows = {
        "HuggingFaceH4/MATH-500": {"problem": "1+1?", "solution": "\\boxed{2}", "answer": "2", "unique_id": "a/1.json"},
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
    problems = [task_problems(task)[0] for task in TASKS.values() if task.hub]
    assert [problem.answer for problem in problems] == ["2", "2.0", "002", "2", "2", "2, 3"]
    assert [problem.id for problem in problems[::2]] == ["math500/a/1.json", "aime24/60", "minerva/0"]
    assert all(problem.prompt[-1]["content"] == "1+1?" for problem in problems)
