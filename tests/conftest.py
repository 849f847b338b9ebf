"""Shared by all tests: no network, one thread, and the optional data folder beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the benchmark files; tests that need them are skipped where it is absent."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the data folder {folder.name} beside the repository")
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A saved random model (4 layers, 97 tokens, context 512) with a character tokenizer and no chat template."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    from tests.support.tiny import tiny_model

    folder = tmp_path_factory.mktemp("tiny-model")
    tiny_model("qwen3", spread=3.0, max_position_embeddings=512).save_pretrained(folder)
    characters = ["<pad>", "<bos>", "<eos>", *map(chr, range(32, 125)), "\n"]
    backend = Tokenizer(WordLevel({text: index for index, text in enumerate(characters)}, unk_token="?"))
    backend.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="?"
    )
    tokenizer.save_pretrained(folder)
    return folder
