"""`bupo.look` and `bupo.read_results`: inline, safe whatever the texts are, with the same numbers as the commands."""

import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

import bupo
from bupo.errors import InputError
from bupo.lens.analyze import AnalysisOptions, analyze_rollouts
from bupo.lens.tokens import explore_rollouts
from bupo.report.page import collect
from tests.support import results as files
from tests.support.lens import pairs
from tests.support.tiny import tiny_model
from tests.support.training import tiny_tokenizer


def elements(text):
    """Start tags with their attributes."""
    found, parser = [], HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(text)
    return found


def test_a_text_is_read_token_by_token(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    seen = bupo.look(model, tokenizer, "w5 w7 w9 w11")
    same = [([5], [7, 9, 11])]
    assert seen.tokens == explore_rollouts(model, same, tokenizer.decode)
    assert seen.analysis == analyze_rollouts(model, same, options=AnalysisOptions(layer_choice=True))
    table = seen.to_pandas()
    assert table.shape == (3 * 4, 10)
    row = table[(table.position == 2) & (table.layer == 3)].iloc[0]
    sample = seen.tokens["samples"][0]
    assert [row.token, row.kl, [row.top, row.top_probability]] == ["w9", sample["kl"][2][1], sample["top"][2][1][0]]
    assert seen.plot().axes[0].get_ylabel() == "entropy (nats)"
    assert repr(seen) == "Look(Qwen3ForCausalLM, samples=1, tokens=3, layers=4)"
    folder = seen.save(tmp_path / "look")
    names = ["analysis.json", "entropy_flow.png", "entropy_flow.svg", "look.html", "tokens.json"]
    assert sorted(p.name for p in folder.iterdir()) == names
    found = collect([str(folder)])
    assert (len(found.analyses), found.tokens[0][1].samples[0].tokens) == (1, ["w7", "w9", "w11"])
    with pytest.raises(InputError, match="choose another"):
        seen.save(folder)


def test_the_explorer_stands_alone_in_its_frame():
    hostile = SimpleNamespace(
        decode=lambda ids: '"></iframe></script><script>alert(1)</script><img src=http://x>&quot;'
    )
    seen = bupo.look(tiny_model(), hostile, pairs(), explore=2)
    assert len(seen.tokens["samples"]) == 2
    assert seen.analysis["samples"] == len(pairs())
    ((tag, attributes),) = elements(seen._repr_html_())
    assert (tag, attributes["sandbox"]) == ("iframe", "allow-scripts")
    inside = elements(attributes["srcdoc"])
    assert [a.get("type") for name, a in inside if name == "script"] == ["application/json", None]  # data, explorer
    assert not [a for _, a in inside if {"src", "href"} & set(a)]
    assert "default-src 'none'" in inside[3][1]["content"]


def test_results_load_as_typed_objects_with_figure_table_and_files(tmp_path):
    look = files.write(tmp_path / "look", "analysis.json", files.analysis(layer_choice=files.layer_choice()))
    run, name = files.write(tmp_path / "bupo", "log.jsonl", files.log(4)), files.HOSTILE.replace("/", "|")
    scored = [files.write(tmp_path / who, "results.json", files.results(n)) for who, n in (("grpo", 4), (name, 8))]
    found = bupo.read_results(look, run, *scored)
    assert found.kinds == ["evaluations", "runs", "analyses"]
    assert repr(found).endswith("grpo, runs: bupo, analyses: look)")
    table = found.to_pandas("evaluations")
    means = {one: evaluation.tasks["sums"].avg_at_k.mean for one, evaluation in found.data.evaluations}
    assert table.groupby("name").correct.mean().to_dict() == pytest.approx(means)
    assert len(found.data.differences) == 1
    layers = found.to_pandas("analyses")
    assert layers["entropy_change.ffn"].tolist() == files.analysis()["entropy_change"]["ffn"]
    assert layers["layer"].tolist() == [1, 2, 3, 4, 5, 6]
    assert found.to_pandas("runs").reward.tolist() == [row["reward"] for row in files.log(4)]
    assert [len(found.plot(kind).axes) for kind in found.kinds] == [1, 5, 1]
    assert bupo.read_results(run).to_pandas().rollout.tolist() == list(range(1, 11))  # the only kind
    with pytest.raises(InputError, match=r"one kind of these results \(evaluations, runs, analyses\), such as plot"):
        found.plot()
    ((tag, attributes),) = elements(found._repr_html_())
    assert (tag, attributes["sandbox"]) == ("iframe", "allow-scripts")
    assert not [a for _, a in elements(attributes["srcdoc"]) if "onerror" in a]
    folder = found.save(tmp_path / "saved")
    written = [f"{kind}.{end}" for kind in found.kinds for end in ("csv", "png", "svg")]
    assert sorted(p.name for p in folder.iterdir()) == sorted([*written, "report.html"])


def test_a_comparison_has_a_row_per_layer_and_one_for_the_output(tmp_path):
    model = {"name": "start", "perplexity": {"value": 2.0}, "entropy": {"mean": [3.0, 2.0, 1.0]},
             "cosine_of_layer": {"mean": [0.5, 1.0, 0.5]}, "divergence": {"mean": [0.3, 0.4]}}  # fmt: skip
    content = {"schema": 1, "kind": "comparison", "layer": 2, "layers": 3, "models": [model]}
    table = bupo.read_results(files.write(tmp_path / "inside", "compare.json", content)).to_pandas()
    assert table[["layer", "entropy", "divergence"]].fillna(-1).values.tolist() == [
        [1, 3, -1], [2, 2, -1], [3, 1, 0.3], [4, -1, 0.4]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "more", "message"),
    [("w5", {}, "two or more tokens"), ([], {}, "no responses"), ("w5 w6", {"explore": 0}, "explore must be")],
)
def test_what_cannot_be_read_is_refused(given, more, message):
    with pytest.raises(InputError, match=message):
        bupo.look(tiny_model(), tiny_tokenizer(), given, **more)


def test_bupo_loads_nothing_heavy_until_it_is_used():
    heavy = {"torch", "transformers", "pandas", "matplotlib"}
    subprocess.run([sys.executable, "-c", f"import sys, bupo; assert not {heavy} & set(sys.modules)"], check=True)
