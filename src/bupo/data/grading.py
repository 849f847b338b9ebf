"""Grades responses, for training rewards and evaluation: whether their answers equal the problems' gold answers.

An answer may be built to hang or exhaust the process that parses it, so parsing happens in worker processes that are
killed and replaced (`bupo.data.grading_worker`). docs/grading.md has the rules.
"""

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Literal, Self

from bupo.data.answers import equal_at_sight, extract_answer, is_usable
from bupo.data.problems import ANSWER_COLUMNS, Problem, gold_answer
from bupo.errors import InputError, shown
from bupo.run_folder import cores

Status = Literal["correct", "wrong", "unparsable", "timeout", "bad_gold"]
MAX_WORKERS = 8
_MAX_SENT = 200_000  # characters; longer answers are not sent to a worker
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Grade:
    """The grade of one response; docs/grading.md explains the statuses."""

    reward: float
    status: Status
    extracted: str | None


class Grader:
    """Grades responses in processes that can be killed. Use it as a context manager, or call `close`.

    The processes start with the first answer that needs them (plain numbers do not), serve later calls too, and end
    with this process even if it is killed. Any thread may call `grade`. There are as many workers as processor cores,
    shared between the processes that a launcher started on this machine, unless ``workers`` says how many. An answer
    may take ``seconds`` of processor time: Python code is interrupted at 60 % of it, C code at 75 %.
    """

    __name__ = "answer"  # of its metrics in a trainer

    def __init__(self, *, workers: int | None = None, seconds: float = 1.6):
        self._workers, self._seconds = workers or default_workers(), seconds
        self._arguments = [str(seconds)]
        self._server: subprocess.Popen[bytes] | None = None  # forks the workers
        self._idle: list[Connection | None] = []  # to workers; None is one that still has to be forked
        self._lock = threading.RLock()
        self._owner = os.getpid()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __call__(
        self, completions: Sequence[Any], problems: Sequence[Problem] | None = None, **columns: Any
    ) -> list[float | None]:
        """The reward of each completion, as TRL calls its reward functions: a text, or messages whose last one counts.

        1 if the answer is right, else 0 (or the task's own score between them); None, which leaves the response out,
        where the reference answer cannot be used. Reference answers are those of ``problems``, or else of the columns
        `ANSWER_COLUMNS`. It logs the shares ``grading/unparsable`` and ``grading/timeout`` with ``log_metric``.
        """
        grades = self.grade([text_of(one) for one in completions], problems or problems_of(columns, len(completions)))
        statuses = Counter(grade.status for grade in grades)
        for status in ("unparsable", "timeout") if "log_metric" in columns else ():
            columns["log_metric"](f"grading/{status}", statuses[status] / max(len(grades), 1))
        return [None if grade.status == "bad_gold" else grade.reward for grade in grades]

    def grade(self, responses: Sequence[str], problems: Sequence[Problem]) -> list[Grade]:
        """Grade ``responses[i]`` as an answer to ``problems[i]``."""
        with self._lock:
            if self._owner != os.getpid():  # this process was forked: the workers belong to its parent
                self._server, self._owner = None, os.getpid()
            answers, known = [], []
            for response, problem in zip(responses, problems, strict=True):
                answers.append(extract_answer(response, tagged="reasoning_gym" in problem.metadata))
                known.append(_without_worker(problem, answers[-1]))
            asked = self._ask({one for one in known if isinstance(one, str)})
        grades = [asked[one] if isinstance(one, str) else one for one in known]
        return [Grade(*grade, answer and answer[:_MAX_SENT]) for grade, answer in zip(grades, answers, strict=True)]

    def _ask(self, requests: set[str]) -> dict[str, tuple[float, Any]]:
        """Return the workers' reward and status of each request."""
        if not (texts := sorted(requests)):
            return {}
        if any(text.startswith('["gym"') for text in texts) and "reasoning_gym" not in self._arguments:
            self.close()
            self._arguments.append("reasoning_gym")  # imported from now on; that takes a second
        while True:
            try:
                if starts := self._server is None:
                    self._start()
                with ThreadPoolExecutor(self._workers) as threads:
                    return dict(zip(texts, threads.map(self._ask_worker, texts), strict=True))
            except OSError:  # the server was killed from outside: try once more with a new one
                self.close()
                if starts:
                    raise

    def _ask_worker(self, request: str) -> tuple[float, Any]:
        """Ask one worker. If something else than its limits ended it, ask another one, once."""
        worker = self._idle.pop()
        try:
            for _ in range(2):
                if worker is None:
                    worker, its = Pipe()
                    socket.send_fds(self._control, [b"fork"], [its.fileno()])
                    its.close()
                began = math.inf
                try:
                    worker.send_bytes(request.encode())
                    worker.recv_bytes()  # it has begun, so it had not been ended before
                    began = time.monotonic()
                    return tuple(json.loads(worker.recv_bytes(1 << 20)))
                except (EOFError, OSError, ValueError):
                    worker.close()
                    worker = None
                if time.monotonic() - began > 0.7 * self._seconds:
                    break
            if began == math.inf:
                raise ConnectionError("no worker began: the server is ending")
            return 0.0, "timeout"
        finally:
            self._idle.append(worker)

    def _start(self) -> None:
        self._control, its = socket.socketpair()
        self._idle = [None] * self._workers
        server = subprocess.Popen(
            [sys.executable, "-P", "-m", "bupo.data.grading_worker", *self._arguments],
            stdin=its.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, **_ONE_THREAD},
            start_new_session=True,  # an interrupt from the keyboard is for this process alone
        )
        its.close()
        if not self._control.recv(16):
            reason = server.communicate()[1].decode(errors="replace").strip().rpartition("\n")[2]
            raise RuntimeError(f"the grading process does not start: {reason or 'it printed no reason'}")
        self._server = server

    def close(self) -> None:
        """End all processes; a later call of `grade` starts new ones."""
        with self._lock:
            if self._server is not None:
                self._control.close()  # which ends the server
                for worker in filter(None, self._idle):
                    worker.close()
                self._server.communicate()
                self._server = None


def text_of(completion: Any) -> str:
    """A completion as text: a text, or the content of the last one of its messages (empty where that calls a tool)."""
    last = completion[-1] if isinstance(completion, list) and completion else completion
    content = (last.get("content") or "") if isinstance(last, Mapping) else last
    parts = content if isinstance(content, list) else [content]
    texts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"a completion must be text, or messages with text, not {shown(completion)}")
    return "".join(texts)


def problems_of(columns: Mapping[str, Any], number: int) -> list[Problem]:
    """Problems with the reference answers of a data set's columns, empty where a row has none."""
    answers = {name: columns[name] for name in ANSWER_COLUMNS if name in columns}
    if not answers or any(len(values) != number for values in answers.values()):
        raise InputError(f"grading needs {number} reference answers in one of the columns {', '.join(ANSWER_COLUMNS)}")
    rows = [{name: values[i] for name, values in answers.items()} for i in range(number)]
    return [Problem(str(i), "", gold_answer(row) or "", "") for i, row in enumerate(rows)]


def default_workers() -> int:
    """Processor cores of this process's share of the machine, between 1 and `MAX_WORKERS`."""
    return max(1, min(MAX_WORKERS, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _without_worker(problem: Problem, answer: str | None) -> tuple[float, Any] | str:
    """Return reward and status where they are clear, or else the request to a worker."""
    gym = problem.metadata.get("reasoning_gym")
    if gym is None and not is_usable(problem.answer):
        return 0.0, "bad_gold"
    if answer is None or len(answer) > _MAX_SENT:
        return 0.0, "unparsable"
    if gym is not None:
        return json.dumps(["gym", gym["task"], gym["entry"], answer])
    equal = equal_at_sight(problem.answer, answer)
    if equal is None:
        return json.dumps(["math", problem.answer, answer])
    return (1.0, "correct") if equal else (0.0, "wrong")
