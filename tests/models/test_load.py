"""Loading models: which device they get, and whether an error tells its cause."""

import json
import ssl
import warnings

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from bupo.errors import InputError
from bupo.models import load
from bupo.models.load import load_model, load_tokenizer, resolve_model
from tests.support.tiny import tiny_model
from tests.support.training import LORA, make_trainer


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

    monkeypatch.setattr(load, "find_on_hub", lambda *about: None)
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


def changed(folder, source, edit, **config):
    """A copy of a saved model whose tensors by name went through ``edit``, and whose configuration has other values."""
    folder.mkdir()
    for file in source.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | config))
    save_file(edit(load_file(source / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return str(folder)


UP = "model.layers.1.mlp.up_proj.weight"
INCOMPLETE = [
    (
        lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"},
        {},
        r"lack tensors of the model: lm_head.weight;",
    ),
    (
        lambda t: {f"policy.{k}": v for k, v in t.items()},
        {},
        r"lack .*lm_head.weight, .* and 43 more; .*: policy.lm_head",
    ),
    (
        lambda t: t | {UP: torch.zeros(3, 3)},
        {},
        r"other shapes .*: model.layers.1.mlp.up_proj.weight \[3, 3\] instead of",
    ),
    (lambda t: t | {UP.replace("weight", "bias"): torch.zeros(48)}, {}, "no place for .*up_proj.bias"),
    (
        lambda t: t,
        {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
        r"no place for .*layers.3.input_lay",
    ),
    (lambda t: t, {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}, r"lack .*layers.4.input_lay"),
]


@pytest.mark.parametrize(("edit", "config", "words"), INCOMPLETE)
def test_every_parameter_comes_from_the_file_and_every_tensor_has_its_place(tiny_folder, tmp_path, edit, config, words):
    with pytest.raises(InputError, match=words) as error:
        load_model(changed(tmp_path / "m", tiny_folder, edit, **config))
    assert "\n" not in str(error.value)


def test_a_tensor_missing_from_a_shard_is_named(tiny_folder, tmp_path):
    model, tokenizer = load_model(str(tiny_folder))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    shard = tmp_path / json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"][UP]
    save_file({k: v for k, v in load_file(shard).items() if k != UP}, shard, {"format": "pt"})
    with pytest.raises(InputError, match=f"lack tensors of the model: {UP}"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_of_wrappers_are_left_out_with_a_notice(tiny_folder, tmp_path, prefix):
    folder = changed(tmp_path / "m", tiny_folder, lambda t: {prefix + k: v for k, v in t.items()})
    with pytest.warns(UserWarning, match="torch.compile or DDP"):
        model, _ = load_model(folder)
    expected = load_model(str(tiny_folder))[0].state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_tied_embeddings_need_one_tensor_and_unused_ones_are_said(tmp_path, tiny_folder):
    tied = tmp_path / "tied"
    tiny_model("qwen3", tie_word_embeddings=True).save_pretrained(tied)
    load_tokenizer(str(tiny_folder)).save_pretrained(tied)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(str(tied))
    with pytest.warns(UserWarning, match=r"tensors of the weights are not used: value_head.weight$"):
        load_model(changed(tmp_path / "m", tied, lambda t: t | {"value_head.weight": torch.zeros(3)}))


def test_an_adapter_as_model_names_its_base_and_how_to_merge_it(tiny_folder, tmp_path):
    adapted = get_peft_model(load_model(str(tiny_folder))[0], LORA)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=f"PEFT adapter of {tiny_folder}, .*merge_and_unload") as error:
        load_model(str(tmp_path / "adapter"))
    assert str(tmp_path / "adapter") in str(error.value)
    changed(tmp_path / "model", tiny_folder, lambda t: t)
    with pytest.raises(InputError, match=rf"not a whole model; name {tmp_path / 'model'}$"):
        load_tokenizer(str(tmp_path / "adapter"))


def test_a_trainer_that_is_given_a_path_refuses_incomplete_files(tiny_folder, tmp_path):
    edit, config, words = INCOMPLETE[0]  # TRL would draw the missing tensor at random
    with pytest.raises(InputError, match=words):
        make_trainer(tmp_path / "run", model=changed(tmp_path / "m", tiny_folder, edit, **config))


def test_a_name_that_the_hub_lacks_is_refused_after_one_request(monkeypatch):
    asked = []

    def no_hub(name, **more):
        asked.append(name)
        raise ConnectionError("name or service not known")

    monkeypatch.setattr(load, "is_offline_mode", lambda: False)
    monkeypatch.setattr(load, "model_info", no_hub)
    with pytest.raises(InputError, match=r"no such local folder, and the hub .* the cause was: name or service"):
        load_tokenizer("some/model")
    assert asked == ["some/model"]
