"""The text of passages, looked up by id in a JSONL file, for an index that stores none."""

import gzip
import hashlib
import os
import shutil
import zlib
from array import array
from pathlib import Path
from typing import Any

from filelock import FileLock

from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.jsonl import MAX_LINE, JsonFault, bounded_lines, parse_json
from searche1_lite.runtime.progress import SILENT, Progress, megabytes
from searche1_lite.runtime.sealed_folder import write_atomically
from searche1_lite.search.corpus import is_gzip, open_corpus
from searche1_lite.search.download import full_disk_explained


class JsonlStore:
    """Passages of a JSONL corpus by id, read from the file when asked for.

    A table of the ids' hashes and where their lines begin is made once, in `cache`, and made again when the file
    changes: 16 bytes a passage, of which only what is looked up is read. A gzip file is unpacked there once.
    `fingerprint` tells whether all passages are the same.

    Raises:
        UserError: if the file is missing, holds no passage, is cut short, or there is no room to unpack it.
    """

    def __init__(self, corpus: Path, cache: Path, progress: Progress = SILENT) -> None:
        if not corpus.is_file():
            raise UserError(f"no corpus at {corpus}; set search.corpus to the JSONL file of this index")
        import numpy

        cache.mkdir(parents=True, exist_ok=True)
        name = _name(corpus)
        with FileLock(cache / f"{name}.lock"):
            self._path = _unpacked(corpus, cache / f"{name}.jsonl", progress) if is_gzip(corpus) else corpus
            table, digest = cache / f"{name}.offsets.npy", cache / f"{name}.sha256"
            if not (table.is_file() and digest.is_file()):
                write_atomically(digest, _write_table(self._path, table, progress))
        try:
            self.fingerprint = digest.read_text()[:24]
            self._hashes, self._offsets = numpy.load(table, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{table} is damaged ({error}); delete it, and it is made again", exit_code=1) from error
        self._file = self._path.open("rb")

    def contents(self, passage_id: str) -> str:
        """The title in the first line, and the text.

        Raises:
            UserError: if the corpus has no such passage.
        """
        import numpy

        wanted = numpy.int64(_hash(passage_id))
        position = int(numpy.searchsorted(self._hashes, wanted))
        while position < len(self._hashes) and self._hashes[position] == wanted:
            record = _record(self._line(int(self._offsets[position])))
            if record is not None and str(record["id"]) == passage_id:
                return str(record["contents"])
            position += 1
        raise UserError(f"{self._path} has no passage {passage_id!r}; set search.corpus to the file of this index", 1)

    def _line(self, offset: int) -> bytes:
        """The line that begins at `offset`; `pread`, so that threads do not share a position."""
        line = b""
        while b"\n" not in line and len(line) <= MAX_LINE:
            part = os.pread(self._file.fileno(), 8192, offset + len(line))
            if not part:
                break
            line += part
        return line.partition(b"\n")[0]


def _name(corpus: Path) -> str:
    status = corpus.stat()
    text = f"{corpus.resolve()} {status.st_size} {status.st_mtime_ns}"
    return f"{corpus.name.split('.')[0][:60]}-{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:16]}"


def _hash(passage_id: str) -> int:
    """64 bits, the same in every process."""
    digest = hashlib.blake2b(passage_id.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _unpacked(corpus: Path, place: Path, progress: Progress) -> Path:
    """`corpus` without gzip, at `place`, where it may be already."""
    if place.is_file():
        return place
    part, size = place.with_suffix(".part"), corpus.stat().st_size
    try:
        with (
            full_disk_explained(place.parent),
            megabytes(progress, f"unpack {corpus.name}", size) as advance,
            open_corpus(corpus, lambda data: advance(len(data))) as packed,
            part.open("wb") as file,
        ):
            shutil.copyfileobj(packed, file, 2**22)
        part.replace(place)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{corpus} is cut short or damaged ({error}); fetch it again", exit_code=1) from error
    finally:
        part.unlink(missing_ok=True)
    return place


def _write_table(corpus: Path, table: Path, progress: Progress) -> str:
    """(2, passages) int64 at `table`: hashes in order, and the byte at which each one's line begins.

    Returns:
        The SHA-256 of all lines that are passages.
    """
    import numpy

    hashes, offsets, begin, content = array("q"), array("q"), 0, hashlib.sha256()
    with megabytes(progress, f"look up {corpus.name}", corpus.stat().st_size) as advance, corpus.open("rb") as file:
        for _, line in bounded_lines(file):
            if line is not None and (record := _record(line)) is not None:
                hashes.append(_hash(str(record["id"])))
                offsets.append(begin)
                content.update(line.strip() + b"\n")
            end = file.tell()
            advance(end - begin)
            begin = end
    if not hashes:
        raise UserError(f"{corpus} holds no passage; search.corpus must be a JSONL file with `id` and `contents`")
    order = numpy.argsort(numpy.frombuffer(hashes, dtype=numpy.int64), kind="stable")
    part = table.with_suffix(".part")
    try:
        with full_disk_explained(table.parent), part.open("wb") as file:
            columns = (numpy.frombuffer(column, dtype=numpy.int64)[order] for column in (hashes, offsets))
            numpy.save(file, numpy.stack(list(columns)))
        part.replace(table)
    finally:
        part.unlink(missing_ok=True)
    return content.hexdigest()


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record: Any = parse_json(line)
    except JsonFault:
        return None
    if not isinstance(record, dict) or "id" not in record or not isinstance(record.get("contents"), str):
        return None
    return record
