"""The interactive session of `ask`: questions and commands at a prompt."""

import difflib
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from prompt_toolkit import PromptSession
from prompt_toolkit.application import run_in_terminal
from prompt_toolkit.completion import Completer, NestedCompleter, PathCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from rich.console import Console
from rich.text import Text

from searche1_lite.data.questions import sample_question
from searche1_lite.rollout.protocol import check_question
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.sealed_folder import write_atomically
from searche1_lite.runtime.terminal import one_line, plain_text
from searche1_lite.serve.answer_view import AnswerView, comparison_table, source_lines
from searche1_lite.serve.ask import Answer, Asker, Comparison, Event

PROMPT = "ask> "


class Stopped(Exception):
    """The answer was stopped with Ctrl-C."""


class PrivateHistory(FileHistory):
    """A history file that ignores write errors, such as a full disk."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def open_history(file: Path) -> History:
    """The history in `file`, readable by its owner only; in memory if the file cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
        file.chmod(0o600)
        return PrivateHistory(file)
    except OSError:
        return InMemoryHistory()


class Chat:
    """One session.

    Args:
        console: the terminal.
        history: questions of earlier sessions; those of this one are added.
    """

    def __init__(self, asker: Asker, console: Console, history: History) -> None:
        self._asker, self._console = asker, console
        self._said: list[Answer | Comparison] = []
        self._last: Answer | None = None
        self._stop = self._leaving = False
        self._commands: dict[str, tuple[Callable[[str], None], str, str]] = {
            "help": (self._help, "", "list the commands"),
            "sources": (
                self._sources,
                "[NUMBER]",
                "the passages with the last answer; with a number, the full passage",
            ),
            "trace": (self._trace, "", "everything written and found for the last answer"),
            "compare": (self._compare, "[QUESTION]", "base and adapter side by side; default: the last question"),
            "set": (self._set, "[NAME VALUE]", "k, max_searches, temperature (0: greedy), seed; alone: show them"),
            "adapter": (self._adapter, "[DIR|none]", "answer with another adapter, or with the base alone"),
            "save": (self._save, "FILE", "the session's answers, as JSON lines"),
            "quit": (self._quit, "", "leave; Ctrl-D does too"),
        }
        words: dict[str, Completer | None] = {f"/{name}": None for name in self._commands}
        paths = {"/adapter": PathCompleter(only_directories=True, expanduser=True), "/save": PathCompleter()}
        self._prompt: PromptSession[str] = PromptSession(
            PROMPT,
            history=history,
            completer=NestedCompleter.from_nested_dict({**words, **paths}),
            complete_while_typing=False,
            key_bindings=self._keys(),
        )

    def run(self) -> None:
        """Reads and answers until the user leaves. User errors are shown in a line; GPU and memory errors propagate."""
        self._say("Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands")
        if (sample := sample_question(self._asker.work.config.data.evaluation)) is not None:
            self._say(f"for instance: {sample}")
        while not self._leaving:
            try:
                line = self._prompt.prompt().strip()
            except KeyboardInterrupt:
                continue
            except EOFError:
                break
            try:
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self._ask(line)
            except UserError as error:
                self._say(f"error: {error}", "bold red")
            except OSError as error:
                self._say(f"error: {error.strerror or error}: {error.filename or ''}", "bold red")

    def _say(self, line: str, style: str = "dim") -> None:
        self._console.print(Text(one_line(line, 1000), style=style))

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add(Keys.BracketedPaste)
        def _(event: KeyPressEvent) -> None:
            """Joins pasted lines to one, without control characters."""
            text = " ".join(plain_text(event.data.replace("\r", "\n")).split("\n"))
            try:
                if text.strip():
                    check_question(text, self._asker.work.protocol.config)
                event.current_buffer.insert_text(text)
            except UserError as error:
                message = f"not pasted: {error}"
                run_in_terminal(lambda: self._say(message, "bold red"))

        return keys

    def _ask(self, question: str) -> None:
        self._last = None
        view = AnswerView(self._console, self._console, "reasoning", self._asker.settings)
        with self._stoppable(view.stop):
            answer = self._asker.answer(question, self._unless_stopped(view.show))
            view.end(answer)
            self._last = answer
            self._said.append(answer)

    def _unless_stopped(self, show: Callable[[Event], object]) -> Callable[[Event], None]:
        def listen(event: Event) -> None:
            if self._stop:
                raise Stopped
            show(event)

        return listen

    @contextmanager
    def _stoppable(self, on_stop: Callable[[], None]) -> Iterator[None]:
        """Ctrl-C stops the answer at the next token, where the state is consistent; a second one leaves the session."""
        self._stop = False

        def note(signum: int, frame: FrameType | None) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        except Stopped:
            on_stop()
            self._say("stopped", "yellow")
        finally:
            signal.signal(signal.SIGINT, before)

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        if name not in self._commands:
            near = difflib.get_close_matches(name, self._commands, n=1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists them"
            raise UserError(f"there is no command /{name}; {hint}")
        self._commands[name][0](rest.strip())

    def _help(self, rest: str) -> None:
        for name, (_, arguments, explanation) in self._commands.items():
            self._console.print(Text.assemble((f"/{name} {arguments}".ljust(24), "bold"), explanation))
        self._say("anything else is a question. Up and down go through earlier ones, Ctrl-R searches them")

    def _answered(self) -> Answer:
        if self._last is None:
            raise UserError("there is no answer yet; ask something")
        return self._last

    def _sources(self, rest: str) -> None:
        answer = self._answered()
        if not rest:
            if not answer.answered:
                raise UserError("the last question got no answer, so it has no sources")
            for line in source_lines(answer):
                self._console.print(line)
            return
        source = next((source for source in answer.sources if str(source.number) == rest), None)
        if source is None:
            raise UserError(f"the last answer has no source {rest}; it has {len(answer.sources)}")
        passages = (p for search in answer.searches for p in search.passages if p.id == source.id)
        passage = next(passages)
        self._say(f"{passage.title} ({passage.id})", "bold")
        self._console.print(Text(plain_text(passage.text)))

    def _trace(self, rest: str) -> None:
        answer = self._answered()
        AnswerView(self._console, self._console, "all", self._asker.settings).replay(answer.events)
        self._say(f"ended: {answer.stopped}")

    def _compare(self, rest: str) -> None:
        question = rest or self._answered().question
        self._asker.check_comparable()
        self._say("answering twice ...")
        with self._stoppable(lambda: None):
            compared = self._asker.compare(question, self._unless_stopped(lambda event: None))
            self._console.print(comparison_table(compared, str(self._asker.adapter), self._asker.settings))
            self._last = compared.adapter
            self._said.append(compared)

    def _set(self, rest: str) -> None:
        if rest:
            name, _, value = rest.replace("=", " ", 1).partition(" ")
            if not value.strip():
                raise UserError(f"give {name} a value: /set {name} VALUE")
            self._asker.set(name, value.strip())
        now = self._asker.settings
        temperature = f"{now.temperature:g}" + (" (greedy)" if now.temperature == 0 else "")
        self._say(f"k={now.k} max_searches={now.max_searches} temperature={temperature} seed={now.seed}")

    def _adapter(self, rest: str) -> None:
        if rest:
            self._asker.use(None if rest == "none" else Path(rest).expanduser())
        adapter = self._asker.adapter
        self._say(f"adapter: {adapter}" if adapter else "adapter: none, the base alone answers")

    def _save(self, rest: str) -> None:
        if not rest:
            raise UserError("name a file: /save FILE")
        if not self._said:
            raise UserError("there is nothing to save yet; ask something")
        file = Path(rest).expanduser()
        if file.exists():
            raise UserError(f"{file} exists already; give another name")
        write_atomically(file, "".join(f"{json.dumps(said.to_dict())}\n" for said in self._said))
        count = "1 answer" if len(self._said) == 1 else f"{len(self._said)} answers"
        self._say(f"{count} in {file}")

    def _quit(self, rest: str) -> None:
        self._leaving = True
