"""Lucene indexes: built through Anserini, atomically, and found again by the content of their corpus.

A corpus is JSONL in the wiki-18 form: `id` and `contents`, whose first line is the title and the rest the text.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from searche1_lite.errors import UserError
from searche1_lite.search.base import Passage
from searche1_lite.search.jvm import start_jvm

INDEX_FORMAT = 1
"""Raised whenever an index built by older code must not be used any more."""

METADATA_FILE = "searche1_index.json"


def cache_folder() -> Path:
    """Where indexes are kept: `SEARCHE1_LITE_CACHE`, else `searche1-lite` in the user's cache folder."""
    if folder := os.environ.get("SEARCHE1_LITE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "searche1-lite"


def parse_contents(passage_id: str, contents: str, score: float = 0.0) -> Passage:
    """Splits `contents` into title (first line, wiki-18's surrounding quotes dropped) and text."""
    title, _, text = contents.partition("\n")
    title = title.strip()
    if len(title) >= 2 and title[0] == title[-1] == '"':
        title = title[1:-1]
    return Passage(passage_id, title, text.strip(), score)


def read_corpus(corpus: Path) -> Iterator[tuple[str, str]]:
    """`(id, contents)` of every passage, checked.

    Raises:
        UserError: with file and line number, for an unreadable line, a missing field or an id that came before.
    """
    if not corpus.is_file():
        raise UserError(f"no corpus at {corpus}; give a JSONL file with `id` and `contents`")
    seen: dict[str, int] = {}
    with corpus.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{corpus}:{number}: not a JSON line ({error}); mend or delete it") from error
            if not isinstance(record, dict) or not isinstance(record.get("contents"), str) or "id" not in record:
                raise UserError(f"{corpus}:{number}: a passage needs `id` and a string `contents`; mend or delete it")
            passage_id = str(record["id"])
            if passage_id in seen:
                raise UserError(
                    f"{corpus}:{number}: id {passage_id!r} was already used on line {seen[passage_id]}; make it unique"
                )
            seen[passage_id] = number
            yield passage_id, record["contents"]
    if not seen:
        raise UserError(f"{corpus} holds no passage; give a JSONL file with `id` and `contents`")


def build_index(corpus: Path, out: Path, threads: int = 2) -> None:
    """Builds a BM25 index of `corpus` at `out`, which must not exist. Complete or not there at all.

    Raises:
        UserError: for a faulty corpus, an existing `out`, or if Lucene indexed fewer passages than there are.
    """
    if out.exists():
        raise UserError(f"{out} exists already; delete it or choose another --out")
    next(read_corpus(corpus))  # a missing or empty corpus is told before anything is made
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as staging:
        collection, index = Path(staging) / "collection", Path(staging) / "index"
        collection.mkdir()
        count = 0
        with (collection / "corpus.jsonl").open("w", encoding="utf-8") as file:
            for passage_id, contents in read_corpus(corpus):
                # A lone surrogate is valid in JSON and not in UTF-8, which Lucene needs.
                clean = contents.encode("utf-8", "replace").decode("utf-8")
                file.write(json.dumps({"id": passage_id, "contents": clean}, ensure_ascii=False) + "\n")
                count += 1
        start_jvm()
        from jnius import autoclass

        arguments = {
            "-collection": "JsonCollection",
            "-input": str(collection),
            "-index": str(index),
            "-generator": "DefaultLuceneDocumentGenerator",
            "-threads": str(threads),
            "-memoryBuffer": "256",  # MB; Anserini's own 4096 would fill the Java heap before Lucene writes to disk
        }
        words = [word for pair in arguments.items() for word in pair]
        autoclass("io.anserini.index.IndexCollection").main([*words, "-storeRaw", "-quiet"])
        indexed = (
            autoclass("io.anserini.search.SimpleSearcher")(str(index)).get_total_num_docs() if index.is_dir() else 0
        )
        if indexed != count:
            raise UserError(f"Lucene indexed {indexed} of {count} passages of {corpus}; is the disk full?", exit_code=1)
        (index / METADATA_FILE).write_text(
            json.dumps({"format": INDEX_FORMAT, "passages": count, "sha256": _sha256(corpus)})
        )
        index.rename(out)


def ensure_index(corpus: Path, cache: Path | None = None, threads: int = 2) -> Path:
    """The index of `corpus`, built on first use and again whenever the corpus changed.

    Args:
        corpus: JSONL file.
        cache: folder of indexes; default `cache_folder()`. Several processes may ask at once: one builds, others wait.
    """
    if not corpus.is_file():
        raise UserError(f"no corpus at {corpus}; give a JSONL file with `id` and `contents`")
    folder = (cache or cache_folder()) / "indexes"
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"bm25-v{INDEX_FORMAT}-{_sha256(corpus)[:24]}"
    with FileLock(f"{out}.lock"):
        if not (out / METADATA_FILE).is_file():
            shutil.rmtree(out, ignore_errors=True)
            build_index(corpus, out, threads)
    return out


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
