"""`bupo.look`: the explorer inline, safe whatever the tokens are, and the same numbers as the commands give."""

from __future__ import annotations

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
