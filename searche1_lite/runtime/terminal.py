"""Text of models, documents and people, made fit for a terminal: it can neither format nor steer it."""

import unicodedata


def one_line(text: str, limit: int) -> str:
    """`text` on one line of at most `limit` characters, with nothing in it that a terminal would obey.

    Control characters, escapes, direction marks and line breaks become spaces, and runs of spaces one.
    """
    beginning = text[: 8 * limit]  # a text of megabytes is not looked through
    line = " ".join("".join(map(_shown, beginning)).split())
    return line if len(line) <= limit and len(beginning) == len(text) else f"{line[: limit - 1].rstrip()}…"


def plain_text(text: str) -> str:
    """`text` with nothing in it that a terminal would obey but its line breaks: the same characters become spaces."""
    return "".join(character if character == "\n" else _shown(character) for character in text)


def _shown(character: str) -> str:
    return " " if unicodedata.category(character)[0] in "CZ" else character
