"""Question files: read strictly, cut to a seeded subset, and never shared by training and evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest

from searche1_lite.benchmarks import check_disjoint, load_questions, load_run_questions
from searche1_lite.config import Config, DataConfig, GRPOStageConfig
from searche1_lite.errors import UserError
from searche1_lite.trajectory import Question

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


@pytest.mark.parametrize("limit", [0, 5, 6])
def test_a_limit_of_zero_or_beyond_the_file_takes_every_question(tmp_path: Path, limit: int) -> None:
    assert len(load_questions(write_many(tmp_path / "q.jsonl", 5), "train", limit=limit, seed=1)) == 5


def test_the_demos_split_is_the_one_asked_for_or_named() -> None:
    dev, test = load_questions("demo", "dev"), load_questions("demo", "test")
    assert load_questions("demo:dev", "test") == dev
    assert dev != test and load_questions("demo:", "test") == test


def test_a_subset_of_the_demo_leaves_the_split_itself_whole() -> None:
    before = len(load_questions("demo", "dev"))
    assert len(load_questions("demo", "dev", limit=3, seed=0)) == 3
    assert len(load_questions("demo", "dev")) == before


@pytest.mark.parametrize("spec", ["demo:validation", "demo:Dev", "demo:dev:2"])
def test_an_unknown_split_of_the_demo_is_refused_with_those_there_are(spec: str) -> None:
    assert refusal(spec) == f"the demo has no split {spec.partition(':')[2]!r}; there are: train, dev, test"


@pytest.mark.parametrize("same", ["Who wrote Emma?", "who  wrote EMMA?", " Who wrote\tEmma? "])
def test_an_evaluation_question_that_was_trained_on_is_refused_with_both_ids(same: str) -> None:
    train = [Question("t1", "Who?", ["Ada"]), Question("t2", "Who wrote Emma?", ["Austen"])]
    with pytest.raises(UserError, match="evaluation question 'e1' is training question 't2'"):
        check_disjoint(train, [Question("e0", "Where?", ["Lima"]), Question("e1", same, ["Austen"])])


def test_questions_that_differ_are_let_through_even_with_the_same_id_and_answer() -> None:
    check_disjoint([Question("q", "Who wrote Emma?", ["Austen"])], [Question("q", "Who wrote Persuasion?", ["Austen"])])
    check_disjoint([], [])


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
    trained, evaluated = load_run_questions(Config())
    assert trained == load_questions("demo:train", "test") and evaluated == load_questions("demo:test", "train")
