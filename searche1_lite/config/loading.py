"""Makes a checked `Config` of a preset, a YAML file and `key=value` overrides, merged in that order."""

import difflib
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError

from searche1_lite.config.settings import Config
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.yaml_file import as_yaml, parse_yaml, read_yaml

DEFAULT_PRESETS = {8: "qwen2.5-3b-8gb", 12: "qwen2.5-3b-12gb", 16: "qwen2.5-3b-16gb", 24: "qwen2.5-3b-24gb"}
"""What `train` uses without a preset or a file, by the GPU's memory in GB."""


def default_preset(gpu_gib: float | None) -> str:
    """The preset for a GPU of this size.

    Raises:
        UserError: without a GPU, or with one too small.
    """
    if gpu_gib is None:
        raise UserError(
            "no NVIDIA GPU found, and no preset or config given; try --preset demo, which needs none, or name one of "
            f"{', '.join(preset_names())} (`searche1-lite doctor` shows why a GPU is not found)"
        )
    # A card's usable memory is a little less than its name says.
    fitting = [size for size in DEFAULT_PRESETS if size <= gpu_gib * 1.06]
    if not fitting:
        raise UserError(f"the GPU has {gpu_gib:.1f} GiB, and no preset is made for less than 8; give one with --preset")
    return DEFAULT_PRESETS[max(fitting)]


PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """The shipped presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(
    preset: str | None = None,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
) -> Config:
    """The settings of a preset, then a YAML file, then `key.sub=value` overrides; later values replace earlier ones.

    A corpus replaces an index that an earlier source set without a corpus, such as a preset's Wikipedia.

    Args:
        before: settings under nested or dotted keys, applied between the file and the overrides.
        after: settings applied last.

    Raises:
        UserError: for an unknown preset, key or file, invalid YAML, or an invalid value; names it and what is allowed.
    """
    data: dict[str, Any] = {}
    if preset is not None:
        if preset not in preset_names():
            raise UserError(f"no preset {preset!r}; there are: {', '.join(preset_names())}")
        _merge(data, read_yaml(PRESETS / f"{preset}.yaml"))
    if file is not None:
        _lay_over(data, read_yaml(Path(file)))
    _lay_over(data, _nested(before or {}))
    given: dict[str, Any] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not re.fullmatch(r"\w+(\.\w+)*", key.strip()):
            raise UserError(f"{override!r} is not an override; write key=value, such as grpo.steps=20")
        try:
            value = parse_yaml(text)
        except yaml.YAMLError as error:
            raise UserError(f"the value in {override!r} is not valid YAML; quote it") from error
        _merge(given, _nested({key.strip(): value}))
    _lay_over(data, given)
    _lay_over(data, _nested(after or {}))
    return parse_config(data)


def _lay_over(data: dict[str, Any], given: dict[str, Any]) -> None:
    """`_merge`, where a new corpus replaces an index that was set without one."""
    there, now = data.get("search"), given.get("search")
    if isinstance(there, dict) and isinstance(now, dict) and there.get("corpus") is None and now.get("corpus"):
        there.pop("index", None)
    _merge(data, given)


def parse_config(data: dict[str, Any]) -> Config:
    """A `Config` from nested dictionaries, checked; see `load_config` for the errors."""
    _check_keys(data, Config, "")
    sections = [item.name for item in fields(Config) if is_dataclass(item.type)]
    try:
        config = TypeAdapter(Config).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        # After section and key, Pydantic names the branch of a union that failed.
        depth = 2 if first["loc"][0] in sections else 1
        key = ".".join(str(part) for part in first["loc"][:depth])
        reason = first["msg"][:1].lower() + first["msg"][1:]
        raise UserError(f"{key}={first['input']!r} is impossible: {reason}") from error
    _check_together(config)
    return config


def dump_config(config: Config) -> str:
    """The settings as YAML that `load_config` reads back as the same."""
    return as_yaml(asdict(config))


def flatten(config: Config) -> dict[str, Any]:
    """Every setting under its dotted key."""
    flat: dict[str, Any] = {}
    for key, value in asdict(config).items():
        inner = {f"{key}.{name}": setting for name, setting in value.items()} if isinstance(value, dict) else None
        flat |= inner or {key: value}
    return flat


_WITHOUT_EFFECT = ("logging.", "checkpoint.", "search.timeout_seconds", "search.retries")


def what_counts(config: Config) -> dict[str, Any]:
    """`flatten`, without the settings that do not change a run's result."""
    return {key: value for key, value in flatten(config).items() if not key.startswith(_WITHOUT_EFFECT)}


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries of settings with dotted keys."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        for part in reversed(str(key).split(".")):
            value = {part: value}
        _merge(nested, value)
    return nested


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = deepcopy(value)  # later values are merged into it, and the caller keeps `other`


def _check_keys(data: dict[str, Any], section: type, prefix: str) -> None:
    known = {item.name: item for item in fields(section)}
    for key, value in data.items():
        if key not in known:
            raise UserError(f"unknown config key {prefix}{key}; {_hint(str(key), prefix, list(known))}")
        kind = known[key].type
        if isinstance(kind, type) and is_dataclass(kind):
            if not isinstance(value, dict):
                raise UserError(
                    f"{prefix}{key} is a section; set one of its keys, such as {prefix}{key}.{fields(kind)[0].name}"
                )
            _check_keys(value, kind, f"{prefix}{key}.")
        elif isinstance(value, bool) and kind is not bool:
            # Pydantic would read true as 1.
            choices = f"; choose {', '.join(map(str, get_args(kind)))}" if get_origin(kind) is Literal else ""
            raise UserError(
                f"{prefix}{key}={str(value).lower()} is impossible: this is not a true/false setting{choices}"
            )


def _hint(key: str, prefix: str, known: list[str]) -> str:
    """A suggestion for an unknown key: a key of the same section, or of another one."""
    if near := difflib.get_close_matches(key, known, n=1):
        return f"did you mean {prefix}{near[0]}?"
    by_name: dict[str, list[str]] = {}
    for dotted in flatten(Config()):
        by_name.setdefault(dotted.rpartition(".")[2], []).append(dotted)
    names = [key] if key in by_name else difflib.get_close_matches(key, by_name, n=2, cutoff=0.75)
    elsewhere = [dotted for name in names for dotted in by_name[name]]
    return f"did you mean {' or '.join(elsewhere)}?" if elsewhere else f"known here: {', '.join(known)}"


def _check_together(config: Config) -> None:
    """Refuses values that are valid alone but not together."""
    for key in ("clip", "top_k"):
        if getattr(config.ofsd, key) and (config.ofsd.divergence, config.ofsd.objective) != ("forward_kl", "distill"):
            raise UserError(f"ofsd.{key} is for ofsd.divergence=forward_kl and ofsd.objective=distill; set it to 0")
    for key, needed in {
        "plain_template": ["{question}"],
        "privileged_template": ["{question}", "{reference}"],
        "direct_template": ["{question}"],
        "rag_template": ["{question}", "{documents}"],
        "information_template": ["{documents}"],
        "document_template": ["{text}"],
    }.items():
        for placeholder in needed:
            if getattr(config.protocol, key).count(placeholder) != 1:
                raise UserError(f"protocol.{key} must contain {placeholder} exactly once")
    if config.protocol.max_turn_tokens > config.protocol.max_completion_tokens:
        raise UserError(
            f"protocol.max_turn_tokens={config.protocol.max_turn_tokens} must be at most "
            f"protocol.max_completion_tokens={config.protocol.max_completion_tokens}"
        )
