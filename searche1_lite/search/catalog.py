"""Opens the configured search engine: its index, the text of its passages, and their downloads."""

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from searche1_lite.config import SearchConfig
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.progress import SILENT, Progress, say_on_stderr
from searche1_lite.search.base import Retriever
from searche1_lite.search.bm25 import BM25Retriever, is_lucene_index
from searche1_lite.search.http import HTTPRetriever
from searche1_lite.search.index import cache_folder, ensure_index
from searche1_lite.search.prebuilt import UNPACKED, fetch_prebuilt, find_prebuilt
from searche1_lite.search.store import JsonlStore
from searche1_lite.search.wiki18 import INDEX_SIZE, PACKED_SIZE, UNPACKED_SIZE, fetch_wiki18
from searche1_lite.search.wiki18 import NAME as WIKI18


def needs_yes(what: str) -> bool:
    """Agrees to nothing, where nobody can be asked.

    Raises:
        UserError: telling what would be done, and how to agree.
    """
    raise UserError(f"{what}; add --yes to agree", exit_code=1)


def open_retriever(
    config: SearchConfig,
    *,
    confirm: Callable[[str], bool] = needs_yes,
    progress: Progress = SILENT,
    say: Callable[[str], None] = say_on_stderr,
) -> Retriever:
    """The configured search engine; its index is built or fetched first if need be.

    Args:
        confirm: receives the size of a download; returns whether to go on.
        say: receives notices for the user.

    Raises:
        UserError: if nothing is configured, or what is configured is not there and cannot be built or fetched.
    """
    if config.url is not None:
        return _open_server(config, say)
    if config.index is None and config.corpus is None:
        raise UserError(
            "nothing to search is set; set search.corpus to a JSONL file, a folder of text files or demo, or "
            f"search.index to an index's folder, {WIKI18} or a name such as wikipedia-dpr-100w, or search.url to a "
            "search server"
        )
    # A preset's demo corpus says nothing about an index given over it.
    corpus = None if config.corpus in (None, "demo") else Path(config.corpus)
    if config.index is not None:
        index, corpus = _find_index(config.index, corpus, confirm, progress)
    else:
        corpus = corpus or _demo_corpus()
        index = ensure_index(corpus, threads=config.threads, progress=progress, say=say)
    text = (lambda: JsonlStore(corpus, cache_folder() / "corpora", progress)) if corpus else None
    return BM25Retriever(index, config.k1, config.b, config.threads, text)


def _open_server(config: SearchConfig, say: Callable[[str], None]) -> HTTPRetriever:
    return HTTPRetriever(
        config.url or "",
        timeout_seconds=config.timeout_seconds,
        retries=config.retries,
        on_failure=config.on_failure,
        say=say,
    )


def _find_index(
    name: str, corpus: Path | None, confirm: Callable[[str], bool], progress: Progress
) -> tuple[Path, Path | None]:
    """The index's folder, and its corpus if the index stores no text."""
    folder = Path(name)
    if is_lucene_index(folder):
        return folder, corpus
    _refuse_path(name)
    if name == WIKI18:
        return fetch_wiki18(corpus, cache_folder(), confirm)
    return fetch_prebuilt(find_prebuilt(name, (WIKI18,)), confirm, progress), corpus


def _refuse_path(name: str) -> None:
    """Raises UserError for what can be no name, or is a folder without an index."""
    if Path(name).exists() or os.sep in name or name.startswith("."):
        raise UserError(f"no Lucene index at {name}; build one with `searche1-lite index CORPUS --out DIR`")


def _demo_corpus() -> Path:
    from searche1_lite.data.demo_world import DEMO_WORLD_SEED, write_demo_corpus

    corpus = cache_folder() / f"demo-{DEMO_WORLD_SEED}.jsonl"
    corpus.parent.mkdir(parents=True, exist_ok=True)
    fresh = corpus.with_name(f"{corpus.name}.{os.getpid()}")
    write_demo_corpus(fresh)
    if corpus.is_file() and corpus.read_bytes() == fresh.read_bytes():
        fresh.unlink()  # another process may be reading it: a file that is replaced counts as changed
    else:
        fresh.replace(corpus)
    return corpus


def describe_source(config: SearchConfig) -> tuple[str, str]:
    """Whether what `open_retriever` would search is at hand: `ok`, `warn` (it would be built or fetched), and in words.

    Nothing is built or fetched; a server is asked.

    Raises:
        UserError: if it could not be opened.
    """
    if config.url is not None:
        with closing(_open_server(config, say_on_stderr)) as server:
            return "ok", f"{server.name} answers"
    if config.index is None:
        if config.corpus is None:
            raise UserError("nothing to search is set; set search.corpus, search.index or search.url")
        if config.corpus == "demo":
            return "ok", "the demo's wiki; its index is built on first use"
        if not Path(config.corpus).exists():
            raise UserError(f"no corpus at {config.corpus}; give a JSONL file, or a folder of text files")
        return "ok", f"{config.corpus}; its index is built on first use, in {cache_folder()}"
    if is_lucene_index(Path(config.index)):
        return "ok", f"the index in {config.index}"
    _refuse_path(config.index)
    if config.index == WIKI18:
        if (cache_folder() / f"{WIKI18}.json").is_file():
            return "ok", f"{WIKI18}, fetched before"
        return "warn", f"{WIKI18} is going to be fetched on first use"
    found = find_prebuilt(config.index, (WIKI18,))
    if found.folder.is_dir():
        return "ok", f"{found.name}, in {found.folder}"
    return "warn", f"{found.name} is going to be fetched on first use, {found.size / 1e9:.1f} GB packed"


def bytes_to_fetch(config: SearchConfig) -> dict[Path, int]:
    """What `open_retriever` would download and unpack, by the cache it goes to; empty if all is there.

    Raises:
        UserError: for a name that Pyserini does not know.
    """
    if config.url is not None or config.index is None or Path(config.index).exists():
        return {}
    if config.index == WIKI18:
        if (cache_folder() / f"{WIKI18}.json").is_file():
            return {}
        from huggingface_hub.constants import HF_HUB_CACHE

        return {Path(HF_HUB_CACHE): INDEX_SIZE + PACKED_SIZE, cache_folder(): UNPACKED_SIZE}
    found = find_prebuilt(config.index, (WIKI18,))
    return {} if found.folder.is_dir() else {found.folder.parent: int(found.size * (1 + UNPACKED))}
