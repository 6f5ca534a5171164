"""YAML as settings are written in it: read safely and within bounds, and written so that it reads back as the same."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from searche1_lite.runtime.errors import UserError

_MAX_YAML = 2**20
"""Bytes."""
_MAX_DEPTH, _MAX_NODES = 50, 20_000


class _Dumper(yaml.SafeDumper):
    """Writes the line breaks that only Unicode knows as escapes; left as they are, YAML would read them as blanks."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if any(character in data for character in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)


def as_yaml(data: dict[str, Any]) -> str:
    """Text that `parse_yaml` reads back as the same, in the order of the keys."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice, where YAML keeps the last one in silence, and a key that is not a plain word.

    Also what is nested deep, or grows large where aliases are written out: copies and messages write them out.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, "nested too deeply", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _written_out(node, {}) > _MAX_NODES:
            raise yaml.composer.ComposerError(None, None, "its aliases stand for too much", node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be one word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _written_out(node: yaml.Node, known: dict[int, float]) -> float:
    """How many nodes there are below one, each alias counted as what it stands for; infinity for an endless one."""
    if id(node) not in known:
        known[id(node)] = float("inf")  # for an alias of something that it is itself part of
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_written_out(part, known) for part in parts)
    return known[id(node)]


def parse_yaml(text: str) -> Any:
    """A YAML document, read safely and within bounds.

    Raises:
        yaml.YAMLError: for whatever it cannot be read as.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        # PyYAML converts a date such as 2001-99-99 or a tag such as `!!int x` without a check.
        raise yaml.YAMLError(f"a value cannot be converted: {str(error)[:80]}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of `key: value` lines, read safely; UserError where it is not one."""
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
        raise UserError(f"{path}{place}: not valid YAML ({problem}); mend it") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold `key: value` lines, not a {type(data).__name__}")
    return data
