"""The wheel holds everything that an installed bupo needs: it works from another folder, without the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = {".yaml", ".j2", ".css", ".js", ".mplstyle", ".typed", ".safetensors", ".json", ".jinja"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"  # setuptools builds beside the sources
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(tree)]
    subprocess.run([*command, "--wheel-dir", str(folder)], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def run(wheel: Path, folder: Path, *arguments: str) -> str:
    """Output of Python in ``folder`` with the wheel's package before the one under test."""
    library = folder / "library"
    if not library.exists():
        zipfile.ZipFile(wheel).extractall(library)
    environment = {**os.environ, "PYTHONPATH": str(library), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_wheel_has_every_file_of_the_package(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    package = [f.relative_to(ROOT / "src") for f in (ROOT / "src" / "bupo").rglob("*") if f.is_file()]
    wanted = {f.as_posix() for f in package if f.suffix == ".py" or (f.suffix in DATA and "__pycache__" not in f.parts)}
    assert wanted - inside == set()


def test_the_installed_package_is_used_and_its_commands_start(wheel, tmp_path):
    place = run(wheel, tmp_path, "-c", "import bupo, pathlib; print(pathlib.Path(bupo.__file__).parent.parent)")
    assert Path(place.strip()) == tmp_path / "library"
    assert "bupo analyze" in run(wheel, tmp_path, "-m", "bupo", "analyze", "--help")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demonstration_runs_from_the_wheel(wheel, tmp_path):
    sizes = ["--rollouts", "2", "--internal-steps", "1", "--limit", "6", "--samples", "2", "--output", "demo"]
    run(wheel, tmp_path, "-m", "bupo", "demo", *sizes)
    assert "BuPO" in (tmp_path / "demo" / "report.html").read_text()
