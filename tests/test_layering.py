"""Who never imports whom: the rooms of the package stay apart, and the command line starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "bupo"
HEAVY = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "vllm", "matplotlib")

# room -> what no file in it may import, anywhere
NEVER = {
    "errors.py": HEAVY,
    "run_folder.py": ("torch", "transformers", "trl"),
    "recipe.py": ("torch", "transformers", "trl"),
    "lens": ("trl",),
    "report": ("torch", "transformers", "trl", "bupo.models", "bupo.train"),
    "train": ("bupo.report", "bupo.evaluate"),
    "models": ("bupo.data.problems", "bupo.train", "bupo.evaluate", "bupo.report"),
}


def imported(path: Path) -> set[str]:
    """Every module a file imports, at its top or inside a function, but for type checking."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []  # never executed
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def under(module: str, forbidden: str) -> bool:
    return module == forbidden or module.startswith(forbidden + ".")


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("room", sorted(NEVER))
def test_rooms_stay_apart(room):
    files = [f for f in FILES if f.relative_to(SOURCE).parts[0] == room]
    assert files
    for file in files:
        for module in imported(file):
            assert not any(under(module, name) for name in NEVER[room]), f"{file.name} imports {module}"


def test_no_stage_imports_the_command_line():
    for file in FILES:
        if file.relative_to(SOURCE).parts[0] not in ("cli", "__main__.py"):
            assert not any(under(module, "bupo.cli") for module in imported(file)), file


def test_only_the_trainer_touches_trl():
    touching = {str(f.relative_to(SOURCE)) for f in FILES if any(under(m, "trl") for m in imported(f))}
    assert touching == {"train/config.py", "train/trainer.py"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["analyze", "--help"], ["plan", "--help"], ["train", "--help"], ["eval", "--help"]]
)
def test_help_needs_nothing_heavy(arguments):
    code = (
        "import sys; from bupo.cli import main; main(sys.argv[1:]); "
        f"print('HEAVY', sorted(set(sys.modules) & set({HEAVY!r})))"
    )
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert "HEAVY []" in run.stdout
    assert "Usage" in run.stdout


def test_modules_stay_readable():
    """The house rule is about 300 lines; this is where it is enforced with some slack."""
    long = {str(f.relative_to(SOURCE)): n for f in FILES if (n := len(f.read_text().splitlines())) > 400}
    assert not long
