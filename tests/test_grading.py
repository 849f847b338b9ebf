"""`bupo.grading` by itself: as a reward of TRL and of verl, by text, and without a training library."""

import subprocess
import sys

import pytest

from bupo.errors import InputError
from bupo.grading import Grader, boxed_string, same_string


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=1) as grader:
        yield grader


def test_a_reward_of_trl_reads_the_answers_of_the_usual_columns(grader):
    texts = [r"\boxed{1/2}", r"\boxed{0.25}", "none"]
    for columns in (
        {"answer": ["0.5", r"\frac14", "3"]},
        {"solution": [r"So $\boxed{\frac12}$.", r"\boxed{.25}", r"\boxed{3}"]},
        {"reward_model": [{"ground_truth": "1/2"}, {"ground_truth": 0.25}, {"ground_truth": "3"}]},
    ):
        assert grader(texts, prompts=["?"] * 3, **columns) == [1.0, 1.0, 0.0]
    assert grader(texts, answer=[None, r"\frac{", ""]) == [None, None, None]
    messages = [[{"role": "assistant", "content": one} for one in (r"\boxed{2}", text)] for text in texts]
    messages[1][1]["content"] = [{"type": "text", "text": r"\boxed{"}, {"type": "text", "text": "0.5}"}]
    messages[2][1]["content"] = None  # it calls a tool
    assert grader(messages, answer=["1/2", "1/2", "1/2"]) == [1.0, 1.0, 0.0]
    assert boxed_string(messages, answer=["1/2", "1/2", ""]) == [1.0, 1.0, None]


@pytest.mark.parametrize(
    ("completions", "columns", "part"),
    [
        (["a"], {"target": ["1"]}, "needs 1 reference answers in one of the columns reward_model, answer"),
        (["a", "b"], {"answer": ["1"]}, "needs 2 reference answers"),
        ([3], {"answer": ["1"]}, "a completion must be text, or messages with text, not 3"),
    ],
    ids=str,
)
def test_what_cannot_be_graded_is_one_line(grader, completions, columns, part):
    for function in (grader, boxed_string):
        with pytest.raises(InputError, match=part):
            function(completions, **columns)


def test_verls_hook_needs_no_training_library():
    program = r"""
import sys, warnings
from bupo.grading import compute_score
hook = lambda text, truth, **more: compute_score(data_source="d", solution_str=text, ground_truth=truth, **more)
assert hook(r"\boxed{x+1}", "1+x", extra_info={"index": 1}) == 1.0
assert hook(r"\boxed{2}", 2, extra_info=None, url="u") == 1.0
assert hook(r"\boxed{2,1}", ["1", "2"]) == 1.0
assert hook("2", "2") == 0.0
with warnings.catch_warnings(record=True) as caught:
    assert hook(r"\boxed{2}", "{") == 0.0
assert "the reference answer '{' cannot be used" in str(caught[0].message)
heavy = {"torch", "trl", "transformers", "accelerate", "peft"} & set(sys.modules)
assert not heavy, heavy"""
    subprocess.run([sys.executable, "-c", program], check=True)


SAME = {  # as the comparison of the MATH benchmark has it
    ("0.5", "1/2"), (r"\dfrac12", "1/2"), (r"\frac1{72}", r"\frac{1}{72}"), (".5", "0.5"), (r"{.5}", "{0.5}"),
    (r"90^\circ", "90"), (r"90^{\circ}", "90"), (r"3\text{ cm}", "3"), ("k=5", "5"), ("x =5", "5"),
    (r"\sqrt3", r"\sqrt{3}"), (r"\left(1, 2\right)", "(1,2)"), (r"50\%", "50"), (r"\$5", "5"),
    (r"10,\!000", "10,000"), ("1\n2", "12"),
}  # fmt: skip
DIFFERENT = {
    ("0.25", "1/4"), ("x^2=4", "4"), ("02/3", r"\frac{2}{3}"), ("2,1", "1,2"), (r"a\text{ b}\text{ c}", "a"),
    ("5 cm", "5"), ("2.0", "2"), ("10,000", "10000"), ("a=b=5", "5"),
}  # fmt: skip


def test_answers_as_strings():
    for equal, pairs in ((True, SAME), (False, DIFFERENT)):
        assert {pair: same_string(*pair) for pair in pairs} == dict.fromkeys(pairs, equal)
        assert {pair: same_string(*pair[::-1]) for pair in pairs} == dict.fromkeys(pairs, equal)
    texts = [r"first \boxed{7}, then \boxed{\frac12}", r"</think> 7", r"\boxed{1/2"]
    assert boxed_string(texts, answer=["0.5", "7", "1/2"]) == [1.0, 0.0, 0.0]
