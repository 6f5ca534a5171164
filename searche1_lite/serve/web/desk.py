"""One policy, many tabs: questions are answered one after the other, each watched by the tab that asked it.

The policy runs in a thread of its own. Who asked gets what happens as plain data, ready to be shown: text of documents
and of the policy has nothing in it that hides or reorders what stands around it.
"""

import asyncio
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from os import environ
from typing import Any

from searche1_lite.data.trajectory import FailedSearch, Passage
from searche1_lite.report.escaping import visible
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.terminal import one_line
from searche1_lite.serve.answer_view import Reasoning, figures, why_no_source
from searche1_lite.serve.ask import Answer, Asker, AskSettings, Event, Found, Searched, Told, Wrote
from searche1_lite.serve.sources import picked_out

MOST_WAITING = 16
_PASSAGE, _TITLE = 20_000, 300
"""Characters that are shown."""

Note = dict[str, Any]


class Stopped(Exception):
    """Nobody waits for the answer any more."""


@dataclass(eq=False)
class _Job:
    question: str
    settings: AskSettings
    sides: tuple[bool, ...]
    """Of each answer to give: by the bare base?"""
    tell: Callable[[Note | None], None]
    """May be called from any thread; None: there is no more to come."""
    stopped: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class Taken:
    """A question that has its place in the queue."""

    _notes: "asyncio.Queue[Note | None]"
    _stopped: threading.Event

    async def notes(self) -> AsyncIterator[Note]:
        """What happens, from the waiting for other questions to the answer; see `_notes`."""
        while (note := await self._notes.get()) is not None:
            yield note

    def leave(self) -> None:
        """Nobody waits any more: the answer is stopped at its next token. Does nothing once it is given."""
        self._stopped.set()


class Desk:
    """Takes questions for one `Asker`, which nobody else may use meanwhile."""

    def __init__(self, asker: Asker) -> None:
        self.asker = asker
        self._thread = ThreadPoolExecutor(1, "answer")
        self._jobs: list[_Job] = []

    def take(self, question: str, settings: AskSettings, sides: tuple[bool, ...]) -> "Taken":
        """Takes a question, to be answered after those before it. Call it in the event loop.

        Raises:
            BlockingIOError: if so many wait that another should come later.
        """
        if (ahead := len(self._jobs)) > MOST_WAITING:
            raise BlockingIOError
        loop, notes = asyncio.get_running_loop(), asyncio.Queue[Note | None]()

        def tell(note: Note | None) -> None:
            with suppress(RuntimeError):  # the server has ended, and with it whoever asked
                loop.call_soon_threadsafe(notes.put_nowait, note)

        job = _Job(question, settings, sides, tell)
        if ahead:
            notes.put_nowait({"type": "waiting", "ahead": ahead})
        self._jobs.append(job)
        self._thread.submit(self._work, job)
        return Taken(notes, job.stopped)

    def stop(self) -> None:
        """Stops all answers. From any thread, from a signal handler too."""
        for job in list(self._jobs):
            job.stopped.set()

    def close(self) -> None:
        """Stops all answers and waits for their end."""
        self.stop()
        self._thread.shutdown()

    def _work(self, job: _Job) -> None:
        try:
            if job.stopped.is_set():
                return
            for name, value in asdict(job.settings).items():
                self.asker.set(name, str(value))
            for bare in job.sides:
                self._answer(job, bare)
        except Stopped:
            job.tell({"type": "stopped"})
        except UserError as error:
            job.tell({"type": "error", "error": one_line(str(error), 500)})
        except Exception as error:
            if environ.get("SEARCHE1_LITE_DEBUG"):
                traceback.print_exception(error)
            print(f"error: {type(error).__name__}: {one_line(str(error), 500)}", file=sys.stderr, flush=True)
            job.tell({"type": "error", "error": "answering failed; the terminal says more"})
        finally:
            self._jobs.remove(job)
            job.tell(None)

    def _answer(self, job: _Job, bare: bool) -> None:
        side = "base" if bare else "adapter"
        job.tell({"type": "began", "side": side})
        reasoning = Reasoning()

        def check() -> None:
            if job.stopped.is_set():
                raise Stopped

        def listen(event: Event) -> None:
            for note in _notes(event, reasoning):
                job.tell(note)

        answer = self.asker.answer(job.question, listen, bare=bare, check=check)
        if rest := reasoning.end("answer" if answer.stopped == "answer" else None):
            job.tell({"type": "reasoned", "text": visible(rest)})
        job.tell(_outcome(answer, job.settings))


def _notes(event: Event, reasoning: Reasoning) -> list[Note]:
    """An event as it is shown: the policy's reasoning is without tags, and without what it searches and answers."""

    def reasoned(text: str) -> list[Note]:
        return [{"type": "reasoned", "text": visible(text)}] if text else []

    match event:
        case Wrote(text):
            return reasoned(reasoning.add(text))
        case Searched(query):
            return [*reasoned(reasoning.end("search")), {"type": "searched", "query": visible(query)}]
        case Found(_, passages):
            failed = one_line(passages.reason, 300) if isinstance(passages, FailedSearch) else None
            return [{"type": "found", "passages": list(map(_passage, passages)), "failed": failed}]
        case Told(text):
            return [*reasoned(reasoning.end(None)), {"type": "told", "text": visible(one_line(text, 500))}]


def _passage(passage: Passage) -> Note:
    text = passage.text[:_PASSAGE] + (" …" if len(passage.text) > _PASSAGE else "")
    title = one_line(passage.title, _TITLE)
    return {"id": visible(one_line(passage.id, 100)), "title": visible(title), "text": visible(text)}


def _outcome(answer: Answer, settings: AskSettings) -> Note:
    """The answer with its sources, or why there is none; `record` is the object of `ask --json`, not to be shown."""
    sources = [
        {
            "number": source.number,
            "id": visible(one_line(source.id, 100)),
            "title": visible(one_line(source.title, 100)),
        }
        | dict(
            zip(
                ("before", "match", "after"),
                map(visible, picked_out(answer.answer or "", source.sentence)),
                strict=True,
            )
        )
        for source in answer.sources
    ]
    return {
        "type": "answer",
        "answer": visible(one_line(answer.answer or "", 2000)) if answer.answered else None,
        "why_not": None if answer.answered else visible(one_line(answer.why_not(settings), 500)),
        "sources": sources,
        "why_no_source": None if sources or not answer.answered else why_no_source(answer),
        "figures": figures(answer, settings).strip(),
        "text": visible(answer.text),
        "record": answer.to_dict(),
    }
