"""Grades responses: whether the answer in a response equals the problem's gold answer.

Training rewards and evaluation share this module. Mathematics: the content of the **last** ``\\boxed{}`` is compared
with the gold answer, reward 1 or 0 (the paper's rule-based reward, arXiv 2512.19673). reasoning-gym: the task's own
scorer. An answer may be built to hang or exhaust the process that parses it, so parsing happens in worker processes
that are killed and replaced (`bupo.data.grading_worker`).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bupo.data.answers import equal_at_sight, extract_answer, rational
from bupo.data.problems import Problem

Status = Literal["correct", "wrong", "unparsable", "timeout", "bad_gold"]
MAX_WORKERS = 8
_MAX_SENT = 200_000  # characters; longer answers are not sent to a worker
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Grade:
    """The grade of one response.

    Status ``unparsable``: no answer was found, or it could not be parsed. ``timeout``: parsing or comparing it exceeded
    the limits. ``bad_gold``: the gold answer itself cannot be parsed, so the response has to be left out.
    """

    reward: float
    status: Status
    extracted: str | None


class Grader:
    """Grades responses in processes that can be killed. Use it as a context manager, or call `close`.

    The processes start with the first answer that needs them (plain numbers do not), serve later calls too, and end
    with this process even if it is killed. Any thread may call `grade`.

    Args:
        workers: number of worker processes (default: the processor cores, shared between the processes that a launcher
            started on this machine; at most `MAX_WORKERS`).
        seconds: limit on the processor time of an answer. Python code is interrupted at 60 % of it, C code at 75 %.
        memory: MiB that a worker may allocate.
    """

    def __init__(self, *, workers: int | None = None, seconds: float = 1.6, memory: int = 1024):
        self._arguments = [str(workers or default_workers()), str(seconds), str(memory)]
        self._server: subprocess.Popen[bytes] | None = None
        self._usable: dict[str, bool] = {}
        self._lock = threading.Lock()
        self._owner = os.getpid()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes; a later call of `grade` starts new ones."""
        with self._lock:
            self._stop()

    def grade(self, responses: Sequence[str], problems: Sequence[Problem]) -> list[Grade]:
        """Grade ``responses[i]`` as an answer to ``problems[i]``."""
        if len(responses) != len(problems):
            raise ValueError(f"{len(responses)} responses for {len(problems)} problems")
        with self._lock:
            if self._owner != os.getpid():  # this process was forked: the server belongs to its parent
                self._server, self._owner = None, os.getpid()
            return self._grade(responses, problems)

    def _grade(self, responses: Sequence[str], problems: Sequence[Problem]) -> list[Grade]:
        self._check_gold({p.answer for p in problems if "reasoning_gym" not in p.metadata} - set(self._usable))
        grades: dict[int, Grade] = {}
        requests: dict[tuple[str, str], tuple[dict[str, Any], list[int]]] = {}  # equal requests are sent once
        extracted = []
        for index, (response, problem) in enumerate(zip(responses, problems, strict=True)):
            gym = problem.metadata.get("reasoning_gym")
            answer = extract_answer(response, tagged=gym is not None)
            extracted.append(answer)
            if gym is None and not self._usable[problem.answer]:
                grades[index] = Grade(0.0, "bad_gold", answer)
            elif answer is None or len(answer) > _MAX_SENT:
                grades[index] = Grade(0.0, "unparsable", None if answer is None else answer[:_MAX_SENT])
            elif gym is not None:
                request = {"kind": "reasoning_gym", "task": gym["task"], "entry": gym["entry"], "answer": answer}
                requests.setdefault((problem.id, answer), (request, []))[1].append(index)
            elif (equal := equal_at_sight(problem.answer, answer)) is not None:
                grades[index] = Grade(1.0, "correct", answer) if equal else Grade(0.0, "wrong", answer)
            else:
                request = {"kind": "math", "gold": problem.answer, "answer": answer}
                requests.setdefault((problem.answer, answer), (request, []))[1].append(index)
        results = self._ask([request for request, _ in requests.values()])
        for (_, indices), result in zip(requests.values(), results, strict=True):
            for index in indices:
                grades[index] = Grade(float(result["reward"]), result["status"], extracted[index])
        return [grades[index] for index in range(len(responses))]

    def _check_gold(self, golds: set[str]) -> None:
        self._usable.update({gold: True for gold in golds if rational(gold)})
        rest = sorted(golds - set(self._usable))
        results = self._ask([{"kind": "gold", "gold": gold} for gold in rest])
        self._usable.update({gold: bool(result["usable"]) for gold, result in zip(rest, results, strict=True)})

    def _ask(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not requests:
            return []
        for _ in range(2):  # the server may have been killed from outside: try once more with a new one
            server = self._server or self._start()
            assert server.stdin is not None
            assert server.stdout is not None
            with contextlib.suppress(OSError):
                server.stdin.write(json.dumps(requests).encode() + b"\n")
                server.stdin.flush()
                if line := server.stdout.readline():
                    return json.loads(line)
            message = self._stop()
        raise RuntimeError(f"the grading process does not start: {message or 'it printed no reason'}")

    def _start(self) -> subprocess.Popen[bytes]:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        self._server = subprocess.Popen(
            [sys.executable, "-P", "-m", "bupo.data.grading_worker", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **_ONE_THREAD},
            start_new_session=True,  # an interrupt from the keyboard is for this process alone
        )
        return self._server

    def _stop(self) -> str:
        """End the server, and return the last line that it printed."""
        if self._server is None:
            return ""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._server.communicate(timeout=5)  # closing its standard input ends it
        self._server.kill()
        self._server.wait()
        self._server = None
        with self._errors as errors:
            errors.seek(0)
            return (errors.read().decode(errors="replace").strip().splitlines() or [""])[-1]


def default_workers() -> int:
    """Processor cores of this process's share of the machine, between 1 and `MAX_WORKERS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
