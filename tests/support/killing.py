"""`bupo train` in forked processes that are killed with SIGKILL at chosen points; called through `warm`."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


def watch(folder: str, event: int | None, counter: int) -> None:
    """Count this process's operations below ``folder`` (one byte each into ``counter``), and die before the n-th."""
    seen = [0]

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name in WATCHED and any(isinstance(a, (str, os.PathLike)) and folder in os.fspath(a) for a in arguments):
            seen[0] += 1
            if seen[0] == event:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(counter, b".")

    sys.addaudithook(hook)


def attempt(
    arguments: list[str], log: str, folder: str, event: int | None = None, seconds: float | None = None
) -> dict[str, Any]:
    """One process, from its start to its end.

    Args:
        arguments: of ``bupo train``.
        log: file for what it prints.
        folder: of the run.
        event: it kills itself right before its n-th operation (from 1) on a file below the folder: opening, renaming,
            removing, making a folder.
        seconds: it is killed from outside after that time, wherever it is.

    Returns: its exit code (None if killed), the operations seen below the folder, and the seconds it took.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.close(reading)
            with open(log, "a") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            watch(folder, event, writing)
            from bupo.cli import main

            code = main(["train", *arguments])
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    found, status = os.waitpid(child, os.WNOHANG)
    while not found:
        if seconds is not None and time.monotonic() - started >= seconds:
            os.kill(child, signal.SIGKILL)
            seconds = None
        time.sleep(0.002)
        found, status = os.waitpid(child, os.WNOHANG)
    events = 0
    while data := os.read(reading, 65536):
        events += len(data)
    os.close(reading)
    code_or_none = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    return {"code": code_or_none, "events": events, "seconds": time.monotonic() - started}
