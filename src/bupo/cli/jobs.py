"""Run several ``bupo`` commands beside each other, with a progress bar each, and stop them all if one fails."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bupo.errors import BupoError


@dataclass
class Job:
    """One command: its arguments after ``bupo``, what to call it, how far it is (done, total), and where it logs."""

    name: str
    arguments: list[str]
    log: Path
    progress: Callable[[], tuple[int, int]]
    seconds: float = 0.0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def command(self) -> str:
        return "bupo " + " ".join(self.arguments)


def run_jobs(jobs: Sequence[Job], *, at_once: int, quiet: bool = False) -> None:
    """Run ``jobs``, at most ``at_once`` at a time with an equal share of the cores each.

    Raises:
        BupoError: one failed; its last line of output is the message, and the others were stopped.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    threads = max(1, (os.cpu_count() or 1) // max(1, min(at_once, len(jobs))))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "COLUMNS": "120"}
    columns = (TextColumn("  {task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    waiting = list(jobs)
    running: list[Job] = []
    started: dict[str, float] = {}
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bars:
        tasks = {job.name: bars.add_task(job.name, total=None, start=False) for job in jobs}
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.pop(0)
                    job.log.parent.mkdir(parents=True, exist_ok=True)
                    with job.log.open("wb") as stream:
                        job.process = subprocess.Popen(
                            [sys.executable, "-m", "bupo", *job.arguments],
                            stdout=stream,
                            stderr=subprocess.STDOUT,
                            stdin=subprocess.DEVNULL,
                            env=environment,
                        )
                    started[job.name] = time.monotonic()
                    bars.start_task(tasks[job.name])
                    running.append(job)
                time.sleep(0.2)
                for job in list(running):
                    assert job.process is not None
                    code = job.process.poll()
                    done, total = job.progress()
                    bars.update(tasks[job.name], completed=total if code == 0 else done, total=total)
                    if code is None:
                        continue
                    running.remove(job)
                    job.seconds = time.monotonic() - started[job.name]
                    bars.stop_task(tasks[job.name])
                    if code:
                        raise BupoError(f"{job.name} failed: {_last_line(job.log)} (all of its output: {job.log})")
        finally:
            for job in running:
                assert job.process is not None
                job.process.terminate()
            for job in running:
                assert job.process is not None
                try:
                    job.process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    job.process.kill()


def lines_in(path: Path, total: int) -> tuple[int, int]:
    """Progress read from a file that grows by a line a step; it may not be there yet, or no more."""
    try:
        return min(total, path.read_bytes().count(b"\n")), total
    except OSError:
        return 0, total


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return (lines[-1] if lines else "no output").removeprefix("bupo: error: ")
