"""Which tokens are read, in which batches, and the means over them."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bupo.errors import InputError
from bupo.lens.batching import ClusterMeans, balance, batches, check_rollouts, rounded, subsample, subsample_evenly
from tests.support.lens import pairs
from tests.support.tiny import tiny_model


@pytest.mark.parametrize(
    ("responses", "words"),
    [
        ([], "no responses"),
        ([([3], [])], "response 1 is empty"),
        ([([3], [3]), ([], [3])], "prompt 2 is empty"),
        ([([3] * 100, [4] * 29)], "129 tokens, more than the model's context of 128"),
        ([([3], [97])], "token id 97, outside this model's vocabulary of 97"),
        ([([3, 40], [5, -1, 60])], "token id -1, outside"),
        ([{"prompt": "a", "response": "b"}], "response 1 is a dict without prompt_ids and response_ids"),
        ([([3], [4]), "text"], "response 2 is a str without"),
        ([([3], [4], [5])], "response 1 is a tuple without"),
        ([("prompt", "response")], "response 1 is a tuple without"),
    ],
)
def test_unusable_responses_are_refused(responses, words):
    with pytest.raises(InputError, match=words):
        check_rollouts(tiny_model(), responses)


def test_pairs_mappings_and_objects_are_responses():
    mapping = {"prompt_ids": [6], "response_ids": [7, 8], "problem_id": "p"}
    found = check_rollouts(tiny_model(), [([3, 4], [5]), mapping, SimpleNamespace(prompt_ids=[9], response_ids=[10])])
    assert [tuple(r[:3]) for r in found] == [([3, 4], [5], None), ([6], [7, 8], "p"), ([9], [10], None)]


@pytest.mark.parametrize("processes", [1, 2, 3, 9])
def test_every_response_is_on_one_process_and_in_one_batch_within_the_limit(processes):
    lengths = [50, 40, 30, 20, 10, 10, 5]
    parts = balance(lengths, processes)
    loads = [sum(lengths[i] for i in part) for part in parts]
    assert max(loads) - min(loads) <= max(lengths)
    found = [batch for part in parts for batch in batches(pairs([(3, n) for n in lengths]), 60, part)]
    assert sorted(i for batch in found for i in batch) == list(range(7))
    assert all(len(batch) == 1 or max(lengths[i] + 2 for i in batch) * len(batch) <= 60 for batch in found)


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
        assert all(places == sorted(set(places) & set(range(length))) for places in (part, spread))
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
    tokens = torch.cat(parts, 1)
    mean, error = ClusterMeans.of(tokens, [4, 9, 2, 7]).statistics()
    torch.testing.assert_close(mean, tokens.mean(1))
    residual = torch.stack([(p - tokens.mean(1, keepdim=True)).sum(1) for p in parts])
    torch.testing.assert_close(error, (residual.square().sum(0) * 4 / 3).sqrt() / 22)
    # two tokens of each response stand for all of it
    drawn, sizes = torch.stack([part[:, :2] for part in parts], 1), torch.tensor([4.0, 9.0, 2.0, 7.0]).double()
    mean, error = ClusterMeans.of(drawn.flatten(1), [2] * 4, [4, 9, 2, 7]).statistics()
    torch.testing.assert_close(mean, drawn.mean(2) @ sizes / 22)
    residual = (drawn.mean(2) - mean[:, None]) * sizes
    torch.testing.assert_close(error, (residual.square().sum(1) * 4 / 3).sqrt() / 22)
    # a single response falls back to its tokens, and a single token has no error
    one = ClusterMeans.of(tokens, [22])
    torch.testing.assert_close(one.statistics()[1], tokens.std(1) / math.sqrt(22))
    assert "single response" in one.method
    assert rounded(ClusterMeans.of(tokens[:, :1], [1]).statistics()[1]) == [None] * 3
