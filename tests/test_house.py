"""The house rules: sizes, floors, no circles, where heavy imports may stand, one home per equation, a light start."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

from bupo.train.paper import PAPER

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "bupo"
FILES = sorted(SOURCE.rglob("*.py"))
HEAVY = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "vllm", "matplotlib", "jinja2", "pyarrow")
FILE_LINES, FUNCTION_LINES, PARAMETERS = 300, 60, 8
TOTAL_LINES = {"src": 9_197, "tests": 7_338}
# lines that features add which are newer than these limits
ADDED = {
    "grading rules": {"src": 120, "tests": 70},
    "lenses": {"src": 900, "tests": 450},
    "no silent wrong results": {"src": 378, "tests": 395},
    "no tracebacks": {"src": 191, "tests": 292},
    "trained layers": {"src": 130, "tests": 70},
    "doctor": {"src": 180, "tests": 45},
    "TRL's behaviours and images": {"src": 126, "tests": 380},
    "rewards, protocols and citation": {"src": 157, "tests": 208},
    "readings in any trainer": {"src": 225, "tests": 218},
    "a look in a notebook": {"src": 105, "tests": 79},
    "typed results, notebooks and the wheel": {"src": 150, "tests": 205},
    "sweeps and power": {"src": 1170, "tests": 566},
    "effects of settings": {"src": 0, "tests": 80},
    "model cards and uploads": {"src": 120, "tests": 90},
    "a check before a run and rollout groups": {"src": 434, "tests": 325},
    "GPUs of all kinds": {"src": 31, "tests": 48},
}
# A file imports only from lower floors or from its own folder.
FLOORS = {
    "errors": 0, "run_folder": 0, "recipe": 0, "models": 1, "data": 1, "lens": 2, "grading": 2, "train": 3,
    "evaluate": 3, "plan": 4, "callbacks": 4, "sweep": 4, "report": 5, "notebook": 6, "cli": 6,
}  # fmt: skip
# Longer functions, each with its reason.
LONG_FUNCTIONS: dict[str, str] = {}
# More parameters, each with its reason; the commands of cli/ are exempt.
MANY_PARAMETERS = {
    f"lens/triton_kernel.py:{kernel}": "pointers and sizes of a GPU kernel" for kernel in ("_product", "_fold", "_read")
}
# Optional packages may be imported inside functions outside cli/.
DELAYED = {
    "vllm": "not installed by default",
    "peft": "only for adapters",
    "bitsandbytes": "only for 4-bit weights",
    "triton": "only with CUDA",
    "deepspeed": "only with ZeRO",
    "reasoning_gym": "an optional task source",
    "math_verify": "loads inside the grading process only",
}


def name(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree without the blocks that only type checkers read."""
    module = ast.parse(path.read_text())
    for node in ast.walk(module):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    return module


def modules(node: ast.AST) -> Iterator[str]:
    """Modules that one import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        files = [one for one in names if own_file(one)]
        yield from files
        if len(files) < len(names):
            yield node.module


def own_file(module: str) -> Path | None:
    """The package's file that is this module."""
    if not module.startswith("bupo."):
        return None
    at = SOURCE.joinpath(*module.split(".")[1:])
    return next((file for file in (at.with_suffix(".py"), at / "__init__.py") if file.is_file()), None)


def imports(path: Path) -> set[str]:
    return {module for node in ast.walk(tree(path)) for module in modules(node)}


def own_imports(path: Path) -> set[Path]:
    """Files of the package that a file imports."""
    return {file for module in imports(path) if (file := own_file(module)) is not None} - {path}


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name(path)}:{node.name}", node


def check(violations: set[str]) -> None:
    assert sorted(violations) == []


@pytest.mark.parametrize("folder", TOTAL_LINES)
def test_total_sizes(folder):
    limit = TOTAL_LINES[folder] + sum(added[folder] for added in ADDED.values())
    assert sum(len(f.read_text().splitlines()) for f in (ROOT / folder).rglob("*.py")) <= limit


def test_files_are_short():
    check({name(f) for f in FILES if len(f.read_text().splitlines()) > FILE_LINES})


def test_functions_are_short():
    long = {key for f in FILES for key, node in functions(f) if (node.end_lineno or 0) - node.lineno >= FUNCTION_LINES}
    commands = {key for key in long if key.startswith("cli/")}
    check(long - set(LONG_FUNCTIONS) - commands)
    assert set(LONG_FUNCTIONS) <= long, "no longer long; remove it from the list"


def test_functions_take_few_parameters():
    many = set()
    for f in FILES:
        for key, node in functions(f):
            a = node.args
            if len({p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)} - {"self", "cls"}) > PARAMETERS:
                many.add(key)
    check({key for key in many if not key.startswith("cli/")} - set(MANY_PARAMETERS))
    assert set(MANY_PARAMETERS) <= many, "no longer many; remove it from the list"


def test_nothing_imports_from_a_higher_floor():
    assert {room(f) for f in FILES} - set(FLOORS) == {"__init__", "__main__"}
    wrong = set()
    for f in FILES:
        for target in own_imports(f) if room(f) in FLOORS else ():
            here, there = room(f), room(target)
            same_floor = here != there and FLOORS[here] == FLOORS[there] > 0
            if FLOORS[there] > FLOORS[here] or same_floor:
                wrong.add(f"{name(f)} -> {name(target)}")
    check(wrong)


def test_there_are_no_circles():
    inside = [f for f in FILES if room(f) in FLOORS]
    files = {name(f): {name(t) for t in own_imports(f) if room(t) in FLOORS} for f in inside}
    rooms: dict[str, set[str]] = {}
    for f in inside:
        rooms.setdefault(room(f), set()).update({room(t) for t in own_imports(f)} - {room(f)})
    for arrows in (files, rooms):
        TopologicalSorter(arrows).prepare()  # raises CycleError


def test_imports_are_delayed_in_the_commands_only():
    nested = {
        f"{name(f)}: {module}"
        for f in FILES
        if room(f) not in ("cli", "__init__")
        for _, function in functions(f)
        for node in ast.walk(function)
        for module in modules(node)
        if module.split(".")[0] not in DELAYED
    }
    check(nested)


def test_who_never_imports_what():
    never = {
        "errors": HEAVY, "run_folder": HEAVY, "recipe": HEAVY, "models": ("trl",), "data": ("trl", "bupo.models"),
        "lens": ("trl",), "report": ("torch", "transformers", "trl", "bupo.models", "bupo.lens", "bupo.train"),
    }  # fmt: skip
    check(
        {
            f"{name(f)}: {module}"
            for f in FILES
            for module in imports(f)
            if any(module == one or module.startswith(one + ".") for one in never.get(room(f), ()))
        }
    )


def test_only_the_trainer_touches_trl():
    touching = {name(f) for f in FILES if any(m == "trl" or m.startswith("trl.") for m in imports(f))}
    check(touching - {"train/trainer.py", "train/config.py", "train/images.py"})


def test_each_equation_has_one_home():
    homes: dict[str, list[str]] = {}
    for f in FILES:
        first = (ast.get_docstring(tree(f)) or "").split("\n")[0]
        for marked in re.findall(r"\[([^\]]*)\]", first):
            for start, end in re.findall(r"Eq\. (\d+)(?:-(\d+))?", marked):
                for number in range(int(start), int(end or start) + 1):
                    homes.setdefault(f"Eq. {number}", []).append(name(f))
    check({f"{equation}: {', '.join(files)}" for equation, files in homes.items() if len(files) > 1})
    missing = {f"Eq. {number} has no home" for number in (5, 6, 7, 9, 10, 11, 12, 13) if f"Eq. {number}" not in homes}
    check(missing)


def test_nothing_names_a_machine():
    places = re.compile(r"/(work|tmp/h|root|home)/")
    suffixes = (".py", ".md", ".yaml", ".toml", ".j2", ".js", ".css")
    files = [f for folder in ("src", "tests", "docs", "recipes") for f in (ROOT / folder).rglob("*")]
    files = [f for f in files if f.suffix in suffixes and f != Path(__file__)]
    assert [str(f) for f in files if places.search(f.read_text())] == []


COMMANDS = ("", "analyze", "plan", "train", "eval", "compare", "report", "demo", "lens", "lens fit", "sweep",
            "power", "doctor")  # fmt: skip
LIGHT = f"""
import sys
from pathlib import Path
from bupo.cli import main
from bupo.recipe import read_recipe, validate
for command in {COMMANDS}:
    main(f"{{command}} --help".split())
for path in Path("recipes").glob("*.yaml"):
    assert not validate(read_recipe(path))[1]
print("HEAVY", sorted(set(sys.modules) & set({HEAVY})))"""


@pytest.mark.parametrize("width", [60, 100])
def test_help_and_recipes_load_nothing_heavy_and_no_name_is_cut(width):
    environment = {**os.environ, "COLUMNS": str(width)}
    program = [sys.executable, "-c", LIGHT]
    run = subprocess.run(program, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    assert "HEAVY []" in run.stdout
    assert run.stdout.count("Usage") == len(COMMANDS)
    assert "…" not in run.stdout


def test_the_report_needs_no_torch():
    code = "import sys, bupo.report.page; bad = {'torch', 'transformers'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [citation[name] for name in ("version", "license")] == [project["version"], project["license"]]
    [paper] = citation["references"]
    assert (paper["title"], paper["url"]) == (PAPER["title"], f"https://arxiv.org/abs/{PAPER['id']}")
    names = [f"{author['given-names']} {author['family-names']}" for author in paper["authors"]]
    assert " and ".join(names) in " ".join(PAPER["citation"].split())
    run = subprocess.run([sys.executable, "-m", "bupo", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == f"bupo {project['version']}\n"
