"""The built-in tasks and the model that ships with them: disjoint splits, right answers, and room to learn."""

import random
import re
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from bupo.data.answers import last_boxed
from bupo.data.arithmetic import SIZES, TEST_SHARE, draw, problems, split_of
from bupo.data.problems import load_problems
from bupo.errors import InputError
from bupo.models.load import SMALL_MODEL

ASCII = "".join(map(chr, range(32, 127))) + "\n"
FORMS = {"standard": r"\((\d+)([+-])(\d+)\)\*(\d+)()=", "hard": r"\((\d+)(\+)(\d+)\)\*(\d+)-(\d+)="}


@pytest.mark.parametrize("level", FORMS)
def test_rows_are_distinct_and_hold_the_right_answers(level):
    rows = problems(300, seed=3, split="test", level=level)
    assert len({r["id"] for r in rows}) == len({r["prompt"] for r in rows}) == 300
    for row in rows:
        text = row["prompt"].removesuffix("\n")
        a, sign, b, c, d = re.fullmatch(FORMS[level], text).groups()
        inner = int(a) + int(b) if sign == "+" else int(a) - int(b)
        assert row["answer"] == str(inner * int(c) - int(d or 0))
        assert row["id"] == f"arithmetic/{level}/{text}"


@pytest.mark.parametrize("level", FORMS)
def test_splits_are_disjoint_for_any_seeds(level):
    for split in ("train", "test"):
        prompts = {r["prompt"] for seed in range(3) for r in problems(1000, seed=seed, split=split, level=level)}
        assert {split_of(p.strip()) for p in prompts} == {split}


def test_deterministic_by_seed_and_a_longer_list_begins_with_the_shorter():
    random.seed(1)
    first = problems(50, seed=7, split="train")
    random.seed(2)
    assert problems(80, seed=7, split="train")[:50] == first
    assert problems(50, seed=8, split="train") != first
    # fixed for good: measured figures name these problems
    assert [r["prompt"] for r in problems(3, seed=0, split="test")] == ["(54+59)*9=\n", "(76+70)*2=\n", "(57+83)*9=\n"]
    assert draw(random.Random(5), "test", "hard") == ("(93+77)*2-69=", 271)
    rows = problems(5, seed=2, split="train", level="hard")
    loaded = load_problems("arithmetic-hard", split="train", limit=5, seed=2)
    assert [(p.id, p.prompt, p.answer) for p in loaded] == [(r["id"], r["prompt"], r["answer"]) for r in rows]


def test_a_split_that_is_too_small_is_refused_at_once():
    with pytest.raises(InputError, match="test split of standard arithmetic has 9,711 problems, fewer than 10,500"):
        load_problems("arithmetic", limit=10_500)
    prompts = {f"({a}+{b})*{c}=" for a in range(10, 100) for b in range(10, 100) for c in range(2, 10)}
    prompts |= {f"({a}-{b})*{c}=" for a in range(10, 100) for b in range(10, a + 1) for c in range(2, 10)}
    assert Counter(map(split_of, prompts)) == {split: SIZES["standard", split] for split in ("train", "test")}
    assert SIZES["standard", "test"] / len(prompts) == pytest.approx(TEST_SHARE, abs=0.01)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SMALL_MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(SMALL_MODEL).eval()


PIECES = st.lists(st.sampled_from(["\\boxed{", "<eos>", "<pad>", "1", " "])).map("".join)


@given(st.text(alphabet=ASCII, max_size=60) | PIECES)
def test_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]  # nothing is put in front or behind
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_shipped_model_is_small_and_of_the_promised_architecture(model, tokenizer):
    files = [p for p in SMALL_MODEL.iterdir() if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 12 * 2**20
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".md"}  # nothing that is unpickled
    assert model.config.model_type == "qwen3"
    assert model.config.num_hidden_layers >= 8
    assert sum(p.numel() for p in model.parameters()) <= 3_000_000
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert tokenizer.chat_template is None
    assert len(tokenizer) == model.config.vocab_size == 4 + len(ASCII) + 1  # specials, characters, "\boxed{"
    config = model.generation_config
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 1.0, 0, 1.0)


def test_shipped_model_solves_some_held_out_problems_but_far_from_all(model, tokenizer):
    """Measured: 33.7 % (1,024 problems x 4). Here the standard error is 4 points, so both limits are far off."""
    rows = problems(160, seed=11, split="test")
    inputs = tokenizer([r["prompt"] for r in rows], return_tensors="pt", padding=True)
    torch.manual_seed(0)
    with torch.no_grad():
        out = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=40)
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    solved = sum(last_boxed(t) == r["answer"] for t, r in zip(texts, rows, strict=True)) / len(rows)
    assert 0.15 <= solved <= 0.60
    working = sum("=" in t for t in texts) / len(texts)
    assert 0.3 <= working <= 0.9  # the room: working that is sometimes left out
