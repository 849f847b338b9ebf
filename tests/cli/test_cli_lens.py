"""`bupo lens` and `bupo analyze --lens` as a user runs them, on the shipped model."""

import json

import pytest
import torch

from bupo.cli import main
from bupo.lens.maps import Lens
from bupo.models.load import SMALL_MODEL

SMALL, L = ("--model", "small"), 8
WIDTH = json.loads((SMALL_MODEL / "config.json").read_text())["hidden_size"]


def card(folder):
    return json.loads((folder / "lens.json").read_text())


def published(path, width=WIDTH):
    """A Jacobian lens file whose maps are the identity, so that it reads as the final norm alone does."""
    torch.save({"J": {layer: torch.eye(width) for layer in range(L - 1)}, "n_prompts": 1, "d_model": width}, path)
    return path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A lens that `bupo lens fit` wrote, with the responses that it sampled."""
    folder = tmp_path_factory.mktemp("lens") / "fitted"
    options = ("--dataset", "arithmetic", "--limit", "8", "--samples", "2", "--max-new-tokens", "24")
    assert main(["lens", "fit", *SMALL, *options, "--output", str(folder)]) == 0
    return folder


def test_a_lens_is_fitted_kept_with_its_responses_and_shown(bupo, fitted, tmp_path):
    about = card(fitted)
    assert [about[key] for key in ("kind", "corpus", "responses")] == ["ridge", "arithmetic", 16]
    assert about["versions"]["torch"]
    assert json.loads((fitted / "run.json").read_text())["command"] == "lens fit"
    held = about["held_out"]["curves"]
    assert held["ridge"]["kl"][-1] == pytest.approx(0, abs=1e-4)
    (fitted / "lens.svg").unlink()
    code, out, _ = bupo("lens", "show", fitted)
    assert code == 0
    assert (fitted / "lens.svg").is_file()
    (row,) = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│ ") and " 3 │" in line[:10]]
    cells = [held[lens][kind][2] for lens in ("raw", "norm", "ridge") for kind in ("entropy", "kl", "top1")]
    shown = [float(cell.split("±")[0].strip(" %")) for cell in row[1:]]
    assert shown == pytest.approx([100 * v if n % 3 == 2 else v for n, v in enumerate(cells)], abs=0.51)
    assert out.count("±") == 3 * L
    assert json.loads(bupo("lens", "show", fitted, "--json")[1]) == about
    again, same = tmp_path / "again", ("--responses", fitted / "responses.jsonl", "--output", tmp_path / "again")
    assert bupo("lens", "fit", *SMALL, *same, "--json")[0] == 0
    assert torch.equal(Lens.load(again).maps, Lens.load(fitted).maps)


def test_a_published_lens_is_checked_measured_and_saved(bupo, tmp_path, responses):
    load = ("lens", "load", published(tmp_path / "j.pt"), *SMALL)
    assert bupo(*load, "--output", tmp_path / "o")[0] == 0
    assert "held_out" not in card(tmp_path / "o")
    assert "pass --responses" in bupo("lens", "show", tmp_path / "o")[1]
    command = (*load, "--output", tmp_path / "o", "--responses", responses)
    assert "--overwrite" in bupo(*command)[2]
    code, out, _ = bupo(*command, "--overwrite", "--json")
    assert (code, json.loads(out)) == (0, card(tmp_path / "o"))
    about = card(tmp_path / "o")
    assert (about["kind"], about["architecture"], about["held_out"]["tokens"]) == ("jacobian", "Qwen3ForCausalLM", 6)
    assert about["held_out"]["curves"]["jacobian"] == about["held_out"]["curves"]["norm"]
    assert (tmp_path / "o" / "lens.png").is_file()


def test_what_cannot_be_used_is_refused(bupo, refused, tmp_path, responses, monkeypatch):
    wide, text = published(tmp_path / "wide.pt", WIDTH + 1), tmp_path / "text.pt"
    text.write_text("no lens")
    load, fit, read = ("lens", "load"), ("lens", "fit"), ("analyze", "--responses", responses, "--lens")
    for arguments, words in (
        ((*load, wide), f"8 layers of width {WIDTH + 1}"), ((*load, text), "holds no published lens"),
        ((*load, tmp_path / "none.pt"), "does not exist"), ((*load, wide, "--responses", "none"), "file none does"),
        (fit, "pass either --dataset"), ((*fit, "--responses", responses, "--limit", 1), "two or more prompts"),
        ((*read, "ridge"), "four or more prompts"), ((*read, "raw,nowhere"), "unknown lens 'nowhere'"),
        ((*read, ","), "unknown lens ''"), ((*read, "raw", "--no-choice"), "--lens has no effect with --no-choice"),
    ):  # fmt: skip
        assert words in refused(*arguments, *SMALL, output=tmp_path / "o")
    code, _, err = bupo("lens", "show", tmp_path)
    assert (code, "holds no lens" in err) == (2, True)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Lens, "fit", interrupt)
    code, _, err = bupo(*fit, *SMALL, "--responses", responses, "--output", tmp_path / "o")
    assert (code, "bupo: interrupted. Nothing was written" in err) == (130, True)
    assert not (tmp_path / "o").exists()


def test_an_analysis_reads_through_the_lenses_it_is_given(bupo, fitted, tmp_path):
    read = ("analyze", *SMALL, "--responses", fitted / "responses.jsonl", "--choice-tokens", 40, "--output")
    names = ["raw", "norm", "ridge", str(fitted)]
    code, out, _ = bupo(*read, tmp_path / "a", "--lens", ",".join(names))
    assert code == 0
    choice = json.loads((tmp_path / "a" / "analysis.json").read_text())["layer_choice"]
    assert sorted(choice["curves"]) == sorted(names)
    assert set(choice["curves"]["ridge"]) == {"entropy", "change", "kl", "top1", "recovered"}
    assert set(choice["knees"]) == set(names) - {"raw"}
    assert all(f"{kind} {name}" in out for kind in ("H", "KL", "top-1") for name in ("norm", "ridge", "fitted"))
    assert "KL raw" not in out
    assert str(fitted.name) in (tmp_path / "a" / "layer_choice.svg").read_text()
    for name, limit, lenses in (("b", 4, {"raw", "norm"}), ("c", 20, {"raw", "ridge"})):  # of two prompts, of eight
        code, _, err = bupo(*read, tmp_path / name, "--limit", limit)
        assert code == 0
        assert ("needs responses to 4 prompts" in err) == (name == "b")
        assert set(json.loads((tmp_path / name / "analysis.json").read_text())["layer_choice"]["curves"]) == lenses
