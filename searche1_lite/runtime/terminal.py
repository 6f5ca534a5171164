"""Untrusted text made safe for a terminal: no control characters or escape sequences."""

import unicodedata


def one_line(text: str, limit: int) -> str:
    """`text` on one line of at most `limit` characters.

    Control characters, escapes, direction marks and line breaks become spaces, and runs of spaces one.
    """
    beginning = text[: 8 * limit]  # bounds the work for a text of megabytes
    line = " ".join("".join(map(_shown, beginning)).split())
    return line if len(line) <= limit and len(beginning) == len(text) else f"{line[: limit - 1].rstrip()}…"


def plain_text(text: str) -> str:
    """`text` with its line breaks; all other characters that `one_line` replaces become spaces."""
    return "".join(character if character == "\n" else _shown(character) for character in text)


def _shown(character: str) -> str:
    return " " if unicodedata.category(character)[0] in "CZ" else character
