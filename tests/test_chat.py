"""The session of `ask` at a real pseudo-terminal: what a person types, and what they then see."""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from searche1_lite.data.demo_world import write_demo_corpus

QUESTION = "What is the mayor of Port Mitu?"
READY, TAKEN = "\x1b[?2004h", "\x1b[?2004l"  # bracketed paste is on while a line is edited
STYLE = re.compile("\x1b\\[[0-9;]*m")
# So long an answer, if it is sampled at random, that there is time to stop it.
LONG = ["protocol.max_turn_tokens=20000", "protocol.max_completion_tokens=20000", "protocol.max_invalid_turns=1000"]


class Terminal:
    """A session of `searche1-lite ask` and the keyboard in front of it."""

    def __init__(self, folder: Path, *words: str, **environment: str) -> None:
        keep = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "searche1_lite", "ask", "--preset", "demo", f"search.corpus={folder / 'corpus.jsonl'}", *words],
            cwd=str(folder),
            env={
                **keep, "SEARCHE1_LITE_CACHE": str(folder / "cache"), "PROMPT_TOOLKIT_NO_CPR": "1",
                "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", **environment,
            },
            encoding="utf-8",
            dimensions=(50, 200),
            timeout=180,
        )  # fmt: skip
        self.child.delaybeforesend = None

    def ready(self) -> str:
        """What was shown until a line can be typed."""
        self.child.expect_exact(READY)
        return self.child.before

    def enter(self, line: str) -> str:
        """Types a line; what is shown for it, without the styles."""
        self.child.send(f"{line}\r")
        self.child.expect_exact(TAKEN)
        return STYLE.sub("", self.ready())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the demo's corpus, and in it a passage that would like to steer the terminal."""
    folder = tmp_path_factory.mktemp("desk")
    corpus = folder / "corpus.jsonl"
    write_demo_corpus(corpus)
    hostile = "Zork\x1b]0;owned\x07 Mitu\nZork Mitu: mayor \x1b[2J\x9b31m Dofa\u202e Togu."
    with corpus.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"id": "\x1b[5m9", "contents": hostile}) + "\n")
    return folder


@pytest.fixture(scope="module")
def session(folder: Path) -> Iterator[Terminal]:
    terminal = Terminal(folder, *LONG)
    terminal.ready()
    yield terminal
    terminal.child.close(force=True)


def test_an_answer_stands_out_with_its_searches_and_sources(session: Terminal) -> None:
    session.child.send(f"{QUESTION}\r")
    session.child.expect_exact(TAKEN)
    shown = session.ready()
    assert "\x1b[2mfind\x1b[0m" in shown or "\x1b[2m find\x1b[0m" in shown, "reasoning, dimmed, piece by piece"
    assert "\x1b[1;32mDofa Togu\x1b[0m" in shown
    plain = STYLE.sub("", shown)
    assert "search  Port Mitu mayor" in plain and "  found Port Mitu" in plain and "<think>" not in plain
    assert "[1] Port Mitu (2717): Port Mitu: mayor Dofa Togu." in plain and "1 search; 18 tokens" in plain


def test_commands_show_what_was_found_and_change_how_it_is_answered(session: Terminal, folder: Path) -> None:
    session.enter(QUESTION)
    assert "[1] Port Mitu (2717)" in session.enter("/sources")
    assert "Port Mitu: mayor Dofa Togu." in session.enter("/sources 1")
    assert "has no source 9; it has" in session.enter("/sources 9")
    assert "<think> find mayor</think><search> Port Mitu mayor</search>" in session.enter("/trace")
    assert "/compare [QUESTION]" in session.enter("/help")
    assert "k=1 max_searches=4 temperature=0 (greedy)" in session.enter("/set k 1")
    assert "found Port Mitu\r" in session.enter(QUESTION)
    assert "k=3" in session.enter("/set k=3")
    assert "error: k=no is impossible" in session.enter("/set k no")
    assert "there is no command /hepl; did you mean /help?" in session.enter("/hepl")
    assert "adapter: none" in session.enter("/adapter none")
    assert "error: nowhere holds no adapter" in session.enter("/adapter nowhere")
    assert "no adapter is on" in session.enter("/compare")
    assert "answers in saved.jsonl" in session.enter("/save saved.jsonl")
    saved = [json.loads(line) for line in (folder / "saved.jsonl").read_text().splitlines()]
    assert saved[0]["question"] == QUESTION and saved[0]["answer"] == "Dofa Togu"
    assert "saved.jsonl exists already" in session.enter("/save saved.jsonl")
    assert "No such file or directory" in session.enter("/save missing/saved.jsonl")


def test_ctrl_c_stops_the_answer_and_the_session_goes_on(session: Terminal) -> None:
    session.enter("/set temperature 100")
    session.child.send(f"{QUESTION}\r")
    session.child.expect_exact(TAKEN)
    session.child.expect("\x1b\\[2m\\S")  # it writes
    session.child.sendintr()
    assert "stopped" in session.ready()
    assert "there is no answer yet" in session.enter("/trace")
    session.enter("/set temperature 0")
    assert "Dofa Togu" in session.enter(QUESTION)


def test_ctrl_c_at_the_prompt_leaves_nothing_but_the_line(session: Terminal) -> None:
    session.child.send("half a question")
    session.child.sendintr()
    session.child.expect_exact(TAKEN)
    session.ready()
    assert "Dofa Togu" in session.enter(QUESTION)


def test_the_history_is_gone_through_and_searched_and_only_its_owner_may_read_it(
    session: Terminal, folder: Path
) -> None:
    session.enter(QUESTION)
    session.enter("/set")
    assert "Dofa Togu" in session.enter("\x1b[A\x1b[A"), "twice up"
    session.enter("/set")
    assert "Dofa Togu" in session.enter("\x12Port Mi\r"), "found backwards; a first return takes it"
    file = folder / "cache" / "ask_history"
    assert file.stat().st_mode & 0o777 == 0o600 and f"+{QUESTION}" in file.read_text()


def test_lines_that_are_pasted_are_one_question(session: Terminal) -> None:
    shown = session.enter("\x1b[200~What is the\nmayor of\r\nPort Mitu?\x1b[201~")
    assert "search  Port Mitu mayor" in shown and "Dofa Togu" in shown


def test_what_cannot_be_asked_is_refused_in_a_line(session: Terminal) -> None:
    assert "error: the prompt of question" in session.enter("Who? " * 200)
    session.child.send(f"\x1b[200~{'x' * 100_000}\x1b[201~")
    session.child.expect_exact(
        "not pasted: the question has 100,000 characters; with protocol.max_prompt_tokens=128 at"
    )
    assert "Dofa Togu" in session.enter(QUESTION)


def test_text_cannot_steer_the_terminal(session: Terminal) -> None:
    session.child.send("\x1b[200~What is the mayor of Zork\x1b]0;owned\x07\x1b[2J Mitu?\x1b[201~\r")
    session.child.expect_exact(TAKEN)
    shown = session.child.before + session.ready() + session.enter("/trace")
    assert "Zork" in shown and "[2717]" not in shown.partition("/trace")[0]
    for forbidden in ("\x1b]", "\x07", "\x1b[2J", "\x1b[5m", "\x9b", "\u202e"):
        assert forbidden not in shown


def test_two_sessions_at_once_and_one_that_wants_no_colours(session: Terminal, folder: Path) -> None:
    other = Terminal(folder, NO_COLOR="1")
    other.ready()
    other.child.send(f"{QUESTION}\r")
    other.child.expect_exact(TAKEN)
    assert "Dofa Togu" in session.enter(QUESTION)
    shown = other.ready()
    assert "Dofa Togu" in shown and not STYLE.search(shown.rpartition("1 search")[0].partition("find")[2])
    other.child.sendeof()
    other.child.expect(pexpect.EOF)
    other.child.close()
    assert other.child.exitstatus == 0
    assert "Dofa Togu" in session.enter(QUESTION)


def test_quit_leaves(session: Terminal) -> None:
    session.child.send("/quit\r")
    session.child.expect(pexpect.EOF)
    session.child.close()
    assert session.child.exitstatus == 0
