"""Runs a grid: `bupo train` and `bupo eval` in processes of their own, and one row per finished run.

The folder holds ``run.json``, ``runs.jsonl`` (unless the rows go elsewhere), with ``keep`` the trained models, and for
each run that is not finished ``unfinished/ARM-SEED``: recipe, log, training and evaluation, which continue.
"""

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import yaml

from bupo.errors import BupoError, InputError
from bupo.run_folder import cores, read_json, write_json, write_text
from bupo.sweep.grid import Grid
from bupo.sweep.rows import START, Row, append_row, rounded
from bupo.train.checkpoint import last_checkpoint
from bupo.train.log import LOG_FILE, read_log

CURVES = ("reward", "entropy", "internal_entropy", "mean_length", "perplexity", "internal/divergence", "grad_norm")
PROGRAM = [sys.executable, "-m", "bupo"]


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Lock the folder for this sweep and for the runs that it starts; yield what a run must inherit."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another sweep, or a run that it started, still writes {folder}; wait for it") from None
        yield handle
    finally:
        os.close(handle)


def gpus() -> list[str]:
    """The CUDA devices that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    number, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return (named.split(",") if named else [str(index) for index in range(number)])[:number]


@dataclass
class Commands:
    """Runs bupo's commands, ``workers`` at a time, with an equal share of cores and GPUs, and ends them in order.

    With GPUs, a command sees one, which is that of another command only if there are fewer GPUs than workers.
    """

    workers: int
    lock: int  # what `locked` yields
    stopping: bool = False
    _free: list[str] = field(default_factory=list)  # GPUs that the next commands get
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._free = list(islice(cycle(gpus()), self.workers))

    def run(self, log: Path, *arguments: Any) -> None:
        """Run one command; `BupoError` has the last line of what it printed, all of which is appended to ``log``."""
        command = [*PROGRAM, *map(str, arguments)]
        threads = {"OMP_NUM_THREADS": str(max(1, cores() // self.workers))}
        environment = {**threads, **os.environ, "COLUMNS": "120"}  # a number of threads that the user set stays
        options: Any = {"stdin": subprocess.DEVNULL, "env": environment, "pass_fds": (self.lock,)}
        with self._mutex, log.open("ab") as out:
            if self.stopping:
                raise BupoError("not started")
            gpu = self._free.pop() if self._free else None
            environment |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
            # Ctrl-C in the terminal reaches this process only, which passes it on once
            process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, **options)
            self._running.add(process)
        code = process.wait()
        with self._mutex:
            self._running.discard(process)
            self._free += [gpu] if gpu else []
        if code:
            last = (log.read_text(errors="replace").strip() or "no output").splitlines()[-1]
            ended = f"ended by {signal.Signals(-code).name}, after: " if code < 0 else ""
            raise BupoError(f"bupo {arguments[0]}: {ended}{last.removeprefix('bupo: error: ')}")

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Ask all commands to end as Ctrl-C does, and start no others; SIGKILL ends them and their workers at once."""
        with self._mutex:
            self.stopping = True
            for process in self._running:
                if how == signal.SIGKILL:
                    os.killpg(process.pid, how)
                else:
                    process.send_signal(how)


@dataclass(frozen=True)
class Runner:
    """What all runs of a sweep share."""

    grid: Grid
    folder: Path
    rows: Path
    keep: bool
    commit: str | None
    commands: Commands
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    def one(self, arm: str, seed: int) -> Row:
        """Train (except for the arm ``start``) and evaluate, or continue where an earlier attempt ended; add a row."""
        recipe, work = self.grid.recipe_of(arm, save_every=10_000), self.folder / "unfinished" / f"{arm}-{seed}"
        row: Row = {"arm": arm, "seed": seed, "changes": self.grid.changes(arm), "evaluate": self.grid.evaluate}
        row |= {"commit": self.commit} if self.commit else {}
        options = self.grid.evaluation()
        text = f"# evaluated by: bupo eval {shlex.join(options)}\n" + yaml.safe_dump({**recipe, "seed": seed})
        if work.exists() and (not (file := work / "recipe.yaml").exists() or file.read_text() != text):
            shutil.rmtree(work)  # of another grid
        write_text(work / "recipe.yaml", text)
        if arm == START:
            source = {"model": recipe["model"], "revision": recipe.get("revision")}
            options += [part for name, value in source.items() if value for part in (f"--{name}", value)]
        else:
            out = work / "train"
            if not _result(out):
                how = ["--resume"] if last_checkpoint(out / "checkpoints") else ["--overwrite"] if out.exists() else []
                self._timed(work, "train", work / "recipe.yaml", "--output", out, "--no-check", *how)
            row |= _of_training(out)
            options += ["--model", str(out / "model")]
        options += ["--trust-remote-code"] * bool(recipe.get("trust_remote_code"))
        if not (work / "eval" / "results.json").exists():
            self._timed(work, "eval", "--output", work / "eval", *options)
        row["tasks"] = _of_evaluation(read_json(work / "eval" / "results.json"))
        seconds = read_json(work / "seconds.json")
        row |= {"train_seconds": round(seconds.get("train", 0.0), 1), "seconds": round(sum(seconds.values()), 1)}
        if self.keep and arm != START:
            kept = self.folder / "models" / work.name
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(work / "train" / "model", kept)
        with self._mutex:
            append_row(self.rows, row)
        shutil.rmtree(work)
        return row

    def _timed(self, work: Path, command: str, *arguments: Any) -> None:
        """Run a command, and add the time that it took to that of earlier attempts."""
        started, file = time.monotonic(), work / "seconds.json"
        try:
            self.commands.run(work / "log", command, *arguments)
        finally:
            before = read_json(file) if file.exists() else {}
            write_json(file, {**before, command: before.get(command, 0.0) + time.monotonic() - started})


def run_sweep(
    runner: Runner, runs: Sequence[tuple[str, int]], workers: int, say: Callable[[str], None]
) -> tuple[int, bool]:
    """Run what is pending, several at a time; return how many failed, and whether Ctrl-C (or SIGTERM) stopped it."""
    failed, kinds = 0, (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, signal.default_int_handler) for kind in kinds]  # a script's "&" ignores the first
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(runner.one, *run): run for run in runs}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                arm, seed = futures[future]
                try:
                    row = future.result()
                    averages = ", ".join(f"{name} {task['avg']:.1%}" for name, task in row["tasks"].items())
                    say(f"{number}/{len(runs)} {arm}, seed {seed}: {averages} in {row['seconds']:.0f} s")
                except (BupoError, OSError) as error:
                    failed += 1
                    where = runner.folder / "unfinished" / f"{arm}-{seed}" / "log"
                    say(f"{number}/{len(runs)} {arm}, seed {seed}: failed: {error} (all of its output: {where})")
        except KeyboardInterrupt:
            say("stopping; press Ctrl-C again to stop at once")
            try:
                pool.shutdown(wait=False, cancel_futures=True)
                runner.commands.stop()
                pool.shutdown()
            except KeyboardInterrupt:
                runner.commands.stop(signal.SIGKILL)
        finally:
            for kind, handler in zip(kinds, before, strict=True):
                signal.signal(kind, handler)
    with suppress(OSError):  # not empty, or never made
        (runner.folder / "unfinished").rmdir()
    return failed, runner.commands.stopping


def commit_of(folder: Path) -> str | None:
    """The commit of the repository that a folder lies in, or None."""
    try:
        command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _result(training: Path) -> dict[str, Any]:
    """What ``run.json`` says of a finished training run; empty if it is not finished."""
    run = read_json(training / "run.json") if (training / "run.json").exists() else {}
    return run["result"] if (run.get("result") or {}).get("model") and (training / "model").is_dir() else {}


def _of_training(training: Path) -> Row:
    """The parts of a row that come from a training run."""
    result, log = _result(training), [row for row in read_log(training / LOG_FILE) if "rollout" in row]
    if not log:
        raise BupoError(f"{training / LOG_FILE} is missing or empty; remove {training} to train again")
    curves = {name: [rounded(row.get(name)) for row in log] for name in CURVES}
    found = {"phase_end": result["phase_end"], "internal_layer": result["internal_layer"]}
    found["curves"] = {name: values for name, values in curves.items() if set(values) != {None}}
    found["curves"]["update_seconds"] = seconds = update_seconds(log)
    found["update_seconds"] = seconds[-1]
    if readings := sorted((training / "inside").glob("after-*.json")):
        left_out = ("schema", "kind", "change", "standard_error_method")
        read = map(read_json, readings)
        found["inside"] = [rounded({k: v for k, v in reading.items() if k not in left_out}) for reading in read]
    return found


def update_seconds(log: Sequence[Row]) -> list[float]:
    """Seconds of training up to the end of every rollout batch, without sampling and rewards, but with lens fits."""
    found: list[float] = []
    earlier = last = sampling = 0.0
    for row in log:
        earlier += last if row["seconds"] < last else 0.0  # a resumed run counts from 0 again
        last, sampling = row["seconds"], sampling + row.get("sampling_seconds", 0.0)
        found.append(round(earlier + last - sampling, 1))
    return found


def _of_evaluation(results: Row) -> dict[str, Any]:
    """The tasks of a row: the number of correct samples of each problem, so that runs can be paired by problem."""
    found: dict[str, Any] = {}
    for name, task in results["tasks"].items():
        if task["n_samples"]:
            found[name] = {"samples": task["n_samples"], "avg": round(task["avg_at_k"]["mean"], 5)}
            found[name]["correct"] = " ".join(str(problem["correct"]) for problem in task["problems"])
            found[name] |= {key: rounded(task[key]) for key in ("mean_length", "truncation_rate", "unparsable_rate")}
    if not found:
        raise BupoError("no task has a problem whose answer can be read")
    return found
