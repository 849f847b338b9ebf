"""Shared by all tests: no network, one thread, and the optional data folder beside the repository."""

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
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    from tests.support.tiny import tiny_model, word_tokenizer

    folder = tmp_path_factory.mktemp("tiny-model")
    tiny_model("qwen3", spread=3.0, max_position_embeddings=512).save_pretrained(folder)
    characters = [*map(chr, range(32, 125)), "\n"]
    word_tokenizer(characters, "?", Split(Regex(r"[\s\S]"), "isolated"), fuse=True).save_pretrained(folder)
    return folder
