"""YAML settings files: safe, bounded reading, and writing that reads back as the same values."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from searche1_lite.runtime.errors import UserError

_MAX_YAML = 2**20
"""Bytes."""
_MAX_NODES = 20_000
"""With aliases expanded: copies and messages expand them."""


class _Dumper(yaml.SafeDumper):
    """Escapes Unicode line breaks, which YAML would read back as blanks."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if any(character in data for character in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, keys that are not scalars, and documents that grow large through aliases."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _expanded_size(node, {}) > _MAX_NODES:
            raise yaml.composer.ComposerError(None, None, "its aliases expand to too many values", node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be one word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _expanded_size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """The number of nodes, each alias counted as its target; infinity for a node that contains itself."""
    if id(node) not in sizes:
        sizes[id(node)] = float("inf")
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        sizes[id(node)] = 1 + sum(_expanded_size(part, sizes) for part in parts)
    return sizes[id(node)]


def as_yaml(data: dict[str, Any]) -> str:
    """YAML text of `data`, in the order of its keys."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def parse_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        yaml.YAMLError: for any text that cannot be read.
    """
    try:
        return yaml.load(text, _Loader)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        # PyYAML converts a date such as 2001-99-99 or a tag such as `!!int x` without a check.
        raise yaml.YAMLError(f"a value cannot be converted: {str(error)[:80]}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; empty for an empty file.

    Raises:
        UserError: if the file cannot be read or holds no mapping.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_YAML + 1)
        if len(content) > _MAX_YAML:
            raise UserError(f"the config {path} is larger than {_MAX_YAML // 2**20} MB; check the path")
        data = parse_yaml(content.decode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark is not None else ""
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise UserError(f"{path}{place}: not valid YAML ({problem}); fix it") from error
    if not isinstance(data, dict | None):
        raise UserError(f"{path} must hold `key: value` lines, not a {type(data).__name__}")
    return data or {}
