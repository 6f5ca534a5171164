"""A folder of text files as a corpus: which files, and how their text is cut into passages."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

SUFFIXES = (".txt", ".md")

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]{1,200}")
"""A word, for counting: Chinese and Japanese have no spaces, so there each character is one."""
_PARAGRAPH_END = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
_HEADING = re.compile(r"^#{1,6}[ \t]+(.*)$", re.MULTILINE)


def text_files(folder: Path) -> list[Path]:
    """The `.txt` and `.md` files below `folder`, sorted; what is hidden (a leading dot) is left out."""
    return [path for path in _files(folder) if path.name.lower().endswith(SUFFIXES)]


def other_files(folder: Path) -> list[Path]:
    """The files below `folder` that are neither text nor hidden, sorted: nothing of them is indexed."""
    return [path for path in _files(folder) if not path.name.lower().endswith(SUFFIXES)]


def _files(folder: Path) -> list[Path]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def folder_passages(
    folder: Path, words: int, on_file: Callable[[str, bytes], None] | None = None
) -> Iterator[tuple[str, str]]:
    """`(id, contents)` of every passage: the id is the file's relative path and `#1`, `#2`, ...

    The title is the file's first heading if it is Markdown, else its name. Bytes that are no UTF-8 are replaced.

    Args:
        on_file: receives each file's relative path and content before its passages come.
    """
    for path in text_files(folder):
        data = path.read_bytes()
        name = os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "replace")
        if on_file:
            on_file(name, data)
        text = data.decode("utf-8-sig", "replace").replace("\0", " ")
        title, body = path.stem.encode("utf-8", "replace").decode("utf-8"), text
        heading = _HEADING.search(text) if path.suffix.lower() == ".md" else None
        if heading and (named := heading.group(1).rstrip(" \t#").strip()):
            title, body = named, text[: heading.start()] + text[heading.end() :]
        for number, passage in enumerate(split_text(body, words), start=1):
            yield f"{name}#{number}", f"{title}\n{passage}"


def split_text(text: str, words: int) -> Iterator[str]:
    """Passages of about `words` words, none longer, cut at the ends of paragraphs or sentences where there are any."""
    current: list[str] = []
    size = 0
    for paragraph in _PARAGRAPH_END.split(text):
        for sentence in _SENTENCE_END.split(paragraph.strip()):
            for piece in _cut(sentence, words):
                count = len(_WORD.findall(piece))
                if size + count > words and current:
                    yield " ".join(current)
                    current, size = [], 0
                if count:
                    current.append(" ".join(piece.split()))
                    size += count
        if size > 0.7 * words:  # a passage that ends with its paragraph reads better than a full one
            yield " ".join(current)
            current, size = [], 0
    if current:
        yield " ".join(current)


def _cut(sentence: str, words: int) -> Iterator[str]:
    """A sentence as it is, or in parts of `words` words if it is longer."""
    starts = [match.start() for match in _WORD.finditer(sentence)][::words]
    for start, end in zip(starts, [*starts[1:], None], strict=False):
        yield sentence[start:end]
