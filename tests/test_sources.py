"""A source is shown only if the answer's words stand in it, with the whole sentence around them."""

import pytest

from searche1_lite.data.trajectory import Passage, Search
from searche1_lite.serve.sources import Source, find_sources, sentence_around, stands_at

AUSTEN = "Jane Austen was born in 1775. She wrote Emma; J. K. Rowling did not.\nThe house is in St. Mary Mead."


@pytest.mark.parametrize(
    ("answer", "text", "found"),
    [
        ("emma", "She wrote Emma; then", "Emma;"),
        ("The  Emma!", "She wrote 'Emma', a novel", "'Emma',"),
        ("J.K. Rowling", "by J. K. Rowling.", "J. K. Rowling"),
        ("J. K. Rowling", "by J. K. Rowling.", "J. K. Rowling."),
        ("17", "born in 1775", None),
        ("Ann", "Anna and Anne", None),
        ("house of the rising sun", "the House of a Rising\nSun", "House of a Rising\nSun"),
        ("Nolan", "Nolan's film", "Nolan"),
        ("French", "the Anglo-French war", "French"),
        ("1200", "some 1,200 people", "1,200"),
        ("", "anything", None),
    ],
)
def test_an_answer_stands_where_its_normalised_words_are_whole_words(answer: str, text: str, found: str | None) -> None:
    place = stands_at(answer, text)
    assert (None if place is None else text[slice(*place)]) == found


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("1775", "Jane Austen was born in 1775."),
        ("Rowling", "She wrote Emma; J. K. Rowling did not."),
        ("1775. She", "Jane Austen was born in 1775. She wrote Emma; J. K. Rowling did not."),
        ("Mary", "The house is in St. Mary Mead."),
    ],
)
def test_the_sentence_is_whole_and_holds_the_answer(answer: str, sentence: str) -> None:
    place = stands_at(answer, AUSTEN)
    assert place is not None and sentence_around(AUSTEN, *place) == sentence


def test_sources_are_numbered_in_the_order_found_and_each_comes_once() -> None:
    lima, peru, quito = (
        Passage("1", "Lima", "Lima is the capital of Peru. It is old."),
        Passage("2", "Peru", "Its capital is Lima."),
        Passage("3", "Lima", "Quito is the capital of Ecuador."),
    )
    searches = [Search("Peru", [peru, quito]), Search("Lima", [lima, peru])]
    assert find_sources("Lima", searches) == [
        Source(1, "2", "Peru", "Its capital is Lima."),
        Source(2, "1", "Lima", "Lima is the capital of Peru."),
    ]
    assert find_sources(None, searches) == find_sources("Oslo", searches) == []


@pytest.mark.parametrize("answer", ["yes", "No.", "the", "?"])
def test_words_that_tell_nothing_have_no_source(answer: str) -> None:
    assert find_sources(answer, [Search("q", [Passage("1", "T", f"Yes, no, the {answer}.")])]) == []


def test_a_run_of_a_million_blanks_in_a_passage_holds_nobody_up() -> None:
    passage = Passage("1", "Lima", f"Lima is{' ' * 1_000_000}old. It is the capital of Peru.")
    assert find_sources("the capital of Peru", [Search("Lima", [passage])])[0].sentence == "It is the capital of Peru."


def test_a_line_break_ends_a_sentence_with_the_blanks_around_it() -> None:
    text = "A list \n  of towns: Lima \n Quito"
    assert sentence_around(text, *stands_at("Lima", text)) == "of towns: Lima"
