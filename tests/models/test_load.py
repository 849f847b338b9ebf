"""Loading models: which device they get, and whether an error tells its cause."""

from __future__ import annotations

import ssl

import pytest
import torch

from bupo.errors import InputError
from bupo.models import load
from bupo.models.load import load_model, load_tokenizer, resolve_model


@pytest.mark.parametrize(
    ("name", "words"),
    [("./none", "does not exist"), ("a/b/c", "does not exist"), (__file__, "is a file"), ("tests", "no config.json")],
)
def test_paths_that_are_not_model_folders_are_refused(name, words):
    with pytest.raises(InputError, match=words):
        resolve_model(name)


@pytest.mark.parametrize(
    ("accelerator", "argument", "device"),
    [("meta", None, "meta"), ("meta", "cpu", "cpu"), ("mps", None, "cpu"), (None, None, "cpu")],
)
def test_the_default_device_is_the_accelerator_of_any_kind(tiny_folder, monkeypatch, accelerator, argument, device):
    current = None if accelerator is None else torch.device(accelerator)  # "meta" stands for XPU, NPU and so on
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: current)
    model, _ = load_model(str(tiny_folder), device=argument)
    assert model.device.type == device


def test_an_unknown_device_is_one_line(tiny_folder):
    with pytest.raises(InputError, match=r"cannot put the model on 'abacus'"):
        load_model(str(tiny_folder), device="abacus")


@pytest.mark.parametrize(
    ("error", "cause", "words"),
    [
        (OSError(28, "No space left on device"), None, "No space left on device"),
        (PermissionError(13, "Permission denied"), None, "Permission denied"),
        (OSError("We couldn't connect to the hub"), ssl.SSLError("certificate verify failed"), "verify failed"),
        (OSError("org/none is not a local folder and is not a valid model identifier"), None, "check the spelling"),
    ],
    ids=["disk", "permission", "certificate", "unknown"],
)
def test_the_cause_of_a_failed_download_is_kept(monkeypatch, error, cause, words):
    def from_pretrained(*args, **kwargs):
        raise error from cause

    monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(InputError, match=words) as raised:
        load_tokenizer("org/none")
    assert str(raised.value).startswith("cannot load tokenizer 'org/none': ")
    assert ("spelling" in str(raised.value)) == ("folder" in str(error) or cause is not None)


def test_other_weight_formats_are_not_loaded(tiny_folder, tmp_path):
    for file in tiny_folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"no file named model\.safetensors"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not a valid JSON"):
        load_model(str(tmp_path))
