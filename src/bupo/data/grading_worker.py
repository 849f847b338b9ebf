"""The process that looks at answers: what a model wrote is parsed here, and nowhere else.

Run as ``python -m bupo.data.grading_worker FD PRELOAD``: it imports the libraries once and then forks a worker each
time the parent hands it a connection, so that a killed worker is replaced in milliseconds. Everything ends with the
parent: the control socket's end of file ends this process, whose death kills the workers.

A worker limits its own memory and processor time and refuses (through an audit hook) to write files, start programs
or open connections; the wall clock is the parent's business (`bupo.data.grading`).
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import socket
import sys
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

from bupo.data.grading_pool import GOLD_PATIENCE
from bupo.data.problems import last_boxed, unpack

CORRECT_SCORE = 0.99  # a reasoning-gym score from here on counts as solved
MAX_MATH_CHARS = 1_000  # no benchmark's answer is near; longer ones are not parsed
MAX_TEXT_CHARS = 100_000

_WRAPPER = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf|textit|textrm|textnormal|operatorname)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[a-z]+(?:[ '-]+[a-z]+)*")
_BASE = re.compile(r"-?[0-9A-Z.]+_\{*([0-9]+|[a-z]+)\}*")
_YES_NO = {"yes", "no"}


class OutOfTime(BaseException):
    """Raised by the processor-time alarm; a BaseException, so that no library's ``except Exception`` keeps it."""


# --- what is compared ---------------------------------------------------------------------------------------------


def bare(answer: str) -> str:
    """The answer without what only surrounds it: spaces, dollar signs, a pair of braces, a final full stop."""
    text = answer.strip()
    while True:
        inner = text.strip("$").strip()
        inner = inner[:-1].rstrip() if inner.endswith(".") else inner
        if inner.startswith("{") and last_boxed(f"\\boxed{inner}") == inner[1:-1]:
            inner = inner[1:-1].strip()
        if inner == text:
            return text
        text = inner


def plain_text(answer: str) -> str:
    """An answer as words: text commands unwrapped, one kind of space, lower case."""
    text = bare(answer)
    while (unwrapped := _WRAPPER.sub(r"\1", text)) != text:
        text = unwrapped
    text = re.sub(r"(?:\\[ ,;:!]|~|\s)+", " ", text).strip().lower()
    return text[1:-1].strip() if re.fullmatch(r"\([a-z]\)", text) else text


def is_words(answer: str) -> bool:
    """Is this a word or a phrase (``\\text{east}``, ``Yes``, ``none of these``) and no formula such as ``xy``?"""
    text = plain_text(answer)
    if not _WORDS.fullmatch(text):
        return False
    letters = len(text.replace(" ", ""))
    return text in _YES_NO or letters >= 4 or (letters >= 2 and _WRAPPER.fullmatch(answer.strip()) is not None)


@lru_cache(maxsize=4096)
def parse_math(answer: str) -> tuple[Any, ...]:
    """What math-verify reads in ``\\boxed{answer}``: sympy objects, then the text itself; empty if nothing.

    Only the box is read: no number is picked out of a sentence.
    """
    from math_verify import LatexExtractionConfig, parse

    config = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    return tuple(parse(f"\\boxed{{{answer}}}", extraction_config=[config], parsing_timeout=None))


def _other_base(gold: str, answer: str) -> bool:
    """Do the two numbers name different bases? (math-verify drops the base; leaving it out is accepted.)"""
    bases = [_BASE.fullmatch(re.sub(r"\s|\\text|\\mathrm", "", text)) for text in (gold, answer)]
    return all(bases) and bases[0].group(1) != bases[1].group(1)  # type: ignore[union-attr]


def gold_is_usable(gold: str) -> bool:
    """Can answers be compared with this gold answer: is it words, or does it parse as mathematics?"""
    if not gold.strip() or len(gold) > MAX_MATH_CHARS:
        return False
    return is_words(gold) or any(not isinstance(part, str) for part in parse_math(gold))


def grade_math(gold: str, answer: str) -> tuple[float, str]:
    """Reward and status of a boxed answer, by math-verify (words are compared as words)."""
    from math_verify import verify

    answer = bare(answer) if len(answer) <= MAX_MATH_CHARS else ""
    if not answer:
        return 0.0, "unparsable"
    if plain_text(gold) == plain_text(answer):
        return 1.0, "correct"
    if is_words(gold) or _other_base(gold, answer):
        return 0.0, "wrong"
    parsed = parse_math(answer)
    if not any(not isinstance(part, str) for part in parsed):
        return 0.0, "wrong" if is_words(answer) else "unparsable"
    # the text fallback is dropped: what is equal as text was accepted above
    target = [part for part in parsed if not isinstance(part, str)]
    known = [part for part in parse_math(gold) if not isinstance(part, str)]
    return (1.0, "correct") if verify(known, target, timeout_seconds=None) else (0.0, "wrong")


@lru_cache(maxsize=64)
def _task(name: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1, seed=0)


def grade_reasoning_gym(task: str, entry: Any, answer: str) -> tuple[float, str]:
    """Reward and status by the task's own ``score_answer``."""
    if len(answer) > MAX_TEXT_CHARS or re.search(r"__\w+__", answer):  # some scorers evaluate expressions
        return 0.0, "unparsable"
    try:
        score = float(_task(task).score_answer(answer=answer, entry=unpack(entry)))
    except Exception:
        return 0.0, "unparsable"
    return score, "correct" if score >= CORRECT_SCORE else "wrong"


def answer_request(request: dict[str, Any]) -> dict[str, Any]:
    """One request of the parent: ``prepare``, ``gold``, ``math`` or ``reasoning_gym``."""
    kind = request["kind"]
    random.seed(0)  # sympy's numerical checks draw from here: the same answer always gets the same grade
    if kind == "math":
        reward, status = grade_math(request["gold"], request["answer"])
        return {"reward": reward, "status": status}
    if kind == "gold":
        return {"usable": gold_is_usable(request["gold"])}
    if kind == "prepare":
        _task(request["task"])
        return {}
    reward, status = grade_reasoning_gym(request["task"], request["entry"], request["answer"])
    return {"reward": reward, "status": status}


# --- the process --------------------------------------------------------------------------------------------------

_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.killpg",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.putenv",
    "subprocess.",
    "socket.",
    "shutil.",
    "ctypes.",
    "pty.",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _forbid(event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith(_FORBIDDEN) or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING):
        raise PermissionError(f"{event} is not allowed while grading")


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent is gone (Linux; elsewhere the closed connection ends it)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(0)


def _limit_memory(mebibytes: int) -> None:
    size = mebibytes * 2**20
    limits = ((resource.RLIMIT_AS, size), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0))
    for kind, value in limits:
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):  # a system without this limit: the wall clock still holds
            continue


def _on_alarm(signum: int, frame: Any) -> None:
    raise OutOfTime


def serve(connection: Connection, *, memory: int, seconds: float) -> None:
    """Answer requests until the parent goes away."""
    signal.signal(signal.SIGPROF, _on_alarm)
    _limit_memory(memory)
    sys.addaudithook(_forbid)
    connection.send_bytes(json.dumps({"pid": os.getpid()}).encode())
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)
        try:
            if request["kind"] != "prepare":
                signal.setitimer(signal.ITIMER_PROF, seconds * (GOLD_PATIENCE if request["kind"] == "gold" else 1))
            try:
                result = answer_request(request)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        except OutOfTime:
            result = {"reward": 0.0, "status": "timeout", "usable": False}
        except MemoryError:
            result = {"reward": 0.0, "status": "timeout", "usable": False}
        except Exception:  # a library that fails on an answer has not read it
            result = {"reward": 0.0, "status": "unparsable", "usable": False}
        try:
            connection.send_bytes(json.dumps(result).encode())
        except OSError:
            os._exit(0)


def _preload(names: list[str]) -> None:
    if "math" in names:
        grade_math("\\frac{1}{2}", "x^2+\\sqrt{2}")  # imports sympy and the grammar, fills their caches
        grade_math("1.5", "\\{1,2\\}")
        parse_math.cache_clear()
    if "reasoning_gym" in names:
        import reasoning_gym  # noqa: F401


def main(control_fd: int, preload: list[str], memory: int, seconds: float) -> None:
    """Import once, then fork a worker for each connection received on the control socket."""
    import logging

    logging.disable(logging.CRITICAL)
    sys.dont_write_bytecode = True
    control = socket.socket(fileno=control_fd)
    _preload(preload)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # dead workers leave no zombies
    own = os.getpid()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message or not descriptors:
            os._exit(0)
        (descriptor,) = descriptors
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control.close()
            _die_with(own)
            try:
                serve(Connection(descriptor), memory=memory, seconds=seconds)
            finally:
                os._exit(1)
        os.close(descriptor)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3]), float(sys.argv[4]))
