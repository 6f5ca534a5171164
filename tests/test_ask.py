"""Questions and answers: told as they come, stopped at will, compared, piped, and shown without obeying their text."""

import io
import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import run_command
from rich.console import Console

from searche1_lite.cli.pipe import LONGEST_LINE, QuestionLines
from searche1_lite.config import ModelConfig, load_config
from searche1_lite.data.questions import load_questions
from searche1_lite.data.trajectory import Passage, Question
from searche1_lite.policy.adapter import adapter_digest, save_adapter
from searche1_lite.policy.model import load_policy
from searche1_lite.rollout.protocol import Protocol
from searche1_lite.runtime.console import RichTasks
from searche1_lite.runtime.errors import UserError
from searche1_lite.serve.answer_view import AnswerView, Reasoning, comparison_table, figures
from searche1_lite.serve.ask import Asker, AskSettings, Comparison, Event, Found, Searched, Told, Wrote, _WatchedEpisode
from searche1_lite.train.session import Session
from tests.conftest import byte_level_tokenizer

QUESTION = "What is the mayor of Port Mitu?"
HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e\rLima"
CONTROL = re.compile("[\x00-\x09\x0b-\x1a\x1c-\x1f\x7f-\x9f\u202e]")


def command(folder: Path, *words: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Runs `searche1-lite ask WORDS` on the demo."""
    settings = {"SEARCHE1_LITE_CACHE": str(folder / "cache"), **environment}
    return run_command("ask", "--preset", "demo", *words, cwd=folder, text=False, given=stdin, **settings)


@pytest.fixture(scope="module")
def work() -> Session:
    return Session(load_config("demo"), RichTasks(quiet=True))


@pytest.fixture(scope="module")
def questions() -> list[str]:
    return [question.question for question in load_questions("demo", "test", 0, 0, print)]


@pytest.fixture
def asker(work: Session, adapter: Path, tmp_path: Path) -> Iterator[Asker]:
    """With an adapter that answers otherwise than the base; the weights are put back for the next test."""
    save_adapter(work.model, tmp_path / "before")
    asker = Asker(work)
    asker.use(adapter)
    yield asker
    asker.use(tmp_path / "before")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "own"
    model, _ = load_policy(ModelConfig(name="demo", lora_rank=8, lora_alpha=16), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, folder)
    return folder


def test_what_happens_is_told_in_order_and_adds_up_to_the_answer(work: Session) -> None:
    told: list[Event] = []
    answer = Asker(work).answer(f"  {QUESTION}\n", told.append)
    assert answer.question == QUESTION and answer.answer == "Dofa Togu" and answer.stopped == "answer"
    assert sum(isinstance(event, Wrote) for event in told) > 4, "told as it is written, not at once"
    assert "".join(e.text for e in told if isinstance(e, Wrote)) == answer.text.replace("\n", "")
    others = [event for event in told if not isinstance(event, Wrote)]
    assert others == [event for s in answer.searches for event in (Searched(s.query), Found(s.query, s.passages))]
    assert [event for event in answer.events if not isinstance(event, Wrote)] == others
    assert len([event for event in answer.events if isinstance(event, Wrote)]) == 2, "one a turn"


def test_the_json_object_has_what_the_design_promises(work: Session) -> None:
    record = json.loads(json.dumps(Asker(work).answer(QUESTION).to_dict()))
    assert list(record) == ["question", "answer", "searches", "sources", "text", "tokens", "seconds", "stopped"]
    assert list(record["searches"][0]) == ["query", "passages"]
    assert list(record["searches"][0]["passages"][0]) == ["id", "title", "text", "score"]
    (source,) = record["sources"]
    assert list(source) == ["number", "id", "title", "sentence"] and "Dofa Togu" in source["sentence"]


@pytest.mark.parametrize("moment", [Wrote, Searched, Found])
def test_whoever_listens_can_stop_the_answer_and_ask_again(asker: Asker, moment: type) -> None:
    before = asker.answer(QUESTION)

    def stop(event: Event) -> None:
        if isinstance(event, moment):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        asker.answer(QUESTION, stop)
    assert replace(asker.answer(QUESTION), seconds=before.seconds) == before


def test_questions_side_by_side_are_answered_as_one_by_one(work: Session, questions: list[str]) -> None:
    asker = Asker(work)
    asked = [*questions[:12], " ", QUESTION, "x" * 5000]
    together = asker.answers(asked)
    for question, answer in zip(asked, together, strict=True):
        if answer.stopped == "refused":
            assert question in (" ", "x" * 5000) and answer.to_dict()["error"].startswith("the question ")
        else:
            alone = asker.answer(question)
            assert alone.to_dict() | {"seconds": 0} == answer.to_dict() | {"seconds": 0}
    assert sum(answer.stopped == "refused" for answer in together) == 2


def test_compare_switches_the_adapter_off_and_on_in_one_model(asker: Asker, questions: list[str]) -> None:
    before = adapter_digest(asker.work.model)
    compared = asker.compare_all(questions[:20])
    assert adapter_digest(asker.work.model) == before
    assert any(pair.base.text != pair.adapter.text for pair in compared)
    one = asker.compare(questions[0])
    assert (one.base.text, one.adapter.text) == (compared[0].base.text, compared[0].adapter.text)
    asker.use(None)
    assert [answer.text for answer in asker.answers(questions[:20])] == [pair.base.text for pair in compared]
    with pytest.raises(UserError, match="no adapter is on"):
        asker.compare(QUESTION)


def test_an_adapter_that_does_not_fit_is_named_and_the_one_before_stays(asker: Asker, tmp_path: Path) -> None:
    assert asker.adapter is not None
    other = tmp_path / "other"
    other.mkdir()
    settings = json.loads((asker.adapter / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "Qwen/Qwen2.5-3B"}))
    before, adapter = adapter_digest(asker.work.model), asker.adapter
    with pytest.raises(UserError, match=r"for the base model 'Qwen/Qwen2\.5-3B', but this run uses 'demo'"):
        asker.use(other)
    with pytest.raises(UserError, match="holds no adapter"):
        asker.use(tmp_path)
    assert asker.adapter == adapter and adapter_digest(asker.work.model) == before


def test_settings_change_how_the_next_question_is_answered(work: Session) -> None:
    asker = Asker(work)
    asker.set("k", "1")
    assert {len(search.passages) for search in asker.answer(QUESTION).searches} == {1}
    asker.set("max_searches", "0")
    answer = asker.answer(QUESTION)
    assert answer.searches == [] and Told("No searches left") in answer.events
    asker.set("max_searches", "1")
    answer = asker.answer(QUESTION)
    assert len(answer.searches) == 1 and "1 search, all it may make" in figures(answer, asker.settings)
    asker.set("temperature", "3")
    texts = []
    for seed in ("1", "2", "1"):
        asker.set("seed", seed)
        texts.append(asker.answer(QUESTION).text)
    assert texts[0] == texts[2] != texts[1]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("k", "0", "k=0 is impossible; give a whole number from 1 to 100"),
        ("k", "many", "k=many is impossible"),
        ("max_searches", "-1", "max_searches=-1 is impossible"),
        ("temperature", "nan", "temperature=nan is impossible; give 0 (greedy), or a number from 0.01 to 100"),
        ("temperature", "1e-300", "temperature=1e-300 is impossible"),
        ("seed", "1.5", "seed=1.5 is impossible; give a whole number"),
        ("heat", "1", "there is no setting 'heat'; there are: k, max_searches, temperature, seed"),
    ],
)
def test_an_impossible_setting_is_refused_and_changes_nothing(
    work: Session, name: str, value: str, message: str
) -> None:
    asker = Asker(work)
    before = asker.settings
    with pytest.raises(UserError, match=re.escape(message)):
        asker.set(name, value)
    assert asker.settings == before


def test_a_token_budget_that_ran_out_is_said(work: Session) -> None:
    asker = Asker(work)
    asker._protocol = Protocol(
        work.tokenizer, replace(work.protocol.config, max_completion_tokens=4, max_turn_tokens=4)
    )
    answer = asker.answer(QUESTION)
    assert (
        not answer.answered and answer.stopped == "token_budget" and "tokens ran out" in answer.why_not(asker.settings)
    )


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "the question is empty"),
        (
            "w " * 50_000,
            "the question has 99,999 characters; with protocol.max_prompt_tokens=128 at most 2,048 are read",
        ),
        ("Who? " * 200, r"tokens, more than protocol.max_prompt_tokens=128"),
    ],
)
def test_a_question_that_cannot_be_put_is_refused_with_the_limit(work: Session, question: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Asker(work).answer(question)


def test_a_character_of_several_tokens_is_told_when_it_is_whole() -> None:
    tokenizer, told = byte_level_tokenizer(), []
    protocol = Protocol(tokenizer, load_config("demo").protocol)
    episode = _WatchedEpisode(
        told.append, frozenset({tokenizer.eos_token_id}), Question("q", "?", []), 0, [1], protocol
    )
    for token in [*tokenizer.encode("é漢😀.", add_special_tokens=False), tokenizer.eos_token_id]:
        episode.wrote(token)
    assert told == [Wrote("é"), Wrote("漢"), Wrote("😀"), Wrote(".")]


@pytest.mark.parametrize(
    ("written", "block", "shown"),
    [
        ("<think> a < b </think><search> x</search>", "search", " a < b "),
        ("<think>so <search> or</think><answer>y</answer>", "answer", "so <search> or</think>"),
        ("<thin ice</thin><answer", None, "<thin ice</thin><answer"),
    ],
)
def test_reasoning_is_shown_without_tags_in_whatever_pieces_it_comes(
    written: str, block: str | None, shown: str
) -> None:
    for size in (1, 2, 7, 100):
        reasoning = Reasoning()
        pieces = [reasoning.add(written[at : at + size]) for at in range(0, len(written), size)]
        assert "".join(pieces) + reasoning.end(block) == shown


@pytest.mark.parametrize("trace", ["none", "reasoning", "all"])
def test_nothing_written_or_found_steers_the_terminal(work: Session, trace: str) -> None:
    answer = Asker(work).answer(QUESTION)
    passages = [Passage(HOSTILE, HOSTILE, f"{HOSTILE} is {HOSTILE}.")]
    hostile = replace(answer, question=HOSTILE, answer=HOSTILE, searches=[], sources=[])
    hostile.sources = [type(answer.sources[0])(1, HOSTILE, HOSTILE, passages[0].text)]
    for colours in (None, "standard"):
        file = io.StringIO()
        console = Console(file=file, force_terminal=True, color_system=colours, soft_wrap=True, highlight=False)
        view = AnswerView(console, console, trace, AskSettings(3, 4))
        for event in (Wrote(HOSTILE), Wrote(f"<think>{HOSTILE}\n"), Searched(HOSTILE), Found(HOSTILE, passages)):
            view.show(event)
        view.show(Told(HOSTILE))
        view.end(hostile)
        view.end(replace(hostile, answer=None, stopped="refused", error=HOSTILE))
        console.print(comparison_table(Comparison(hostile, hostile), HOSTILE, AskSettings(3, 4)))
        shown = file.getvalue()
        assert "Lima" in shown and not CONTROL.search(shown)
        assert "\x1b" not in (re.sub("\x1b\\[[0-9;]*m", "", shown) if colours else shown), "styles and nothing else"


def test_questions_of_a_pipe_come_as_they_are_ready_and_long_lines_are_cut() -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as stream, open(writer, "wb", buffering=0) as ends:
        ends.write("\ufeffone\n\n \n".encode())
        lines = QuestionLines(stream, 2)
        assert lines.wait()
        batches = lines.batches(8)
        assert next(batches) == ["one"], "answered before more is written"
        ends.write(b"two\xff\r\n")
        assert next(batches) == ["two\ufffd"]
        ends.close()
        assert list(batches) == []
    long = QuestionLines(io.BytesIO(b"x" * (3 * LONGEST_LINE + 5) + b"\nlast"), 4)
    assert [[len(q) for q in batch] for batch in long.batches(1)] == [[LONGEST_LINE], [4]]


def test_200_questions_from_a_pipe_give_200_json_lines_in_order(
    work: Session, questions: list[str], tmp_path: Path
) -> None:
    asked = [*questions[:197], f"Who is {HOSTILE}?".replace("\r", ""), "x" * 100_000, questions[0]]
    ran = command(tmp_path, stdin="\n".join(asked).encode(), PYTHONIOENCODING="ascii")
    assert ran.stderr == b"" and not CONTROL.search(ran.stdout.decode("ascii")) and b"\x1b" not in ran.stdout
    answers = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [answer["question"] for answer in answers] == [*asked[:198], "x" * 1000, asked[199]]
    assert answers[198]["stopped"] == "refused" and "100,000 characters" in answers[198]["error"]
    assert ran.returncode == 3, "one was not answered"
    for place in (0, 1, 130, 199):
        alone = Asker(work).answer(asked[place]).to_dict()
        assert answers[place] | {"seconds": 0} == alone | {"seconds": 0}


def test_one_question_gives_its_answer_on_stdout_and_the_rest_on_stderr(tmp_path: Path) -> None:
    ran = command(tmp_path, QUESTION, "search.threads=1", "--show-trace")
    assert (ran.returncode, ran.stdout) == (0, b"Dofa Togu\n")
    assert b"\x1b" not in ran.stderr and b"<think> find mayor</think>" in ran.stderr
    assert b"[1] Port Mitu (2717): Port Mitu: mayor Dofa Togu.\n" in ran.stderr and b"1 search; 18 tokens" in ran.stderr


def test_no_answer_is_said_so_and_exits_with_3(tmp_path: Path) -> None:
    ran = command(tmp_path, "seed=1", QUESTION, "protocol.max_turn_tokens=4", "protocol.max_completion_tokens=4")
    assert (ran.returncode, ran.stdout) == (3, b"")
    assert b"no answer: its tokens ran out (protocol.max_completion_tokens)" in ran.stderr


def test_compare_gives_both_answers(adapter: Path, tmp_path: Path) -> None:
    ran = command(tmp_path, QUESTION, "--adapter", str(adapter), "--compare", "--json")
    found = json.loads(ran.stdout)
    assert list(found) == ["question", "base", "adapter"] and found["base"]["answer"] == "Dofa Togu"
    assert found["adapter"]["seconds"] > 0 and ran.returncode == (0 if found["adapter"]["answer"] else 3)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "there is no question: neither as an argument nor on stdin"),
        (
            ["Who", "wrote", "Emma?"],
            2,
            "'wrote' is neither a setting nor part of the question; put the question in quotes",
        ),
        (["serach.k=3"], 2, "unknown config key serach; did you mean search?"),
        (["Who?", "--compare"], 2, "--compare shows an adapter beside the base; name one with --adapter"),
        (["--show-trace"], 2, "--show-trace is for one question; give it"),
        (["x" * 100_000], 2, "the question has 100,000 characters; with protocol.max_prompt_tokens=128 at most 2,048"),
        (["Who?", "search.index=missing/folder"], 2, "no Lucene index at missing/folder"),
        (["Who?", "search.corpus=missing.jsonl"], 2, "no corpus at missing.jsonl"),
        (["Who?", "search.index=wikipedia-dpr-100w"], 1, "add --yes to agree"),
    ],
)
def test_a_mistake_is_told_in_one_line(tmp_path: Path, words: list[str], code: int, message: str) -> None:
    ran = command(tmp_path, *words, PYSERINI_CACHE=str(tmp_path / "pyserini"))
    assert ran.returncode == code and ran.stdout == b""
    assert ran.stderr.startswith(b"error: ") and ran.stderr.count(b"\n") == 1 and message in ran.stderr.decode()
