"""Which tokens are read, in which batches, and the means over them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bupo import internal_policy
from bupo.errors import InputError
from bupo.lens.batching import balance, batches, check_rollouts, subsample, subsample_evenly
from bupo.lens.clustered import ClusterMeans, round_errors
from tests.support.lens import Pair, pairs
from tests.support.tiny import tiny_model


@pytest.mark.parametrize(
    ("responses", "words"),
    [
        ([], "no responses"),
        ([Pair([3], [])], "response 1 is empty"),
        ([Pair([3], [3]), Pair([], [3])], "prompt 2 is empty"),
        ([Pair([3] * 100, [4] * 29)], "129 tokens, more than the model's context of 128"),
        ([Pair([3], [97])], "token id 97, outside this model's vocabulary of 97"),
        ([Pair([3, 40], [5, -1, 60])], "token id -1, outside"),
        ([{"prompt": "a", "response": "b"}], "response 1 is a dict without prompt_ids and response_ids"),
        ([([3], [4]), "text"], "response 2 is a str without"),
        ([([3], [4], [5])], "response 1 is a tuple without"),
        ([("prompt", "response")], "response 1 is a tuple without"),
    ],
)
def test_unusable_responses_are_refused(responses, words):
    with pytest.raises(InputError, match=words):
        check_rollouts(tiny_model(), responses)


def test_pairs_and_mappings_are_responses_too():
    responses = [([3, 4], [5]), {"prompt_ids": [6], "response_ids": [7, 8], "problem_id": "p"}, Pair([9], [10])]
    found = check_rollouts(tiny_model(), responses)
    assert [(r.prompt_ids, r.response_ids) for r in found] == [([3, 4], [5]), ([6], [7, 8]), ([9], [10])]
    assert found[1].problem_id == "p"


def test_an_open_internal_policy_is_named():
    model = tiny_model()
    with internal_policy(model, 3), pytest.raises(InputError, match=r"inside internal_policy\(model, 3\)"):
        check_rollouts(model, pairs())


def test_batches_cover_every_response_once_within_the_limit():
    responses = pairs([(3, n) for n in (1, 9, 4, 4, 7, 2)])
    found = batches(responses, 20, range(6))
    assert sorted(i for batch in found for i in batch) == list(range(6))
    for batch in found:
        longest = max(len(responses[i].response_ids) + 2 for i in batch)
        assert len(batch) == 1 or longest * len(batch) <= 20


@pytest.mark.parametrize("processes", [1, 2, 3, 9])
def test_responses_are_dealt_out_once_and_evenly(processes):
    lengths = [50, 40, 30, 20, 10, 10, 5]
    parts = balance(lengths, processes)
    assert sorted(i for part in parts for i in part) == list(range(7))
    loads = [sum(lengths[i] for i in part) for part in parts]
    assert max(loads) - min(loads) <= max(lengths)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 200), st.integers(0, 9), st.booleans())
@settings(max_examples=60, deadline=None)
def test_tokens_are_drawn_once_and_in_order(lengths, tokens, seed, few):
    drawn = subsample(lengths, tokens, seed, max_responses=5 if few else None)
    assert drawn == subsample(lengths, tokens, seed, max_responses=5 if few else None)
    taken = sum(map(len, drawn))
    assert taken <= min(tokens, sum(lengths)) if few else taken == min(tokens, sum(lengths))
    assert not few or sum(map(bool, drawn)) <= 5
    even = subsample_evenly(lengths, tokens, seed)
    for part, spread, length in zip(drawn, even, lengths, strict=True):
        for places in (part, spread):
            assert places == sorted(set(places) & set(range(length)))
        assert len(spread) == min(length, max(2, math.ceil(tokens / sum(lengths) * length)))


def test_every_token_is_as_likely():
    counts = torch.zeros(3, 10)
    for seed in range(800):
        for response, places in enumerate(subsample([2, 10, 3], 5, seed)):
            counts[response, places] += 1
    drawn = torch.cat([counts[0, :2], counts[1], counts[2, :3]])
    assert (drawn - 800 / 3).abs().max() < 5 * math.sqrt(800 * (1 / 3) * (2 / 3))


def test_cluster_means_and_errors_by_their_formulas():
    torch.manual_seed(0)
    parts = [torch.randn(3, n, dtype=torch.float64) + i for i, n in enumerate((4, 9, 2, 7))]
    one, two = ClusterMeans(), ClusterMeans()
    for i, part in enumerate(parts):
        (one if i % 2 else two).add(part, i)
    tokens = torch.cat(parts, 1)
    mean, error = ClusterMeans.of(tokens, [4, 9, 2, 7]).statistics()
    torch.testing.assert_close(mean, tokens.mean(1))
    residual = torch.stack([(p - tokens.mean(1, keepdim=True)).sum(1) for p in parts])
    torch.testing.assert_close(error, (residual.square().sum(0) * 4 / 3).sqrt() / 22)
    for got, want in zip(ClusterMeans([one.rows, two.rows]).statistics(), (mean, error), strict=True):
        assert torch.equal(got, want)


def test_drawn_tokens_stand_for_all_of_their_response():
    torch.manual_seed(2)
    parts = [torch.randn(1, n, dtype=torch.float64) + i for i, n in enumerate((40, 15, 90))]
    found = []
    for _ in range(600):
        means = ClusterMeans()
        for i, part in enumerate(parts):
            size = part.shape[1]
            means.add(part[:, torch.randperm(size)[: size // 3]], i, size)
        found.append(means.statistics()[0])
    spread = torch.cat(found)
    assert abs(spread.mean() - torch.cat(parts, 1).mean()) < 4 * spread.std() / math.sqrt(600)


def test_one_response_falls_back_to_tokens_and_one_token_has_no_error():
    means = ClusterMeans()
    values = torch.randn(1, 50, dtype=torch.float64)
    means.add(values, 0)
    torch.testing.assert_close(means.statistics()[1], values.std(1) / math.sqrt(50))
    assert "single response" in means.method
    assert round_errors(ClusterMeans.of(values[:, :1], [1]).statistics()[1]) == [None]
