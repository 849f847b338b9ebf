"""Processes of their own for tests, forked from a server that has imported everything once: imports cost the most."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "tests.support.training", "bupo.train.run"])
WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


def start(log: Path, target: Callable[..., None], **arguments: Any) -> Any:
    """A process that runs a function; what it prints is appended to a file."""
    process = SERVER.Process(target=_run, args=(log, target, arguments))
    process.start()
    return process


def _run(log: Path, target: Callable[..., None], arguments: dict[str, Any]) -> None:
    with log.open("a") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    target(**arguments)


def launch(processes: int, job: Callable[..., None], folder: Path, seconds: float = 240, **arguments: Any) -> None:
    """Run a job of `distributed` in so many processes that find each other; fail unless all end well and in time."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    places |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    logs, made, until = [folder / f"rank-{rank}.txt" for rank in range(processes)], [], time.monotonic() + seconds
    for rank, log in enumerate(logs):
        own = {**places, "RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
        made.append(start(log, _join, job=job, places=own, folder=folder, rank=rank, **arguments))
    while None in (codes := [p.exitcode for p in made]) and not any(codes) and time.monotonic() < until:
        time.sleep(0.01)
    for process in made:
        process.join(2 if any(codes) else 0)  # the others would wait for ever for one that failed
        process.kill()
        process.join()
    assert [p.exitcode for p in made] == [0] * processes, "\n".join(log.read_text() for log in logs)


def _join(job: Callable[..., None], places: dict[str, Any], **arguments: Any) -> None:
    os.environ |= {"ACCELERATE_USE_CPU": "true", **{name: str(value) for name, value in places.items()}}
    job(**arguments)


def attempt(
    arguments: list[str], log: Path, folder: Path, event: int | None = None, seconds: float | None = None
) -> tuple[int, int, float]:
    """Run `bupo train` with these arguments in one process, which may be killed with SIGKILL.

    It kills itself right before its ``event``-th operation (opening, renaming, removing, making a folder; from 1) on a
    file below ``folder``, or is killed from outside after ``seconds``.

    Returns: its exit code (-9 if killed), the operations seen below the folder, and the seconds it took.
    """
    counter, started = log.with_suffix(".events"), time.monotonic()
    process = start(log, _train_watched, arguments=arguments, counter=counter, folder=str(folder), event=event)
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode, counter.stat().st_size if counter.exists() else 0, time.monotonic() - started


def _train_watched(arguments: list[str], counter: Path, folder: str, event: int | None) -> None:
    from bupo.cli import main

    seen, counted = 0, counter.open("wb", buffering=0)

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if name in WATCHED and any(isinstance(a, (str, os.PathLike)) and folder in os.fspath(a) for a in arguments):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)
            counted.write(b".")

    sys.addaudithook(hook)
    sys.exit(main(["train", *arguments]))
