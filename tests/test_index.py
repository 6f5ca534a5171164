"""Building an index: what a corpus may be, what is left out of it, and builds that are cut short."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from searche1_lite.data.trajectory import Passage
from searche1_lite.runtime.errors import UserError
from searche1_lite.search.bm25 import BM25Retriever
from searche1_lite.search.corpus import MAX_LINE, check_corpus
from searche1_lite.search.folder import split_text
from searche1_lite.search.index import METADATA_FILE, build_index, ensure_index, index_fingerprint

LIMA = {"id": "a", "contents": "Lima\nLima is the capital of Peru."}
QUITO = {"id": "b", "contents": "Quito\nQuito is the capital of Ecuador."}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEARCHE1_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def lines(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def search(index: Path, query: str, k: int = 10) -> list[Passage]:
    return BM25Retriever(index).search([query], k)[0]


def staging(out: Path) -> Path:
    return out.with_name(f".{out.name}.building")


def test_what_is_wrong_with_each_faulty_line_is_told_and_the_rest_is_indexed(tmp_path: Path) -> None:
    faulty = [
        (b'{"id": "x", "contents": ', "not a JSON line"),
        (b'{"id": "x"}', "a passage needs `id` and a string `contents`"),
        (b'{"contents": "no id"}', "a passage needs"),
        (b'["x", "y"]', "not a JSON object"),
        (b'{"id": "x", "contents": "caf\xe9"}', "not UTF-8"),
        (b'{"id": "x", "contents": " \\u0001 "}', "`contents` is empty"),
        (b'{"id": "\\ud800", "contents": "y"}', "`id` is empty"),
        (b'{"id": "' + b"x" * 1001 + b'", "contents": "y"}', "`id` is empty, longer than"),
        (b'{"id": true, "contents": "y"}', "a passage needs"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"id": ' + b"1" * 5000 + b', "contents": "y"}', "not a JSON line"),
    ]
    for line, reason in faulty:
        corpus, said = tmp_path / "corpus.jsonl", []
        corpus.write_bytes(lines(LIMA) + line + b"\n\n" + lines(QUITO))
        checked = check_corpus(corpus)
        assert (checked.passages, checked.faults) == (2, 1), line[:80]
        assert checked.named[0].startswith(f"{corpus}:2: ") and reason in checked.named[0], checked.named
    corpus.write_bytes(b"\xef\xbb\xbf" + lines(LIMA) + b"\n".join(line for line, _ in faulty) + b"\n" + lines(QUITO))
    build_index(corpus, tmp_path / "index", say=said.append)
    assert [passage.id for passage in search(tmp_path / "index", "capital")] == ["a", "b"]
    assert len(said) == 1 and said[0].startswith("skipped 11 faulty lines: ") and said[0].endswith("; and 6 more")
    assert said[0].count(f"{corpus}:") == 5


def test_an_unusual_passage_is_indexed_as_it_is(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    odd = [
        {"id": 7, "contents": "Zürich 東京 😀\ntext"},
        {"id": "7 b", "contents": "Half\nhalf \ud800 an emoji \x00", "more": {"x": [1]}},
        {"id": "é" * 1000, "contents": "Long name\ntext"},
    ]
    corpus.write_bytes(lines(*odd)[:-1].replace(b"\n", b"\r\n"))
    build_index(corpus, tmp_path / "index")
    assert search(tmp_path / "index", "zürich")[0].title == "Zürich 東京 😀"
    assert search(tmp_path / "index", "emoji")[0].text == "half ? an emoji \x00"
    assert {passage.id for passage in search(tmp_path / "index", "text")} == {"7", "é" * 1000}


def test_an_id_used_twice_is_refused_with_both_lines_before_anything_is_made(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(lines(LIMA, {"id": 5, "contents": "x"}, QUITO, {"id": "5", "contents": "y"}))
    with pytest.raises(UserError, match=r"corpus\.jsonl:4: id '5' was already used on line 2"):
        build_index(corpus, tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_an_enormous_line_is_skipped_without_being_held(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    with corpus.open("wb") as file:
        file.write(lines(LIMA) + b'{"id": "x", "contents": "')
        for _ in range(200):
            file.write(b"x " * 2**19)
        file.write(b'"}\n' + lines(QUITO))
    program = (
        "import resource, sys; from pathlib import Path; from searche1_lite.search.corpus import check_corpus\n"
        "import numpy; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "checked = check_corpus(Path(sys.argv[1]))\n"
        "print(checked.passages, checked.named[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    shown = subprocess.run([sys.executable, "-c", program, str(corpus)], capture_output=True, text=True, check=True)
    found, grown = shown.stdout.rsplit(None, 1)
    assert found == f"2 {corpus}:2: longer than {MAX_LINE // 2**20} MB"
    assert int(grown) < 100 * 1024, f"{grown} KiB more were held"


def test_a_gzip_corpus_is_indexed_and_one_cut_short_is_refused(tmp_path: Path) -> None:
    corpus, plain = tmp_path / "corpus.jsonl.gz", tmp_path / "corpus.jsonl"
    content = lines(LIMA, QUITO, *({"id": f"n{n}", "contents": f"N\n{n * n}"} for n in range(2000)))
    plain.write_bytes(content)
    corpus.write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]))
    build_index(corpus, tmp_path / "index")
    build_index(plain, tmp_path / "plain")
    assert search(tmp_path / "index", "capital peru") == search(tmp_path / "plain", "capital peru") != []
    corpus.write_bytes(gzip.compress(content)[:-100])
    with pytest.raises(UserError, match=r"corpus\.jsonl\.gz is cut short or damaged after line \d+ \("):
        build_index(corpus, tmp_path / "other")
    corpus.write_bytes(content)
    with pytest.raises(UserError, match="is cut short or damaged after line 0"):
        build_index(corpus, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_folder_of_text_files_is_indexed(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    files = {
        "notes.txt": b"\xef\xbb\xbfThe ferry leaves at nine.",
        "deep/er/guide.md": b"Intro line.\n\n# The *Guide* #\n\nUse the caf\xe9 door.\n",
        "long.MD": ("One sentence of six small words. " * 40).encode(),
        "empty.txt": b" \n",
        "picture.png": b"ferry",
        ".hidden/secret.txt": b"ferry",
    }
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    said: list[str] = []
    index = ensure_index(folder, words=60, say=said.append)
    assert said == [f"left out, being neither .txt nor .md: 1 file, such as {folder / 'picture.png'}"]
    assert search(index, "ferry") == [
        Passage("notes.txt#1", "notes", "The ferry leaves at nine.", pytest.approx(2, abs=2))
    ]
    guide = search(index, "door")[0]
    assert (guide.id, guide.title) == ("deep/er/guide.md#1", "The *Guide*")
    assert guide.text == "Intro line. Use the caf\ufffd door."
    assert {passage.id for passage in search(index, "sentence")} == {f"long.MD#{n}" for n in range(1, 5)}
    assert ensure_index(folder, words=60) == index != ensure_index(folder, words=30)
    (folder / "notes.txt").write_bytes(b"The ferry leaves at five!")
    assert search(ensure_index(folder, words=60), "ferry")[0].text.endswith("five!")


def test_text_is_cut_at_sentences_and_paragraphs_and_never_longer_than_asked() -> None:
    text = "A b c d. E f g h.\n\nI j k l! M n o p. Q r\n\n" + " ".join(map(str, range(25))) + ". " + "東" * 25
    passages = list(split_text(text, 10))
    assert passages[:2] == ["A b c d. E f g h.", "I j k l! M n o p. Q r"]
    assert all(len(passage.split()) <= 10 and len(passage) < 40 for passage in passages)
    assert "".join("".join(passages).split()) == "".join(text.split()), "nothing is lost"


BUILD = """
import sys
from pathlib import Path
from searche1_lite.search.index import build_index
build_index(Path(sys.argv[1]), Path(sys.argv[2]), commit_every=2000)
"""


def test_a_build_that_was_killed_goes_on_and_finds_the_same(tmp_path: Path) -> None:
    corpus, whole, out = tmp_path / "corpus.jsonl", tmp_path / "whole", tmp_path / "out"
    corpus.write_bytes(
        lines(
            *(
                {"id": f"n{n}", "contents": f"Title {n % 97}\nword{n % 89} word{n % 13} " + "x " * 80}
                for n in range(20_000)
            )
        )
    )
    killed = subprocess.Popen([sys.executable, "-c", BUILD, str(corpus), str(out)])
    while killed.poll() is None and not list(staging(out).glob("index/segments_[4-9]")):
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and not out.exists()
    said: list[str] = []
    build_index(corpus, out, say=said.append)
    assert len(said) == 1 and said[0].startswith("going on with an interrupted build: ")
    assert 6_000 <= int(said[0].split()[6].replace(",", "")) < 20_000
    assert json.loads((out / METADATA_FILE).read_text())["passages"] == 20_000 and not staging(out).exists()
    build_index(corpus, whole)
    queries = [f"word{n} title {n}" for n in range(30)]
    assert BM25Retriever(out).search(queries, 5) == BM25Retriever(whole).search(queries, 5)


def test_what_is_left_of_another_build_is_replaced(tmp_path: Path) -> None:
    corpus, out, said = tmp_path / "corpus.jsonl", tmp_path / "out", []
    corpus.write_bytes(lines(LIMA))
    build_index(corpus, out)
    staging(out).mkdir()
    out.rename(staging(out) / "index")
    state = {"format": 1, "sha256": "of another corpus", "passages": 1}
    (staging(out) / "state.json").write_text(json.dumps(state))
    corpus.write_bytes(lines(QUITO))
    build_index(corpus, out, say=said.append)
    assert said == [f"{staging(out)} holds an unfinished index of another corpus; it is replaced"]
    assert [passage.id for passage in search(out, "capital")] == ["b"]


def test_an_interrupted_build_keeps_what_is_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, out, said = tmp_path / "corpus.jsonl", tmp_path / "out", []
    corpus.write_bytes(lines(*({"id": f"n{n}", "contents": f"T\n{n}"} for n in range(5_000))))

    def dumps(record: dict[str, object]) -> str:
        if record.get("id") == "n4500":
            raise KeyboardInterrupt
        return json.dumps(record)

    with monkeypatch.context() as patch:
        patch.setattr(
            "searche1_lite.search.index.json", type("json", (), {"dumps": staticmethod(dumps), "loads": json.loads})
        )
        with pytest.raises(KeyboardInterrupt):
            build_index(corpus, out)
    assert not out.exists()
    build_index(corpus, out, say=said.append)
    assert said == ["going on with an interrupted build: 4,000 of 5,000 passages are indexed"]
    assert BM25Retriever(out).search(["4999", "3"], 2)[0][0].id == "n4999"


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own at `folder`, while the body runs."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip(f"no right to mount a small disk ({made.stderr.decode().strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_leaves_nothing_at_out(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(lines(*({"id": str(n), "contents": f"T\n{os.urandom(300).hex()}"} for n in range(12_000))))
    with small_disk(tmp_path / "disk", "3m") as disk:
        command = [sys.executable, "-m", "searche1_lite", "index", str(corpus), "--out", str(disk / "out")]
        shown = subprocess.run(command, capture_output=True, text=True)
        assert shown.returncode == 1 and shown.stdout == "" and not (disk / "out").exists()
        assert shown.stderr.startswith("error: ") and shown.stderr.count("\n") == 1, shown.stderr
        assert "make room" in shown.stderr and str(disk) in shown.stderr
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        again = subprocess.run(command, capture_output=True, text=True)
        assert again.returncode == 0 and (disk / "out" / METADATA_FILE).is_file(), again.stderr


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(lines(LIMA))
    command = [sys.executable, "-m", "searche1_lite", "index", str(corpus), "--out"]
    shown = subprocess.run([*command, str(corpus / "out")], capture_output=True, text=True)
    assert shown.returncode == 1 and shown.stdout == ""
    assert shown.stderr.startswith("error: Not a directory") and shown.stderr.count("\n") == 1


def test_two_processes_do_not_build_the_same_index(tmp_path: Path) -> None:
    from filelock import FileLock

    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(lines(LIMA))
    staging(tmp_path / "out").mkdir()
    with FileLock(staging(tmp_path / "out") / "lock"), pytest.raises(UserError, match="another process is building"):
        build_index(corpus, tmp_path / "out")


def test_a_corpus_that_did_not_change_is_not_read_again(tmp_path: Path, cache: Path) -> None:
    corpus, memory = tmp_path / "corpus.jsonl", cache / "corpora"
    corpus.write_bytes(lines(LIMA))
    check_corpus(corpus, memory=memory)
    assert not memory.exists(), "a file that changed just now could change again unseen"
    os.utime(corpus, (1, 1))
    later = time.time() + 10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("searche1_lite.search.corpus.time.time", lambda: later)
        checked = check_corpus(corpus, memory=memory)
    (note,) = memory.iterdir()
    note.write_text(note.read_text().replace('"passages": 1', '"passages": 12345'))
    assert check_corpus(corpus, memory=memory).passages == 12345 and checked.passages == 1
    corpus.write_bytes(lines(QUITO))
    os.utime(corpus, (1, 1))
    assert check_corpus(corpus, memory=memory).passages == 1


def test_a_fingerprint_tells_whether_the_passages_are_the_same(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    prints = []
    for number, records in enumerate(([LIMA], [LIMA], [LIMA, QUITO])):
        corpus.write_bytes(lines(*records))
        build_index(corpus, tmp_path / f"{number}", threads=number + 1)
        prints.append(BM25Retriever(tmp_path / f"{number}").fingerprint)
    assert prints[0] == prints[1] != prints[2]
    for number in range(3):  # as an index from elsewhere
        (tmp_path / f"{number}" / METADATA_FILE).unlink()
    shutil.copytree(tmp_path / "1", tmp_path / "copy")
    prints = [index_fingerprint(tmp_path / name) for name in ("0", "1", "copy", "2")]
    assert prints[1] == prints[2] and len(set(prints)) == 3


def test_a_relative_place_is_that_of_the_folder_one_is_in_and_not_of_the_one_java_was_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(lines(LIMA, QUITO))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert build_index(corpus, Path("index")) == 2 and (tmp_path / name / "index" / METADATA_FILE).is_file()
        assert [passage.id for passage in search(Path("index"), "Lima")] == ["a"]
