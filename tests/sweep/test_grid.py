"""Grids: what is refused before anything runs, and the shipped ones."""

from pathlib import Path

import pytest

from bupo.errors import InputError
from bupo.recipe import load_yaml
from bupo.sweep.grid import pending, read_grid, seeds_of
from bupo.sweep.rows import read_rows

ROOT = Path(__file__).resolve().parents[2]
GOOD = """
recipe: recipes/small.yaml
seeds: 0-2
evaluate: {tasks: arithmetic, limit: 4, k: 2}
arms: {start: {seeds: [0]}, grpo: {internal_steps: 0, internal_layer: null}, bupo: }
"""


@pytest.mark.parametrize("path", sorted((ROOT / "experiments" / "grids").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_grids_of_the_evidence_and_their_rows_are_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    grid, rows = read_grid(path), ROOT / "experiments" / "results" / f"{path.stem}.jsonl"
    assert len(grid.runs()) == len({*grid.runs()}) >= len(grid.arms)
    if rows.exists():
        pending(grid, read_rows(rows), None, None)
    if path.stem == "small":
        assert pending(grid, read_rows(rows), ["grpo"], [0]) == []
        assert grid.changes("ridge6x45")["internal_lens"] == "ridge"  # by YAML's merge key
        assert grid.recipe_of("grpo")["internal_steps"] == 0


def test_every_layer_of_the_shipped_model_has_an_arm(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the recipe is found beside the grid
    grid = read_grid(ROOT / "recipes" / "sweeps" / "layers.yaml")
    assert [grid.changes(arm).get("trained_layers") for arm in grid.arms] == [None, None, *range(1, 9)]
    assert len(grid.runs()) == 1 + 9 * 5


def test_runs_come_by_seed_and_then_by_arm(monkeypatch, tmp_path):
    assert [seeds_of(given) for given in ([3, 1], 4, "0,2", "0-3, 7")] == [[3, 1], [4], [0, 2], [0, 1, 2, 3, 7]]
    monkeypatch.chdir(ROOT)
    (tmp_path / "g.yaml").write_text(GOOD + "order: [bupo]\n")
    grid = read_grid(tmp_path / "g.yaml")
    assert grid.runs()[:4] == [("bupo", 0), ("start", 0), ("grpo", 0), ("bupo", 1)]
    rows = {"bupo": {0: {"changes": {}}}}
    assert pending(grid, rows, ["bupo"], None) == [("bupo", 1), ("bupo", 2)]
    assert pending(grid, rows, None, [0]) == [("start", 0), ("grpo", 0)]
    with pytest.raises(InputError, match=r"--only names buppo, .* \(did you mean bupo\?\)"):
        pending(grid, rows, ["buppo"], None)
    with pytest.raises(InputError, match="--seeds names 7, which is not in the grid; add it"):
        pending(grid, rows, None, [7])
    rows["grpo"] = {1: {"changes": {"internal_steps": 0, "internal_layer": 4}, "evaluate": grid.evaluate}}
    with pytest.raises(
        InputError, match="arm grpo, seed 1 was run with internal_layer 4, in the grid it is None; name"
    ):
        pending(grid, rows, None, None)
    rows["grpo"][1] = {"changes": grid.changes("grpo"), "evaluate": {**grid.evaluate, "limit": 8}}
    with pytest.raises(InputError, match=r"was run with evaluate\.limit 8, in the grid it is 4"):
        pending(grid, rows, None, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("seeds: 0-2", "seeds: [0, 0]"), "seeds must be different whole numbers, such as"),
        (("seeds: 0-2", "seeds: [0, -1]"), "seeds must be different whole numbers, such as"),
        (("seeds: 0-2", "seed: 0"), "unknown key seed (did you mean seeds?)"),
        (("arms: {", "arms: {a/b: , "), "arms.a/b must be a name of letters"),
        (("bupo: }", "bupo: {learning_rat: 1}}"), "arm bupo: unknown key learning_rat (did you mean learning_rate?)"),
        (("bupo: }", "bupo: {seed: 1}}"), "arm bupo: seed is set by the sweep, from seeds"),
        (("bupo: }", "bupo: 5}"), "arms.bupo must be a mapping"),
        (("seeds: [0]", "rollouts: 3"), "arm start is the model before training"),
        (("arms:", "base: {rollouts: 0}\narms:"), "g.yaml: rollouts must be at least 1, not 0"),
        (("arms:", "order: [grp]\narms:"), "order names grp, which is no arm (did you mean grpo?)"),
        (("k: 2", "model: small"), "evaluate.model is set by the sweep"),
        (("recipes/small.yaml", "nothing.yaml"), "recipe nothing.yaml is neither in"),
        (("arms:", "arms: ["), "is not valid YAML"),
    ],
)
def test_a_wrong_grid_is_one_line(change, said, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    (tmp_path / "g.yaml").write_text(GOOD.replace(*change))
    with pytest.raises(InputError) as error:
        read_grid(tmp_path / "g.yaml")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_may_merge_and_a_repeated_key_is_still_refused():
    assert load_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}", "f")["b"] == {"x": 3, "y": 2}
    with pytest.raises(InputError, match="key 'x' is given twice"):
        load_yaml("a: &a {x: 1}\nb: {<<: *a, x: 3, x: 4}", "f")
