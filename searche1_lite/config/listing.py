"""Lists all settings with value, default, type and meaning; the texts are the docstrings of `settings.py`."""

import difflib
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from pydantic import TypeAdapter

from searche1_lite.config import Config, flatten
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.yaml_file import as_yaml


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting."""

    name: str
    """Within its section."""
    value: Any
    default: Any
    kind: str
    """The type, choices or range, in words."""
    meaning: str


@dataclass(frozen=True, slots=True)
class Section:
    """One dataclass of settings."""

    name: str
    """The prefix of its keys; "" for the top level."""
    meaning: str
    settings: list[Setting]


def list_settings(config: Config, wanted: Sequence[str] = ()) -> list[Section]:
    """The settings in their order, section by section.

    Args:
        wanted: sections, such as `grpo`, or settings, such as `grpo.steps`; none: everything.

    Raises:
        UserError: for an unknown name; suggests known ones.
    """
    _check_wanted(wanted)
    kinds = {item.name: item.type for item in fields(Config)}
    parts = {"": Config} | {name: kind for name, kind in kinds.items() if isinstance(kind, type) and is_dataclass(kind)}
    values, defaults = flatten(config), flatten(Config())
    found = []
    for part, holder in parts.items():
        schema = TypeAdapter(holder).json_schema()
        settings = []
        for name, item in schema["properties"].items():
            key = f"{part}.{name}" if part else name
            if name not in parts and (not wanted or part in wanted or key in wanted):
                meaning = " ".join(item.get("description", "").split())
                settings.append(Setting(name, values[key], defaults[key], describe_kind(item), meaning))
        if settings:
            found.append(Section(part, " ".join(schema.get("description", "").split()), settings))
    return found


def describe_kind(schema: dict[str, Any]) -> str:
    """The type, choices or range of a value, in words, from its JSON schema."""
    if "anyOf" in schema:
        kinds = [describe_kind(choice) for choice in schema["anyOf"]]
        return " or ".join([kind for kind in kinds if kind != "null"] + ["null"] * ("null" in kinds))
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if schema["type"] == "array":
        return f"list of {describe_kind(schema['items'])}"
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true | false"}
    kind = names.get(schema["type"], schema["type"])
    low, above, high = (schema.get(bound) for bound in ("minimum", "exclusiveMinimum", "maximum"))
    if low is not None and high is not None:
        return f"{kind} from {low:g} to {high:g}"
    return kind + (f", at least {low:g}" if low is not None else f", above {above:g}" if above is not None else "")


def one_line_value(value: Any) -> str:
    """The value as in an override; a long text is cut."""
    text = as_yaml({"": value}).partition(":")[2]
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:50]}... ({len(value)} characters)"


def as_commented_yaml(sections: Sequence[Section]) -> str:
    """YAML that `--config` reads back as the same values, with each meaning as a comment above."""
    lines: list[str] = []
    for section in sections:
        if section.name:
            lines += ["", *_comment(section.meaning, ""), f"{section.name}:"]
        for setting in section.settings:
            lines += _comment(f"{setting.meaning} [{setting.kind}]", "  " if section.name else "")
            entry: dict[str, Any] = {setting.name: setting.value}
            text = as_yaml({section.name: entry}).partition("\n")[2] if section.name else as_yaml(entry)
            lines.append(text.rstrip("\n"))
    return "\n".join(lines).lstrip("\n") + "\n"


def _comment(text: str, indent: str) -> list[str]:
    start = f"{indent}# "
    return textwrap.wrap(text, 118, initial_indent=start, subsequent_indent=start, break_on_hyphens=False)


def _check_wanted(wanted: Sequence[str]) -> None:
    top, keys = [item.name for item in fields(Config)], list(flatten(Config()))
    for word in wanted:
        if word not in top and word not in keys:
            by_name = [key for key in keys if key.rpartition(".")[2] == word]
            near = by_name or difflib.get_close_matches(word, dict.fromkeys([*top, *keys]), n=3)
            meant = f"did you mean {' or '.join(near)}? " if near else ""
            raise UserError(f"there is no section or setting {word!r}; {meant}there are {', '.join(top)}")
