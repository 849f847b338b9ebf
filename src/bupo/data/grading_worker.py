"""The process that reads answers: text written by a model is parsed here, in children that can be killed.

`bupo.data.grading` runs ``python -m bupo.data.grading_worker WORKERS SECONDS MEMORY``, writes lists of requests as
lines of JSON to its standard input, and reads one line of results for each. A process of its own loads neither the
caller's ``__main__`` nor torch, and it can fork workers safely, because it runs no threads.

A worker limits its memory and its processor time, and an audit hook refuses to write files, start programs or open
connections. The limits count processor time, so that the load of the machine does not change a grade.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Container
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import psutil

from bupo.data import same_answer

GOLD_PATIENCE = 8  # gold answers are not written by a model, so they may take this many times as long
_CLOCK_PATIENCE = 8  # wall-clock limit, in multiples of the limit on processor time: only a sleeping worker reaches it
_TIMEOUT = {"reward": 0.0, "status": "timeout", "usable": False}
_UNPARSABLE = {"reward": 0.0, "status": "unparsable", "usable": False}
_FORBIDDEN = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "signal.", "time.sleep")
_ALLOWED = ("os.listdir", "os.scandir", "os.walk")  # importing a module lists folders
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class OutOfTime(BaseException):
    """Raised by the processor-time alarm; a BaseException, so that no library's ``except Exception`` catches it."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
    if writes or (event.startswith(_FORBIDDEN) and event not in _ALLOWED):
        raise PermissionError(f"{event} is not allowed while grading")


def _raise_out_of_time(signum: int, frame: Any) -> None:
    raise OutOfTime


def _confine(memory: int) -> None:
    """Close the standard streams, allow ``memory`` MiB beyond what the libraries take, and refuse side effects."""
    devnull = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(devnull, stream)
    space = psutil.Process().memory_info().vms + memory * 2**20
    for kind, value in ((resource.RLIMIT_AS, space), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):  # a system without this limit, or with a lower one
            continue
    signal.signal(signal.SIGPROF, _raise_out_of_time)
    sys.addaudithook(_audit)


def _limit_time(seconds: float) -> None:
    """Limit processor time from now on; 0 removes the limit.

    The first alarm raises `OutOfTime` between two bytecodes. A single call into C can outlast it: the second ends the
    process.
    """
    signal.setitimer(signal.ITIMER_PROF, 0.6 * seconds)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.75 * seconds)  # SIGVTALRM keeps its default action


def _patience(request: dict[str, Any]) -> int:
    return GOLD_PATIENCE if request["kind"] == "gold" else 1


def answer_request(request: dict[str, Any]) -> dict[str, Any]:
    """Answer one request of kind ``gold``, ``math`` or ``reasoning_gym``."""
    random.seed(0)  # sympy's numerical checks draw from here: the same answer always gets the same grade
    if request["kind"] == "gold":
        return {"usable": same_answer.gold_is_usable(request["gold"])}
    if request["kind"] == "math":
        reward, status = same_answer.grade_math(request["gold"], request["answer"])
    else:
        reward, status = same_answer.grade_reasoning_gym(request["task"], request["entry"], request["answer"])
    return {"reward": reward, "status": status}


def _work(connection: Connection, server: int, seconds: float, memory: int) -> None:
    """Answer requests until the server is gone."""
    _confine(memory)
    while os.getppid() == server:
        if not connection.poll(1.0):
            continue
        request = json.loads(connection.recv_bytes())
        try:
            try:
                _limit_time(seconds * _patience(request))
                result = answer_request(request)
            finally:
                _limit_time(0)
        except (OutOfTime, MemoryError):
            result = _TIMEOUT
        except Exception:  # a library that fails on an answer has not read it
            result = _UNPARSABLE
        connection.send_bytes(json.dumps(result).encode())


class Pool:
    """Forks workers on demand, and kills and replaces those that exceed their limits.

    Args:
        size: largest number of workers.
        seconds: processor time of an answer; Python code is interrupted at 60 % of it, C code at 75 %.
        memory: MiB per worker.
    """

    def __init__(self, size: int, seconds: float, memory: int):
        self._size, self._seconds, self._memory = size, seconds, memory
        self._workers: dict[Connection, BaseProcess] = {}
        self._tasks: set[str] = set()
        self._context = multiprocessing.get_context("fork")

    def ask(self, requests: list[dict[str, Any]], caller: int) -> list[dict[str, Any]]:
        """Return the results of all requests, in order; one that exceeds the limits is a ``timeout``.

        A request whose worker was ended by something else is repeated once.

        Args:
            caller: file descriptor that becomes readable when the caller is gone. Then this process exits.
        """
        self._prepare({request["task"] for request in requests if "task" in request} - self._tasks)
        results = [_TIMEOUT] * len(requests)
        waiting = list(range(len(requests) - 1, -1, -1))
        repeated: set[int] = set()
        busy: dict[Connection, tuple[int, float]] = {}  # index of the request, deadline
        while waiting or busy:
            while waiting and (idle := self._idle(busy)) is not None:
                index = waiting.pop()
                limit = self._seconds * _patience(requests[index])
                busy[idle] = index, time.monotonic() + _CLOCK_PATIENCE * limit
                with contextlib.suppress(OSError):  # it was killed while it was idle: its end of file follows
                    idle.send_bytes(json.dumps(requests[index]).encode())
            soonest = min(deadline for _, deadline in busy.values())
            ready = wait([*busy, caller], timeout=max(0.0, soonest - time.monotonic()))
            if caller in ready:
                sys.exit()
            for connection, (index, deadline) in list(busy.items()):
                if connection in ready:
                    del busy[connection]
                    try:
                        results[index] = json.loads(connection.recv_bytes(1 << 20))
                    except (EOFError, OSError, ValueError):
                        if self._remove(connection) != -signal.SIGVTALRM and index not in repeated:
                            repeated.add(index)
                            waiting.append(index)
                elif time.monotonic() >= deadline:
                    del busy[connection]
                    self._remove(connection)
        return results

    def _prepare(self, tasks: set[str]) -> None:
        """Build reasoning-gym tasks, which can take longer than an answer may; new workers inherit them."""
        for task in sorted(tasks):
            same_answer.gym_task(task)
        for connection in list(self._workers) if tasks else ():
            self._remove(connection)
        self._tasks |= tasks

    def _idle(self, busy: Container[Connection]) -> Connection | None:
        for connection in self._workers:
            if connection not in busy:
                return connection
        if len(self._workers) >= self._size:
            return None
        connection, theirs = self._context.Pipe()
        arguments = (theirs, os.getpid(), self._seconds, self._memory)
        process = self._context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        theirs.close()
        self._workers[connection] = process
        return connection

    def _remove(self, connection: Connection) -> int | None:
        """Kill a worker if it still runs, and return its exit code."""
        process = self._workers.pop(connection)
        process.kill()
        process.join()
        connection.close()
        return process.exitcode


def main(workers: int, seconds: float, memory: int) -> None:
    """Serve one caller until it closes standard input."""
    logging.disable(logging.CRITICAL)
    sys.dont_write_bytecode = True
    same_answer.grade_math("\\frac{1}{2}", "x^2+\\sqrt{2}")  # fills the caches of sympy and of the grammar
    same_answer.grade_math("1.5", "\\{1,2\\}")
    same_answer.parse_math.cache_clear()
    pool = Pool(workers, seconds, memory)
    for line in sys.stdin.buffer:
        results = pool.ask(json.loads(line), sys.stdin.fileno())
        sys.stdout.buffer.write(json.dumps(results).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
