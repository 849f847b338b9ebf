"""The processes that read answers: text written by a model is parsed here, where it can be limited and killed.

`bupo.data.grading` runs ``python -m bupo.data.grading_worker SECONDS MODULES`` with a socket as standard input. This
program forks a worker for each connection that arrives there: safely, as it runs no threads, and without the caller's
``__main__`` or torch. Limits count processor time, so that the load of the machine does not change a grade.
"""

import contextlib
import json
import logging
import os
import random
import resource
import signal
import socket
import sys
from multiprocessing.connection import Connection
from typing import Any

import psutil

from bupo.data import generators, same_answer

MEMORY = 1024 * 2**20  # bytes that a worker may allocate beyond what the libraries take
# An exception between two bytecodes; the end of a worker whose call into C outlasts that; the end of one that sleeps.
_TIMERS = ((signal.ITIMER_PROF, 0.6), (signal.ITIMER_VIRTUAL, 0.75), (signal.ITIMER_REAL, 8.0))
_FORBIDDEN = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "signal.", "time.sleep")
_ALLOWED = ("os.listdir", "os.scandir", "os.walk")  # importing a module lists folders
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class OutOfTime(BaseException):
    """Raised by the first alarm; a BaseException, so that no library's ``except Exception`` catches it."""


def _raise_out_of_time(signum: int, frame: Any) -> None:
    raise OutOfTime


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
    if writes or (event.startswith(_FORBIDDEN) and event not in _ALLOWED):
        raise PermissionError(f"{event} is not allowed while grading")


def _confine() -> None:
    devnull = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(devnull, stream)
    space = psutil.Process().memory_info().vms + MEMORY
    for kind, value in ((resource.RLIMIT_AS, space), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # a system without this limit, or with a lower one
            resource.setrlimit(kind, (value, value))
    signal.signal(signal.SIGPROF, _raise_out_of_time)
    sys.addaudithook(_audit)


def _limit_time(seconds: float) -> None:
    for timer, share in _TIMERS:
        signal.setitimer(timer, share * seconds)


def _answer(kind: str, arguments: list[Any], seconds: float) -> tuple[float, str]:
    random.seed(0)  # sympy's numerical checks draw from here: the same answer always gets the same grade
    try:
        if kind == "gym":
            generators.gym_task(arguments[0])  # can take longer than an answer may
        try:
            _limit_time(seconds)
            return generators.score(*arguments) if kind == "gym" else same_answer.grade_math(*arguments)
        finally:
            _limit_time(0)  # no limit
    except (OutOfTime, MemoryError):
        return 0.0, "timeout"
    except Exception:  # a library that fails on an answer has not read it
        return 0.0, "unparsable"


def work(connection: Connection, seconds: float) -> None:
    _confine()
    with contextlib.suppress(EOFError, OSError):
        while True:
            kind, *arguments = json.loads(connection.recv_bytes(), object_hook=generators.unpack)
            connection.send_bytes(b"begun")
            connection.send_bytes(json.dumps(_answer(kind, arguments, seconds)).encode())


def main(seconds: float, modules: list[str]) -> None:
    """Fork a worker for each connection, until the caller closes standard input; import ``modules`` for them first."""
    logging.disable(logging.CRITICAL)
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the workers
    for module in modules:
        __import__(module)
    same_answer.grade_math("\\{1.5,\\frac{1}{2}\\}", "x^2+\\sqrt{2}")  # fills the caches of sympy and of the grammar
    same_answer.parse_math.cache_clear()
    caller = socket.socket(fileno=0)
    caller.send(b"ready")
    while sockets := socket.recv_fds(caller, 4, 1)[1]:
        if os.fork() == 0:
            work(Connection(sockets[0]), seconds)
            os._exit(0)
        os.close(sockets[0])


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
