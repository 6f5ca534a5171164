"""From the configuration to a search engine: prebuilt indexes over real HTTP, wiki-18 from a hub, text kept apart."""

import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hub_server import HubServer

from searche1_lite.config import SearchConfig
from searche1_lite.data.trajectory import Passage
from searche1_lite.runtime.errors import UserError
from searche1_lite.search import download
from searche1_lite.search.base import fingerprint_of
from searche1_lite.search.catalog import open_retriever
from searche1_lite.search.index import build_index
from searche1_lite.search.jvm import start_jvm
from searche1_lite.search.store import JsonlStore

PASSAGES = [
    {"id": "0", "contents": '"Lima"\nLima is the capital of Peru.'},
    {"id": "1", "contents": '"Quito"\nQuito is the capital of Ecuador, high in the mountains.'},
    {"id": "2", "contents": '"Zürich"\nZürich is no capital. 😀' + " It has a lake." * 2000},
]
FIRST = Passage("0", "Lima", "Lima is the capital of Peru.", 0.0)
NAME = "wikipedia-dpr-100w"


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCHE1_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYSERINI_CACHE", str(tmp_path / "pyserini"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def write_corpus(path: Path, records: list[dict[str, str]] = PASSAGES) -> Path:
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def bare_index(folder: Path, records: list[dict[str, str]] = PASSAGES) -> Path:
    """A Lucene index that stores ids only, as Search-R1's is said to be."""
    start_jvm()
    from jnius import autoclass

    options = f"-collection JsonCollection -input x -generator DefaultLuceneDocumentGenerator -index {folder}"
    writer = autoclass("io.anserini.index.SimpleIndexer")(options.split())
    assert writer.addRawDocuments([json.dumps(record) for record in records]) == len(records)
    writer.close()
    return folder


def first(config: SearchConfig, query: str = "Lima Peru", **options: object) -> Passage:
    passage = open_retriever(config, **options).search([query], 1)[0][0]
    assert passage.score > 0
    return Passage(passage.id, passage.title, passage.text)


# What may be configured


def test_nothing_configured_names_both_keys_and_examples() -> None:
    with pytest.raises(UserError, match=r"set search\.corpus to a JSONL.* or search\.index to .*wiki-18") as error:
        open_retriever(SearchConfig())
    assert error.value.exit_code == 2


def test_an_index_wins_over_a_corpus_and_its_name_tells_how_it_ranks(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    build_index(corpus, tmp_path / "index")
    other = write_corpus(tmp_path / "other.jsonl", [{"id": "x", "contents": "Peru\nLima Peru"}])
    assert first(SearchConfig(corpus=str(other), index=str(tmp_path / "index"))) == FIRST
    assert first(SearchConfig(corpus=str(other))).id == "x"
    assert open_retriever(SearchConfig(corpus=str(corpus), k1=1.2)).name == "bm25(k1=1.2, b=0.4)"


@pytest.mark.parametrize("name", ["folder", "folder/index", "./wiki-18", "file.txt"])
def test_a_path_without_an_index_is_not_taken_for_a_name(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file.txt").touch()
    with pytest.raises(UserError, match=rf"^no Lucene index at {re.escape(name)}; build one with"):
        open_retriever(SearchConfig(index=name))


@pytest.mark.parametrize(
    ("name", "hint"),
    [("wikipedia-dpr-100", "did you mean wikipedia-dpr-100w or"), ("wiki18", "wiki-18"), ("?", "names are such as")],
)
def test_a_name_that_is_not_known_gets_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"no index '{re.escape(name)}': .*{hint}"):
        open_retriever(SearchConfig(index=name))


# An index without text


def test_an_index_without_text_takes_it_from_the_corpus(tmp_path: Path) -> None:
    index = bare_index(tmp_path / "index")
    with pytest.raises(UserError, match=r"index stores no text; set search\.corpus"):
        open_retriever(SearchConfig(index=str(index)))
    for name in ("corpus.jsonl", "corpus.jsonl.gz"):
        config = SearchConfig(index=str(index), corpus=str(write_corpus(tmp_path / name)))
        assert first(config) == FIRST and first(config, "zürich").text.endswith("😀" + " It has a lake." * 2000)
    other = write_corpus(tmp_path / "other.jsonl", PASSAGES[1:])
    with pytest.raises(UserError, match=r"other\.jsonl has no passage '0'"):
        first(SearchConfig(index=str(index), corpus=str(other)))
    for bad, message in (("missing.jsonl", "no corpus at"), ("index", "no corpus at")):
        with pytest.raises(UserError, match=message):
            open_retriever(SearchConfig(index=str(index), corpus=str(tmp_path / bad)))


def test_the_fingerprint_of_an_index_without_text_tells_whether_the_texts_are_the_same(tmp_path: Path) -> None:
    config = SearchConfig(index=str(bare_index(tmp_path / "index")))
    changed = [PASSAGES[0] | {"contents": PASSAGES[0]["contents"].replace("Peru", "Perv")}, *PASSAGES[1:]]
    assert changed != PASSAGES
    prints = []
    for name, records in (("a.jsonl", PASSAGES), ("b.jsonl.gz", PASSAGES), ("c.jsonl", changed)):
        config.corpus = str(write_corpus(tmp_path / name, records))
        prints += [fingerprint_of(open_retriever(config)) for _ in range(2)]  # the second from the cache
    assert prints[0] is not None and len(set(prints[:4])) == 1 and len(set(prints[4:])) == 1
    assert prints[0] != prints[4]


def test_passages_are_looked_up_by_id_in_any_order_and_the_table_is_made_once(tmp_path: Path) -> None:
    records = [{"id": f"doc {n * 7919 % 5000}", "contents": f"T{n}\n{n}"} for n in range(5000)]
    corpus = write_corpus(tmp_path / "corpus.jsonl", [records[0]])
    corpus.write_text(
        "\n" + "not JSON\n" + '{"id": "doc 1"}\n' + "".join(json.dumps(record) + "\n" for record in records)
    )
    store = JsonlStore(corpus, tmp_path / "store")
    assert all(store.contents(record["id"]) == record["contents"] for record in records)
    (table,) = (tmp_path / "store").glob("*.npy")
    made = table.stat().st_mtime_ns
    JsonlStore(corpus, tmp_path / "store")
    assert table.stat().st_mtime_ns == made
    write_corpus(corpus, [{"id": "new", "contents": "New\n"}])
    assert JsonlStore(corpus, tmp_path / "store").contents("new") == "New\n"


def test_a_corpus_that_is_cut_short_leaves_no_half_in_the_cache(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl.gz")
    corpus.write_bytes(corpus.read_bytes()[:-20])
    with pytest.raises(UserError, match="is cut short or damaged"):
        JsonlStore(corpus, tmp_path / "store")
    assert {path.suffix for path in (tmp_path / "store").iterdir()} <= {".lock"}


# Pyserini's prebuilt indexes


@dataclass
class FileServer:
    """Serves one file over HTTP, with ranges; the first connections break, after so many bytes each as `drops` says."""

    content: bytes
    drops: list[int] = field(default_factory=list)
    status: int = 200
    ranges: bool = True
    asked: list[str | None] = field(default_factory=list)

    @contextmanager
    def run(self) -> Iterator[str]:
        handler = type("Handler", (_FileHandler,), {"shelf": self})
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}/small.tar.gz"
            server.shutdown()


class _FileHandler(BaseHTTPRequestHandler):
    shelf: FileServer

    def log_message(self, *args: object) -> None:
        """Nothing: the tests read `FileServer.asked`."""

    def do_GET(self) -> None:
        shelf = self.shelf
        shelf.asked.append(self.headers["Range"])
        if shelf.status != 200:
            return self.send_error(shelf.status)
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if shelf.ranges else 0
        self.send_response(206 if shelf.ranges else 200)
        self.send_header("Content-Length", str(len(shelf.content) - start))
        self.end_headers()
        end = start + shelf.drops.pop(0) if shelf.drops else None
        self.wfile.write(shelf.content[start:end])


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small real index as Pyserini publishes them: a `tar.gz` of one folder."""
    folder = tmp_path_factory.mktemp("prebuilt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEARCHE1_LITE_CACHE", str(folder / "cache"))
        build_index(write_corpus(folder / "corpus.jsonl"), folder / "index")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(folder / "index", "index-small-20240101")
    return packed.getvalue()


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts an archive into Pyserini's table under `NAME`."""

    def put(url: str, content: bytes, **changes: object) -> None:
        start_jvm()
        from pyserini.prebuilt_index_info import TF_INDEX_INFO

        size = {"size compressed (bytes)": len(content)}
        entry = {"urls": [url], "filename": "small.tar.gz", "md5": hashlib.md5(content).hexdigest()} | size | changes
        monkeypatch.setitem(TF_INDEX_INFO, NAME, entry)

    return put


def kept(tmp_path: Path) -> dict[str, int]:
    """What Pyserini's cache holds: name -> size; folders and locks count 0."""
    found = (tmp_path / "pyserini" / "indexes").glob("*")
    return {path.name: path.stat().st_size if path.is_file() else 0 for path in found if path.suffix != ".lock"}


def test_a_prebuilt_index_is_fetched_once_into_pyserinis_cache(
    tmp_path: Path, archive: bytes, listed: Callable[..., None]
) -> None:
    questions: list[str] = []
    config = SearchConfig(index=NAME)
    with FileServer(archive).run() as url:
        listed(url, archive)
        with pytest.raises(UserError, match=r"downloading the index .* MB more on disk .*; add --yes to agree"):
            open_retriever(config)
        with pytest.raises(UserError, match="nothing was downloaded"):
            open_retriever(config, confirm=lambda what: bool(questions.append(what)))
        assert kept(tmp_path) == {} and "MB" in questions[0] and str(tmp_path / "pyserini") in questions[0]
        assert first(config, confirm=lambda what: True) == FIRST
    folder = f"small.{hashlib.md5(archive).hexdigest()}"
    assert kept(tmp_path) == {folder: 0}
    from pyserini.util import check_downloaded

    assert check_downloaded(NAME), "Pyserini finds it too"
    assert first(config, confirm=lambda what: pytest.fail("asked again")) == FIRST


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_PAUSE", 0.0)


def test_a_download_that_breaks_goes_on_by_itself_as_long_as_something_comes(
    archive: bytes, listed: Callable[..., None]
) -> None:
    server = FileServer(archive, drops=[1000, 500, 1])
    with server.run() as url:
        listed(url, archive)
        assert first(SearchConfig(index=NAME), confirm=lambda what: True) == FIRST
    assert server.asked == ["bytes=0-", "bytes=1000-", "bytes=1500-", "bytes=1501-"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_was_given_up_goes_on_where_it_stopped(
    tmp_path: Path, archive: bytes, listed: Callable[..., None], ranges: bool
) -> None:
    """A server that cannot resume sends all of it again."""
    server, questions = FileServer(archive, drops=[1000, 0 if ranges else 1000], ranges=ranges), []
    config = SearchConfig(index=NAME)
    with server.run() as url:
        listed(url, archive)
        with pytest.raises(UserError, match=r"connection to 127\.0\.0\.1:\d+ broke after .*; run it again, it goes on"):
            open_retriever(config, confirm=lambda what: True)
        assert list(kept(tmp_path).values()) == [1000]
        assert first(config, confirm=lambda what: not questions.append(what)) == FIRST
    assert server.asked == ["bytes=0-", "bytes=1000-", "bytes=1000-"]
    assert "are there already" in questions[0] and all(size == 0 for size in kept(tmp_path).values())


def test_a_damaged_download_is_deleted(tmp_path: Path, archive: bytes, listed: Callable[..., None]) -> None:
    with FileServer(archive).run() as url:
        listed(url, archive, md5="0" * 32)
        with pytest.raises(UserError, match="is damaged"):
            open_retriever(SearchConfig(index=NAME), confirm=lambda what: True)
    assert kept(tmp_path) == {}


@pytest.mark.parametrize(("status", "message"), [(404, "HTTP 404"), (503, "HTTP 503"), (0, "cannot reach 127.0.0.1")])
def test_a_server_that_fails_is_told_in_one_line(
    tmp_path: Path, archive: bytes, listed: Callable[..., None], status: int, message: str
) -> None:
    with FileServer(archive, status=status).run() as url:
        listed(url if status else "http://127.0.0.1:1/small.tar.gz", archive)
        with pytest.raises(UserError, match=message) as error:
            open_retriever(SearchConfig(index=NAME), confirm=lambda what: True)
    assert "\n" not in str(error.value) and error.value.exit_code == 1


def test_too_little_room_is_told_before_asking(archive: bytes, listed: Callable[..., None]) -> None:
    listed("http://127.0.0.1:1/small.tar.gz", archive, **{"size compressed (bytes)": 10**18})
    with pytest.raises(UserError, match=r"no room in .*: about \d+\.0 GB are needed"):
        open_retriever(SearchConfig(index=NAME), confirm=lambda what: pytest.fail("asked"))


def test_an_archive_cannot_write_elsewhere(tmp_path: Path, listed: Callable[..., None]) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../../../escaped"), io.BytesIO())
    with FileServer(packed.getvalue()).run() as url:
        listed(url, packed.getvalue())
        with pytest.raises(UserError, match="cannot be unpacked"):
            open_retriever(SearchConfig(index=NAME), confirm=lambda what: True)
    assert not list(tmp_path.rglob("escaped")) and not list(tmp_path.rglob("*.unpacking"))


# wiki-18

OPEN_WIKI18 = """
import json
from searche1_lite.config import SearchConfig
from searche1_lite.runtime.errors import UserError
from searche1_lite.search import wiki18
from searche1_lite.search.catalog import open_retriever
wiki18.INDEX_SIZE = wiki18.PACKED_SIZE = wiki18.UNPACKED_SIZE = 1000  # so that the test needs no large disk
questions = []
try:
    retriever = open_retriever(SearchConfig(index="wiki-18"), confirm=lambda what: questions.append(what) or True)
    passage = retriever.search(["Lima Peru"], 1)[0][0]
    print(json.dumps([questions, passage.id, passage.title, passage.text]))
except UserError as error:
    print(json.dumps([questions, str(error)]))
"""


def test_wiki_18_comes_from_the_hub_with_its_text(tmp_path: Path) -> None:
    bare_index(tmp_path / "index" / "bm25")
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus" / "wiki-18.jsonl.gz")

    def opened(environment: dict[str, str]) -> list[object]:
        ran = subprocess.run([sys.executable, "-c", OPEN_WIKI18], env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    with HubServer().run() as hub:
        environment = hub.environment(tmp_path / "hf", SEARCHE1_LITE_CACHE=str(tmp_path / "cache"))
        questions, problem = opened(environment)
        assert "PeterJinGo/wiki-18-bm25-index" in problem and "cannot fetch" in problem
        hub.add("datasets", "PeterJinGo/wiki-18-bm25-index", tmp_path / "index")
        hub.add("datasets", "PeterJinGo/wiki-18-corpus", tmp_path / "corpus")
        questions, *passage = opened(environment)
        assert len(questions) == 1 and "2.5 GB of index" in questions[0] and "14 GB unpacked" in questions[0]
        assert passage == ["0", "Lima", "Lima is the capital of Peru."]
        asked = len(hub.requests)
        assert opened(environment) == [[], *passage] and len(hub.requests) == asked, "neither asked nor fetched again"
    shutil.rmtree(tmp_path / "hf")
    questions, problem = opened(environment)
    assert len(questions) == 1 and "cannot fetch" in problem, "what was deleted is fetched again"
