"""What the files of a model or an adapter say, checked before a library acts on them. They may come from anywhere.

Only safetensors are read, never a pickle. Of an adapter's settings only LoRA's shape is taken over: PEFT has others
that import modules, match regular expressions or change the base.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from searche1_lite.policy.adapter_folder import no_adapter
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.jsonl import read_json

_MAX_RANK = 4096
_OWN = ("r", "lora_alpha", "lora_dropout", "bias", "target_modules", "use_rslora", "task_type", "revision")
"""An adapter's settings that are taken over."""
_IGNORED = (
    "peft_type",
    "peft_version",
    "inference_mode",
    "base_model_name_or_path",
    "auto_mapping",
    "init_lora_weights",
)
_PLAIN_FILES = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def check_model_files(folder: Path, name: str) -> None:
    """Refuses a base model whose files cannot be read, are not whole, or would have code fetched and run.

    Args:
        name: how the user calls the model.

    Raises:
        UserError: in one line, with what to do.
    """

    def unfit(problem: str) -> UserError:
        return UserError(f"cannot load the model {name!r}: {problem}", exit_code=1)

    if not (folder / "config.json").is_file():
        raise unfit("it has no config.json; give a causal language model saved by transformers")
    for key, value in _pairs(read_json(folder / "config.json", "fetch or save the model anew", 1)):
        # transformers takes such a name for a repository of the hub, whose code it would fetch and run.
        if key in _KERNEL_KEYS and "/" in str(value):
            raise unfit(f"its config.json asks for code from {value!r} ({key}); delete that line")
    for plain in _PLAIN_FILES:
        if (folder / plain).is_file():
            read_json(folder / plain, "fetch or save the model anew", 1)
    index = folder / "model.safetensors.index.json"
    shards = {"model.safetensors"}
    if index.is_file() and not (folder / "model.safetensors").is_file():
        places = read_json(index, "fetch or save the model anew", 1).get("weight_map")
        if not isinstance(places, dict) or not places or not all(map(_is_file_name, places.values())):
            raise unfit(f"{index.name} is damaged (its weight_map names no files); fetch or save it anew")
        shards = set(places.values())
    for shard in sorted(shards):
        if not (folder / shard).is_file():
            raise unfit(f"it has no {shard}; only safetensors are loaded, as pickled weights (.bin) can run code")
        try:
            with safe_open(folder / shard, framework="pt"):  # reads the header, which must agree with the file's size
                pass
        except (SafetensorError, OSError) as error:
            place = (folder / shard).resolve()
            raise unfit(f"{shard} is damaged or cut off ({error}); delete {place} and fetch or save it anew") from error


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w-][\w.-]{0,200}\.safetensors", value) is not None


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value in nested dictionaries and lists."""
    for key, inner in value.items() if isinstance(value, dict) else ((None, inner) for inner in value):
        if key is not None:
            yield key, inner
        if isinstance(inner, dict | list):
            yield from _pairs(inner)


def check_weights(model: torch.nn.Module, name: str) -> None:
    """Refuses a base with weights that are no numbers (in 4 bits their scales tell) or not of their layer's shape.

    transformers compares the shapes of plain weights itself, and not of those that it quantises (seen in 5.23).
    """

    def unfit(key: str, problem: str) -> UserError:
        return UserError(f"cannot load the model {name!r}: {key} {problem}; fetch or save it anew", exit_code=1)

    for key, module in model.named_modules():
        if isinstance(module, Linear4bit):
            there, needed = tuple(module.weight.quant_state.shape), (module.out_features, module.in_features)
            if there != needed:
                raise unfit(f"{key}.weight", f"has the shape {there}, where {needed} is needed")
    for key, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        values = [parameter] if state is None else [state.absmax, state.offset]
        for value in values:
            if value is not None and value.is_floating_point() and not torch.isfinite(value).all():
                raise unfit(key, "holds NaN or infinity")


def read_adapter_config(folder: Path) -> LoraConfig:
    """An adapter's shape, from its `adapter_config.json`.

    Raises:
        UserError: if there is none, it cannot be read, or it asks for more than plain LoRA.
    """
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise no_adapter(folder)
    data = read_json(path, "give a folder written by `train`")

    def refuse(key: str) -> UserError:
        return UserError(
            f"cannot read {path}: {key}={str(data.get(key))[:60]!r} is not plain LoRA; give another adapter", 1
        )

    if data.get("peft_type") != "LORA":
        raise refuse("peft_type")
    defaults = {}
    for field in fields(LoraConfig):
        if field.default is not MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not MISSING:
            defaults[field.name] = field.default_factory()
    for key, value in data.items():
        if key not in (*_OWN, *_IGNORED) and value and value != defaults.get(key):
            raise refuse(key)
    if not isinstance(data.get("init_lora_weights", True), bool) and data["init_lora_weights"] != "gaussian":
        raise refuse("init_lora_weights")  # others are of a base that was changed for them
    checks = {
        "r": lambda value: type(value) is int and 1 <= value <= _MAX_RANK,
        "lora_alpha": lambda value: _is_number(value) and value > 0,
        "lora_dropout": lambda value: _is_number(value) and 0 <= value < 1,
        "bias": lambda value: value == "none",
        "target_modules": _are_modules,
        "use_rslora": lambda value: isinstance(value, bool),
        "task_type": lambda value: value in (None, "CAUSAL_LM"),
        "revision": lambda value: value is None or isinstance(value, str),
    }
    for key, fits in checks.items():
        if not fits(data.get(key, defaults.get(key))):
            raise refuse(key)
    base = data.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise refuse("base_model_name_or_path")
    return LoraConfig(base_model_name_or_path=base, **{key: data[key] for key in _OWN if key in data})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_modules(value: object) -> bool:
    """Names of layers; PEFT takes any other text than `all-linear` for a regular expression."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(name, str) and re.fullmatch(r"[\w.]{1,200}", name) for name in value)
    return value == "all-linear"


def read_adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    """An adapter's tensors by name, all of them finite.

    Raises:
        UserError: if they are not there, no safetensors, or no numbers.
    """
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(
            f"{folder} has no {path.name}; only safetensors are loaded, since pickles can run code; save it as such", 1
        )
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}; give a saved adapter") from error
    for name, values in weights.items():
        if not values.is_floating_point() or not torch.isfinite(values.float()).all():
            raise UserError(f"{path}: {name} holds NaN, infinity or no numbers; give another adapter", exit_code=1)
    return weights
