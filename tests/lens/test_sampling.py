"""Drawing tokens until a tolerance is met: the draw, the stopping rule, and the analysis that uses both."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import socket
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from bupo.errors import InputError
from bupo.lens.analyze import SITES, analyze_rollouts
from bupo.lens.batching import shares
from bupo.lens.old_sampling import TokenDraw, judge
from tests.lens.test_analysis import Pair, pairs
from tests.support.tiny import tiny_model


@pytest.mark.parametrize("growth", [[0.1, 0.3, 1.0], [1.0], [0.5, 0.500001, 0.9, 1.0]])
def test_rounds_together_take_every_token_once(growth):
    lengths = [1, 2, 7, 30]
    draw = TokenDraw(lengths, seed=3)
    seen = [[] for _ in lengths]
    for share in growth:
        for tokens, part in zip(seen, draw.take(share), strict=True):
            assert part == sorted(part)
            tokens += part
        assert all(len(t) >= min(n, 2, math.ceil(share * n)) for t, n in zip(seen, lengths, strict=True))
        assert draw.taken == sum(map(len, seen))
    assert [sorted(tokens) for tokens in seen] == [list(range(n)) for n in lengths]


def test_a_draw_depends_on_the_seed_and_is_uniform():
    assert TokenDraw([50], 1).take(0.2) == TokenDraw([50], 1).take(0.2)
    assert TokenDraw([50], 1).take(0.2) != TokenDraw([50], 2).take(0.2)
    counts = torch.zeros(10)
    for seed in range(800):
        counts[TokenDraw([10], seed).take(0.3)[0]] += 1
    assert (counts - 240).abs().max() < 5 * math.sqrt(800 * 0.3 * 0.7)


def errors(between, within, share):
    """Clustered and sampling errors of sites with these variances, a share of the tokens read."""
    sampling = (torch.tensor(within) * (1 - share) / share).sqrt()
    return (torch.tensor(between) + sampling.square()).sqrt(), sampling


def test_it_stops_when_every_clustered_error_is_small_enough():
    found = judge(*errors([1e-4, 1e-6], [1e-6, 1e-6], 0.5), 0.5, 0.02, 20)
    assert (found.done, found.reached, found.responses_needed) == (True, True, None)


def test_the_next_share_meets_the_tolerance():
    between, within = [1e-4, 2e-4], [1e-4, 3e-5]
    share, rounds = 0.05, 0
    while True:
        found = judge(*errors(between, within, share), share, 0.02, 20)
        if found.done:
            break
        assert share < found.share <= max(4 * share, 1.0)
        share, rounds = found.share, rounds + 1
    assert found.reached
    assert rounds <= 3
    # the share at which the clustered error is the tolerance, with the margin for an estimate
    exact = max(w / (w + 0.02**2 - b) for b, w in zip(between, within, strict=True))
    assert exact <= share <= 1.15 * exact


def test_where_responses_differ_too_much_only_the_sampling_error_must_be_small():
    between, within = [0.01], [1e-4]
    assert not judge(*errors(between, within, 0.1), 0.1, 0.02, 20).done
    found = judge(*errors(between, within, 0.25), 0.25, 0.02, 20)
    assert (found.done, found.reached) == (True, False)
    assert found.responses_needed == math.ceil(20 * 0.01 / 0.02**2)


def test_one_site_beyond_reach_leaves_the_others_to_the_sampling_error():
    """A site that could just be met would need nearly every token, and the tolerance would be missed all the same."""
    between, within = [0.01, 0.99 * 0.02**2], [1e-4, 1e-4]
    found = judge(*errors(between, within, 0.1), 0.1, 0.02, 20)
    assert not found.done
    assert found.share <= 0.25  # without the first site: nearly all
    found = judge(*errors(between, within, 0.25), 0.25, 0.02, 20)
    assert (found.done, found.reached) == (True, False)
    assert judge(*errors(between[1:], within[1:], 0.25), 0.25, 0.02, 20).share == 1.0


def test_reading_everything_ends_it():
    assert judge(torch.tensor([9.0]), torch.tensor([0.0]), 1.0, 0.02, 20).done


def long_pairs(n=12):
    return pairs([(3, 60 + 5 * i) for i in range(n)])


def test_a_small_tolerance_is_the_full_answer():
    model = tiny_model(spread=3.0)
    whole = analyze_rollouts(model, pairs())
    part = analyze_rollouts(model, pairs(), tolerance=1e-9)
    sampling = part.pop("sampling")
    assert part == whole
    assert sampling["tokens_used"] == sampling["tokens_of_responses"] == whole["tokens"]
    assert sampling["largest_sampling_error"] == 0.0
    assert not sampling["reached"]


def test_a_tolerance_lands_within_its_errors(monkeypatch):
    monkeypatch.setattr("bupo.lens.old_sampling.FIRST", 100)
    model, rollouts = tiny_model(spread=3.0), long_pairs()
    whole = analyze_rollouts(model, rollouts)
    part = analyze_rollouts(model, rollouts, tolerance=0.12, seed=1)
    sampling = part["sampling"]
    assert sampling["tokens_used"] < 0.7 * sampling["tokens_of_responses"] == 0.7 * whole["tokens"]
    assert sampling["reached"]
    assert max(max(part["standard_errors"][s]) for s in SITES) <= 0.12
    for site in SITES:
        for got, want, error in zip(
            part["sites"][site], whole["sites"][site], part["standard_errors"][site], strict=True
        ):
            assert abs(got - want) <= 3 * error + 1e-6
    assert part["sites"] != whole["sites"]


def test_statistics_are_those_of_single_tokens():
    from bupo.lens.tokens import explore_rollouts

    model, rollouts = tiny_model(spread=3.0), pairs()
    result = analyze_rollouts(model, rollouts, statistics=["logprob", "rank", "kl", "varentropy", "top2"])
    tokens = explore_rollouts(model, rollouts, lambda ids: str(ids), top=2)["samples"]
    for name in ("logprob", "rank", "kl"):
        for layer in range(4):
            every = [value for sample in tokens for value in sample[name][layer]]
            assert result["statistics"][name]["layer_out"][layer] == pytest.approx(sum(every) / len(every), abs=2e-3)
    mass = [sum(share for _, share in cell) for sample in tokens for cell in sample["top"][2]]
    assert result["statistics"]["top2_mass"]["layer_out"][2] == pytest.approx(sum(mass) / len(mass), abs=1e-3)
    plain = analyze_rollouts(model, rollouts)
    assert {k: v for k, v in result.items() if not k.startswith("statistics")} == plain
    # the last layer's stream is the final policy's state without its norm, the final policy diverges not from itself
    with pytest.raises(InputError, match="unknown statistic 'logits'"):
        analyze_rollouts(model, rollouts, statistics=["logits"])


def test_a_tolerance_must_be_positive():
    with pytest.raises(InputError, match="above 0"):
        analyze_rollouts(tiny_model(), pairs(), tolerance=0.0)


@pytest.mark.parametrize("processes", [1, 2, 3, 9])
def test_responses_are_dealt_out_once_and_evenly(processes):
    lengths = [50, 40, 30, 20, 10, 10, 5]
    parts = shares(lengths, processes)
    assert sorted(i for part in parts for i in part) == list(range(7))
    loads = [sum(lengths[i] for i in part) for part in parts]
    assert max(loads) - min(loads) <= max(lengths)


def test_a_sink_sees_every_token_once():
    rows = []

    def sink(chosen, tokens, batch, found):
        start = 0
        for response, numbers in zip(chosen, tokens, strict=True):
            for offset, number in enumerate(numbers):
                rows.append((response, number, int(batch.targets[start + offset])))
            start += len(numbers)
        assert found["entropy"].shape == (6, 4, len(batch.targets))

    rollouts = pairs()
    analyze_rollouts(tiny_model(), rollouts, sink=sink, batch_tokens=20)
    assert sorted(rows) == [(i, t, token) for i, r in enumerate(rollouts) for t, token in enumerate(r.response_ids)]


def test_two_tokens_are_the_least(monkeypatch):
    monkeypatch.setattr("bupo.lens.old_sampling.FIRST", 1)
    result = analyze_rollouts(tiny_model(), [Pair([3, 4], [5]), Pair([3], [6, 7, 8])], tolerance=50.0)
    assert result["sampling"]["tokens_used"] == 3


def _note(read, chosen, *_):
    read.extend(chosen)


def _one_of_two(rank: int, port: int, folder: str) -> None:
    """A process of an accelerate launch, forked from a warm one."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    PartialState._reset_state()
    for name, more in KINDS.items():
        read: list[int] = []
        sink = partial(_note, read)
        result = analyze_rollouts(tiny_model(spread=3.0), long_pairs(5), share=True, sink=sink, **more)
        Path(folder, f"{name}-{rank}.json").write_text(json.dumps({**result, "read here": sorted(set(read))}))


KINDS = {"all": {}, "some": {"tolerance": 0.3, "seed": 1, "statistics": ["kl", "rank"]}}


def test_two_processes_give_one_process_s_result(tmp_path, monkeypatch):
    monkeypatch.setattr("bupo.lens.old_sampling.FIRST", 60)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_one_of_two, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    for name, more in KINDS.items():
        alone = analyze_rollouts(tiny_model(spread=3.0), long_pairs(5), **more)
        both = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        assert all(found["read here"] for found in both)
        assert sorted(both[0]["read here"] + both[1]["read here"]) == list(range(5))  # each response once
        for found in both:
            assert found["tokens"] == alone["tokens"]
            for group in ("sites", "standard_errors"):
                for site in SITES:
                    assert found[group][site] == pytest.approx(alone[group][site], abs=1e-6)
            assert found.get("statistics", {}) == alone.get("statistics", {})
