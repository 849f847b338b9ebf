"""Whatever a user hands in gives a result or one line: properties of files, answers, settings and options.

Each property is tried with 20 or 50 cases, always the same, and with 1,000 random ones by `make test-slow`.
"""

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import typer.main
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bupo.cli import app, main
from bupo.data import answers, grading_worker
from bupo.data.problems import SUFFIXES, load_problems, read_rows
from bupo.data.prompts import prompts_of
from bupo.data.rollouts import read_responses
from bupo.errors import ConfigError, InputError
from bupo.recipe import Recipe, override, read_recipe
from bupo.report.logs import TrainingRun
from bupo.run_folder import read_json, write_json
from bupo.train.build import check_recipe
from bupo.train.config import BuPOConfig
from tests.data.test_prompts import Tokenizer

TEXT = st.text(st.characters(exclude_categories=())) | st.sampled_from(("", "1", "auto", "a/b", "\ud83d", "9" * 500))
NUMBER = st.integers() | st.floats() | st.sampled_from((-1, 0, 2, 2**32, 10**30, 10**400))
LEAF = st.none() | st.booleans() | NUMBER | TEXT
JSON = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
MESSAGES = st.lists(st.fixed_dictionaries({}, optional={"role": JSON, "content": JSON}), max_size=3)
_NAMES = (
    "prompt response prompt_ids response_ids reward sample problem_id id unique_id messages problem question answer "
    "final_answer solution ground_truth reward_model step rollout phase layer entropy"
)
COLUMNS = _NAMES.split()
IDS = st.lists(st.integers(-1, 300), max_size=3)
ROW = st.fixed_dictionaries({}, optional=dict.fromkeys(COLUMNS, JSON | TEXT | MESSAGES | IDS))
GOOD = {"prompt": "a", "response": "b", "answer": "1", "step": 1, "reward": 0.5}
_LATEX = (
    r"\frac{1}{2} \frac \sqrt{2} \sqrt { } ( ) [ ] \{ \} \left( \right) ^ _ ^{2} _{2} 1 2 10 100,200 3.5 . , ; = < \le "
    r"+ - * / \cdot \times \pi x y \infty \% $ \$ \text{ cm} \text{or} \text \cup \in \boxed{ \boxed \overline{3} 1e5 "
    r"√ ² ° \\ & \begin{pmatrix} \end{pmatrix} \circ \angle ABC yes ~ | ' ! </think> <answer> #### ** \pm \log_2 \dots"
)
FRAGMENTS = _LATEX.split(" ")
ANSWER = st.text(max_size=30) | st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join) | NUMBER.map(repr)


def holds(few=50, **strategies):
    """A property as a test of a few and of 1,000 cases, in an empty working directory."""

    def make(check):
        @pytest.mark.parametrize("cases", [few, pytest.param(1_000, marks=pytest.mark.slow)])
        def test(cases, tmp_path, monkeypatch):
            monkeypatch.chdir(tmp_path)
            limits = {"max_examples": cases, "derandomize": cases == few, "deadline": None, "database": None}
            settings(**limits, suppress_health_check=list(HealthCheck))(given(**strategies)(check))()

        return test

    return make


def refuses(call, *arguments, error=InputError):
    """The result of a call, or None if it refused its arguments."""
    try:
        return call(*arguments)
    except error:
        return None


@holds(rows=st.lists(ROW, min_size=1, max_size=3), usual=st.booleans(), chat=st.booleans())
def test_rows(rows, usual, chat):
    rows = [{**GOOD, **row} for row in rows] if usual else rows
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer(chat)
    for rollout in refuses(read_responses, "rows.jsonl", tokenizer) or ():
        assert rollout.prompt_ids
        json.dumps(dataclasses.asdict(rollout), allow_nan=False, ensure_ascii=False).encode()
    problems = refuses(load_problems, "rows.jsonl") or []
    assert all(isinstance(p.answer, str) and p.answer.encode() is not None for p in problems)
    refuses(prompts_of, problems, tokenizer, "auto", 300)
    run = refuses(TrainingRun.load, Path("rows.jsonl"))
    if run is not None:
        assert run.ends("reward")
        assert len(run.series("entropy")) == 2
        assert run.switch != ""


@holds(
    content=st.binary()
    | TEXT.map(lambda text: text.encode(errors="surrogatepass"))
    | JSON.map(json.dumps).map(str.encode)
)
def test_files(content):
    for suffix in (*SUFFIXES, ".yaml"):
        Path("file" + suffix).write_bytes(content)
        refuses(read_recipe if suffix == ".yaml" else read_rows, Path("file" + suffix))
    refuses(read_json, Path("file.json"))
    refuses(TrainingRun.load, Path("file.jsonl"))


@holds(value=JSON)
def test_every_value_is_written_or_not_at_all(value):
    try:
        write_json("value.json", [value])
    except ValueError:  # not a finite number
        assert not Path("value.json").exists()
    else:
        assert json.loads(Path("value.json").read_text()) == [value]
        Path("value.json").unlink()


@holds(gold=ANSWER, answer=ANSWER, same=st.booleans())
def test_answers(gold, answer, same):
    answer = gold if same else answer
    for read in (answers.last_boxed, answers.is_usable, answers.rational, answers.plain_text, answers.is_words):
        read(answer)
    for tagged in (False, True):
        answers.extract_answer(answer, tagged=tagged)
        answers.extract_answer(f"\\boxed{{{answer}}}", tagged=tagged)
    assert answers.strip_answer(answers.strip_answer(answer)) == answers.strip_answer(answer)
    answers.normal_form(answer)
    assert answers.equal_at_sight(gold, answer) == answers.equal_at_sight(answer, gold)
    assert answers.equal_at_sight(gold, gold) is True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grading_worker, "_TIMERS", grading_worker._TIMERS[:1])  # the others end this process
        before = signal.signal(signal.SIGPROF, grading_worker._raise_out_of_time)
        try:
            reward, status = grading_worker._answer("math", [gold, answer], 3.0)
        finally:
            signal.signal(signal.SIGPROF, before)
    assert (reward, status) in {(1.0, "correct"), (0.0, "wrong"), (0.0, "unparsable"), (0.0, "timeout")}
    assert not same or status in ("correct", "unparsable")


KEYS = sorted({*Recipe.model_fields, *(field.name for field in dataclasses.fields(BuPOConfig)), "eval.limit", "lora.r"})


@holds(key=st.sampled_from(KEYS) | TEXT, value=JSON | NUMBER, trl=st.booleans())
def test_settings(key, value, trl):
    raw = {"model": "small", "dataset": "arithmetic"}
    changed = {**raw, "trl": {key: value}} if trl else {**raw, key: value}
    refuses(check_recipe, changed, 1, error=ConfigError)
    if "." not in key and isinstance(value, (str, int, float)):
        refuses(lambda: check_recipe(override(raw, [f"{key}={value!s}"]), 1))
        Path("recipe.yaml").write_text(yaml.safe_dump(changed, allow_unicode=False))
        refuses(lambda: check_recipe(read_recipe("recipe.yaml"), 1))


COMMANDS = {  # each ends before a model is loaded
    "analyze": ["--model", "./none", "--responses", "rows.jsonl", "--output", "out"],
    "eval": ["--model", "./none", "--tasks", "rows.jsonl", "--output", "out"],
    "compare": ["./none", "b=./none", "--responses", "rows.jsonl", "--layer", "1", "--output", "out"],
    "plan": ["none.yaml"],
    "train": ["none.yaml", "--output", "out"],
    "report": ["none"],
}
GROUP = typer.main.get_command(app)
OPTIONS = [
    (name, option) for name in COMMANDS for p in GROUP.commands[name].params for option in p.opts if "--" in option
]


@holds(few=20, chosen=st.sampled_from(OPTIONS), value=(TEXT | NUMBER.map(str)).filter(lambda text: "\0" not in text))
def test_options(chosen, value):
    Path("rows.jsonl").write_text(json.dumps(GOOD) + "\n")
    name, option = chosen
    assert main([name, *COMMANDS[name], f"{option}={value}"]) == 2
    assert [path.name for path in Path().iterdir()] == ["rows.jsonl"]
