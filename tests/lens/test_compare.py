"""Comparing states of a model inside: against definitions, paired errors, refusals, the figure and the page."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from bupo.cli import main
from bupo.errors import InputError
from bupo.lens.batching import subsample_evenly
from bupo.lens.compare import compare_models, measure_layers
from bupo.report.inside_figures import comparison_figure
from bupo.report.results import Comparison
from tests.support.lens import pairs
from tests.support.tiny import tiny_model
from tests.support.zoo_checks import stream


def moved(model, scale=0.3):
    """The same model after a change of its second layer."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.model.layers[1].parameters():
            p += scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) * p.abs().mean()
    return other


@torch.no_grad()
def plain(model, rollouts, layer):
    """Every quantity by its definition, response by response."""
    rows = {"logprob": [], "entropy": [], "divergence": [], "cosine": []}
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
        at = slice(len(rollout.prompt_ids) - 1, ids.shape[1] - 1)
        states = [s[0, at] for s in stream(model, ids)["layer"]]
        policies = [Categorical(logits=model.lm_head(s).double()) for s in states]
        policies.append(Categorical(logits=model(ids).logits[0, at].double()))
        rows["logprob"].append(policies[-1].log_prob(torch.tensor(rollout.response_ids)))
        rows["entropy"].append(torch.stack([p.entropy() for p in policies[:-1]]))
        chosen = policies[layer - 1]
        rows["divergence"].append(torch.stack([kl_divergence(chosen, p) for p in policies[layer:]]))
        cosines = [torch.stack([torch.cosine_similarity(a, b, dim=-1) for b in states]) for a in states]
        rows["cosine"].append(torch.stack(cosines).double())
    return {name: torch.cat(values, -1).mean(-1) for name, values in rows.items()}


@pytest.mark.parametrize("layer", [1, 2, 4])
def test_every_quantity_is_its_definition(layer):
    model, rollouts = tiny_model(spread=3.0), pairs()
    result = compare_models([("a", measure_layers(model, rollouts, layer, batch_tokens=20))])
    (found,) = result["models"]
    want = plain(model, rollouts, layer)
    close = {"rtol": 1e-3, "atol": 1e-3}
    assert found["perplexity"]["value"] == pytest.approx(math.exp(-want["logprob"]), rel=1e-3)
    torch.testing.assert_close(torch.tensor(found["entropy"]["mean"]).double(), want["entropy"], **close)
    torch.testing.assert_close(torch.tensor(found["divergence"]["mean"]).double(), want["divergence"], **close)
    torch.testing.assert_close(torch.tensor(found["cosine"]).double(), want["cosine"], **close)
    assert found["cosine_of_layer"]["mean"] == pytest.approx(found["cosine"][layer - 1], abs=1e-4)
    json.dumps(result, allow_nan=False)


def test_changes_are_paired_by_token():
    model, rollouts = tiny_model(spread=3.0), pairs([(3, 20), (6, 25), (1, 30)])
    readings = [("a", measure_layers(model, rollouts, 2)), ("b", measure_layers(moved(model), rollouts, 2))]
    one, two = compare_models(readings)["models"]
    assert "change" not in one
    change = two["change"]
    for name in ("entropy", "divergence", "cosine_of_layer"):
        for index, value in enumerate(change[name]["mean"]):
            assert value == pytest.approx(two[name]["mean"][index] - one[name]["mean"][index], abs=3e-6)
    ratio = two["perplexity"]["value"] / one["perplexity"]["value"]
    assert change["perplexity_ratio"]["value"] == pytest.approx(ratio, rel=1e-4)
    assert change["entropy"]["mean"][0] == 0.0  # the first layer is the same, at every token
    assert change["entropy"]["standard_error"][0] == 0.0
    assert change["entropy"]["mean"][1] != 0.0
    same = compare_models([readings[0], ("again", readings[0][1])])["models"][1]["change"]
    assert set(same["divergence"]["mean"]) == {0.0}


def test_the_same_tokens_are_drawn_for_every_model():
    rollouts = pairs([(3, 40), (6, 25)])
    part = measure_layers(tiny_model(), rollouts, 2, tokens=20, seed=4)
    assert part.values.shape[1] == sum(part.counts) < 25
    assert part.counts == [len(t) for t in subsample_evenly([40, 25], 20, 4)]
    again = measure_layers(tiny_model(), rollouts, 2, tokens=20, seed=4)
    assert torch.equal(part.values, again.values)


def test_other_layers_and_other_depths_are_refused():
    rollouts = pairs()
    with pytest.raises(InputError, match="layer 5 does not exist"):
        measure_layers(tiny_model(), rollouts, 5)
    readings = [
        ("a", measure_layers(tiny_model(), rollouts, 2)),
        ("b", measure_layers(tiny_model(num_hidden_layers=3), rollouts, 2)),
    ]
    with pytest.raises(InputError, match="a has 4 layers and b has 3"):
        compare_models(readings)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_folder):
    """The tiny model, a training run's folder with a changed copy of it, and responses."""
    from bupo.models.load import load_model

    folder = tmp_path_factory.mktemp("compare")
    model, tokenizer = load_model(str(tiny_folder))
    trained = folder / "run"
    moved(model).save_pretrained(trained / "model")
    tokenizer.save_pretrained(trained / "model")
    run = {"config": {"internal_steps": 3}, "result": {"internal_layer": 2}}
    (trained / "run.json").write_text(json.dumps(run))
    rows = [{"prompt_ids": [5, 6, 7], "response_ids": [8, 9, 10, 11]}, {"prompt_ids": [7], "response_ids": [9, 2]}]
    (folder / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(capsys, *arguments):
    code = main(["compare", *map(str, arguments)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_as_a_user_runs_it(capsys, tmp_path, folders, tiny_folder):
    out = tmp_path / "out"
    code, text, _ = run(
        capsys, f"start={tiny_folder}", folders / "run", "--responses", folders / "r.jsonl", "--output", out
    )
    assert code == 0
    assert "H(layer 2)" in " ".join(text.split())
    result = json.loads((out / "compare.json").read_text())
    assert [m["name"] for m in result["models"]] == ["start", "run"]
    assert result["layer"] == 2  # what the run trained
    assert {p.name for p in out.iterdir()} == {"compare.json", "inside.png", "inside.svg", "run.json"}
    page = tmp_path / "page.html"
    assert main(["report", str(out), "--output", str(page)]) == 0
    text = page.read_text()
    assert "What training did inside" in text
    assert "fig-inside1" in text


@pytest.mark.parametrize(
    ("models", "options", "words"),
    [
        (["small"], ["--layer", "2"], "two or more models"),
        (["small", "small"], ["--layer", "2"], "two models are named small"),
        (["small", "a=small"], [], "choose one with --layer"),
        (["small", "a=small"], ["--layer", "9"], "layer 9 does not exist"),
        (["small", "a=nowhere"], ["--layer", "2"], "nowhere"),
    ],
)
def test_refusals(capsys, tmp_path, folders, models, options, words):
    out = tmp_path / "out"
    code, _, error = run(capsys, *models, "--responses", folders / "r.jsonl", "--output", out, *options)
    assert code == 2
    assert words in error
    assert not out.exists()


def test_many_models_are_drawn_and_nonsense_is_refused():
    model, rollouts = tiny_model(spread=3.0), pairs()
    readings = [(f"state {i} <b>", measure_layers(moved(model, 0.1 * i), rollouts, 2)) for i in range(7)]
    figure = comparison_figure(Comparison.parse(compare_models(readings)))
    assert len(figure.axes) == 4
    with pytest.raises(InputError, match="not a complete result of bupo compare"):
        Comparison.parse({"schema": 1})
