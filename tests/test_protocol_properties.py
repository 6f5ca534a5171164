"""Properties of the parser and the escaping, for any text and for text made of pieces of tags."""

import re
import string

from conftest import byte_level_tokenizer, tiny_protocol_config
from hostile_documents import MARKERS
from hostile_documents import TAGS as TAG_TEXTS
from hostile_tokenizers import gemma_like, llama2_like, unflagged_like
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from searche1_lite.data.trajectory import Passage
from searche1_lite.policy.stopping import STOP_TAGS
from searche1_lite.rollout.protocol import TAGS, Protocol, escape, last_block, parse_turn
from searche1_lite.rollout.reward import exact_match, extract_answer, f1_score, normalize_answer, plain_words

PROTOCOLS = [
    Protocol(make(), tiny_protocol_config(max_document_tokens=50))
    for make in (byte_level_tokenizer, gemma_like, llama2_like, unflagged_like)
]
PIECES = [
    *TAGS,
    *(tag.upper() for tag in TAGS),
    "<",
    ">",
    "</",
    "/",
    "answer",
    "search",
    "information",
    "<<",
    ">>",
    "＜",
    "﹥",
    "\u200b",
    "\u0338",
    "‹",
    "›",
    " ",
    "\n",
    "Lima",
    "Peru",
    "The",
    "a",
    ".",
    "<|im_end|>",
    "<|im_",
    "[INST]",
    "[/IN",
    "ST]",
    "<0x3C>",
    "\x02question\x03",
    "{text}",
    "{title}",
    "\ud800",
    "\0",
    "\u202e",
    "é",
    "e\u0301",
]
ANY = st.text(st.characters(), max_size=80)
TAGGED = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
TEXTS = st.one_of(ANY, TAGGED, st.lists(st.one_of(st.sampled_from(PIECES), ANY), max_size=6).map("".join))
HARMLESS = st.text(st.characters(exclude_characters="<>＜＞﹤﹥", exclude_categories=["Cs"]), max_size=80)
FEW = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@FEW
@given(TEXTS)
def test_a_turn_asks_for_something_only_where_a_block_is_closed_in_it(text: str) -> None:
    action = parse_turn(text)
    assert action == parse_turn(text)
    if action.kind == "invalid":
        assert action.content == ""
        return
    closing = f"</{action.kind}>"
    position = min(text.find(tag) for tag in STOP_TAGS if tag in text)
    assert text.startswith(closing, position) and f"<{action.kind}>" in text[:position]
    assert action.content == action.content.strip() and action.content in text[:position]
    assert not any(tag in action.content for tag in (*STOP_TAGS, f"<{action.kind}>"))
    assert action.content or action.kind == "answer", "an empty query is none"


@FEW
@given(TEXTS, TEXTS)
def test_what_follows_the_first_closing_tag_changes_no_action(text: str, more: str) -> None:
    ends = [text.find(tag) + len(tag) for tag in STOP_TAGS if tag in text]
    if ends:
        assert parse_turn(text[: min(ends)] + more) == parse_turn(text[: min(ends)])


@FEW
@given(HARMLESS, TEXTS)
def test_an_answer_that_is_written_is_found_whatever_stands_before_it(answer: str, before: str) -> None:
    written = f"{before}<answer>{answer}</answer>"
    assert last_block(written, "answer") == answer.strip()
    assert extract_answer(["<answer>no</answer>", written]) == answer.strip()
    if not any(tag in before for tag in STOP_TAGS):
        assert parse_turn(written).content == answer.strip() and parse_turn(written).kind == "answer"


@FEW
@given(st.lists(TEXTS, max_size=4))
def test_an_answer_stands_whole_in_one_turn_or_is_none(turns: list[str]) -> None:
    answer = extract_answer(turns)
    blocks = [last_block(turn, "answer") for turn in turns]
    assert answer == next((block for block in reversed(blocks) if block is not None), None)
    if answer is not None:
        assert "</answer>" not in answer and "<answer>" not in answer
        assert any(re.search(rf"<answer>\s*{re.escape(answer)}\s*</answer>", turn) for turn in turns)


@FEW
@given(st.lists(TEXTS, max_size=4))
def test_escaped_text_asks_for_nothing_and_answers_nothing(turns: list[str]) -> None:
    escaped = [escape(turn) for turn in turns]
    assert extract_answer(escaped) is None
    assert all(parse_turn(turn).kind == "invalid" for turn in escaped)


@FEW
@given(TEXTS)
def test_escaping_is_idempotent_and_replaces_angle_brackets_alone(text: str) -> None:
    escaped = escape(text)
    assert escape(escaped) == escaped and len(escaped) == len(text) and not set("<>＜＞﹤﹥") & set(escaped)
    assert all(new == old or (old in "<>＜＞﹤﹥" and new in "‹›") for old, new in zip(text, escaped, strict=True))


@FEW
@given(HARMLESS)
@example("▁")
def test_harmless_text_is_not_touched(text: str) -> None:
    assert escape(text) == text
    for protocol in PROTOCOLS[:2]:
        tokenizer = protocol.tokenizer
        if not any(content in text for content in protocol._added):
            assert protocol.encode_data(text) == tokenizer.encode(text, add_special_tokens=False)
            # SentencePiece writes blanks as "▁", so that one comes back as a blank.
            blanks = text.replace("▁", " ") if tokenizer.decode(tokenizer.encode("▁")) == " " else text
            assert tokenizer.decode(protocol.encode_data(text)) == blanks


@FEW
@given(TEXTS)
def test_data_has_neither_control_ids_nor_angle_brackets(text: str) -> None:
    for protocol in PROTOCOLS:
        ids = protocol.encode_data(text)
        said = protocol.tokenizer.decode(ids)
        assert not protocol.control_ids & set(ids) and "<" not in said and ">" not in said
        assert protocol._text_markers is None or not protocol._text_markers.search(said)


@FEW
@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=3))
def test_a_block_of_any_passages_has_its_two_tags_and_keeps_to_its_budget(contents: list[tuple[str, str]]) -> None:
    for protocol in PROTOCOLS:
        ids = protocol.information_ids([Passage(str(n), *content) for n, content in enumerate(contents)])
        said = protocol.tokenizer.decode(ids)
        assert [said.count(tag) for tag in TAGS] == [int("information" in tag) for tag in TAGS]
        assert said.count("<") == said.count(">") == 2 and said.strip().endswith("</information>")
        assert protocol.information_ids([]) or contents
        longest = len(protocol._information_opening) + len(protocol._information_closing) + 50 * max(len(contents), 1)
        assert len(ids) <= longest


@FEW
@given(TEXTS.filter(lambda text: text.strip()))
def test_a_question_of_any_text_adds_no_structure_to_the_prompt(text: str) -> None:
    for protocol in PROTOCOLS:
        plain, hostile = protocol.prompt_ids("Who?"), protocol.prompt_ids(text)
        assert [i for i in hostile if i in protocol._forbidden] == [i for i in plain if i in protocol._forbidden]


@FEW
@given(TEXTS)
def test_normalising_an_answer_twice_changes_nothing_more(text: str) -> None:
    once = normalize_answer(text)
    assert not set(once) & set(string.punctuation) and "  " not in once and once == once.strip()
    # Not wholly idempotent, as SQuAD's is not: lower-casing can make a letter and a combining mark of one letter.
    assert normalize_answer(normalize_answer(once)) == normalize_answer(once)
    assert plain_words(plain_words(text)) == plain_words(text)


@FEW
@given(TEXTS, st.lists(TEXTS, max_size=3))
def test_rewards_are_bounded_and_an_exact_match_has_full_f1(prediction: str, golds: list[str]) -> None:
    em, f1 = exact_match(prediction, golds), f1_score(prediction, golds)
    assert em in (0.0, 1.0) and 0.0 <= f1 <= 1.0 and (em == 0.0 or f1 == 1.0)
    assert exact_match(None, golds) == f1_score(None, golds) == exact_match(" \n", golds) == 0.0
    if prediction.strip():
        assert exact_match(prediction, [*golds, prediction]) == f1_score(prediction, [prediction]) == 1.0


def test_the_pieces_are_hostile() -> None:
    assert any(tag in "".join(PIECES) for tag in TAGS) and len(TAG_TEXTS) + len(MARKERS) >= 60
