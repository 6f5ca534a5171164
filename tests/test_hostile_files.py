"""Names that become paths go nowhere, and files of any content are read, or refused with file and line."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_run import write_run

from searche1_lite.config import Config, ModelConfig, SearchConfig, load_config
from searche1_lite.data.questions import load_questions
from searche1_lite.evaluate.sweep.plan import load_plan
from searche1_lite.policy.model import resolve_model
from searche1_lite.report import build_report, write_report
from searche1_lite.report.record import read_run
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.jsonl import MAX_LINE, JsonFault, parse_json
from searche1_lite.search.bm25 import BM25Retriever
from searche1_lite.search.catalog import open_retriever
from searche1_lite.search.corpus import check_corpus
from searche1_lite.search.index import build_index
from searche1_lite.search.store import JsonlStore

PATHS = [
    "../up",
    "..",
    ".",
    "../../../../tmp/up",
    "/tmp/absolute",
    "a/../../b",
    "a/b",
    "a\\..\\b",
    "C:\\x",
    "~root",
    "~/x",
    "$HOME",
    "a\0b",
    "a\nb",
    "x" * 300,
    " ",
    "-rf",
    "con",
    "NUL.txt",
    "com1",
    "a.",
    "\u202etxt",
    "%2e%2e%2f",
    "file:///etc/passwd",
    "\\\\server\\share",
]


@pytest.mark.parametrize("name", [name for name in PATHS if name not in ("-rf", "con", "NUL.txt", "com1", "a.")])
def test_a_project_is_no_path(name: str) -> None:
    with pytest.raises(UserError, match="logging.project"):
        load_config(after={"logging.project": name})


@pytest.mark.parametrize("name", PATHS)
def test_a_variant_becomes_a_folder_of_the_sweep_or_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(json.dumps({"preset": "demo", "variants": {name: {}}}))
    with pytest.raises(UserError, match="variant|not valid YAML"):
        load_plan(file)


def test_values_of_a_grid_become_plain_names(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    grid = {"search.corpus": [name for name in PATHS if "\0" not in name and "\n" not in name and len(name) < 60]}
    file.write_text(json.dumps({"preset": "demo", "grid": grid}))
    try:
        runs = load_plan(file).runs
    except UserError as error:
        assert "called" in str(error) or "variant" in str(error)
        return
    for planned in runs:
        assert not planned.folder.is_absolute() and ".." not in planned.folder.parts and len(planned.folder.parts) == 3


def test_a_sweep_files_own_name_is_no_way_up(tmp_path: Path) -> None:
    for name in ("...yaml", "..yaml", ".yaml"):
        (tmp_path / name).write_text(json.dumps({"preset": "demo", "variants": {"a": {}}}))
        assert load_plan(tmp_path / name).name not in ("", ".", "..")


@pytest.mark.parametrize("revision", ["../x", "..", "/etc", "a/../b", "a\0", "x" * 300, ".", "refs/../../x"])
def test_a_revision_is_no_path(revision: str) -> None:
    with pytest.raises(UserError, match="model.revision"):
        load_config(after={"model.revision": revision})
    assert load_config(after={"model.revision": "refs/pr/1"}).model.revision == "refs/pr/1"


@pytest.mark.parametrize("name", ["../up", "..", "/tmp/no-such", "~nobody/x", "a/../b", "a\\b", " ", "a/b/c"])
def test_a_models_name_that_is_a_path_must_be_a_folder(name: str) -> None:
    with pytest.raises(UserError, match="model.name"):
        resolve_model(ModelConfig(name=name).name)


@pytest.mark.parametrize("name", ["../up", "..", "/tmp/no-such", "a/../b", "a\0b"])
def test_an_index_that_is_no_folder_and_no_known_name_is_refused(name: str) -> None:
    with pytest.raises(UserError):
        open_retriever(SearchConfig(index=name))


def test_ids_of_passages_and_questions_are_never_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCHE1_LITE_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "here"
    place.mkdir()
    corpus = place / "c.jsonl"
    corpus.write_text(
        "".join(json.dumps({"id": name, "contents": f"Lima\nLima {n}"}) + "\n" for n, name in enumerate(PATHS))
    )
    build_index(corpus, place / "index")
    assert {p.id for p in BM25Retriever(place / "index").search(["Lima"], 99)[0]} == set(PATHS)
    store = JsonlStore(corpus, place / "store")
    assert [store.contents(name) for name in PATHS] == [f"Lima\nLima {n}" for n in range(len(PATHS))]
    questions = place / "q.jsonl"
    questions.write_text(
        "".join(json.dumps({"id": name, "question": f"Q{name}", "golden_answers": ["x"]}) + "\n" for name in PATHS)
    )
    assert [q.id for q in load_questions(str(questions), "test")] == PATHS
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", "here"}
    assert {path.name for path in place.iterdir()} == {"c.jsonl", "index", "store", "q.jsonl"}


def test_a_corpus_with_the_longest_name_there_is_can_be_looked_up(tmp_path: Path) -> None:
    corpus = tmp_path / ("c" * 250 + ".json")
    corpus.write_text('{"id": "1", "contents": "Lima"}\n')
    assert JsonlStore(corpus, tmp_path / "cache").contents("1") == "Lima"


@pytest.mark.parametrize("folder", ["../other", "/tmp", "..", "runs/../../other", "", "a\0b", "..\\other"])
def test_a_sweeps_report_stays_in_its_folder(folder: str, tmp_path: Path) -> None:
    write_run(tmp_path / "other", questions=2, asked=2, watched=1)
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    run = {"folder": folder, "seed": 1, "state": "done", "em": 0.5}
    (sweep / "sweep.json").write_text(json.dumps({"variants": [{"name": "a", "runs": [run]}]}))
    with pytest.raises(UserError, match="no folder of the sweep"):
        write_report(sweep, runs=True)
    assert not (tmp_path / "other" / "report.html").exists()


GOOD = b'{"id": "1", "question": "Who?", "golden_answers": ["Peru"]}'
LINES = {
    "too long a line": b'{"id": "2", "question": "' + b"x" * MAX_LINE + b'", "golden_answers": ["Peru"]}',
    "NaN": b'{"id": "2", "question": "Who else?", "golden_answers": ["Peru"], "metadata": {"x": NaN}}',
    "infinity": b'{"id": "2", "question": "Who else?", "golden_answers": ["Peru"], "metadata": {"x": -Infinity}}',
    "a key twice": b'{"id": "2", "question": "Who else?", "question": "Who?", "golden_answers": ["Peru"]}',
    "a key twice further in": b'{"id": "2", "question": "Q", "golden_answers": ["P"], "metadata": {"a": 1, "a": 2}}',
    "invalid UTF-8": b'{"id": "2", "question": "\xff", "golden_answers": ["Peru"]}',
    "UTF-16": '{"id": "2", "question": "Q", "golden_answers": ["P"]}'.encode("utf-16"),
    "nested deeply": b'{"id": "2", "question": "Q", "golden_answers": ["P"], "metadata": ' + b"[" * 50_000,
    "nested a little too deeply": b'{"id": "2", "question": "Q", "golden_answers": ["P"], "metadata": {"x": '
    + b"[" * 300
    + b"]" * 300
    + b"}}",
    "many digits": b'{"id": ' + b"9" * 5000 + b', "question": "Q", "golden_answers": ["P"]}',
    "a list": b"[1, 2]",
    "a question of another type": b'{"id": "2", "question": ["Q"], "golden_answers": ["P"]}',
    "an id of another type": b'{"id": 1.5, "question": "Q", "golden_answers": ["P"]}',
    "answers of another type": b'{"id": "2", "question": "Q", "golden_answers": "P"}',
    "an answer of another type": b'{"id": "2", "question": "Q", "golden_answers": [null]}',
    "metadata of another type": b'{"id": "2", "question": "Q", "golden_answers": ["P"], "metadata": [1]}',
    "an id again": GOOD,
    "no JSON": b"</information>",
    "NUL": b"\0\0\0\0",
}


@pytest.mark.parametrize("fault", LINES)
def test_a_faulty_question_is_named_with_file_and_line(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(GOOD + b"\n" + LINES[fault] + b"\n")
    with pytest.raises(UserError) as error:
        load_questions(str(path), "test")
    text = str(error.value)
    assert text.startswith(f"{path}:2: ") and "\n" not in text and len(text) < 500


def test_a_byte_order_mark_lone_surrogates_and_odd_ids_are_read(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + GOOD + b'\r\n\n{"id": "\\ud800", "question": "\\udfffQ", "golden_answers": ["\\ud83d"]}\n'
    )
    loaded = load_questions(str(path), "test")
    assert [q.id for q in loaded] == ["1", "\ud800"] and loaded[1].question == "\udfffQ"


def test_a_key_that_stands_twice_in_a_corpus_means_the_same_everywhere(tmp_path: Path) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"id": "1", "id": "2", "contents": "x", "contents": "Lima"}\n')
    build_index(corpus, tmp_path / "index")
    (found,) = BM25Retriever(tmp_path / "index").search(["Lima"], 3)[0]
    assert (found.id, found.title) == ("2", "Lima")
    assert JsonlStore(corpus, tmp_path / "store").contents("2") == "Lima"


def test_a_line_without_end_is_not_held_whole(tmp_path: Path) -> None:
    corpus = tmp_path / "c.jsonl"
    with corpus.open("wb") as file:
        file.truncate(200 * 2**20)  # zeros, and no line's end
    with pytest.raises(UserError, match=f"{corpus}:1: longer than 16 MB"):
        check_corpus(corpus)
    with pytest.raises(UserError, match=f"{corpus}:1: a line of more than 16 MB"):
        load_questions(str(corpus), "test")
    with pytest.raises(UserError, match="holds no passage"):
        JsonlStore(corpus, tmp_path / "store")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, -1, "base"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder / "run", questions=4, asked=4, watched=2)
    return folder / "run"


def spoil(value: object, at: int, other: object) -> tuple[object, int]:
    """`value` with its part number `at`, counted from the outside, replaced by `other`."""
    if at == 0:
        return other, -1
    at -= 1
    if isinstance(value, dict | list):
        made = dict(value) if isinstance(value, dict) else list(value)
        for key in list(made) if isinstance(made, dict) else range(len(made)):
            if at < 0:
                break
            made[key], at = spoil(made[key], at, other)
        return made, at
    return value, at


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_report_is_written_whatever_stands_in_the_runs_files(
    recorded: Path, tmp_path_factory, data: st.DataObject
) -> None:
    folder = Path(shutil.copytree(recorded, tmp_path_factory.mktemp("spoilt") / "run"))
    files = [
        "summary.json",
        "metrics.jsonl",
        *(str(p.relative_to(folder)) for p in (folder / "trajectories").iterdir()),
    ]
    path = folder / data.draw(st.sampled_from(sorted(files)))
    other = data.draw(JSON)
    if path.suffix == ".json":
        value, _ = spoil(json.loads(path.read_text()), data.draw(st.integers(0, 60)), other)
        path.write_text(json.dumps(value))
    else:
        lines = path.read_text().splitlines()
        number = data.draw(st.integers(0, len(lines) - 1))
        value, _ = spoil(json.loads(lines[number]), data.draw(st.integers(0, 60)), other)
        lines[number] = json.dumps(value)
        path.write_text("\n".join(lines) + "\n")
    assert "</html>" in build_report(folder)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"\xff", b'{"stages": 5}', b'{"stages": [{"name": "base", "em": NaN}]}', b""]
)
def test_a_report_says_what_it_could_not_read(recorded: Path, tmp_path: Path, content: bytes) -> None:
    folder = Path(shutil.copytree(recorded, tmp_path / "run"))
    (folder / "summary.json").write_bytes(content)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"[" * 5000 + b"\n" + b"\xff\xfe\n" + b'{"stage": 5, "loss": 1e999}\n')
    assert "</html>" in build_report(folder)
    assert any("metrics.jsonl" in note for note in read_run(folder).notes)


def test_the_parser_of_json_raises_one_error_for_whatever_is_wrong() -> None:
    for text in (b"\xff", b"[" * 200_000, b"9" * 5000, b"", b"{", b"[" * 150 + b"]" * 150, "\ud800{"):
        with pytest.raises(JsonFault):
            parse_json(text)
    assert parse_json("[" * 99 + "]" * 99) and parse_json(b"\xef\xbb\xbf{}") == {} and parse_json("[NaN]")
    for text in ("[NaN]", '{"a": 1, "a": 1}', '[{"b": {"a": 1, "a": 1}}]', "-Infinity"):
        with pytest.raises(JsonFault):
            parse_json(text, strict=True)


def test_a_configuration_is_what_it_was_but_for_the_new_setting() -> None:
    assert Config().model.trust_remote_code is False
    assert load_config(None, None, ["model.trust_remote_code=true"]).model.trust_remote_code is True
