import json
import re

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bupo.data.generators import pack, unpack
from bupo.data.problems import BOXED_INSTRUCTION, load_problems
from bupo.data.rollouts import read_responses
from bupo.errors import InputError
from tests.data.test_prompts import Tokenizer


@pytest.mark.parametrize(
    ("name", "size"), [("math500", 500), ("amc2023", 40), ("aime_2024", 30), ("aime_2025", 30), ("deepmath-5k", 5000)]
)
def test_shared_sets_load_whole(shared_data, name, size):
    problems = load_problems(str(shared_data / f"{name}.parquet"))
    assert len(problems) == size == len({p.id for p in problems})
    assert all(p.prompt[-1]["role"] == "user" and p.answer for p in problems)
    assert problems[0].prompt[0]["content"] == BOXED_INSTRUCTION
    assert problems[0].id == f"{name}/0"


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"problem": "1+1?", "answer": "2"}, "2"),
        ({"question": "1+1?", "final_answer": "2"}, "2"),
        ({"problem": "1+1?", "solution": "so \\boxed{1} then \\boxed{\\frac{4}{2}}."}, "\\frac{4}{2}"),
        ({"question": "1+1?", "answer": "two, as 1+1=2\n#### 2"}, "2"),
        ({"question": "1+1?", "final_answer": ["2"]}, "2"),
        ({"prompt": "1+1?", "ground_truth": 2}, "2"),
        ({"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}}, "2"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_usual_columns(tmp_path, row, answer, suffix):
    path = tmp_path / f"set.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps([row] if suffix == "json" else row))
    (problem,) = load_problems(str(path))
    assert problem.answer == answer
    text = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1]["content"]
    assert text == "1+1?"
    # a question is asked with the instruction; a prompt stays as it is
    assert (isinstance(problem.prompt, list) and len(problem.prompt) == 2) == bool({"problem", "question"} & set(row))


def messages(content, **more):
    return {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": content}], **more}


def test_text_parts_of_a_message_are_joined(tmp_path):
    parts = [{"type": "text", "text": "1+", "image": None}, {"text": "1?"}]
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(messages(c, answer="2")) + "\n" for c in (parts, "1+1?", ["1+", "1?"])))
    problems = load_problems(str(path))
    assert [problem.prompt for problem in problems] == [messages("1+1?")["messages"]] * 3
    path.write_text(json.dumps({"prompt": messages(parts)["messages"], "response": "2"}))
    (read,) = read_responses(path, Tokenizer(True))
    assert read.prompt_ids == list(b"<system>s<user>1+1?<assistant>")


@pytest.mark.parametrize("content", [None, 4, [], [None], [{"type": "image", "text": "a"}], [{"type": "text"}]])
def test_other_content_of_a_message_is_refused(tmp_path, content):
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(messages(content, answer="2")))
    wrong = r"row 0: content of message 2 must be text or a list of text parts, not "
    with pytest.raises(InputError, match=wrong + re.escape(repr(content))):
        load_problems(str(path))
    path.write_text(json.dumps({"prompt": messages(content)["messages"], "response": "2"}))
    with pytest.raises(InputError, match=wrong):
        read_responses(path, Tokenizer(True))


def test_messages_that_hold_the_answer_are_refused(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text(
        json.dumps(
            {"messages": [*messages("1+1?")["messages"], {"role": "assistant", "content": "2"}]} | {"answer": "2"}
        )
    )
    with pytest.raises(InputError, match=r"row 0: the last message is the assistant's"):
        load_problems(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such file"),
        ("empty.json", "[]", "is empty"),
        (
            "bad.jsonl",
            '{"problem": "a", "answer": "1"}\n\n{',
            "jsonl in line 3: Expecting.*at column 2",
        ),
        ("deep.jsonl", "{}\n" + "[" * 100_000, "cannot be read as jsonl in line 2: nested too deeply"),
        ("bad.parquet", "nope", "cannot be read as parquet"),
        ("scalar.json", "3", "list of objects"),
        ("x.jsonl", '{"text": "a", "label": 1}', "row 0 lacks a prompt column .prompt, messages, .*found: text, label"),
        ("y.jsonl", '{"problem": "a", "label": 1}', "row 0 lacks an answer column .*final_answer"),
        ("same.jsonl", '{"id": 1, "problem": "a", "answer": "1"}\n{"id": 1, "problem": "b", "answer": ""}', "two rows"),
    ],
)
def test_wrong_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_problems(str(path))


def test_json_answers_stay_as_written(tmp_path):
    """Arrow's reader, which `datasets` uses for JSON, would make dates of the first and floats of the others."""
    rows = [{"problem": "a", "answer": answer} for answer in ("2020-01-01", 10**32 + 1, 0.5)]
    path = tmp_path / "set.jsonl"
    path.write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert [problem.answer for problem in load_problems(str(path))] == ["2020-01-01", str(10**32 + 1), "0.5"]


@pytest.mark.parametrize(
    ("spec", "message", "options"),
    [
        ("nobody/no-such-dataset", "download it and pass a local file", {}),
        ("mathh", "unknown dataset 'mathh'", {}),
        ("arithmetic", "limit must be at least 1", {"limit": 0}),
        ("reasoning_gym/gsm_symbolik", "did you mean gsm_symbolic", {}),
        ("reasoning_gym/gsm_symbolic", "splits train and test", {"split": "validation"}),
        ("reasoning_gym/chain_sum/terms=3", "argument 'terms'.*; write /key=value with one of .*max_terms", {}),
        ("reasoning_gym/chain_sum/min_terms=5/max_terms=2", "refuses these options", {}),
    ],
)
def test_wrong_names(spec, message, options):
    with pytest.raises(InputError, match=message):
        load_problems(spec, **options)


def test_options_of_a_reasoning_gym_task():
    spec = "reasoning_gym/chain_sum/min_terms=5/max_terms=5/max_digits=1"
    found = load_problems(spec, limit=4)
    for problem in found:
        terms = re.findall(r"\d+", problem.prompt[1]["content"].split("\n")[-1])
        assert [len(term) for term in terms] == [1] * 5
        assert problem.id.startswith(spec)
        assert problem.metadata["reasoning_gym"]["task"] == "chain_sum"


def test_reasoning_gym_problems_repeat_and_splits_differ():
    first = load_problems("reasoning_gym/gsm_symbolic", limit=3, seed=1)
    again = load_problems("reasoning_gym/gsm_symbolic", limit=3, seed=1)
    train = load_problems("reasoning_gym/gsm_symbolic", limit=3, seed=1, split="train")
    assert first == again
    assert {p.prompt[1]["content"] for p in first}.isdisjoint(p.prompt[1]["content"] for p in train)
    json.dumps(first[0].metadata)


LEAVES = st.none() | st.booleans() | st.integers() | st.text()
KEYS = st.text() | st.integers() | st.tuples(st.integers(), st.integers())


def nested(inner):
    return st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner)


@given(st.recursive(LEAVES, nested, max_leaves=12))
def test_pack_keeps_tuples_and_keys_through_json(value):
    assert json.loads(json.dumps(pack(value)), object_hook=unpack) == value
