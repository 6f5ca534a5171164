"""A corpus: passages read from a JSONL file (gzip too) or a folder of text files, and checked once before indexing.

A JSONL corpus is in the wiki-18 form: `id` and `contents`, whose first line is the title and the rest the text.
"""

import gzip
import hashlib
import io
import json
import os
import time
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.jsonl import MAX_LINE, JsonFault, bounded_lines, parse_json, read_json
from searche1_lite.runtime.progress import SILENT, Progress, megabytes
from searche1_lite.search.folder import SUFFIXES, folder_passages, text_files

_MAX_ID = 1000
_NAMED = 5
_BLANK = "".join(map(chr, range(33)))
"""The characters that Java's `trim` removes: Anserini refuses contents that are empty after it."""
_SETTLED = 2.0
"""Seconds after a change in which another change may keep the modification time."""


class _Fault(Exception):
    """The reason why a line is not a passage."""


@dataclass(frozen=True, slots=True)
class CheckedCorpus:
    """The result of the first pass over a corpus."""

    sha256: str
    """Of the content; for a folder also of how it is cut into passages."""
    passages: int
    faults: int
    named: tuple[str, ...]
    """The first faulty lines: file, line number and reason."""

    def warning(self) -> str | None:
        """The faults in one line, if there are any."""
        if not self.faults:
            return None
        more = f"; and {self.faults - len(self.named):,} more" if self.faults > len(self.named) else ""
        lines = "1 faulty line" if self.faults == 1 else f"{self.faults:,} faulty lines"
        return f"skipped {lines}: {'; '.join(self.named)}{more}"


def corpus_size(corpus: Path) -> int:
    """Bytes to be read, for progress."""
    if corpus.is_dir():
        return sum(path.stat().st_size for path in text_files(corpus))
    return corpus.stat().st_size


def read_passages(corpus: Path, words: int, on_bytes: Callable[[int], None]) -> Iterator[tuple[str, str]]:
    """`(id, contents)` of every passage that is not faulty, always in the same order.

    Args:
        words: about how many a passage has, where `corpus` is a folder of text files.
        on_bytes: receives the number of further bytes read.

    Raises:
        UserError: for a gzip file that is cut short or damaged.
    """
    if corpus.is_dir():
        yield from folder_passages(corpus, words, lambda name, data: on_bytes(len(data)))
    else:
        for _, passage_id, contents in _read_lines(corpus, lambda data: on_bytes(len(data)), lambda *fault: None):
            yield passage_id, contents


def check_corpus(
    corpus: Path, words: int = 100, progress: Progress = SILENT, memory: Path | None = None
) -> CheckedCorpus:
    """Reads all of a corpus once: counts passages and faults, hashes the content, refuses repeated ids.

    Args:
        memory: a folder that remembers what was found, for as long as the corpus is not changed.

    Raises:
        UserError: if it is not there, holds no passage, repeats an id, or changes while it is read.
    """
    if not corpus.is_dir() and not corpus.is_file():
        raise UserError(f"no corpus at {corpus}; give a JSONL file with `id` and `contents`, or a folder of text files")
    stamp, changed = _stamp(corpus)
    note = memory / f"{_key(corpus, words)}.json" if memory else None
    if note and (known := _recall(note, stamp)):
        return known
    with megabytes(progress, f"check {corpus.name}", corpus_size(corpus)) as advance:
        checked = _check_folder(corpus, words, advance) if corpus.is_dir() else _check_file(corpus, advance)
    if _stamp(corpus)[0] != stamp:
        raise UserError(f"{corpus} was changed while it was read; run it again when it is complete", exit_code=1)
    if note and time.time() - changed > _SETTLED:
        _remember(note, stamp, checked)
    return checked


def _check_folder(corpus: Path, words: int, advance: Callable[[int], None]) -> CheckedCorpus:
    digest = hashlib.sha256(f"folder of text files, {words} words\n".encode())

    def on_file(name: str, data: bytes) -> None:
        digest.update(f"{len(name)} {name} {len(data)} ".encode())
        digest.update(data)
        advance(len(data))

    count = sum(1 for _ in folder_passages(corpus, words, on_file))
    if not count:
        raise UserError(f"{corpus} holds no text; give a folder with {' or '.join(SUFFIXES)} files, or a JSONL file")
    return CheckedCorpus(digest.hexdigest(), count, 0, ())


def _check_file(corpus: Path, advance: Callable[[int], None]) -> CheckedCorpus:
    digest, hashes = hashlib.sha256(), array("q")
    named: list[str] = []
    faults = 0

    def on_bytes(data: memoryview) -> None:
        digest.update(data)
        advance(len(data))

    def on_fault(number: int, reason: str) -> None:
        nonlocal faults
        faults += 1
        if len(named) < _NAMED:
            named.append(f"{corpus}:{number}: {reason}")

    for _, passage_id, _ in _read_lines(corpus, on_bytes, on_fault):
        hashes.append(hash(passage_id))
    if not hashes and faults:
        raise UserError(f"every line of {corpus} is faulty: {named[0]}; a line is JSON with `id` and `contents`")
    if not hashes:
        raise UserError(f"{corpus} holds no passage; give a JSONL file with `id` and `contents`")
    count = len(hashes)
    _refuse_repeated_ids(corpus, hashes)
    return CheckedCorpus(digest.hexdigest(), count, faults, tuple(named))


def _refuse_repeated_ids(corpus: Path, hashes: "array[int]") -> None:
    """Finds equal 64-bit hashes first, so that 21 million ids need 168 MB, and looks again at those lines only."""
    import numpy

    ordered = numpy.frombuffer(hashes, dtype=numpy.int64)
    ordered.sort()
    repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not repeated:
        return
    seen: dict[str, int] = {}
    for number, passage_id, _ in _read_lines(corpus, lambda data: None, lambda *fault: None):
        if hash(passage_id) in repeated:
            if passage_id in seen:
                raise UserError(
                    f"{corpus}:{number}: id {passage_id[:200]!r} was already used on line {seen[passage_id]}; "
                    "make it unique"
                )
            seen[passage_id] = number


def _read_lines(
    corpus: Path, on_bytes: Callable[[memoryview], None], on_fault: Callable[[int, str], None]
) -> Iterator[tuple[int, str, str]]:
    """`(line number, id, contents)` of the lines that are passages; blank lines are neither passage nor fault."""
    with open_corpus(corpus, on_bytes) as file:
        number = 0
        try:
            for number, line in bounded_lines(file):
                try:
                    if line is None:
                        raise _Fault(f"longer than {MAX_LINE // 2**20} MB")
                    if number == 1:
                        line = line.removeprefix(b"\xef\xbb\xbf")
                    if not line.isspace():
                        yield number, *_parse(line)
                except _Fault as fault:
                    on_fault(number, str(fault))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(
                f"{corpus} is cut short or damaged after line {number} ({error}); fetch or make it again", exit_code=1
            ) from error


def _parse(line: bytes) -> tuple[str, str]:
    try:
        record = parse_json(line)
    except JsonFault as fault:
        reason = str(fault)
        raise _Fault(reason if reason.startswith("not UTF-8") else f"not a JSON line ({reason})") from fault
    if not isinstance(record, dict):
        raise _Fault("not a JSON object")
    passage_id, contents = record.get("id"), record.get("contents")
    if not isinstance(contents, str) or not isinstance(passage_id, str | int) or isinstance(passage_id, bool):
        raise _Fault("a passage needs `id` and a string `contents`")
    passage_id = str(passage_id)
    # A lone surrogate is valid in JSON and not in UTF-8, which Lucene needs.
    if len(passage_id) > _MAX_ID or not passage_id or not _is_unicode(passage_id):
        raise _Fault(f"`id` is empty, longer than {_MAX_ID} characters or not Unicode")
    if not contents.strip() or not contents.strip(_BLANK):
        raise _Fault("`contents` is empty")
    return passage_id, contents if _is_unicode(contents) else contents.encode("utf-8", "replace").decode("utf-8")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class _Watched(io.RawIOBase):
    """A file that passes the bytes read to a function."""

    def __init__(self, path: Path, on_bytes: Callable[[memoryview], None]) -> None:
        self._file, self._on_bytes = path.open("rb", buffering=0), on_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self._on_bytes(memoryview(buffer)[:count])
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b" or path.suffix == ".gz"


def open_corpus(corpus: Path, on_bytes: Callable[[memoryview], None]) -> BinaryIO:
    """The content of a file, unpacked if it is gzip; `on_bytes` sees the bytes as they lie on disk."""
    raw = io.BufferedReader(_Watched(corpus, on_bytes), 2**20)
    return io.BufferedReader(gzip.GzipFile(fileobj=raw), 2**20) if is_gzip(corpus) else raw


def _stamp(corpus: Path) -> tuple[str, float]:
    """Changes whenever the corpus does, without reading it; and the time of the last change."""
    files = text_files(corpus) if corpus.is_dir() else [corpus]
    digest, latest = hashlib.sha256(), 0.0
    for path in files:
        status = path.stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode("utf-8", "replace"))
        latest = max(latest, status.st_ctime)
    return digest.hexdigest(), latest


def _key(corpus: Path, words: int) -> str:
    return hashlib.sha256(f"{words} {corpus.resolve()}".encode("utf-8", "replace")).hexdigest()[:24]


def _recall(note: Path, stamp: str) -> CheckedCorpus | None:
    try:
        kept = read_json(note, "delete it")
        if kept.pop("stamp") == stamp:
            return CheckedCorpus(**{**kept, "named": tuple(kept["named"])})
    except (UserError, KeyError, TypeError):
        pass
    return None


def _remember(note: Path, stamp: str, checked: CheckedCorpus) -> None:
    part = note.with_suffix(f".{os.getpid()}.part")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(asdict(checked) | {"stamp": stamp}), encoding="utf-8")
        part.replace(note)
    except OSError:  # a cache that cannot be written to only costs time
        part.unlink(missing_ok=True)
