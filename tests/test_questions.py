"""Questions: your own files read strictly, public sets by name, a seeded subset, and nothing trained on evaluated."""

import datetime
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from searche1_lite.config import Config, DataConfig, GRPOStageConfig
from searche1_lite.data.question_files import PUBLIC_SETS
from searche1_lite.data.questions import (
    SEVEN_SETS,
    check_disjoint,
    load_questions,
    load_run_questions,
    sample_question,
)
from searche1_lite.data.trajectory import Question
from searche1_lite.runtime import hub
from searche1_lite.runtime.errors import UserError

GOOD: dict[str, Any] = {"id": "q", "question": "Who?", "golden_answers": ["Ada"]}


def line(**changes: Any) -> str:
    return json.dumps({**GOOD, **changes})


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{text}\n" for text in lines), encoding="utf-8")
    return str(path)


def write_many(path: Path, count: int) -> str:
    return write(path, *(line(id=f"q{number}", question=f"Who is {number}?") for number in range(count)))


def refusal(spec: str, split: str = "train") -> str:
    """The message that `spec` is refused with: one line, and wrong usage."""
    with pytest.raises(UserError) as caught:
        load_questions(spec, split)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_file_is_read_in_its_order_with_all_its_columns(tmp_path: Path) -> None:
    spec = write(
        tmp_path / "q.jsonl",
        line(id="b", question="Où est Élan ?", golden_answers=["là", "ici"], metadata={"hops": 2}),
        "",
        line(id=7, metadata=None, another_column=[1]),
    )
    assert load_questions(spec, "train") == [
        Question("b", "Où est Élan ?", ["là", "ici"], {"hops": 2}),
        Question("7", "Who?", ["Ada"], {}),
    ]


def test_a_file_may_begin_with_a_byte_order_mark_and_need_not_end_with_a_newline(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + line().encode() + b"\r\n" + line(id="r").encode())
    assert [question.id for question in load_questions(str(tmp_path / "q.jsonl"), "train")] == ["q", "r"]


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ('{"id": "x", "question": ', "not a JSON line"),
        ("id,question", "not a JSON line"),
        ('["id", "question"]', "not a JSON object"),
        ('"Who?"', "not a JSON object"),
        ('{"question": "Who?", "golden_answers": ["Ada"]}', "no `id`"),
        ('{"id": "x", "golden_answers": ["Ada"]}', "no `question`"),
        ('{"id": "x", "question": "Who?", "answer": "Ada"}', "no `golden_answers`"),
        (line(id="x", golden_answers=[]), "golden_answers must be a list"),
        (line(id="x", golden_answers="Ada"), "golden_answers must be a list"),
        (line(id="x", golden_answers=["Ada", 3]), "golden_answers must be a list"),
        (line(id="x", golden_answers=["Ada", " "]), "none blank"),
        (line(id="x", golden_answers=None), "golden_answers must be a list"),
        (line(id="x", question=" "), "the question is empty"),
        (line(id="x", question=None), "the question is empty"),
        (line(id=None), "the id must be"),
        (line(id=True), "the id must be"),
        (line(id=["x"]), "the id must be"),
        (line(id="x", metadata="hops"), "metadata must be an object"),
        (line(id="x", metadata=[2]), "metadata must be an object"),
        (line(id="q"), "id 'q' was already used on line 1"),
    ],
)
def test_a_bad_line_is_refused_with_file_and_line_number(tmp_path: Path, bad: str, problem: str) -> None:
    spec = write(tmp_path / "q.jsonl", line(), "", bad, line(id="last"))
    message = refusal(spec)
    assert message.startswith(f"{spec}:3: ") and problem in message


def test_a_line_that_is_not_utf8_is_refused_with_file_and_line_number(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(line().encode() + b'\n{"id": "x", "question": "\xff"}\n')
    assert refusal(str(tmp_path / "q.jsonl")).startswith(f"{tmp_path / 'q.jsonl'}:2: not a JSON line")


def test_ids_that_differ_only_in_type_count_as_the_same(tmp_path: Path) -> None:
    assert "id '7' was already used on line 1" in refusal(write(tmp_path / "q.jsonl", line(id=7), line(id="7")))


@pytest.mark.parametrize("lines", [[], [""], ["", "  "]])
def test_a_file_without_a_question_is_refused(tmp_path: Path, lines: list[str]) -> None:
    assert refusal(write(tmp_path / "q.jsonl", *lines)).startswith(f"{tmp_path / 'q.jsonl'} holds no question")


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_a_missing_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    assert refusal(str(tmp_path / name)).startswith(f"no question file at {tmp_path / name}")


def test_a_subset_is_seeded_and_in_file_order(tmp_path: Path) -> None:
    spec = write_many(tmp_path / "q.jsonl", 100)
    every = load_questions(spec, "train")
    chosen = load_questions(spec, "train", limit=10, seed=1)
    places = [every.index(question) for question in chosen]
    assert len(set(places)) == 10 and places == sorted(places)
    assert places != list(range(10)), "a sample, not the head of the file"
    assert load_questions(spec, "train", limit=10, seed=1) == chosen
    assert load_questions(spec, "train", limit=10, seed=2) != chosen
    assert load_questions(spec, "train", limit=100) == load_questions(spec, "train", limit=101) == every


def test_the_demos_split_is_the_one_asked_for_or_named() -> None:
    dev, test = load_questions("demo", "dev"), load_questions("demo", "test")
    assert load_questions("demo:dev", "test") == dev
    assert dev != test and load_questions("demo:", "test") == test


@pytest.mark.parametrize("spec", ["demo:validation", "demo:Dev", "demo:dev:2"])
def test_an_unknown_split_of_the_demo_is_refused_with_those_there_are(spec: str) -> None:
    assert refusal(spec) == f"the demo has no split {spec.partition(':')[2]!r}; there are: train, dev, test"


@pytest.mark.parametrize("same", ["Who wrote Emma?", "who  wrote EMMA?", " Who wrote\tEmma? "])
def test_an_evaluation_question_that_was_trained_on_is_refused_with_both_ids(same: str) -> None:
    train = [Question("t1", "Who?", ["Ada"]), Question("t2", "Who wrote Emma?", ["Austen"])]
    with pytest.raises(UserError, match="evaluation question 'e1' is training question 't2'"):
        check_disjoint(train, [Question("e0", "Where?", ["Lima"]), Question("e1", same, ["Austen"])])
    check_disjoint(train, [Question("t2", "Who wrote Persuasion?", ["Austen"])])


def test_a_runs_questions_are_both_files_and_only_evaluation_is_cut(tmp_path: Path) -> None:
    train = write_many(tmp_path / "train.jsonl", 6)
    evaluation = write(tmp_path / "test.jsonl", *(line(id=f"e{n}", question=f"Where is {n}?") for n in range(6)))
    data = DataConfig(train=train, evaluation=evaluation, evaluation_limit=2)
    trained, evaluated = load_run_questions(Config(seed=1, data=data, grpo=GRPOStageConfig(questions_per_step=6)))
    assert trained == load_questions(train, "train")
    assert evaluated == load_questions(evaluation, "test", limit=2, seed=1)


def test_too_few_training_questions_for_one_step_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    data = DataConfig(train=write_many(tmp_path / "train.jsonl", 6), evaluation="demo")
    with pytest.raises(UserError, match="grpo.questions_per_step=7 is more than the 6 training questions"):
        load_run_questions(Config(data=data, grpo=GRPOStageConfig(questions_per_step=7, group_size=4)))


def test_a_run_is_refused_the_same_file_twice_and_takes_the_demo_for_both(tmp_path: Path) -> None:
    train = write_many(tmp_path / "train.jsonl", 6)
    with pytest.raises(UserError, match="evaluation question 'q0' is training question 'q0'"):
        load_run_questions(Config(data=DataConfig(train=train, evaluation=train)))
    demo = Config(data=DataConfig(train="demo", evaluation="demo"))
    assert load_run_questions(demo) == (load_questions("demo:train", "test"), load_questions("demo:test", "train"))


@pytest.mark.parametrize(("key", "other"), [("train", "evaluation"), ("evaluation", "train")])
def test_questions_that_were_never_named_are_asked_for_with_the_setting_and_examples(key: str, other: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.{key} is not set; give `demo`, a set such as `nq`, ") as caught:
        load_run_questions(Config(data=DataConfig(**{other: "demo"})))
    assert caught.value.exit_code == 2


def test_a_training_subset_is_seeded_and_apart_from_the_evaluations(tmp_path: Path) -> None:
    train = write_many(tmp_path / "train.jsonl", 100)

    def chosen(seed: int) -> list[Question]:
        data = DataConfig(train=train, evaluation="demo", train_limit=10)
        return load_run_questions(Config(seed=seed, data=data, grpo=GRPOStageConfig(questions_per_step=10)))[0]

    every = load_questions(train, "train")
    places = [every.index(question) for question in chosen(1)]
    assert len(set(places)) == 10 and places == sorted(places)
    assert chosen(1) == chosen(1) != chosen(2)


# Own files of other kinds


def write_parquet(path: Path, **columns: Any) -> str:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return str(path)


def test_a_gzipped_and_a_parquet_file_say_the_same_as_the_plain_one(tmp_path: Path) -> None:
    records = [
        {**GOOD, "id": f"q{n}", "golden_answers": ["Ada", f"{n}"], "metadata": {"hops": n + 1}} for n in range(5)
    ]
    plain = write(tmp_path / "q.jsonl", *map(json.dumps, records))
    (tmp_path / "q.jsonl.gz").write_bytes(gzip.compress(Path(plain).read_bytes()))
    columns = {key: [record[key] for record in records] for key in records[0]}
    for spec in (str(tmp_path / "q.jsonl.gz"), write_parquet(tmp_path / "q.parquet", **columns)):
        assert load_questions(spec, "train") == load_questions(plain, "train")


@pytest.mark.parametrize("name", ["q.jsonl.gz", "q.parquet"])
@pytest.mark.parametrize("harm", ["cut off", "of another kind", "with a bad byte at its end"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, harm: str) -> None:
    path = tmp_path / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(b"".join(line(id=n).encode() + b"\n" for n in range(999))))
    else:
        write_parquet(path, id=["q"] * 99, question=["Who?"] * 99, golden_answers=[["Ada"]] * 99)
    whole = path.read_bytes()
    middle = len(whole) // 2
    harmed = {
        "cut off": whole[:middle],
        "of another kind": line().encode(),
        "with a bad byte at its end": whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:],
    }
    path.write_bytes(harmed[harm])
    assert refusal(str(path)).startswith(f"{path} is damaged or cut off (")


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        (
            {"id": ["q"], "question": ["Who?"]},
            ": no `golden_answers`; a question needs id, question and golden_answers",
        ),
        ({"id": ["q", "r"], "question": ["Who?", None], "golden_answers": [["Ada"]] * 2}, ":2: the question is empty"),
        ({"id": ["q"], "question": ["Who?"], "golden_answers": ["Ada"]}, ":1: golden_answers must be a list"),
        ({"id": ["q"], "question": ["Who?"], "golden_answers": [[]]}, ":1: golden_answers must be a list"),
        ({"id": [0.5], "question": ["Who?"], "golden_answers": [["Ada"]]}, ":1: the id must be"),
        (
            {
                "id": ["q"],
                "question": ["Who?"],
                "golden_answers": [["Ada"]],
                "metadata": [{"day": datetime.date(2020, 1, 1)}],
            },
            ":1: metadata cannot be written as JSON",
        ),
    ],
)
def test_a_bad_parquet_file_is_refused_with_file_and_row(tmp_path: Path, columns: dict[str, Any], problem: str) -> None:
    spec = write_parquet(tmp_path / "q.parquet", **columns)
    assert refusal(spec).startswith(spec + problem)


# Several at once


def test_joined_files_are_read_one_after_the_other_and_may_not_share_an_id(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", line(id="a"))
    two = write(tmp_path / "two.jsonl", line(id="b", question="Where?"))
    assert [question.id for question in load_questions(f"{one}+{two}", "train")] == ["a", "b"]
    same = write(tmp_path / "same.jsonl", line(id="a", question="When?"))
    assert refusal(f"{one} + {same}").startswith(f"id 'a' is in {one} and in {same}")
    assert refusal(f"{one}+{one}") == f"'{one}+{one}' names {one} twice; name it once"
    assert "has an empty part" in refusal(f"{one}+")
    assert refusal(f"{one}+{tmp_path / 'none.jsonl'}").startswith(f"no question file at {tmp_path / 'none.jsonl'}")


def test_a_file_whose_name_has_a_plus_is_that_file(tmp_path: Path) -> None:
    assert len(load_questions(write(tmp_path / "one+two.jsonl", line()), "train")) == 1


def test_joining_leaves_the_demo_itself_as_it_was(tmp_path: Path) -> None:
    before = [question.id for question in load_questions("demo", "dev")]
    joined = load_questions(f"demo:dev+{write(tmp_path / 'one.jsonl', line())}", "dev")
    assert [question.id for question in joined] == [*(f"demo:{name}" for name in before), "q"]
    assert [question.id for question in load_questions("demo", "dev")] == before


# Public sets


@pytest.fixture
def shelf_of_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """The hub's files in a folder (test_hub.py fetches for real); gives a function that puts lines into one of them."""

    def fetch(repo: str, filename: str, *, repo_type: str, revision: str | None = None) -> Path:
        assert repo_type == "dataset" and (tmp_path / repo / filename).is_file(), f"{filename} is asked for"
        return tmp_path / repo / filename

    def put(name: str, split: str, *lines: str) -> Path:
        path = tmp_path / PUBLIC_SETS[name].repo / PUBLIC_SETS[name].files[split]
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, *lines)
        return path

    monkeypatch.setattr(hub, "download_file", fetch)
    return put


def test_the_public_sets_are_where_their_publishers_keep_them() -> None:
    flashrag = {name: public.files for name, public in PUBLIC_SETS.items() if name != "search-r1"}
    assert {public.repo for name, public in PUBLIC_SETS.items() if name in flashrag} == {"RUC-NLPIR/FlashRAG_datasets"}
    assert sorted(path for files in flashrag.values() for path in files.values()) == [
        "2wikimultihopqa/dev.jsonl", "2wikimultihopqa/train.jsonl", "bamboogle/test.jsonl",
        "hotpotqa/dev.jsonl", "hotpotqa/train.jsonl", "musique/dev.jsonl", "musique/train.jsonl",
        "nq/dev.jsonl", "nq/test.jsonl", "nq/train.jsonl", "popqa/test.jsonl",
        "triviaqa/dev.jsonl", "triviaqa/test.jsonl", "triviaqa/train.jsonl",
    ]  # fmt: skip
    assert PUBLIC_SETS["search-r1"].repo == "PeterJinGo/nq_hotpotqa_train"


def test_evaluation_takes_the_test_split_or_else_dev_and_training_takes_train(
    shelf_of_sets: Callable[..., Path],
) -> None:
    for split in ("train", "dev", "test"):
        shelf_of_sets("nq", split, line(id=f"{split}_0"))
    for split in ("train", "dev"):
        shelf_of_sets("hotpotqa", split, line(id=f"{split}_0"))
    cases = {
        ("nq", "test"): "test_0",
        ("nq", "train"): "train_0",
        ("nq:dev", "test"): "dev_0",
        ("hotpotqa", "test"): "dev_0",
        ("hotpotqa", "train"): "train_0",
        ("hotpotqa:train", "test"): "train_0",
    }
    for (spec, split), expected in cases.items():
        (found,) = load_questions(spec, split)
        assert found == Question(expected, "Who?", ["Ada"], {"data_set": spec.partition(":")[0]})


@pytest.mark.parametrize(
    ("spec", "split", "message"),
    [
        ("nq:validation", "test", "nq has no split 'validation'; there are: train, dev, test"),
        ("hotpotqa:test", "test", "hotpotqa has no split 'test'; there are: train, dev"),
        ("popqa", "train", "popqa has no split 'train'; there are: test"),
        ("nq+bamboogle", "train", "bamboogle has no split 'train'; there are: test"),
        ("search-r1:dev", "train", "search-r1 has no split 'dev'; there are: train, test"),
        ("NQ", "test", "no question file at NQ; did you mean nq?"),
        ("hotpot_qa:dev", "test", "no question file at hotpot_qa:dev; did you mean hotpotqa?"),
        ("nq+nq:test", "test", "'nq+nq:test' names nq:test twice; name it once"),
    ],
)
def test_an_unknown_set_or_split_is_refused_before_anything_is_fetched(
    shelf_of_sets: Callable[..., Path], spec: str, split: str, message: str
) -> None:
    assert refusal(spec, split) == message


def test_joined_sets_have_ids_of_their_own_and_one_subset_of_all(shelf_of_sets: Callable[..., Path]) -> None:
    shelf_of_sets("nq", "train", *(line(id=f"train_{n}", question=f"Who is {n}?") for n in range(4)))
    shelf_of_sets("hotpotqa", "train", *(line(id=f"train_{n}", question=f"Where is {n}?") for n in range(4)))
    joined = load_questions("nq+hotpotqa", "train")
    assert [question.id for question in joined] == [
        f"{name}:train_{n}" for name in ("nq", "hotpotqa") for n in range(4)
    ]
    assert [question.metadata["data_set"] for question in joined] == ["nq"] * 4 + ["hotpotqa"] * 4
    assert len(load_questions("nq+hotpotqa", "train", limit=5, seed=1)) == 5


def test_all_is_the_seven_sets_and_a_limit_may_be_of_each(shelf_of_sets: Callable[..., Path], tmp_path: Path) -> None:
    for name in SEVEN_SETS:
        split = "test" if "test" in PUBLIC_SETS[name].files else "dev"
        shelf_of_sets(name, split, *(line(id=f"{n}", question=f"Who is {n}?") for n in range(9)))
    every = load_questions("all", "test")
    assert [question.metadata["data_set"] for question in every][::9] == list(SEVEN_SETS) and len(every) == 63
    each = load_questions("all", "test", limit=2, seed=1, limit_each=True)
    alone = [question.id for question in load_questions("nq", "test", limit=2, seed=1, limit_each=True)]
    assert [question.metadata["data_set"] for question in each] == [name for name in SEVEN_SETS for _ in range(2)]
    assert [question.id for question in each[:2]] == [f"nq:{name}" for name in alone], "those of the set alone"
    own = write(tmp_path / "own.jsonl", line(id="a"), line(id="b", metadata={"data_set": "mine"}))
    joined = load_questions(f"all+{own}+demo:dev", "test", limit=1, limit_each=True)
    assert len(joined) == 9 and joined[-1].metadata["data_set"] == "demo" and joined[-1].metadata["hops"]
    assert [question.metadata for question in load_questions(f"{own}+nq", "test")][:2] == [
        {"data_set": own},
        {"data_set": "mine"},
    ]
    assert "data_set" not in load_questions("demo:dev", "test")[0].metadata, "the demo's own are as they were"
    assert refusal("all", "train") == "popqa has no split 'train'; there are: test"
    assert refusal("nq+all", "test") == "'nq+all' names nq:test twice; name it once"


def test_a_public_sets_plain_metadata_is_kept_and_musiques_hops_are_read_from_its_ids(
    shelf_of_sets: Callable[..., Path],
) -> None:
    shelf_of_sets(
        "musique",
        "dev",
        line(id="2hop__482757_12019", metadata={"type": "bridge", "level": "hard", "paragraphs": [{"text": "long"}]}),
        line(id="3hop1__1_2_3"),
        line(id="4hop3__1_2_3_4", metadata=None),
        line(id="dev_9", metadata="none"),
        line(id="2hop__1_2", metadata={"hops": 5, "data_set": "mine"}),
    )
    assert [question.metadata for question in load_questions("musique", "test")] == [
        {"data_set": "musique", "type": "bridge", "level": "hard", "hops": 2},
        {"data_set": "musique", "hops": 3},
        {"data_set": "musique", "hops": 4},
        {"data_set": "musique"},
        {"data_set": "mine", "hops": 5},
    ]


def test_a_public_sets_questions_without_an_answer_are_left_out_and_counted(
    shelf_of_sets: Callable[..., Path],
) -> None:
    shelf_of_sets(
        "nq",
        "test",
        line(id="a", golden_answers=[]),
        line(id="b", golden_answers=["", "Ada"]),
        line(id="c", golden_answers=None),
        line(id="d", question=" "),
        line(id="b", question="Again?"),
    )
    notices: list[str] = []
    questions = load_questions("nq", "test", notice=notices.append)
    assert [(question.id, question.golden_answers) for question in questions] == [("b", ["Ada"]), ("b#2", ["Ada"])]
    assert notices == ["3 of 5 questions of nq:test have no usable answer; left out"]


def test_a_public_file_that_cannot_be_used_is_named(shelf_of_sets: Callable[..., Path]) -> None:
    shown = "popqa/test.jsonl of RUC-NLPIR/FlashRAG_datasets"
    shelf_of_sets("popqa", "test", line(), '{"id": "x", "question": "Who?"}')
    assert refusal("popqa", "test").startswith(f"{shown}:2: no `golden_answers`; a question needs id, question and")
    shelf_of_sets("popqa", "test", line(), '{"id": "x", "ques')
    assert refusal("popqa", "test").startswith(f"{shown}:2: not a JSON line")
    path = shelf_of_sets("search-r1", "test", "not Parquet")
    with pytest.raises(
        UserError, match="^test.parquet of PeterJinGo/nq_hotpotqa_train is damaged or cut off"
    ) as caught:
        load_questions("search-r1", "test")
    assert caught.value.exit_code == 1 and f"delete {path.resolve()} and it is downloaded again" in str(caught.value)


def spoil_columns(path: Path, *names: str) -> None:
    """Makes these columns' pages unreadable, so that who asks for them fails."""
    content = bytearray(path.read_bytes())
    group = parquet.read_metadata(path).row_group(0)
    for column in (group.column(index) for index in range(group.num_columns)):
        if column.path_in_schema.partition(".")[0] in names:
            content[column.data_page_offset : column.data_page_offset + 8] = b"\xff" * 8
    path.write_bytes(content)


def test_search_r1s_mixture_is_read_whatever_its_other_columns_hold(shelf_of_sets: Callable[..., Path]) -> None:
    path = shelf_of_sets("search-r1", "train")
    columns = {
        "id": ["train_0", "train_1", "train_0"],
        "question": ["Who?", "Where?", "When?"],
        "golden_answers": [["Ada"], ["Lima", "Quito"], ["1815"]],
        "data_source": ["nq", "nq", "hotpotqa"],
        "metadata": [None, None, {"context": {"title": ["Ada"], "sentences": [["long"]]}}],
        "prompt": [[{"role": "user", "content": "Answer"}]] * 3,
        "reward_model": [{"style": "rule", "ground_truth": {"target": ["Ada"]}}] * 3,
    }
    expected = [
        Question("nq:train_0", "Who?", ["Ada"], {"data_set": "nq"}),
        Question("nq:train_1", "Where?", ["Lima", "Quito"], {"data_set": "nq"}),
        Question("hotpotqa:train_0", "When?", ["1815"], {"data_set": "hotpotqa"}),
    ]
    for answers in (pyarrow.list_(pyarrow.string()), pyarrow.large_list(pyarrow.large_string())):
        table = pyarrow.table({**columns, "golden_answers": pyarrow.array(columns["golden_answers"], answers)})
        parquet.write_table(table, path, row_group_size=2)
        spoil_columns(path, "metadata", "prompt", "reward_model")
        assert load_questions("search-r1", "train") == expected
    shelf_of_sets("nq", "dev", line(id="dev_0", question="Why?"))
    joined = load_questions("search-r1+nq:dev", "train")
    assert [question.id for question in joined][::3] == ["search-r1:nq:train_0", "nq:dev_0"]


def test_public_training_questions_that_are_evaluated_are_left_out_and_counted(
    shelf_of_sets: Callable[..., Path], tmp_path: Path
) -> None:
    shelf_of_sets("nq", "train", *(line(id=f"t{n}", question=f"who is {n}?") for n in range(6)))
    shelf_of_sets("nq", "test", *(line(id=f"e{n}", question=f"Who  is {n}?") for n in range(4, 9)))
    own = write(tmp_path / "own.jsonl", line(id="own", question="Where?"))

    def load(train: str, evaluation: str, **more: Any) -> tuple[list[str], list[str], list[str]]:
        notices: list[str] = []
        data = DataConfig(train=train, evaluation=evaluation, **more)
        stage = GRPOStageConfig(questions_per_step=1)
        found = load_run_questions(Config(data=data, grpo=stage), notices.append)
        return [question.id for question in found[0]], [question.id for question in found[1]], notices

    left_out = "2 questions of nq are in nq too; not trained on"
    assert load("nq", "nq") == (["t0", "t1", "t2", "t3"], ["e4", "e5", "e6", "e7", "e8"], [left_out])
    train, evaluation, notices = load("nq", "nq", evaluation_limit=1, train_limit=3)
    assert len(train) == 3 and not {"t4", "t5"} & set(train) and len(evaluation) == 1
    assert notices == [left_out], "the whole split is held out, for one may evaluate on all of it later"
    assert load(own, "nq") == (["own"], ["e4", "e5", "e6", "e7", "e8"], [])
    with pytest.raises(UserError, match=r"^all 5 questions of data.train=nq:test are in data.evaluation=nq too"):
        load("nq:test", "nq")
    mine = write(tmp_path / "mine.jsonl", line(id="mine", question="Who is 8?"))
    with pytest.raises(UserError, match="evaluation question 'e8' is training question 'mine'"):
        load(f"nq+{mine}", "nq")


def test_a_sample_question_is_given_where_nothing_has_to_be_fetched_for_it(tmp_path: Path) -> None:
    assert sample_question("demo") in {question.question for question in load_questions("demo", "test")}
    (tmp_path / "own.jsonl").write_text(json.dumps({"id": "1", "question": "Who?", "golden_answers": ["Ann"]}) + "\n")
    assert sample_question(str(tmp_path / "own.jsonl")) == "Who?"
    (tmp_path / "own.jsonl").write_text("{")
    assert sample_question(str(tmp_path / "own.jsonl")) is None
    assert sample_question("nq") is None and sample_question(None) is None
