"""Loads a model and its tokenizer by hub id, folder or the name of the shipped model; errors say what to do."""

import json
import os
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from huggingface_hub import is_offline_mode, model_info, try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from bupo.errors import InputError
from bupo.models.unembed import has_low_precision_units

SMALL_MODEL = Path(__file__).parent.parent / "assets" / "small"
DTYPES = ("float32", "bfloat16", "float16")
_ADAPTER = "adapter_config.json"  # of PEFT
WRAPPERS = r"(^|\.)(?:(?:_orig_mod|module)\.)+"  # what torch.compile and DDP put before the names of tensors
# words in transformers' messages where the hub does not have the model, or could not be asked
_NOT_ON_HUB = ("offline", "connect", "not a local folder", "not a valid model identifier", "cannot find")


def accelerator() -> torch.device | None:
    """The kind of accelerator that models are put on: not a Mac's MPS, which lacks the float64 of statistics."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None or found.type == "mps" else found


def join_processes(cpu: bool = False) -> PartialState:
    """Join the processes that a launcher started, on CPUs if ``cpu``, and return accelerate's state of this one."""
    use_cpus_without_accelerator()
    state = PartialState(cpu=cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or accelerator() is None)
    check_group(state.num_processes)
    return state


def use_cpus_without_accelerator() -> None:
    """Tell accelerate about launched processes on CPUs, which torchrun does not: they would form no group otherwise."""
    elsewhere = accelerator() is not None or "ACCELERATE_USE_DEEPSPEED" in os.environ
    if "LOCAL_RANK" in os.environ and not elsewhere:
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def check_group(processes: int) -> None:
    """Raise `InputError` if these are not all the launched processes: each would silently do all the work."""
    if processes < int(os.environ.get("WORLD_SIZE", "1")):
        raise InputError("the launched processes do not form a group; start them with torchrun or accelerate launch")


def resolve_model(name: str) -> str:
    """Return the folder of the shipped model for ``small``, else ``name``; `InputError` for a path that is no model."""
    if name == "small":
        return str(SMALL_MODEL)
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / _ADAPTER).exists():
            raise _adapter(name)
        if not (path / "config.json").exists():
            raise InputError(f"model folder {path} has no config.json; name the folder that save_pretrained wrote")
        return str(path)
    if path.exists():
        raise InputError(f"model {path} is a file; name the model's folder")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"model folder {name} does not exist")
    return name


def model_revision(model: Any) -> str | None:
    """The hub commit of a loaded model, or None for a local folder."""
    return getattr(getattr(model, "config", None), "_commit_hash", None)


def find_on_hub(path: str, revision: str | None = None) -> None:
    """Raise `OSError` if the hub lacks this model or cannot be reached; transformers would try again for a minute."""
    known = Path(path).exists() or isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str)
    if not known and not is_offline_mode():
        try:
            model_info(path, revision=revision, timeout=20)
        except Exception as error:  # of the network, or the hub's
            raise OSError("not a valid model identifier, or the hub cannot be reached") from error


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model; where it has no padding token, the end-of-sequence token is used."""
    path = resolve_model(name)
    try:
        find_on_hub(path, revision)
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many types here; all mean the same to a user
        raise InputError(_explain("tokenizer", name, error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Load a causal LM in evaluation mode and its tokenizer.

    Args:
        dtype: ``float32``, ``bfloat16``, ``float16``, ``auto`` (the dtype of the checkpoint), or ``fitting``: the same,
            but float32 where the checkpoint is 16-bit and the device has no units for it, which is exact and faster.
        device: torch device. Default: that of `accelerator`, or the CPU where there is none. Quantised models,
            and models with a ``device_map`` in ``kwargs`` (of ``from_pretrained``), stay where they were loaded.

    Raises `InputError` if there is no such model, it is not a causal LM, a file is damaged, the dtype or device is
    unknown, or the hub cannot be reached.
    """
    if dtype not in (*DTYPES, "auto", "fitting"):
        raise InputError(f"unknown dtype {dtype!r}; choose one of auto, {', '.join(DTYPES)}")
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    path, tokenizer = resolve_model(name), load_tokenizer(name, **source)
    try:
        # of a multimodal model, the language model is read
        multimodal = type(AutoConfig.from_pretrained(path, **source)) in AutoModelForImageTextToText._model_mapping
        auto: Any = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
        torch_dtype = getattr(torch, dtype) if dtype in DTYPES else "auto"
        source |= {"dtype": torch_dtype, "use_safetensors": True, **kwargs}
        model = _complete(auto, path, name, **source)
    except InputError:
        raise
    except Exception as error:
        raise InputError(_explain("model", name, error)) from error
    if not getattr(model, "is_quantized", False):  # quantised models refuse to be moved
        device = device or (accelerator() or torch.device("cpu")).type
        try:
            target = torch.device(device)
            sixteen_bit = model.dtype in (torch.bfloat16, torch.float16)
            if dtype == "fitting" and sixteen_bit and not has_low_precision_units(target, model.dtype):
                model = model.float()
            model = model if "device_map" in kwargs else model.to(target)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"cannot put the model on {device!r}: {_first_line(error)}") from error
    return model.eval(), tokenizer


def _complete(auto: Any, path: str, name: str, **kwargs: Any) -> Any:
    """``from_pretrained``; raises `InputError` for tensors that it would initialise at random or ignore wrongly."""
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # a wrong shape is refused below, by name
    model, info = auto.from_pretrained(path, **kwargs)
    wrapped = [tensor for tensor in info["unexpected_keys"] if re.search(WRAPPERS, tensor)]
    if wrapped and info["missing_keys"] and "key_mapping" not in kwargs:
        model, info = auto.from_pretrained(path, key_mapping={WRAPPERS: r"\1"}, **kwargs)
        prefixes = "names of torch.compile or DDP (such as _orig_mod.) before the names of its tensors were left out"
        warnings.warn(f"model {name!r}: {prefixes}", stacklevel=3)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _adapter(name)
    _refuse_incomplete(model, info, name)
    return model


def check_files(model: Any, name: str, options: Any = None) -> None:
    """Raise `InputError` if the files that ``model`` was loaded from lack tensors of it, or hold others.

    For models that another library loaded with ``options`` of ``from_pretrained``: reads names and shapes only.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # of a PEFT model
    source = {key: (options or {})[key] for key in ("revision", "trust_remote_code") if key in (options or {})}
    source |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "device_map": "meta"}
    loaded, info = type(base).from_pretrained(name, **source)
    _refuse_incomplete(loaded, info, name)


def _refuse_incomplete(model: Any, info: dict[str, Any], name: str) -> None:
    missing, extra = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    shapes = [f"{t} {list(its)} instead of {list(ours)}" for t, its, ours in sorted(info["mismatched_keys"])]
    found = {
        "the weights lack tensors of the model": missing,
        "tensors have other shapes than config.json says": shapes,
        "config.json has no place for tensors of the weights": [t for t in extra if missing or _has_place(model, t)],
    }
    if any(found.values()):
        problems = "; ".join(f"{what}: {_shortened(tensors)}" for what, tensors in found.items() if tensors)
        remedy = "check that config.json and the weights belong together and were saved whole"
        raise InputError(f"cannot load model {name!r}: {problems}; {remedy}")
    if extra:
        warnings.warn(f"model {name!r}: tensors of the weights are not used: {_shortened(extra)}", stacklevel=4)


def _has_place(model: Any, tensor: str) -> bool:
    """Whether the model could hold the tensor with other settings: a bias that is off, or one layer more."""
    module, _, parameter = re.sub(r"\.\d+\.", ".0.", tensor).rpartition(".")
    with suppress(AttributeError):
        return parameter in model.get_submodule(module)._parameters
    return False


def _shortened(names: list[str], shown: int = 4) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _adapter(name: str) -> InputError:
    """The error for a PEFT adapter as model: transformers would load its base, if it finds one, with layers inside."""
    folder, base = Path(name).expanduser(), ""
    with suppress(OSError, ValueError, KeyError):
        base = f" of {json.loads((folder / _ADAPTER).read_text(encoding='utf-8'))['base_model_name_or_path']}"
    merged = folder.parent / "model"  # where bupo train merges it
    python = f"AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload().save_pretrained('merged')"
    remedy = f"name {merged}" if (merged / "config.json").exists() else f"merge it and name the result: {python}"
    return InputError(f"model {name} is a PEFT adapter{base}, not a whole model; {remedy}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()[:300]


def _explain(what: str, name: str, error: BaseException) -> str:
    message = f"cannot load {what} {name!r}: "
    local = name == "small" or Path(name).expanduser().exists()
    if local or not any(words in str(error).lower() for words in _NOT_ON_HUB):
        return message + _first_line(error)
    message += "there is no such local folder, and the hub has no model of this name or cannot be reached "
    message += "(check the spelling, log in for gated models, or pass a local folder)"
    # transformers says "couldn't connect" for a wrong certificate or proxy too: the first error of the chain tells
    cause = error
    while (earlier := cause.__cause__ or cause.__context__) is not None:
        cause = earlier
    return message if cause is error else f"{message}; the cause was: {_first_line(cause)}"
