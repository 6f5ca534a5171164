"""Lucene indexes: built through Anserini, complete or not there, resumable, and found again by what they hold."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.jsonl import read_json
from searche1_lite.runtime.progress import SILENT, Progress, megabytes, say_on_stderr
from searche1_lite.runtime.terminal import one_line
from searche1_lite.search.corpus import CheckedCorpus, check_corpus, corpus_size, read_passages
from searche1_lite.search.folder import other_files
from searche1_lite.search.jvm import start_jvm

INDEX_FORMAT = 1
"""Raised when indexes built by older code must not be used."""

METADATA_FILE = "searche1_index.json"
_BATCH = 2_000
"""Passages per batch, which Lucene spreads over its threads."""
_BATCH_CHARACTERS = 8_000_000
"""The most characters per batch."""


def index_fingerprint(index: Path) -> str:
    """Identifies an index's passages: by its corpus if it was built here, else by its last commit."""
    try:
        digest = read_json(index / METADATA_FILE, "build it again").get("sha256")
    except UserError:
        digest = None
    if not isinstance(digest, str):
        commits = sorted(index.glob("segments_*"))  # each has an id that Lucene draws
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in commits)).hexdigest()
    return digest[:24]


def cache_folder() -> Path:
    """The cache of indexes: `SEARCHE1_LITE_CACHE`, else `searche1-lite` in the user's cache folder."""
    if folder := os.environ.get("SEARCHE1_LITE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "searche1-lite"


def build_index(
    corpus: Path,
    out: Path,
    threads: int = 2,
    *,
    words: int = 100,
    progress: Progress = SILENT,
    say: Callable[[str], None] = say_on_stderr,
    commit_every: int = 100_000,
) -> int:
    """Builds a BM25 index of `corpus` at `out`, which must not exist. Complete or not there at all.

    A build that was interrupted goes on from its last commit: it is kept in a hidden folder beside `out`.

    Args:
        corpus: JSONL, JSONL.gz, or a folder of text files, cut into passages of about `words` words.
        say: receives notices for the user, such as the faulty lines that are left out.
        commit_every: passages between two commits.

    Returns:
        How many passages it has.

    Raises:
        UserError: for a corpus without passages or with a repeated id, an existing `out`, or if Lucene cannot write.
    """
    if out.exists():
        raise UserError(f"{out} exists already; delete it or choose another --out")
    checked = check_corpus(corpus, words, progress, cache_folder() / "corpora")
    _build(corpus, checked, out, threads, words, progress, say, commit_every)
    return checked.passages


def ensure_index(
    corpus: Path,
    cache: Path | None = None,
    threads: int = 2,
    *,
    words: int = 100,
    progress: Progress = SILENT,
    say: Callable[[str], None] = say_on_stderr,
) -> Path:
    """The index of `corpus`, built on first use and again whenever the corpus changed.

    Args:
        corpus: as for `build_index`, which gives the errors too.
        cache: folder of indexes; default `cache_folder()`. Several processes may ask at once: one builds, others wait.
    """
    cache = cache or cache_folder()
    checked = check_corpus(corpus, words, progress, cache / "corpora")
    folder = cache / "indexes"
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"bm25-v{INDEX_FORMAT}-{checked.sha256[:24]}"
    with FileLock(f"{out}.lock"):
        if not (out / METADATA_FILE).is_file():
            shutil.rmtree(out, ignore_errors=True)
            _build(corpus, checked, out, threads, words, progress, say, commit_every=100_000)
    return out


def _build(
    corpus: Path,
    checked: CheckedCorpus,
    out: Path,
    threads: int,
    words: int,
    progress: Progress,
    say: Callable[[str], None],
    commit_every: int,
) -> None:
    staging = out.with_name(f".{out.name}.building")
    staging.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(staging / "lock", blocking=False):
            if warning := checked.warning():
                say(warning)
            if corpus.is_dir() and (others := other_files(corpus)):
                count = "1 file" if len(others) == 1 else f"{len(others):,} files"
                say(f"left out, being neither .txt nor .md: {count}, such as {one_line(str(others[0]), 200)}")
            done = _resume(staging, checked, say)
            _index(corpus, checked, staging, done, threads, words, progress, commit_every)
            metadata = {"format": INDEX_FORMAT, "passages": checked.passages, "sha256": checked.sha256}
            (staging / "index" / METADATA_FILE).write_text(json.dumps(metadata))
            (staging / "index").rename(out)
            shutil.rmtree(staging)
    except Timeout:
        raise UserError(f"another process is building {out}; wait for it, or choose another --out", 1) from None


def _resume(staging: Path, checked: CheckedCorpus, say: Callable[[str], None]) -> int:
    """The passages that an earlier build of the same corpus committed; begins afresh if there are none."""
    index, state = staging / "index", staging / "state.json"
    ours = {"format": INDEX_FORMAT, "sha256": checked.sha256, "passages": checked.passages}
    try:
        found = read_json(state, "delete it")
    except UserError:
        found = None
    start_jvm()
    done = _committed(index) if found == ours else 0
    if 0 < done <= checked.passages:
        say(f"going on with an interrupted build: {done:,} of {checked.passages:,} passages are indexed")
        return done
    if found not in (None, ours):
        say(f"{staging} holds an unfinished index of another corpus; it is replaced")
    shutil.rmtree(index, ignore_errors=True)
    state.write_text(json.dumps(ours))
    return 0


def _committed(index: Path) -> int:
    """Passages in the last readable commit, or 0."""
    if not any(index.glob("segments_*")):
        return 0
    from jnius import JavaException, autoclass

    try:
        searcher = autoclass("io.anserini.search.SimpleSearcher")(str(index.absolute()))
        count = int(searcher.get_total_num_docs())
        searcher.close()
    except JavaException:
        return 0
    return count


def _index(
    corpus: Path,
    checked: CheckedCorpus,
    staging: Path,
    done: int,
    threads: int,
    words: int,
    progress: Progress,
    commit_every: int,
) -> None:
    """Indexes all but the first `done` passages. After every commit the index holds the first so many, no others."""
    index, state, doubtful = staging / "index", staging / "state.json", staging / "doubtful.json"
    with megabytes(progress, f"index {corpus.name}", corpus_size(corpus)) as advance:
        passages = read_passages(corpus, words, advance)
        for _ in islice(passages, done):
            pass
        while chunk := next(chunks := _batches(islice(passages, commit_every)), None):
            before = done
            writer = _writer(index, threads)
            try:
                for batch in chain([chunk], chunks):
                    done += len(batch)
                    if writer.addRawDocuments(batch, pass_by_reference=False) != len(batch):
                        state.rename(doubtful)  # a part of a batch must not be gone on with, should it be committed
                        break
            finally:  # also when interrupted: what was handed over is a whole number of batches, and is kept
                _close(writer)
            if (held := _committed(index)) != done:
                if held == before and doubtful.exists():
                    doubtful.rename(state)
                raise _cannot_write(staging)
    if done != checked.passages:
        state.unlink()
        raise UserError(f"{corpus} was changed while it was indexed; run it again when it is complete", exit_code=1)


def _batches(passages: Iterator[tuple[str, str]]) -> Iterator[list[str]]:
    """Batches of passages as JSON."""
    batch: list[str] = []
    size = 0
    for passage_id, contents in passages:
        batch.append(json.dumps({"id": passage_id, "contents": contents}))
        size += len(contents)
        if len(batch) == _BATCH or size > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _writer(index: Path, threads: int) -> Any:
    """Anserini's indexer, which adds to what is committed at `index`."""
    from jnius import JavaException, autoclass

    # It logs each passage that it could not write, and goes on: the counts tell.
    off = autoclass("org.apache.logging.log4j.Level").OFF
    autoclass("org.apache.logging.log4j.core.config.Configurator").setLevel("io.anserini.index", off)
    options = {
        "-collection": "JsonCollection",
        "-input": "passages",
        "-index": str(index.absolute()),
        "-generator": "DefaultLuceneDocumentGenerator",
        "-threads": str(threads),
        "-memoryBuffer": "256",  # MB; Anserini's own 4096 would fill the Java heap before Lucene writes to disk
    }
    words = [word for pair in options.items() for word in pair]
    try:
        return autoclass("io.anserini.index.SimpleIndexer")([*words, "-storeRaw", "-append"])
    except JavaException as error:
        raise _cannot_write(index.parent) from error


def _close(writer: Any) -> None:
    from jnius import JavaException

    # On a full disk Lucene closes the index by itself, and Anserini fails to do so again: the counts tell.
    with suppress(JavaException):
        writer.close()


def _cannot_write(staging: Path) -> UserError:
    free = shutil.disk_usage(staging).free / 2**20
    return UserError(
        f"Lucene could not write the index in {staging} ({free:,.0f} MB are free there); make room and run it again, "
        "it goes on from what is there",
        exit_code=1,
    )
