"""JSON and JSONL from untrusted files: bounded reading with one-line faults."""

import json
from collections.abc import Iterator
from gzip import GzipFile
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from searche1_lite.runtime.errors import UserError

MAX_LINE = 16 * 2**20
"""Bytes; a longer line is a fault and is never held in memory as a whole."""
MAX_FILE = 64 * 2**20
"""Bytes of a file that is one JSON value."""
_MAX_DEPTH = 100
"""Nested lists and objects; code that walks through them recurses."""


class JsonFault(ValueError):
    """Why a text is not usable JSON, in one line."""


def parse_json(text: bytes | str, strict: bool = False) -> Any:
    """The JSON value in `text`.

    Args:
        strict: also refuse NaN, infinities and duplicate keys.

    Raises:
        JsonFault: for text that cannot be read, or is nested more than 100 deep.
    """
    hooks: dict[str, Any] = {"object_pairs_hook": _unique, "parse_constant": _not_json} if strict else {}
    try:
        decoded = text.decode() if isinstance(text, bytes) else text
        value = json.loads(decoded.removeprefix("\ufeff"), **hooks)
    except UnicodeDecodeError as error:
        raise JsonFault(f"not UTF-8 ({error.reason} at byte {error.start + 1})") from error
    except RecursionError as error:
        raise JsonFault("nested too deeply") from error
    except json.JSONDecodeError as error:
        raise JsonFault(f"{error.msg} at character {error.pos + 1}") from error
    except ValueError as error:  # also a number with thousands of digits
        raise JsonFault(str(error)[:80]) from error
    if decoded.count("[") + decoded.count("{") > _MAX_DEPTH and _is_deeper(value, _MAX_DEPTH):
        raise JsonFault("nested too deeply")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise JsonFault(f"duplicate key {next(key for key in keys if keys.count(key) > 1)[:60]!r}")
    return found


def _not_json(name: str) -> NoReturn:
    raise JsonFault(f"{name} is not JSON")


def _is_deeper(value: Any, limit: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(limit == 0 or _is_deeper(item, limit - 1) for item in inner)


def read_json(path: Path, remedy: str, exit_code: int = 2) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        remedy: what to do if it cannot be read, in a few words.

    Raises:
        UserError: if the file is missing, too large, or not a JSON object.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise JsonFault(f"larger than {MAX_FILE // 2**20} MB")
        value = parse_json(data)
        if not isinstance(value, dict):
            raise JsonFault("not a JSON object")
    except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}; {remedy}", exit_code) from error
    return value


def bounded_lines(file: BinaryIO | GzipFile) -> Iterator[tuple[int, bytes | None]]:
    """The lines of a file with their numbers from 1; None for a line longer than `MAX_LINE`."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        too_long = len(line) > MAX_LINE and not line.endswith(b"\n")
        yield number, None if too_long else line
        while too_long and (rest := file.readline(2**20)):
            too_long = not rest.endswith(b"\n")
