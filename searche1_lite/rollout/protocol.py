"""Tags, prompts, parsing of turns, and the escaping of retrieved text.

The tags are Search-R1's: `<think>`, `<search>`, `<information>`, `<answer>`. The policy writes everything except
`<information>` blocks and the two short environment messages. Questions and retrieved text are data: they are encoded
so that they can neither open nor close a block nor become a control id.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from searche1_lite.config import ProtocolConfig
from searche1_lite.data.trajectory import FailedSearch, Passage, Question, Trajectory
from searche1_lite.policy.stopping import STOP_TAGS
from searche1_lite.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAGS = tuple(f"<{slash}{name}>" for name in ("think", "search", "information", "answer") for slash in ("", "/"))

CHARACTERS_PER_TOKEN = 16
"""A question with more characters per token of the prompt's budget is refused before it is tokenised."""

_ANGLES = str.maketrans(dict.fromkeys("<＜﹤", "‹") | dict.fromkeys(">＞﹥", "›"))
_PLACEHOLDER = re.compile(r"\{(rank|title|text)\}")
_CHAT_MARKER = re.compile(r"<<?\|?/?\w+\|?>>?|\[/?[A-Z_]+\]")
_MARKER_TOKENS = 64
"""The most tokens of a chat marker."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""SentencePiece's names of byte tokens."""


@dataclass(frozen=True, slots=True)
class Action:
    """The action of one model turn. `content` is the stripped query or answer; empty for an invalid turn."""

    kind: Literal["search", "answer", "invalid"]
    content: str = ""


def last_block(text: str, tag: str) -> str | None:
    """The stripped content of the last complete `<tag>..</tag>` in `text`, or None.

    The block is closed by the last `</tag>` that has a `<tag>` before it, and opened by the nearest one before that.
    """
    opening, closing = f"<{tag}>", f"</{tag}>"
    end = text.rfind(closing)
    while end != -1:
        start = text.rfind(opening, 0, end)
        if start == -1:
            return None
        content = text[start + len(opening) : end]
        if closing not in content:
            return content.strip()
        end = text.rfind(closing, 0, end)
    return None


def parse_turn(text: str) -> Action:
    """The action of one model turn, which ends at its first `</search>` or `</answer>` if it has one."""
    ends = [(text.find(tag), tag) for tag in STOP_TAGS if tag in text]
    if not ends:
        return Action("invalid")
    position, tag = min(ends)
    kind: Literal["search", "answer"] = "search" if tag == "</search>" else "answer"
    content = last_block(text[: position + len(tag)], kind)
    if content is None or (kind == "search" and not content):
        return Action("invalid")
    return Action(kind, content)


def escape(text: str) -> str:
    """`text` with every angle bracket, ASCII or full-width, replaced by a look-alike that forms no tag or marker."""
    return text.translate(_ANGLES)


def check_question(question: str, limits: ProtocolConfig) -> str:
    """The question without surrounding space and lone surrogates.

    Raises:
        UserError: if it is empty, or so long that it cannot fit the prompt's budget.
    """
    question = question.encode("utf-8", "replace").decode("utf-8").strip()
    if not question:
        raise UserError("the question is empty; write one")
    if len(question) > (most := CHARACTERS_PER_TOKEN * limits.max_prompt_tokens):
        raise UserError(
            f"the question has {len(question):,} characters; with protocol.max_prompt_tokens="
            f"{limits.max_prompt_tokens} at most {most:,} are read; shorten it or raise the limit"
        )
    return question


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: "PreTrainedTokenizerBase", size: int) -> tuple[frozenset[int], int]:
    """The ids whose text has an angle bracket, and the longest token's characters; `size` makes the cache's key."""
    names = tokenizer.get_vocab()
    angles = set()
    for name, index in names.items():
        if (byte := _BYTE.fullmatch(name)) and byte[1] not in ("3C", "3E"):
            continue
        if "<" in name or ">" in name:
            angles.add(index)
    return frozenset(angles), max(map(len, names))


class Protocol:
    """Prompts and environment text as token ids, for one tokenizer.

    Args:
        tokenizer: any fast tokenizer; its chat template, if it has one, renders the prompts.
        config: templates and token budgets.

    Raises:
        UserError: if the chat template does not show a message unchanged, exactly once.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", config: ProtocolConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        # Some tokenizers, such as Gemma's, add runs of blanks, which occur in ordinary text.
        self._added = {content: index for content, index in added.items() if content.replace("▁", " ").strip()}
        self.control_ids = frozenset(self._added.values()) | frozenset(tokenizer.all_special_ids)
        """Ids that data may never become: every added token, flagged special or not."""
        angles, self._longest = _vocabulary(tokenizer, len(tokenizer))
        # The tokenizer's normaliser may produce angle brackets after the escaping, such as from ≮.
        self._forbidden = self.control_ids | angles
        self._added_pattern = (
            re.compile("|".join(re.escape(content) for content in sorted(self._added, key=len, reverse=True)))
            if self._added
            else None
        )
        frame = self._render_text("\x02question\x03")
        markers = set(_CHAT_MARKER.findall(frame)) - self._added.keys() - set(TAGS)
        self._text_markers = re.compile("|".join(map(re.escape, sorted(markers)))) if markers else None
        """Message delimiters that the chat template writes as ordinary text, such as Llama 2's `[/INST]`."""
        frame_ids = set(self._encode(frame)) & self.control_ids
        self._frame_ids = frame_ids - {index for content, index in self._added.items() if content in TAGS}
        opening, closing = config.information_template.split("{documents}")
        self._information_opening = self._encode(opening)
        self._information_closing = self._encode(closing)
        # The rollouts of a question retrieve the same passages again; texts are cut before they are cached.
        self._encode_document = lru_cache(maxsize=4096)(self.encode_data)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []

    def encode_data(self, text: str) -> list[int]:
        """Token ids of untrusted text: escaped, and never a control id.

        An added token without angle brackets, such as `[INST]`, survives the escaping and is encoded in two halves. A
        delimiter that is ordinary text to the tokenizer gets look-alike brackets too.
        """
        # Tokenizers refuse lone surrogates, such as JSON's \ud800.
        text = escape(text.encode("utf-8", "replace").decode("utf-8"))
        if self._text_markers is not None:
            text = self._text_markers.sub(lambda match: f"‹{match[0][1:-1]}›", text)
        cuts = [0]
        if self._added_pattern is not None:
            for match in self._added_pattern.finditer(text):
                cuts.append(match.start() + max(1, len(match.group()) // 2))
        cuts.append(len(text))
        ids: list[int] = []
        for start, end in zip(cuts, cuts[1:], strict=False):
            ids += self._encode(text[start:end])
        return [index for index in ids if index not in self._forbidden]

    def _render_text(self, content: str) -> str:
        """The chat template with one user message and the generation prompt."""
        if self.tokenizer.chat_template is None:
            return content
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        sentinels = re.findall("\x02\\w+\x03", content)
        if re.findall("\x02\\w+\x03", text) != sentinels:
            raise UserError("the tokenizer's chat template must show a message as it is, once; give another model", 1)
        return text

    def _render(self, template: str, parts: dict[str, list[int] | str]) -> list[int]:
        """`template` in the chat template's user message, each `{name}` replaced by ids or by encoded data."""
        sentinels = {name: f"\x02{name}\x03" for name in parts}
        content = template.replace("{max_searches}", str(self.config.max_searches))
        for name, sentinel in sentinels.items():
            content = content.replace("{" + name + "}", sentinel)
        ids: list[int] = []
        for piece in re.split("(\x02\\w+\x03)", self._render_text(content)):
            value = parts.get(piece[1:-1]) if piece.startswith("\x02") else None
            if value is None:
                ids += self._encode(piece)
            else:
                ids += self.encode_data(value) if isinstance(value, str) else value
        return ids

    def prompt_ids(self, question: str) -> list[int]:
        """P_S(question): the plain prompt's token ids.

        Raises:
            UserError: if the question alone exceeds `max_prompt_tokens`.
        """
        self._check_characters(question)
        ids = self._render(self.config.plain_template, {"question": question.strip()})
        self._check_length(len(ids), question)
        return ids

    def direct_prompt_ids(self, question: str) -> list[int]:
        """A prompt for an answer without search; raises as `prompt_ids`."""
        self._check_characters(question)
        ids = self._render(self.config.direct_template, {"question": question.strip()})
        self._check_length(len(ids), question)
        return ids

    def rag_prompt_ids(self, question: str, passages: Sequence[Passage]) -> list[int]:
        """A prompt with passages retrieved for the question, rendered as a search's; raises as `prompt_ids`.

        The passages do not count towards `max_prompt_tokens`.
        """
        self._check_characters(question)
        documents = self.document_ids(passages)
        ids = self._render(self.config.rag_template, {"question": question.strip(), "documents": documents})
        self._check_length(len(ids) - len(documents), question)
        return ids

    def _check_characters(self, question: str) -> None:
        """Refuses a question that cannot fit before it is tokenised, which takes seconds for megabytes."""
        if len(question.strip()) > self._longest * self.config.max_prompt_tokens:
            self._check_length(-(-len(question.strip()) // self._longest), question, "at least ")

    def _check_length(self, length: int, question: str, about: str = "") -> None:
        if length > self.config.max_prompt_tokens:
            raise UserError(
                f"the prompt of question {question[:60]!r} has {about}{length} tokens, more than "
                f"protocol.max_prompt_tokens={self.config.max_prompt_tokens}; shorten the question or raise the limit"
            )

    def check_prompts(
        self, questions: Sequence[Question], prompt_ids: Callable[[str], list[int]] | None = None
    ) -> None:
        """Raises before a run begins where `prompt_ids` (default: the plain prompt's) would raise during it.

        Only questions with more bytes than the budget has tokens are encoded.
        """
        prompt_ids = prompt_ids or self.prompt_ids
        room = self.config.max_prompt_tokens - len(prompt_ids("?"))
        for question in questions:
            if len(escape(question.question).encode("utf-8", "replace")) >= room:
                prompt_ids(question.question)

    def reference_ids(self, reference: Trajectory, with_documents: bool = True) -> list[int]:
        """A trajectory as the teacher sees it: its own ids without special tokens, and without documents on request.

        The chat template's message delimiters are dropped too, special or not, so that a reference that wrote one can
        neither end the message it is shown in nor begin another.
        """
        # `all_special_ids` may list named tokens only.
        added = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special = added | set(self.tokenizer.all_special_ids) | self._frame_ids
        ids = [
            index
            for index, by_model in zip(reference.completion_ids, reference.loss_mask, strict=True)
            if index not in special and (with_documents or by_model)
        ]
        return ids if self._text_markers is None else self._without_markers(ids, self._text_markers)

    def _without_markers(self, ids: list[int], markers: re.Pattern[str]) -> list[int]:
        """`ids` without those that would complete one of the markers."""
        if not markers.search(self.tokenizer.decode(ids)):
            return ids
        kept: list[int] = []
        for index in ids:
            if not markers.search(self.tokenizer.decode([*kept[-_MARKER_TOKENS:], index])):
                kept.append(index)
        return kept

    def privileged_prompt_ids(self, question: str, reference: Trajectory, with_documents: bool = True) -> list[int]:
        """P_T(question, reference): the question beside a more efficient trajectory, whose own ids are spliced in."""
        return self._render(
            self.config.privileged_template,
            {"question": question.strip(), "reference": self.reference_ids(reference, with_documents)},
        )

    def information_ids(self, passages: Sequence[Passage]) -> list[int]:
        """The `<information>` block for one search, each document cut to `max_document_tokens`."""
        return self._information_opening + self.document_ids(passages) + self._information_closing

    def document_ids(self, passages: Sequence[Passage]) -> list[int]:
        """The passages as data, each cut to `max_document_tokens`; a message if there are none."""
        ids: list[int] = []
        for rank, passage in enumerate(passages, start=1):
            ids += self._encode_document(self._document_text(rank, passage))[: self.config.max_document_tokens]
        if not passages:
            failed = isinstance(passages, FailedSearch)
            ids += self._encode(self.config.search_failed_message if failed else self.config.no_result_message)
        return ids

    def _document_text(self, rank: int, passage: Passage) -> str:
        """The filled-in template; title and text are cut to what can fit in the budget."""
        most = self._longest * self.config.max_document_tokens
        parts = {"rank": str(rank), "title": passage.title[:most], "text": passage.text[:most]}
        return _PLACEHOLDER.sub(lambda match: parts[match[1]], self.config.document_template)

    def correction_ids(self) -> list[int]:
        """The environment's message after a turn that was neither a search nor an answer."""
        return self._encode(self.config.correction_message)

    def no_more_searches_ids(self) -> list[int]:
        """The environment's message once `max_searches` is used up."""
        return self._encode(self.config.no_more_searches_message)
