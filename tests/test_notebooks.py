"""The notebooks run from top to bottom in an empty folder; their sizes are lowered to what a test can wait for."""

import os
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
MADE = {
    "1-look-inside": ["look/analysis.json"],
    "2-train-and-compare": ["runs/bupo/model/config.json", "inside/compare.json", "report.html"],
    "3-your-own": ["my-run/model/config.json", "eval-after/results.json"],
}
SMALL = {"ROLLOUTS": 3, "PROBLEMS": 8, "UPDATES": 8}


def test_every_notebook_is_tested_and_holds_no_outputs():
    nbformat = pytest.importorskip("nbformat")
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(MADE)
    for name in MADE:
        content = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        nbformat.validate(content)
        assert not any(cell.get("outputs") for cell in content.cells)


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
@pytest.mark.timeout(900)
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # for the command bupo
    content = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    for cell in content.cells:
        cell.source = re.sub(r"(?m)^([A-Z]+) = \d+", lambda match: f"{match[1]} = {SMALL[match[1]]}", cell.source)
    nbclient.NotebookClient(content, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [path for path in MADE[name] if not (tmp_path / path).is_file()] == []
    shown = str([cell.get("outputs") for cell in content.cells])
    assert "Traceback" not in shown
    assert "text/html" in shown or "image/png" in shown
