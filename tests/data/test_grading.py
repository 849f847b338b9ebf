import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bupo.data import answers, same_answer
from bupo.data.grading import Grader, default_workers
from bupo.data.problems import Problem, load_problems
from tests.support import hostile


def problem(answer: str) -> Problem:
    return Problem("p/0", "?", answer, "test")


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=1) as grader:
        yield grader


def status(grader, gold, *texts):
    return [g.status for g in grader.grade([f"so \\boxed{{{a}}}" for a in texts], [problem(gold)] * len(texts))]


RIGHT_AND_WRONG = {  # gold answer: right answers, wrong ones (a sentence is not searched for numbers)
    r"\frac{3}{2}": ([r"\dfrac32", "1.5", "3/2", r"\frac{6}{4}", r"1\frac{1}{2}", "1 1/2", "1½"], ["2/3", "-1.5"]),
    r"\frac{71}{6}": (["11 5/6", r"11\frac{5}{6}"], ["11.8333", "11 7/6"]),
    r"90^\circ": (["90", r"90^{\circ}", r"90\text{ degrees}", "90°"], [r"91^\circ", "-90"]),
    r"10,\!080": (["10080", "10,080", r"10\,080", "10~080", r"10\ 080", "10 080"], ["10081", "1080"]),
    "100,200": (["100, 200", "200,100"], ["100200", "100"]),
    "4,5": ([r"x=4 \text{ or } x=5", "5,4"], ["4", "4,6"]),
    "1,-2": (["-2,1", "-2, 1", r"\{1,-2\}", r"-2 \text{ and } 1"], ["1,2", "-1,-2"]),
    "(3,4]": (["(3, 4]", r"\left(3,4\right]", r"3<x\le 4"], ["(3,4)", "[3,4]", "(4,3]"]),
    r"(10^{-20},1)": ([r"(10^{-20}, 1)"], [r"(10^{-30},1)"]),
    "(15,-29)": (["(15, -29)", r"\left( 15,-29 \right)"], ["(-29,15)", "(15,29)", r"\{15,-29\}"]),
    r"x<-1\text{ or }x>3": ([r"(-\infty,-1)\cup(3,∞)", r"x>3\text{ or }x<-1"], [r"x<-1\text{ or }x>4", "x>3"]),
    "x=5": (["5", "x = 5"], ["6", "x=-5"]),
    "5": (
        ["5=x", "x=2+3=5", "f(2)=5", r"\text{Area}=5"],
        ["4=5", "1+1=5", "0=5", "1=2=3=4=5", "2x=5", "x-1=5", "xy=5"],
    ),
    "+5": ([r"5\text{ m/s}", "5cm", "5,", "5;", "**5**", r"\text{Answer: }5"], [r"5\text{ is wrong}", "5 or 6", "5?"]),
    "25": (["x=25"], ["x^2=25"]),
    "x+1": (["y=x+1", "1+x"], ["x=x+1"]),
    "5t": (["t5", r"5\cdot t"], ["5", r"5\text{ t}"]),
    r"2\pi r h": ([r"2\pi hr"], [r"2\pi r"]),
    r"\frac{1}{m}t": ([r"\frac{t}{m}"], [r"\frac{1}{m}"]),
    r"36\text{ cm}^2": (["36", r"36\,\mathrm{cm^2}", "36 square units"], [r"36\text{ cm}^8"]),
    "13 apples and 4 pears": (["13 apples and 4 pears"], ["13"]),
    r"\text{Evelyn}": (["Evelyn", r"\text{evelyn}", r"{\mathrm{Evelyn}}", "Evelyn."], ["Eve", r"\text{Navin}", "3"]),
    r"\text{(C)}": (["C", "(C)", r"\textbf{C}"], ["(B)", "D"]),
    "A,C": ([r"\text{C, A}", r"\text{(A), (C)}"], ["A", "A, B"]),
    "BAC": ([r"\text{BAC}"], ["ABC"]),
    "(a,b)": (["(a, b)"], ["(b,a)"]),
    "Yes": (["yes", r"\text{Yes}"], ["No", "sye"]),
    r"\infty": ([r"\infty", r"+\infty", "∞"], [r"-\infty", "0"]),
    r"\varnothing": ([r"\emptyset", r"\{\}", "∅"], ["0"]),
    "4": (["5-1", "2^2"], ["the answer is 4", "1 2 3 4", r"3 \text{ or } 4", "answer is $4$", "3,4", "4 or 5"]),
    "23": (["23.0"], ["2 3"]),
    "2:1": (["2 : 1"], ["2", "1:2"]),
    r"12.5\%": (["12.5", "0.125", r"\frac18", "12.5%"], ["1.25", r"0.125\%"]),
    r"4.5 \times 10^{33}": (["4.5e33", "4.5E+33"], ["4.5e32"]),
    r"6.63\times10^{-34}": (["6.63e-34"], [r"1.6\times10^{-19}"]),
    r"\frac{1}{2^{90}}": (["2^{-90}"], [r"\frac{1}{2^{91}}", r"\frac{1}{1999!}"]),
    r"0.1\overline{6}": ([r"\frac16", r"0.1\bar{6}"], ["0.16", "0.17"]),
    r"101_{\text{two}}": (["101_2", "101"], ["101_3", r"101_{\text{three}}", "5"]),
    r"1-\frac{1}{\mathrm{e}}": (["1-e^{-1}"], [r"1+\frac{1}{\mathrm{e}}"]),
    r"x_{\max}": ([r"x_{\text{max}}"], [r"x_{\min}", "x"]),
    r"e^{i\pi}": (["-1"], ["1"]),
    r"2\sqrt{3}x^2": (["2√3x²"], ["2√3x"]),
}


@pytest.mark.parametrize("gold", RIGHT_AND_WRONG)
def test_right_and_wrong_answers(grader, gold):
    right, wrong = RIGHT_AND_WRONG[gold]
    assert status(grader, gold, *right) == ["correct"] * len(right)
    assert "correct" not in status(grader, gold, *wrong)


def test_pairs_that_people_reported(shared_data):
    path = shared_data.parent / "faults" / "grading_pairs.jsonl"
    if not path.is_file():
        pytest.skip("needs the shared pairs")
    pairs = [json.loads(line) for line in path.read_text().splitlines()]
    with Grader() as grader:
        grades = grader.grade([pair["response"] for pair in pairs], [problem(pair["gold"]) for pair in pairs])
    for pair, grade in zip(pairs, grades, strict=True):
        assert (grade.status == "correct") == (pair["expected"] == "correct"), (pair, grade)


def test_which_box_counts(grader):
    statuses = {
        "\\boxed{3} no, \\boxed{4}": "correct",
        "\\boxed{4} no, \\boxed{3}": "wrong",
        "it is 4": "unparsable",
        "\\boxed{4} then \\boxed{4": "unparsable",
        "": "unparsable",
        "\\boxed{4}. I used \\boxed as asked": "correct",
        "<think>\\boxed{4}</think> It is 5": "unparsable",
        "<think>\\boxed{5}</think> It is \\boxed{4}": "correct",
    }
    grades = grader.grade(list(statuses), [problem("4")] * len(statuses))
    assert {text: grade.status for text, grade in zip(statuses, grades, strict=True)} == statuses
    assert [g.reward for g in grades] == [float(g.status == "correct") for g in grades]
    assert grades[0].extracted == "4"
    assert status(grader, "2,3", "2} and \\boxed{3") == ["wrong"]  # boxes are not joined


def test_gold_that_cannot_be_read_is_said_and_never_counted_as_wrong(grader):
    assert status(grader, "\\frac{", "1", "\\frac{") == ["bad_gold"] * 2
    assert [g.status for g in grader.grade(["1", "no box"], [problem("")] * 2)] == ["bad_gold"] * 2
    assert status(grader, "%%%", "%%%") == ["bad_gold"]
    assert status(grader, "\\mathbb{Z}_3", "\\mathbb{Z}_{3}", "\\mathbb{Z}_2") == ["correct", "unparsable"]  # text only


def test_words():
    assert answers.is_words("\\text{no}")
    assert answers.is_words("Yes")
    assert not answers.is_words("xy")  # a product
    assert not answers.is_words("2k")
    assert answers.plain_text(" $\\text{ Two  words }$. ") == "two words"
    assert answers.strip_answer("{ $x^{2}$ }") == "x^{2}"
    assert answers.strip_answer("\\{1\\}") == "\\{1\\}"


def test_hostile_answers_cost_only_themselves():
    """A few of every kind, with a short limit; all of them are graded by the slow test below."""
    chosen = [text for kind in hostile.answers().values() for text in (kind[0], kind[-1])]
    with Grader(workers=2, seconds=0.4) as grader:
        found = [g.status for g in grader.grade([*chosen, "\\boxed{5-1}"], [problem("4")] * (len(chosen) + 1))]
        assert found.index("correct") == len(chosen)
        assert "timeout" in found
        some = ["9^{9^{9^{9}}}", "\\frac{1}{3}", "x", "{"]
        assert status(grader, "\\frac{2}{6}", *some) == status(grader, "\\frac{2}{6}", *some)  # and a grade repeats


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
    assert equivalent == 1
    assert perturbed <= 0.001


def test_equal_at_sight():
    equal = [("4", "4"), ("4", "04"), ("\\frac{1}{2}", "2/4"), ("\\frac{1}{2}", "0.5"), ("x", "x")]
    other = [("4", "5"), ("-\\dfrac{1}{2}", "\\frac{1}{2}")]
    unclear = [("-\\dfrac{1}{2}", "-$\\frac{1}{2}$"), ("4", "4/0"), ("4", "x"), ("4", "\u0664")]  # a foreign digit
    unclear += [("\\frac{1}{3}", "0.333")]  # math-verify decides about rounding
    for pairs, expected in ((equal, True), (other, False), (unclear, None)):
        assert [(pair, answers.equal_at_sight(*pair)) for pair in pairs] == [(pair, expected) for pair in pairs]


@given(
    *[st.sampled_from(["3", "-3", "3.0", "0.5", ".5", "1/2", "-1/2", "\\frac{1}{2}", "\\dfrac{2}{4}", "6/2", "7"])] * 2
)
@settings(max_examples=60, deadline=None)
def test_sight_and_math_verify_agree(gold, answer):
    equal = answers.equal_at_sight(gold, answer)
    if equal is not None:
        assert (same_answer.grade_math(gold, answer)[1] == "correct") == equal


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
    codes = [
        f"__import__('os').system('touch {target}')",
        f"open('{target}', 'w')",
        f"().__class__.__base__.__subclasses__()[0]('{target}')",
        f"exec('import os; os.mkdir(\"{target}\")')",
    ]
    grades = grader.grade([f"<answer>{a}</answer>" for a in codes], [countdown] * len(codes))
    assert not any(g.status == "correct" for g in grades)
    assert not target.exists()


def test_extraction():
    assert answers.extract_answer("<answer>1</answer> <answer> 2 </answer>", tagged=True) == "2"
    assert answers.extract_answer("a\nb\n", tagged=True) == "b"
    assert answers.extract_answer("<answer>1</answer> \\boxed{3}", tagged=True) == "3"
    assert answers.extract_answer("<answer>1</answer>") is None
    boxes = {"a \\boxed{1} b \\boxed{2}": "2", "\\boxed{\\sqrt{2}}": "\\sqrt{2}", "\\boxed{\\{1,2\\}}": "\\{1,2\\}"}
    boxes |= {"\\boxed {5}": "5", "\\boxed 5": "5", "\\boxed{}": "", "no box": None, "\\boxed": None, "\\boxed{": None}
    boxes |= {"\\boxed{1} then \\boxed{2": None}
    assert {text: answers.last_boxed(text) for text in boxes} == boxes


def grading_processes(pid: int | None = None) -> list[psutil.Process]:
    """Servers and workers below a process (default: this one)."""
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if "bupo.data.grading_worker" in child.cmdline()]


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=20)[1]


def test_killed_processes_are_replaced_and_close_ends_every_one():
    before = set(grading_processes())
    grader = Grader(workers=2)
    assert status(grader, "4", "{4}", "x+5.5") == ["correct", "wrong"]
    for process in set(grading_processes()) - before:
        process.kill()
    assert status(grader, "4", "2^2", "y") == ["correct", "wrong"]
    for worker in psutil.Process(grader._server.pid).children():
        worker.kill()
    assert status(grader, "4", "2+2", "z") == ["correct", "wrong"]
    mine = set(grading_processes()) - before
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
