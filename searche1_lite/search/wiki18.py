"""Search-R1's Wikipedia of 2018: its BM25 index and its corpus, 21 million passages, from the Hugging Face hub."""

import json
from collections.abc import Callable
from pathlib import Path

from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.jsonl import read_json
from searche1_lite.search.bm25 import is_lucene_index
from searche1_lite.search.prebuilt import agree, need_room

NAME = "wiki-18"
INDEX_REPO, INDEX_FILES = "PeterJinGo/wiki-18-bm25-index", "bm25/*"
CORPUS_REPO, CORPUS_FILE = "PeterJinGo/wiki-18-corpus", "wiki-18.jsonl.gz"
_GB = 10**9
INDEX_SIZE, PACKED_SIZE, UNPACKED_SIZE = int(2.5 * _GB), 5 * _GB, 14 * _GB
"""Bytes, about."""


def fetch_wiki18(corpus: Path | None, cache: Path, confirm: Callable[[str], bool]) -> tuple[Path, Path]:
    """The index's folder and the corpus' file; both are downloaded unless they were before.

    Args:
        corpus: the corpus, if the user has it; then it is not downloaded.
        cache: where is noted what was downloaded, and where the corpus is going to be unpacked.

    Raises:
        UserError: if there is no room, the answer was no, or the hub cannot give them.
    """
    note = cache / f"{NAME}.json"
    try:
        known = read_json(note, "delete it")
    except UserError:
        known = {}
    if not all(isinstance(known.get(key), str) for key in ("index", "corpus")):
        known = {}
    index = Path(known["index"]) if known and is_lucene_index(Path(known["index"])) else None
    if corpus is None and known and Path(known["corpus"]).is_file():
        corpus = Path(known["corpus"])
    if index is None or corpus is None:
        _ask(index is None, corpus is None, cache, confirm)
    index = index or _fetch_index()
    corpus = corpus or _fetch_corpus()
    cache.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({"index": str(index), "corpus": str(corpus)}), encoding="utf-8")
    return index, corpus


def _ask(index: bool, corpus: bool, cache: Path, confirm: Callable[[str], bool]) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    parts, size = [], 0
    if index:
        parts.append("2.5 GB of index")
        size += INDEX_SIZE
    if corpus:
        parts.append("5 GB of corpus (14 GB unpacked)")
        size += PACKED_SIZE
        need_room(cache, UNPACKED_SIZE)
    need_room(Path(HF_HUB_CACHE), size)
    agree(confirm, f"downloading {NAME} takes about {' and '.join(parts)}, in {HF_HUB_CACHE} and {cache}")


def _fetch_index() -> Path:
    from searche1_lite.runtime.hub import download_folder

    folder = download_folder(INDEX_REPO, repo_type="dataset", patterns=[INDEX_FILES])
    found = sorted({segments.parent for segments in folder.rglob("segments_*")})
    if not found:
        raise UserError(f"{INDEX_REPO} holds no Lucene index in {INDEX_FILES}; build one from {CORPUS_REPO}", 1)
    return found[0]


def _fetch_corpus() -> Path:
    from searche1_lite.runtime.hub import download_file

    return download_file(CORPUS_REPO, CORPUS_FILE, repo_type="dataset")
