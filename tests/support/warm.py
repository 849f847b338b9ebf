"""A process that has imported everything once and forks for the tests that need processes of their own.

It reads one JSON object per line, ``{"call": "module:function", "arguments": {...}}`` with a module of this folder,
calls the function (which forks) and answers with its result. Importing costs more than most of these tests' runs.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[2]


class Warm:
    """The other end: starts the process, calls functions in it."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(HERE / "src"), str(HERE)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )

    def call(self, name: str, **arguments: Any) -> Any:
        """The answer of ``module:function``; arguments and answer go through JSON."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the warm process ended"
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anybody prints is no answer
    for module in ("tests.support.training", "bupo.train.run"):
        importlib.import_module(module)
    for line in sys.stdin:
        order = json.loads(line)
        module, _, function = order["call"].partition(":")
        answer = getattr(importlib.import_module(f"tests.support.{module}"), function)(**order["arguments"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
