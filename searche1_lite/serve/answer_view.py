"""How an answer is shown in a terminal: its searches, the reasoning as it is written, and where the answer stands."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from searche1_lite.data.trajectory import FailedSearch, Passage
from searche1_lite.runtime.terminal import one_line, plain_text
from searche1_lite.serve.ask import Answer, Asker, AskSettings, Comparison, Event, Found, Searched, Told, Wrote
from searche1_lite.serve.sources import picked_out

_THINK, _BLOCKS = ("<think>", "</think>"), ("<search>", "<answer>")


def plain_console(stderr: bool = False) -> Console:
    """A console without colours or weights where they are not wanted (NO_COLOR) or nobody watches."""
    colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True, color_system=colours)


class Reasoning:
    """What of the policy's text is reasoning, as it is written: without tags, without what is searched and answered."""

    def __init__(self) -> None:
        self._held = ""

    def add(self, text: str) -> str:
        """What can be shown now that the policy wrote `text`."""
        self._held += text
        shown = ""
        while self._held:
            before, bracket, after = self._held.partition("<")
            shown, self._held = shown + before, bracket + after
            if self._held.startswith(_BLOCKS):
                break
            if tag := next((tag for tag in _THINK if self._held.startswith(tag)), None):
                self._held = self._held[len(tag) :]
            elif any(tag.startswith(self._held) for tag in _THINK + _BLOCKS):
                break  # it may become one
            else:
                shown, self._held = shown + self._held[:1], self._held[1:]
        return shown

    def end(self, block: str | None) -> str:
        """The rest, when a turn is over.

        Args:
            block: `search` or `answer` if it ended with one, which is left out.
        """
        held, self._held = self._held, ""
        if block is not None:
            held = held[: max(held.rfind(f"<{block}>"), 0)]
        return held


class AnswerView:
    """Shows one answer.

    Args:
        result: where the answer goes.
        aside: where everything else goes.
        trace: `none` (searches only), `reasoning`, or `all`: every word written and found.
        settings: what it is answered with.
    """

    def __init__(self, result: Console, aside: Console, trace: str, settings: AskSettings) -> None:
        self._result, self._aside, self._trace, self._settings = result, aside, trace, settings
        self._reasoning = Reasoning()
        self._within_line = False

    def show(self, event: Event) -> None:
        """What has happened."""
        match event:
            case Wrote(text):
                if self._trace != "none":
                    self._stream(text if self._trace == "all" else self._reasoning.add(text))
            case Searched(query):
                self._end_turn("search")
                self._line("search  ", "cyan", one_line(query, 500))
            case Found(_, FailedSearch(reason=reason)):
                self._line("  failed ", "yellow", one_line(reason, 300))
            case Found(_, passages):
                if self._trace == "all":
                    for passage in passages:
                        self._line(f"  [{one_line(passage.id, 40)}] ", "dim", _whole(passage))
                else:
                    self._line("  found ", "dim", _titles(passages))
            case Told(text):
                self._end_turn(None)
                if self._trace == "all":
                    self._line("told    ", "dim", one_line(text, 500))

    def replay(self, events: Sequence[Event]) -> None:
        for event in events:
            self.show(event)
        self._end_turn(None)

    def end(self, answer: Answer) -> None:
        """The answer, and where it stands."""
        self._end_turn("answer" if answer.answered else None)
        if answer.answered:
            self._result.print(Text(one_line(answer.answer or "", 2000), style="bold green"))
            for line in source_lines(answer):
                self._aside.print(line)
        else:
            self._aside.print(Text(f"no answer: {one_line(answer.why_not(self._settings), 500)}", style="bold yellow"))
        self._aside.print(Text(figures(answer, self._settings), style="dim"))

    def stop(self) -> None:
        """There is no more to come."""
        self._end_turn(None)

    def _stream(self, text: str) -> None:
        if not self._within_line:
            text = text.lstrip()
        if text:
            self._aside.print(Text(plain_text(text), style="dim"), end="")
            self._aside.file.flush()
            self._within_line = not text.endswith("\n")

    def _end_turn(self, block: str | None) -> None:
        if self._trace == "reasoning":
            self._stream(self._reasoning.end(block))
        if self._within_line:
            self._aside.print()
            self._within_line = False

    def _line(self, label: str, style: str, text: str) -> None:
        self._aside.print(Text.assemble((label, style), text))


def source_lines(answer: Answer) -> list[Text]:
    """The answer's sources, numbered, the answer picked out in its sentence; or that there are none."""
    if not answer.sources:
        return [Text(f"  no source: {why_no_source(answer)}", style="dim")]
    lines = []
    for source in answer.sources:
        line = Text(f"  [{source.number}] {one_line(source.title, 100)} ({one_line(source.id, 60)}): ")
        lines.append(line.append_text(_picked_out(answer.answer or "", source.sentence)))
    return lines


def _picked_out(answer: str, sentence: str) -> Text:
    """The sentence, or what is around the answer in a long one, with the answer in bold."""
    before, match, after = (plain_text(part).replace("\n", " ") for part in picked_out(answer, sentence))
    return Text.assemble(before, (match, "bold"), after)


def why_no_source(answer: Answer) -> str:
    """In words, of an answer without sources."""
    return "in no passage found does this answer stand" if answer.searches else "it did not search"


def figures(answer: Answer, settings: AskSettings) -> str:
    """Searches, tokens and time in a line; it says if the searches were used up."""
    count = len(answer.searches)
    spent = ", all it may make" if count and count >= settings.max_searches else ""
    searches = "1 search" if count == 1 else f"{count} searches"
    tokens = "1 token" if answer.tokens == 1 else f"{answer.tokens} tokens"
    return f"  {searches}{spent}; {tokens}; {answer.seconds:.2f} s"


def comparison_table(compared: Comparison, adapter: str, settings: AskSettings) -> Table:
    """Base and adapter side by side."""
    table = Table(title=Text(one_line(compared.base.question, 200)), expand=False)
    table.add_column("")
    for heading in ("base", f"adapter {one_line(adapter, 60)}"):
        table.add_column(Text(heading), overflow="fold", ratio=1)
    both = (compared.base, compared.adapter)

    def searches(answer: Answer) -> Text:
        lines = [
            f"{number}. {one_line(search.query, 120)}\n   {'failed' if search.failed else _titles(search.passages)}"
            for number, search in enumerate(answer.searches, 1)
        ]
        return Text("\n".join(lines) or "none")

    def answered(answer: Answer) -> Text:
        if answer.answered:
            return Text(one_line(answer.answer or "", 500), style="bold green")
        return Text(f"no answer: {one_line(answer.why_not(settings), 200)}", style="yellow")

    table.add_row("answer", *map(answered, both))
    table.add_row("searches", *map(searches, both))
    table.add_row("sources", *(Text("\n").join(source_lines(answer)) for answer in both))
    table.add_row("tokens", *(Text(str(answer.tokens)) for answer in both))
    table.add_row("seconds", *(Text(f"{answer.seconds:.2f}") for answer in both))
    return table


def _titles(passages: Sequence[Passage]) -> str:
    """The titles, each once with how often it came."""
    counts = Counter(one_line(passage.title, 60) or f"[{one_line(passage.id, 40)}]" for passage in passages)
    return ", ".join(f"{title} (x{count})" if count > 1 else title for title, count in counts.items()) or "nothing"


def _whole(passage: Passage) -> str:
    return f"{one_line(passage.title, 200)}: {plain_text(passage.text)}"


def show_one(asker: Asker, question: str, compare: bool, show_trace: bool, as_json: bool) -> bool:
    """Asks one question and shows what comes of it, the answer alone on stdout; was it answered?"""
    result, aside = plain_console(), plain_console(stderr=True)
    view = AnswerView(result, aside, "all" if show_trace else "none", asker.settings)
    on_event = view.show if show_trace or not (as_json or compare) else None
    if compare:
        compared = asker.compare(question, on_event)
        view.stop()
        if as_json:
            print(json.dumps(compared.to_dict()))
        else:
            result.print(comparison_table(compared, str(asker.adapter), asker.settings))
        return compared.answered
    answer = asker.answer(question, on_event)
    view.stop()
    if as_json:
        print(json.dumps(answer.to_dict()))
    else:
        view.end(answer)
    return answer.answered
