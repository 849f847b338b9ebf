"""Grading: is a response's answer right? Used by the training reward and by evaluation alike.

Mathematics: the content of the **last** ``\\boxed{}`` against the gold answer with math-verify, 1 or 0 (the paper's
rule-based reward, arXiv 2512.19673). reasoning-gym: the task's own scorer. What a model wrote may be built to hang
or to exhaust whoever reads it, so it is read in worker processes with a memory limit, which are killed and replaced
when an answer takes too long.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from bupo.data.grading_pool import Pool
from bupo.data.problems import Problem, last_boxed

Status = Literal["correct", "wrong", "unparsable", "timeout", "bad_gold"]

_RATIONAL = re.compile(
    r"(-?)(?:([0-9]{1,18})|([0-9]{0,9}\.[0-9]{1,9})|\\[dt]?frac\{([0-9]{1,18})\}\{([0-9]{1,18})\}"
    r"|([0-9]{1,18})/([0-9]{1,18}))"
)
_MAX_SENT = 200_000  # characters of an extracted answer that are worth sending


@dataclass(frozen=True)
class Grade:
    """The verdict on one response.

    ``unparsable``: no answer was found or it could not be read. ``timeout``: it used up its time or memory.
    ``bad_gold``: the gold answer itself cannot be read, so that the response says nothing and must be left out.
    """

    reward: float
    status: Status
    extracted: str | None


def extract_answer(response: str, problem: Problem) -> str | None:
    """The answer a response gives: its last box; for reasoning-gym else the last ``<answer>``, else the last line."""
    boxed = last_boxed(response)
    if boxed is not None or "reasoning_gym" not in problem.metadata:
        return boxed
    start = response.rfind("<answer>")
    if start >= 0:
        return response[start + len("<answer>") :].split("</answer>", 1)[0].strip()
    lines = response.rstrip().rsplit("\n", 1)
    return lines[-1].strip() or None


def rational(text: str) -> tuple[Fraction, bool] | None:
    """Value of an integer, fraction or decimal, and whether it is exact (no decimal point); None for anything else."""
    found = _RATIONAL.fullmatch(text.strip().strip("$").replace(" ", ""))
    if not found:
        return None
    sign, whole, point, top, bottom, slash_top, slash_bottom = found.groups()
    below = int(bottom or slash_bottom or 1)
    if below == 0:
        return None
    value = Fraction(point) if point else Fraction(int(whole or top or slash_top), below)
    return (-value if sign else value), not point


def equal_at_sight(gold: str, answer: str) -> bool | None:
    """Whether two answers are equal where that needs no mathematics; None where it does.

    The same text is equal, and so are equal numbers. Unequal numbers are unequal, but decimals are left to
    math-verify, which rounds.
    """
    if gold.strip() == answer.strip():
        return True
    first, second = rational(gold), rational(answer)
    if first is None or second is None:
        return None
    equal = first[0] == second[0]
    return equal if equal or (first[1] and second[1]) else None


class Grader:
    """Grades responses in a pool of killable processes; use it as a context manager or call `close`.

    The processes start with the first answer that needs them (plain numbers do not), are reused by later calls, and
    end with this process, also when it is killed. Safe to call from any thread.

    Args:
        workers: worker processes (default: the processors, at most 8).
        seconds: wall-clock limit an answer, after which its worker is killed; time in which the worker waited for a
            processor is not counted (up to eight times the limit), so that a busy machine gives the same verdicts.
            Processor time is limited to 60 % of it, by which most answers that take too long end without a kill.
        memory: MiB of address space a worker.
    """

    def __init__(self, *, workers: int | None = None, seconds: float = 1.6, memory: int = 1024):
        self.seconds = seconds
        self._workers = workers or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
        self._memory = memory
        self._pools: dict[str, Pool] = {}
        self._usable: dict[str, bool] = {}
        self._lock = threading.Lock()
        self._owner = os.getpid()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes; a later call starts new ones."""
        with self._lock:
            for pool in self._pools.values():
                pool.close()
            self._pools = {}

    def grade(self, responses: Sequence[str], problems: Sequence[Problem]) -> list[Grade]:
        """Grade ``responses[i]`` as an answer to ``problems[i]``."""
        if len(responses) != len(problems):
            raise ValueError(f"{len(responses)} responses for {len(problems)} problems")
        with self._lock:
            if self._owner != os.getpid():  # forked since: the processes belong to the parent
                self._pools, self._owner = {}, os.getpid()
            return self._grade(responses, problems)

    def _grade(self, responses: Sequence[str], problems: Sequence[Problem]) -> list[Grade]:
        self._check_gold({p.answer for p in problems if "reasoning_gym" not in p.metadata} - set(self._usable))
        grades: list[Grade | None] = [None] * len(responses)
        waiting: dict[str, tuple[dict[str, Any], list[int]]] = {}  # equal questions are asked once
        extracted = [extract_answer(r, p) for r, p in zip(responses, problems, strict=True)]
        for index, (answer, problem) in enumerate(zip(extracted, problems, strict=True)):
            gym = problem.metadata.get("reasoning_gym")
            if gym is None and not self._usable[problem.answer]:
                grades[index] = Grade(0.0, "bad_gold", answer)
            elif answer is None or len(answer) > _MAX_SENT:
                grades[index] = Grade(0.0, "unparsable", None if answer is None else answer[:_MAX_SENT])
            elif gym is None and (equal := equal_at_sight(problem.answer, answer)) is not None:
                grades[index] = Grade(1.0, "correct", answer) if equal else Grade(0.0, "wrong", answer)
            elif gym is None:
                request = {"kind": "math", "gold": problem.answer, "answer": answer}
                waiting.setdefault(f"{problem.answer}\0{answer}", (request, []))[1].append(index)
            else:
                request = {"kind": "reasoning_gym", "task": gym["task"], "entry": gym["entry"], "answer": answer}
                waiting.setdefault(f"{problem.id}\0{answer}", (request, []))[1].append(index)
        for kind in ("math", "reasoning_gym"):
            chosen = [entry for entry in waiting.values() if entry[0]["kind"] == kind]
            if not chosen:
                continue
            for (_, indices), result in zip(chosen, self._pool(kind).ask([r for r, _ in chosen]), strict=True):
                for index in indices:
                    grades[index] = Grade(float(result["reward"]), result["status"], extracted[index])
        return [grade for grade in grades if grade is not None]

    def _check_gold(self, golds: set[str]) -> None:
        self._usable.update({gold: True for gold in golds if rational(gold)})
        if golds := golds - set(self._usable):
            ordered = sorted(golds)
            answers = self._pool("math").ask([{"kind": "gold", "gold": gold} for gold in ordered])
            self._usable.update({gold: bool(a["usable"]) for gold, a in zip(ordered, answers, strict=True)})

    def _pool(self, kind: str) -> Pool:
        if kind not in self._pools:
            self._pools[kind] = Pool(kind, self._workers, self.seconds, self._memory)
        return self._pools[kind]
