"""The pool of processes in which answers are graded: forked on demand, killed when an answer takes too long."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

_START_SECONDS = 120.0  # for a worker to come up: imports only
GOLD_PATIENCE = 8  # a gold answer is no model's; it may take so many times as long before its problem is left out
_LOAD_PATIENCE = 8  # on a busy machine an answer may take so many times as long by the clock


@dataclass
class _Worker:
    connection: Connection
    pid: int
    prepared: set[str]
    index: int | None = None  # of the request it works on
    deadline: float = 0.0
    last: float = 0.0  # the deadline is never moved beyond this
    waited: float = 0.0  # for a processor, in its life, as last looked up


class Pool:
    """One source process that forks workers on demand, and the workers it made."""

    def __init__(self, kind: str, size: int, seconds: float, memory: int):
        self.kind, self.size, self.seconds, self.memory = kind, size, seconds, memory
        self.workers: list[_Worker] = []
        self.control: socket.socket | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.errors: Any = None
        self._finish: weakref.finalize | None = None

    def ask(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answers to all requests, in order; one that takes too long is answered with ``timeout``."""
        results: dict[int, dict[str, Any]] = {}
        queue = list(range(len(requests) - 1, -1, -1))
        rests: dict[
            int, float
        ] = {}  # of requests whose worker died: they are tried once more, in the rest of their time
        while len(results) < len(requests):
            while queue and (worker := self._idle()) is not None:
                if self._send(worker, queue[-1], requests[queue[-1]]):
                    index = queue.pop()
                    seconds = rests.get(index, self._seconds(requests[index]))
                    worker.deadline = time.monotonic() + seconds
                    worker.last = time.monotonic() + _LOAD_PATIENCE * seconds
                    worker.waited = waited(worker.pid)
            busy = {worker.connection: worker for worker in self.workers if worker.index is not None}
            rest = max(0.0, min(worker.deadline for worker in busy.values()) - time.monotonic())
            for ready in wait(list(busy), timeout=rest):
                assert isinstance(ready, Connection)
                worker = busy[ready]
                assert worker.index is not None
                index, worker.index = worker.index, None
                try:
                    results[index] = json.loads(ready.recv_bytes(1 << 20))
                except (EOFError, OSError, ValueError):  # it died: of this answer, or killed by someone else before
                    self._replace(worker)
                    if index in rests:
                        results[index] = timed_out()
                    else:
                        rests[index] = worker.deadline - time.monotonic()
                        queue.append(index)
            for worker in list(self.workers):
                if worker.index is not None and time.monotonic() >= worker.deadline and not _extend(worker):
                    results[worker.index] = timed_out()
                    self._replace(worker)
        return [results[index] for index in range(len(requests))]

    def _seconds(self, request: dict[str, Any]) -> float:
        return self.seconds * (GOLD_PATIENCE if request["kind"] == "gold" else 1)

    def _send(self, worker: _Worker, index: int, request: dict[str, Any]) -> bool:
        try:
            task = request.get("task")
            if task is not None and task not in worker.prepared:  # building a task may take longer than an answer may
                worker.connection.send_bytes(json.dumps({"kind": "prepare", "task": task}).encode())
                if not worker.connection.poll(_START_SECONDS):
                    raise OSError("not prepared in time")
                worker.connection.recv_bytes()
                worker.prepared.add(task)
            worker.connection.send_bytes(json.dumps(request).encode())
        except (OSError, EOFError):  # it died while idle
            self._replace(worker)
            return False
        worker.index = index
        return True

    def _idle(self) -> _Worker | None:
        for worker in self.workers:
            if worker.index is None:
                return worker
        if len(self.workers) >= self.size:
            return None
        before = time.monotonic()
        worker = self._fork()
        for other in self.workers:  # nobody watched them meanwhile
            other.deadline += time.monotonic() - before
            other.last += time.monotonic() - before
        self.workers.append(worker)
        return worker

    def _fork(self) -> _Worker:
        for attempt in (1, 2):  # the source process may have been killed: once more with a new one
            if self.control is None:
                self._start()
            assert self.control is not None
            mine, theirs = socket.socketpair()
            connection = Connection(mine.detach())
            try:
                with theirs:
                    socket.send_fds(self.control, [b"f"], [theirs.fileno()])
                if connection.poll(_START_SECONDS):
                    return _Worker(connection, int(json.loads(connection.recv_bytes())["pid"]), set())
            except (OSError, EOFError, ValueError):
                pass
            connection.close()
            message = self._last_words()
            self._stop()  # its workers end with it; what they were asked is asked again
            if attempt == 2:
                raise RuntimeError(f"the grading process does not start: {message or 'it gave no reason'}")
        raise AssertionError("unreachable")

    def _start(self) -> None:
        self.control, theirs = socket.socketpair()
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        preload = "math" if self.kind == "math" else "reasoning_gym"
        arguments = [str(theirs.fileno()), preload, str(self.memory), str(0.6 * self.seconds)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "bupo.data.grading_worker", *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.errors,
                env=environment,
                start_new_session=True,  # an interrupt from the keyboard is for the parent alone
            )
        self._finish = weakref.finalize(self, _end, self.process, self.control, os.getpid())

    def _replace(self, worker: _Worker) -> None:
        """Kill a worker and forget it; `_idle` forks the next one."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)
        worker.connection.close()
        self.workers.remove(worker)

    def _last_words(self) -> str:
        if self.errors is None:
            return ""
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return re.sub(r"\s+", " ", lines[-1]) if lines else ""

    def close(self) -> None:
        for worker in list(self.workers):
            self._replace(worker)
        self._stop()

    def _stop(self) -> None:
        """End the source process."""
        if self._finish is not None:
            self._finish()
        if self.errors is not None:
            self.errors.close()
        self.control, self.process, self.errors, self._finish = None, None, None, None


def waited(pid: int) -> float:
    """Seconds that a process has stood in line for a processor since it began; 0 where the system does not say."""
    try:
        with open(f"/proc/{pid}/schedstat", "rb") as stream:
            return int(stream.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def _extend(worker: _Worker) -> bool:
    """Give back the time in which others had the processor: a verdict must not depend on what else runs here."""
    now = waited(worker.pid)
    lost, worker.waited = now - worker.waited, now
    worker.deadline = min(worker.deadline + lost, worker.last)
    return worker.deadline > time.monotonic()


def _end(process: subprocess.Popen[bytes], control: socket.socket, owner: int) -> None:
    """Close the control socket (its end of file ends the source process, and with it the workers)."""
    control.close()
    if os.getpid() != owner:
        return
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def timed_out() -> dict[str, Any]:
    return {"reward": 0.0, "status": "timeout", "usable": False}
