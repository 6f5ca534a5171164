"""The demo's fictional wiki: big enough, answerable from its passages alone, and not by guessing."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from itertools import combinations
from pathlib import Path

import pytest

from searche1_lite.data.demo_world import (
    DEMO_WORLD_SEED,
    HOP_SHARES,
    RELATIONS,
    World,
    load_demo_questions,
    write_corpus,
    write_demo_corpus,
)
from searche1_lite.data.trajectory import Question

SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def passages(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The shipped corpus, as the index reads it."""
    corpus = tmp_path_factory.mktemp("world") / "corpus.jsonl"
    write_demo_corpus(corpus)
    return [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def facts(passages: list[dict[str, str]]) -> dict[str, dict[str, str]]:
    """Title -> relation -> entity, read from the text of the passages alone; an entity may have several."""
    read: dict[str, dict[str, str]] = {}
    for passage in passages:
        title, _, text = passage["contents"].partition("\n")
        assert text.startswith(f"{title}: ") and text.endswith(".")
        for fact in text.removeprefix(f"{title}: ").removesuffix(".").split("; "):
            relation, value = fact.split(" ", 1)
            assert relation not in read.setdefault(title, {}), "a fact is stated once"
            read[title][relation] = value
    return read


@pytest.fixture(scope="module")
def questions() -> dict[str, list[Question]]:
    return {split: load_demo_questions(split) for split in SPLITS}


def parse(question: Question) -> tuple[str, list[str]]:
    """Start and relations, in the order in which they are followed."""
    match = re.fullmatch(r"What is the (.+) of ([^?]+)\?", question.question)
    assert match is not None, question.question
    return match[2], list(reversed(match[1].split(" of the ")))


def final_fact(question: Question) -> tuple[str, str]:
    """The fact that answers the question: who it is about, and the relation."""
    return question.metadata["path"][-2], parse(question)[1][-1]


def test_the_wiki_is_large_and_every_passage_has_its_own_id(passages: list[dict[str, str]]) -> None:
    assert len(passages) >= 2000
    assert len({passage["id"] for passage in passages}) == len(passages)


def test_the_passages_state_every_fact_and_each_leads_to_another_entity_of_the_right_kind(
    facts: dict[str, dict[str, str]],
) -> None:
    world = World(DEMO_WORLD_SEED)
    assert facts.keys() == world.entities.keys()
    for name, stated in facts.items():
        kind = world.entities[name].kind
        assert {relation: world.entities[value].kind for relation, value in stated.items()} == RELATIONS[kind]
        assert name not in stated.values()


def test_the_splits_have_their_promised_sizes_and_share_of_hops(questions: dict[str, list[Question]]) -> None:
    assert len(questions["train"]) >= 2000
    assert len(questions["dev"]) == 200 and len(questions["test"]) == 500
    for split in SPLITS:
        hops = Counter(question.metadata["hops"] for question in questions[split])
        assert hops == {count: round(share * len(questions[split])) for count, share in HOP_SHARES.items()}
        assert len({question.id for question in questions[split]}) == len(questions[split])


@pytest.mark.parametrize(
    "key",
    [lambda question: question.question, lambda question: tuple(question.metadata["path"]), final_fact],
    ids=["question", "path of entities", "final fact"],
)
def test_no_two_splits_share(questions: dict[str, list[Question]], key: Callable[[Question], Hashable]) -> None:
    for one, other in combinations(SPLITS, 2):
        assert not {key(question) for question in questions[one]} & {key(question) for question in questions[other]}


def test_no_question_is_asked_twice(questions: dict[str, list[Question]]) -> None:
    asked = Counter(question.question for split in SPLITS for question in questions[split])
    assert max(asked.values()) == 1


def test_answers_follow_from_the_passages_hop_by_hop(
    questions: dict[str, list[Question]], facts: dict[str, dict[str, str]]
) -> None:
    for split in SPLITS:
        for question in questions[split]:
            name, relations = parse(question)
            met = [name]
            for relation in relations:
                name = facts[name][relation]
                met.append(name)
            assert met == question.metadata["path"] and question.golden_answers == [name]
            assert len(relations) == question.metadata["hops"]
            assert len(set(met)) == len(met), "no detour through an entity met before"


def test_the_same_seed_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    program = (
        "import json, sys; from dataclasses import asdict; from searche1_lite.data.demo_world import World\n"
        "world = World(11)\n"
        "questions = {split: [asdict(q) for q in asked] for split, asked in world.questions().items()}\n"
        "sys.stdout.write(json.dumps([world.passages(), questions]))"
    )
    seen = set()
    for hash_seed in ("1", "2"):
        shown = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            check=True,
        )
        seen.add(hashlib.sha256(shown.stdout).hexdigest())
    assert len(seen) == 1
    write_corpus(World(11), tmp_path / "first.jsonl")
    write_corpus(World(11), tmp_path / "second.jsonl")
    assert (tmp_path / "first.jsonl").read_bytes() == (tmp_path / "second.jsonl").read_bytes()


def test_another_seed_gives_another_wiki_and_other_questions() -> None:
    one, other = World(1), World(2)
    assert one.passages() != other.passages()
    asked = [{question.question for question in world.questions()["test"]} for world in (one, other)]
    assert len(asked[0] & asked[1]) < 25, "5% of the test split"


@pytest.mark.parametrize("part", [0, -1], ids=["first word", "last word"])
def test_most_entities_share_a_word_of_their_name_with_others(facts: dict[str, dict[str, str]], part: int) -> None:
    words = Counter(name.split()[part] for name in facts)
    lookalikes = [name for name in facts if words[name.split()[part]] > 1]
    assert len(lookalikes) > 0.9 * len(facts)


def test_half_a_name_fits_several_entities_on_average(facts: dict[str, dict[str, str]]) -> None:
    words = Counter(name.split()[-1] for name in facts)
    assert sum(words[name.split()[-1]] for name in facts) / len(facts) > 4


def test_the_best_fixed_guess_is_seldom_right(questions: dict[str, list[Question]]) -> None:
    answers = Counter(question.golden_answers[0] for question in questions["test"])
    assert max(answers.values()) < 0.05 * len(questions["test"])


def test_the_commonest_answer_of_each_relation_in_training_is_seldom_right_in_test(
    questions: dict[str, list[Question]],
) -> None:
    trained: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions["train"]:
        trained[final_fact(question)[1]][question.golden_answers[0]] += 1
    guesses = {relation: answers.most_common(1)[0][0] for relation, answers in trained.items()}
    right = [guesses[final_fact(question)[1]] in question.golden_answers for question in questions["test"]]
    assert sum(right) < 0.05 * len(right)


def test_the_answer_never_stands_in_the_question(questions: dict[str, list[Question]]) -> None:
    for split in SPLITS:
        assert not [q.question for q in questions[split] if q.golden_answers[0].lower() in q.question.lower()]


def test_a_caller_that_changes_its_list_leaves_the_split_as_it_was() -> None:
    load_demo_questions("dev").clear()
    assert len(load_demo_questions("dev")) == 200
