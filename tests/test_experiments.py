"""The arithmetic of the experiments, and that the pages agree with the result files."""

import json

import pytest

from bupo.train.effects import NEVER
from docs import reference
from experiments import figures, record, styles, summary, tables
from tests.support.sweeps import write_rows


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_pages_agree_with_the_result_files(page):
    text = page.read_text(encoding="utf-8")
    assert tables.render(text) == text


@pytest.mark.parametrize("name", [n for n in summary.TABLES if (summary.RESULTS / f"{n}.json").exists()])
def test_tables_agree_with_the_lines(name):
    made = json.loads(json.dumps(summary.make(name)))
    assert made == json.loads((summary.RESULTS / f"{name}.json").read_text())


def test_students_interval():
    found = summary.interval([0.1, 0.2, 0.6])
    assert found["mean"] == 30.0
    assert found["ci95"] == pytest.approx([30 - 65.7, 30 + 65.7], abs=0.1)  # 4.303 * 26.458 / sqrt(3)
    assert "ci95" not in summary.interval([0.5])


def a_row(*counts: int) -> dict:
    return {"tasks": {"t": {"samples": 4, "correct": " ".join(map(str, counts)), "mean_length": 1.0}}}


def test_differences_are_paired_by_seed_and_by_problem():
    one, other = {0: a_row(4, 0), 1: a_row(4, 2)}, {0: a_row(2, 0), 1: a_row(1, 1), 2: a_row(4, 4)}
    found = summary.difference(one, other, "t", "avg@4", [0, 1, 2])
    assert found["each"] == {"0": 25.0, "1": 50.0}  # seed 2 is in one of them only
    assert found["mean"] == 37.5
    assert found["ci95_problems"] == [12.5, 62.5]  # problems: (2 + 3) / 8 and (0 + 1) / 8
    passed = summary.difference(one, other, "t", "pass@4", [0, 1])
    assert passed["each"] == {"0": 0.0, "1": 0.0}


def test_an_arm_may_have_a_baseline_of_its_own():
    rows = {n: {0: {**a_row(*c), "changes": {}}} for n, c in {"a": (4, 4), "b": (2, 4), "c": (0, 0)}.items()}
    wanted = {"arms": ["a", "b", "c"], "seeds": 1}
    found = summary.table(rows, wanted, "t", "avg@4")
    assert found["baseline"] == "a"
    assert {name: away["mean"] for name, away in found["minus_baseline"].items()} == {"b": -25, "c": -100}
    own = summary.table(rows, {**wanted, "against": {"a": "b", "b": "c", "c": "d"}}, "t", "avg@4")
    assert {name: away["mean"] for name, away in own["minus_baseline"].items()} == {"a": 25, "b": 75}


def a_style(entropy: list[float], ffn: list[float], **more) -> dict:
    curves, change = {"norm": {"entropy": entropy[::-1]}}, {"ffn": ffn, "attn": [-c for c in ffn]}
    sites = {"layer_out": entropy}
    return {"layers": 8, "sites": sites, "curves": curves, "entropy_change": change, "solved": 0.5, **more}


def test_how_late_an_entropy_falls():
    even = styles.measures(a_style([8.0, 7, 6, 5, 4, 3, 2, 1], [1, -1] * 4))
    assert even["late_share_raw"] == pytest.approx(2 / 7, abs=1e-4)
    assert even["late_share_norm"] is None  # it rises: there is no fall
    assert (even["ffn_positive_layers"], even["attention_positive_layers"]) == (4, 4)
    late = styles.measures(a_style([5.0] * 7 + [1.0], [1] * 7 + [0.25]))
    assert (even["ffn_last_step"], late["ffn_last_step"]) == (2, 0.75)
    assert late["late_share_raw"] == late["largest_fall_raw"] == 1.0


def test_architectures_are_paired_by_seed_and_tying():
    def row(arch: str, tied: bool, seed: int, last: float) -> dict:
        falling = [5.0, 4.0, 3.0, 2.0, 2.0, 2.0, 2.0, last]
        return a_style(falling, [1.0] * 8, arch=arch, tied=tied, seed=seed, data="worked")

    rows = [row("llama", t, s, 1.0 - 0.1 * s) for t in (False, True) for s in (0, 1)]
    rows += [row("qwen3", t, s, 2.0) for t, s in ((False, 0), (False, 1), (True, 0))]
    both = styles.contrast(rows, {"arch": "llama"}, {"arch": "qwen3"})
    assert both["seeds"] == [0, 0, 1]  # untied, tied, untied; a tied seed 1 is there for one of them only
    late = both["differences"]["late_share_raw"]["each"]
    assert late == pytest.approx([1 / 4, 1 / 4, 1.1 / 4.1], abs=1e-4)
    later = styles.contrast(rows, {"arch": "llama", "tied": False}, {"arch": "qwen3", "tied": False}, since=1)
    assert later["seeds"] == [1]
    assert styles.flags({"tied": True, "left_out": 0.35, "seed": 0}) == ["--tied", "--left-out", "0.35", "--seed", "0"]
    assert styles.flags({"tied": False}) == []


def a_reading(last_cosine: float, entropy: float, perplexity: float, kl: list[float]) -> dict:
    means = {"cosine_of_layer": [0.1, 1.0, 0.5, last_cosine], "entropy": [9.0, entropy, 9.0, 9.0], "divergence": kl}
    about = {"layer": 2, "layers": 4, "rollouts_done": 0, "perplexity": {"value": perplexity}}
    return {**about, **{name: {"mean": mean} for name, mean in means.items()}}


BEFORE = a_reading(0.3, 2.0, 1.5, [0.2, 0.4, 0.6])


def test_readings_inside_are_paired_by_seed(tmp_path, monkeypatch):
    after = [a_reading(0.3 + 0.1 * seed, 2.0 - seed, 1.5, [0.2] * 3) for seed in (0, 1, 2)]
    rows = [
        {"arm": "a", "seed": seed, "changes": {}, "inside": [BEFORE, reading], **a_row(1)}
        for seed, reading in enumerate(after)
    ]
    (tmp_path / "inside.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    found = summary.inside()["arms"]["a"]
    assert (found["layer"], found["seeds"]) == (2, [0, 1, 2])
    entropy = found["measures"]["entropy of layer l"]
    assert (entropy["before"], entropy["after"], entropy["change"]) == (2.0, 1.0, -1.0)
    assert entropy["ci95"] == pytest.approx([-1 - 2.484, -1 + 2.484], abs=1e-3)  # 4.303 * 1 / sqrt(3)
    top = found["measures"]["cosine to the top quarter"]  # of 4 layers: the last
    assert (top["before"], top["each"]) == (0.3, {"0": 0.0, "1": 0.1, "2": 0.2})
    assert found["measures"]["KL to the output"]["change"] == pytest.approx(-0.4)


def test_readings_over_seeds_carry_the_error_of_the_change_over_seeds():
    start, end = figures.over_seeds([[BEFORE, a_reading(0.3, 2.0 - s, 3.0, [0.2, 0.4, 0.6])] for s in (0, 2)])
    assert start["change"]["entropy"]["standard_error"] == [0, 0, 0, 0]
    assert end["entropy"]["mean"] == [9, 1, 9, 9]
    assert end["change"]["entropy"]["standard_error"] == [0, 1, 0, 0]  # changes 0 and -2: their mean's error is 1
    assert end["change"]["perplexity_ratio"] == {"value": 2, "standard_error": 0}


def test_two_seeds_are_shown_one_by_one():
    assert tables._few(0.5, [0.25, 0.75], [-2.7, 3.7]) == "+0.25, +0.75"
    assert tables._few(0.5, [0.4, 0.5, 0.6], [0.25, 0.75]) == "+0.50 [+0.25, +0.75]"


def test_the_reference_is_that_of_the_code():
    text = reference.PAGE.read_text(encoding="utf-8")
    assert text == reference.page()
    assert not [name for name in NEVER.split() if f"`{name}`" in text]  # `bupo train` refuses them


def test_the_runs_of_record_are_read_as_the_protocol_says():
    assert record.batch_of([0.0] * 4 + [1.0] * 6, 0.6) == 7  # batches 3 to 7 have a mean of 0.6
    assert record.batch_of([0.5] * 10, 0.6) == record.NEVER
    curves = [[0.2, *[0.0] * 5, *[0.8] * 5], [0.4, *[0.0] * 5, *[0.6] * 5]]
    assert record.half_of_gain({s: {"curves": {"reward": c}} for s, c in enumerate(curves)}) == pytest.approx(0.5)
    assert record.verdict((0.1, 2.0), 0.04, 1.0) == "higher"
    assert record.verdict((0.1, 2.0), 0.06, 1.0) == "not shown either way"
    assert record.verdict((-0.9, 0.8), 0.5, 1.0) == "no difference larger than 1"
    assert record.verdict((-2.0, -0.1), 0.001, 1.0) == "lower"
    members = {"a": {"p": 0.01, "ends": (1.0, 2.0)}, "b": {"p": 0.02, "ends": (1.0, 2.0)}}
    record.correct(members, 4, "ends", 1.0)  # two of four have not run
    assert [one["p_holm"] for one in members.values()] == pytest.approx([0.04, 0.06])


def test_runs_on_sums_have_a_table_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="no pair"):
        record.markdown({"sums": {}}, "smollm2")
    rows = []
    for seed in range(4):
        for arm, right in (("grpo", 2), ("raw15x2", 1 + seed % 2)):
            task = {"samples": 4, "avg": 0.5, "correct": " ".join([str(right)] * 8)}
            tasks = {"held-out": task, "shifted": task}
            rows.append(
                {"arm": arm, "seed": seed, "changes": {}, "tasks": tasks, "seconds": 3.0, "update_seconds": 2.0}
            )
    write_rows(record.rows_of("smollm2"), rows)
    table = record.markdown({"sums": {"smollm2": record.on_sums("smollm2")}}, "smollm2")
    assert "| raw, layer 15, 2 batches | 37.5 | GRPO | 4 | -12.5 [" in table
    assert ("Avg@4" in table, "shifted, points" in table, "not shown either way" in table) == (True, True, True)


@pytest.mark.parametrize(
    ("counts", "taken"), [((100, 99, 0), "3e-5"), ((102, 99, 0), "1.5e-5"), ((0, 99, 100), "3e-5")]
)
def test_a_rate_wins_by_more_than_half_a_point(counts, taken):
    def row(count: int) -> dict:
        return {"tasks": {"arithmetic": {"samples": 200, "correct": str(count)}}}

    rows = {f"grpo-{rate}": {100: row(count)} for rate, count in zip(record.RATES, counts, strict=True)}
    assert record.rate_of(rows, "grpo")[0] == taken
