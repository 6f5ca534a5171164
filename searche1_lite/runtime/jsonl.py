"""JSON and JSONL that may come from anywhere: read within bounds, and a fault is told in one line."""

import json
from collections.abc import Iterator
from gzip import GzipFile
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from searche1_lite.runtime.errors import UserError

MAX_LINE = 16 * 2**20
"""Bytes; a longer line is a fault, and is never held whole."""
MAX_FILE = 64 * 2**20
"""Bytes of a file that is one JSON value."""
_MAX_DEPTH = 100
"""Lists and objects inside one another; what walks through them recurses."""


class JsonFault(ValueError):
    """Why something is no JSON that can be used, in one line."""


def parse_json(text: bytes | str, strict: bool = False) -> Any:
    """The JSON value in `text`.

    Args:
        strict: refuse what JSON does not have or does not define: NaN and infinities, a key that stands twice.

    Raises:
        JsonFault: for whatever cannot be read, or is nested more than 100 deep.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(
            text.removeprefix("\ufeff"),
            object_pairs_hook=_unique if strict else None,
            parse_constant=_no_number if strict else None,
        )
    except UnicodeDecodeError as error:
        raise JsonFault(f"not UTF-8 ({error.reason} at byte {error.start + 1})") from error
    except RecursionError as error:
        raise JsonFault("nested too deeply") from error
    except json.JSONDecodeError as error:
        raise JsonFault(f"{error.msg} at character {error.pos + 1}") from error
    except JsonFault:
        raise
    except ValueError as error:  # a number with thousands of digits
        raise JsonFault(str(error)[:80]) from error
    if text.count("[") + text.count("{") > _MAX_DEPTH and _is_deep(value):
        raise JsonFault("nested too deeply")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise JsonFault(f"key {next(key for key in keys if keys.count(key) > 1)[:60]!r} stands twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise JsonFault(f"{name} is no JSON")


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def read_json(path: Path, remedy: str, exit_code: int = 2) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        remedy: what to do where it cannot be read, in a few words.

    Raises:
        UserError: if it is not there, too large, or no JSON object.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}; {remedy}", exit_code) from error
    try:
        if len(data) > MAX_FILE:
            raise JsonFault(f"larger than {MAX_FILE // 2**20} MB")
        value = parse_json(data)
        if not isinstance(value, dict):
            raise JsonFault("no JSON object")
    except JsonFault as fault:
        raise UserError(f"cannot read {path}: {fault}; {remedy}", exit_code) from fault
    return value


def bounded_lines(file: BinaryIO | GzipFile) -> Iterator[tuple[int, bytes | None]]:
    """The lines of a file with their numbers from 1; None for one that is longer than `MAX_LINE`."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) <= MAX_LINE or line.endswith(b"\n"):
            yield number, line
            continue
        while (rest := file.readline(2**20)) and not rest.endswith(b"\n"):
            pass
        yield number, None
