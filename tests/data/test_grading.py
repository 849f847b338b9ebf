from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bupo.data.answers import equal_at_sight, extract_answer, is_words, plain_text, strip_answer
from bupo.data.grading import Grader, default_workers
from bupo.data.problems import Problem, load_problems
from bupo.data.same_answer import check_gold, grade_math
from tests.support import hostile


def problem(answer: str) -> Problem:
    return Problem("p/0", "?", answer, "test")


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=1) as grader:
        yield grader


def status(grader, gold, *answers, boxed=True):
    texts = [f"so \\boxed{{{a}}}" if boxed else a for a in answers]
    return [g.status for g in grader.grade(texts, [problem(gold)] * len(answers))]


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        (
            "\\frac{3}{2}",
            ["\\dfrac32", "1.5", "3/2", "\\frac{6}{4}", "\\tfrac{3}{2}", "1\\frac{1}{2}"],
            ["2/3", "-1.5"],
        ),
        ("90^\\circ", ["90", "90^{\\circ}", "90\\text{ degrees}"], ["91^\\circ", "-90"]),
        ("10,\\!080", ["10080", "10,080"], ["10081", "1080"]),
        ("1,-2", ["-2,1", "-2, 1"], ["1,2", "-1,-2"]),
        ("(3,4]", ["(3, 4]", "\\left(3,4\\right]"], ["(3,4)", "[3,4]", "(4,3]"]),
        ("(15,-29)", ["(15, -29)", "\\left( 15,-29 \\right)"], ["(-29,15)", "(15,29)"]),
        ("x=5", ["5", "x = 5"], ["6", "x=-5"]),
        (
            "\\text{Evelyn}",
            ["Evelyn", "\\text{evelyn}", "{\\mathrm{Evelyn}}", "Evelyn."],
            ["Eve", "\\text{Navin}", "3"],
        ),
        ("\\text{(C)}", ["C", "(C)", "\\textbf{C}"], ["(B)", "D"]),
        ("Yes", ["yes", "\\text{Yes}"], ["No", "sye"]),
        ("\\infty", ["\\infty", "+\\infty"], ["-\\infty", "0"]),
    ],
)
def test_equivalent_and_other_answers(grader, gold, right, wrong):
    assert status(grader, gold, *right) == ["correct"] * len(right)
    assert "correct" not in status(grader, gold, *wrong)


def test_only_the_last_box_counts(grader):
    texts = ["\\boxed{3} no, \\boxed{4}", "\\boxed{4} no, \\boxed{3}", "it is 4", "\\boxed{4} then \\boxed{4", ""]
    grades = grader.grade(texts, [problem("4")] * 5)
    assert [g.status for g in grades] == ["correct", "wrong", "unparsable", "unparsable", "unparsable"]
    assert [g.reward for g in grades] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert grades[0].extracted == "4"


def test_a_sentence_in_the_box_is_not_searched_for_numbers(grader):
    wrong = ["the answer is 4", "1 2 3 4", "3 \\text{ or } 4", "final answer is $4$", "3,4", "4 or 5"]
    assert "correct" not in status(grader, "4", *wrong)


def test_gold_that_cannot_be_read_is_said_and_never_counted_as_wrong(grader):
    assert status(grader, "\\frac{", "1", "\\frac{") == ["bad_gold"] * 2
    assert status(grader, "", "1", "no box", boxed=False) == ["bad_gold"] * 2
    assert check_gold("%%%")[1] == "bad_gold"
    assert check_gold("none of these")[1] == "usable"


def test_words():
    assert is_words("\\text{no}")
    assert is_words("Yes")
    assert not is_words("xy")  # a product
    assert not is_words("2k")
    assert plain_text(" $\\text{ Two  words }$. ") == "two words"
    assert strip_answer("{ $x^{2}$ }") == "x^{2}"
    assert strip_answer("\\{1\\}") == "\\{1\\}"


HANGING = ["9^{9^{9^{9}}}", "(10^{10})!!", "\\sqrt{" * 400 + "2" + "}" * 400, "2^{2^{2^{2^{2^{2^{2}}}}}}"]


def test_a_hanging_answer_costs_only_itself(grader):
    before = time.monotonic()
    answers = [*HANGING, "4"]
    found = status(grader, "4", *answers)
    assert found[-1] == "correct"
    assert "correct" not in found[:-1]
    assert "timeout" in found
    assert time.monotonic() - before < 60  # not a timing test: without the limit this takes for ever


def test_hostile_answers():
    """A few of every kind, with a short limit; all of them are graded by the slow test below."""
    chosen = [text for kind in hostile.answers().values() for text in kind[:: max(1, len(kind) // 3)]]
    assert len(chosen) > 50
    with Grader(workers=2, seconds=0.4) as grader:
        grades = grader.grade(chosen, [problem(hostile.GOLD)] * len(chosen))
        assert not any(g.status == "correct" for g in grades)
        assert status(grader, "4", "5-1") == ["correct"]  # and it still works


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_hostile_answer_is_rejected_in_bounded_time():
    """`benchmarks/grading.py` measures the time on a quiet machine; here others may have the processor."""
    before = set(grading_processes())
    with Grader(workers=2) as grader:
        status(grader, "4", "x^2")
        kinds = hostile.answers()
        assert sum(map(len, kinds.values())) >= 1000
        for kind, texts in kinds.items():
            for text in texts:
                start = time.monotonic()
                (grade,) = grader.grade([text], [problem(hostile.GOLD)])
                assert time.monotonic() - start < 30, (kind, text[:100])
                assert grade.status != "correct", (kind, text[:100])
        mine = [p for p in grading_processes() if p not in before]
        assert len(mine) <= 3  # the source and two workers, however many were killed
    assert gone(mine)


@pytest.mark.slow
def test_agreement_on_math500(shared_data, monkeypatch):
    from experiments import grading_agreement

    monkeypatch.setattr(sys, "argv", ["grading_agreement", "--data", str(shared_data / "math500.parquet")])
    equivalent, perturbed = grading_agreement.main()
    assert equivalent >= 0.97
    assert perturbed <= 0.005


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("4", "4", True),
        ("4", "04", True),
        ("4", "5", False),
        ("\\frac{1}{2}", "2/4", True),
        ("\\frac{1}{2}", "0.5", True),
        ("\\frac{1}{3}", "0.333", None),  # math-verify decides about rounding
        ("-\\dfrac{1}{2}", "-$\\frac{1}{2}$", None),
        ("-\\dfrac{1}{2}", "\\frac{1}{2}", False),
        ("4", "4/0", None),
        ("4", "x", None),
        ("x", "x", True),
        ("4", "\u0664", None),  # another script's digit
    ],
)
def test_equal_at_sight(gold, answer, equal):
    assert equal_at_sight(gold, answer) is equal


@given(
    *[st.sampled_from(["3", "-3", "3.0", "0.5", ".5", "1/2", "-1/2", "\\frac{1}{2}", "\\dfrac{2}{4}", "6/2", "7"])] * 2
)
@settings(max_examples=60, deadline=None)
def test_sight_and_math_verify_agree(gold, answer):
    equal = equal_at_sight(gold, answer)
    if equal is not None:
        assert (grade_math(gold, answer)[1] == "correct") == equal


def test_equal_grades_when_repeated(grader):
    answers = ["\\frac{1}{3}", "0.333", "x", "{", "9^{9^{9^{9}}}"]
    assert status(grader, "\\frac{2}{6}", *answers) == status(grader, "\\frac{2}{6}", *answers)


def test_reasoning_gym_scorers(grader):
    problems = load_problems("reasoning_gym/gsm_symbolic", limit=2) + load_problems("reasoning_gym/rearc", limit=1)
    right = [f"thinking\n<answer>{p.answer}</answer>" for p in problems]
    assert [g.reward for g in grader.grade(right, problems)] == [1.0] * 3
    first = problems[0]
    assert grader.grade([f"so \\boxed{{{first.answer}}}"], [first])[0].status == "correct"
    assert grader.grade([f"so\n{first.answer}\n"], [first])[0].status == "correct"
    assert grader.grade(["<answer>-12345</answer>"], [first])[0].status == "wrong"
    assert grader.grade([""], [first])[0].status == "unparsable"


def test_scorers_cannot_be_made_to_act(grader, tmp_path):
    """countdown's scorer evaluates the answer as an expression."""
    (countdown,) = load_problems("reasoning_gym/countdown", limit=1)
    target = tmp_path / "touched"
    answers = [
        f"__import__('os').system('touch {target}')",
        f"open('{target}', 'w')",
        f"().__class__.__base__.__subclasses__()[0]('{target}')",
        f"exec('import os; os.mkdir(\"{target}\")')",
    ]
    grades = grader.grade([f"<answer>{a}</answer>" for a in answers], [countdown] * len(answers))
    assert not any(g.status == "correct" for g in grades)
    assert not target.exists()


def test_extraction():
    assert extract_answer("<answer>1</answer> <answer> 2 </answer>", tagged=True) == "2"
    assert extract_answer("a\nb\n", tagged=True) == "b"
    assert extract_answer("<answer>1</answer> \\boxed{3}", tagged=True) == "3"
    assert extract_answer("<answer>1</answer>") is None


def test_killed_processes_are_replaced(grader):
    assert status(grader, "4", "{4}", "x") == ["correct", "wrong"]
    for process in grading_processes():
        process.kill()
    assert status(grader, "4", "2^2", "y") == ["correct", "wrong"]
    server = psutil.Process(grader._server.pid)
    for worker in server.children():
        worker.kill()
    assert status(grader, "4", "2+2", "z") == ["correct", "wrong"]


def grading_processes(pid: int | None = None) -> list[psutil.Process]:
    """Servers and workers below a process (default: this one)."""
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if "bupo.data.grading_worker" in child.cmdline()]


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=20)[1]


def test_close_ends_every_process():
    grader = Grader(workers=2)
    before = set(grading_processes())
    assert status(grader, "4", "5.5+x", "4.4+x") == ["wrong", "wrong"]
    mine = [p for p in grading_processes() if p not in before]
    assert len(mine) == 3
    grader.close()
    assert gone(mine)
    assert status(grader, "4", "x+1") == ["wrong"]  # and it starts again
    grader.close()


PLAIN_SCRIPT = """
import sys
print("main", flush=True)
from bupo.data.grading import Grader
from bupo.data.problems import Problem
grader = Grader(workers=2)
problem = Problem("p/0", "?", "4", "t")
print([grade.status for grade in grader.grade(["\\\\boxed{x}", "\\\\boxed{2^2}"], [problem] * 2)], flush=True)
print("torch" in sys.modules, flush=True)
grader.grade(["\\\\boxed{9^{9^{9^{9}}}}"] * 50, [Problem(f"p/{i}", "?", str(i), "t") for i in range(50)])
"""


def test_a_plain_script_needs_no_guard_and_no_torch_and_its_workers_die_with_it(tmp_path):
    """No `if __name__ == "__main__"`: a start method that imports the script again would run it once per worker."""
    script = tmp_path / "plain.py"
    script.write_text(PLAIN_SCRIPT)
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    lines = [parent.stdout.readline().strip() for _ in range(3)]
    assert lines == ["main", "['wrong', 'correct']", "False"]
    processes = grading_processes(parent.pid)
    assert len(processes) == 3  # the server and two workers, which are busy now
    assert not any("libtorch" in m.path for process in processes for m in process.memory_maps())
    parent.kill()
    parent.wait()
    assert gone(processes)


def test_cores_are_shared_between_the_processes_of_a_launcher(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert default_workers() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert default_workers() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "128")
    assert default_workers() == 1
