"""A fictional wiki, generated from a seed: the demo's corpus and questions.

People, cities, countries, companies and works are tied by eleven relations; every fact has one short passage, under the
title of the entity it is about. Names share their words on purpose (`Port Miro`, `New Miro`; a score of
people called `Dora`), so that a query with half a name mostly finds somebody else. Questions chain one to three
relations: `What is the mayor of the birthplace of Dora Velu?`. Nothing is true, so nothing can be known without
searching.
"""

import json
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random

from searche1_lite.data.trajectory import Question
from searche1_lite.runtime.seeds import derive_seed

DEMO_WORLD_SEED = 2026
"""The shipped demo's world. `build.py` never trains on it."""

SPLIT_SIZES = {"train": 2400, "dev": 200, "test": 500}
"""Questions in each split of the demo."""

_SPLIT_SHARES = {"train": 0.7, "dev": 0.1, "test": 0.2}
"""Share of all facts that may be the last fact of a split's questions."""

HOP_SHARES = {1: 0.3, 2: 0.4, 3: 0.3}
"""Share of the questions with one, two and three relations."""

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprtv" for vowel in "aeiou"]
WORDS = [(first + second).capitalize() for first in _SYLLABLES for second in _SYLLABLES][::7]
"""The words that names are made of, in every world; which of them make a name, and what holds of it, a world draws."""
CITY_PREFIXES = ["Port", "New", "Upper", "Lower"]

RELATIONS: dict[str, dict[str, str]] = {
    "person": {"birthplace": "city", "employer": "company", "spouse": "person"},
    "city": {"country": "country", "mayor": "person"},
    "company": {"base": "city", "founder": "person"},
    "work": {"author": "person", "publisher": "company"},
    "country": {"capital": "city", "leader": "person"},
}
"""Kind of entity -> relation -> kind of the entity it leads to."""

_COUNTS = {"person": 900, "city": 400, "company": 400, "work": 400, "country": 60}


@dataclass(frozen=True, slots=True)
class Entity:
    """`facts` maps a relation to the name of the entity it leads to."""

    name: str
    kind: str
    facts: dict[str, str]

    def passage(self, relation: str) -> str:
        """The text that states one fact."""
        return f"{self.name}: {relation} {self.facts[relation]}."


@dataclass(frozen=True, slots=True)
class Chain:
    """A question's path: from `start`, follow `relations` in order; `names` holds the start and every entity met."""

    start: str
    relations: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def answer(self) -> str:
        return self.names[-1]

    @property
    def question(self) -> str:
        return f"What is the {' of the '.join(reversed(self.relations))} of {self.start}?"


class World:
    """One generated wiki.

    Args:
        seed: the same seed gives the same wiki, to the byte.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = Random(derive_seed(seed, "world"))
        names = self._draw_names(rng)
        self.entities: dict[str, Entity] = {}
        for kind, kind_names in names.items():
            for name in kind_names:
                facts = {}
                for relation, target in RELATIONS[kind].items():
                    value = rng.choice(names[target])
                    while value == name:
                        value = rng.choice(names[target])
                    facts[relation] = value
                self.entities[name] = Entity(name, kind, facts)

    @staticmethod
    def _draw_names(rng: Random) -> dict[str, list[str]]:
        words = rng.sample(WORDS, len(WORDS))
        given, families, places, nouns = words[:40], words[40:190], words[190:290], words[290:360]
        countries = words[360 : 360 + _COUNTS["country"]]

        def pairs(first: list[str], second: list[str], count: int) -> list[str]:
            return rng.sample([f"{a} {b}" for a in first for b in second], count)

        return {
            "person": pairs(given, families, _COUNTS["person"]),
            "city": pairs(CITY_PREFIXES, places, _COUNTS["city"]),
            "company": pairs(families[:60], nouns, _COUNTS["company"]),
            "work": pairs(nouns, given, _COUNTS["work"]),
            "country": countries,
        }

    def passages(self) -> list[dict[str, str]]:
        """The corpus in the wiki-18 form: `id` and `contents`, the first line the title."""
        facts = ((entity, relation) for entity in self.entities.values() for relation in entity.facts)
        return [
            {"id": str(index), "contents": f"{entity.name}\n{entity.passage(relation)}"}
            for index, (entity, relation) in enumerate(facts)
        ]

    def chain(self, start: str, relations: tuple[str, ...]) -> Chain:
        names = [start]
        for relation in relations:
            names.append(self.entities[names[-1]].facts[relation])
        return Chain(start, relations, tuple(names))

    def draw_chain(self, rng: Random, hops: int) -> Chain:
        """A random chain of `hops` relations that never meets an entity twice."""
        while True:
            name = rng.choice(list(self.entities))
            kind, relations = self.entities[name].kind, []
            for _ in range(hops):
                relation = rng.choice(list(RELATIONS[kind]))
                relations.append(relation)
                kind = RELATIONS[kind][relation]
            chain = self.chain(name, tuple(relations))
            if len(set(chain.names)) == hops + 1:
                return chain

    def questions(self) -> dict[str, list[Question]]:
        """The splits. A fact that answers a question of one split answers none of another; no question repeats."""
        rng = Random(derive_seed(self.seed, "questions"))
        facts = [(entity.name, relation) for entity in self.entities.values() for relation in entity.facts]
        rng.shuffle(facts)
        owner: dict[tuple[str, str], str] = {}
        for split, share in _SPLIT_SHARES.items():
            for fact in facts[len(owner) : len(owner) + round(share * len(facts))]:
                owner[fact] = split
        splits: dict[str, list[Question]] = {split: [] for split in SPLIT_SIZES}
        wanted = {
            (split, hops): round(size * share)
            for split, size in SPLIT_SIZES.items()
            for hops, share in HOP_SHARES.items()
        }
        seen: set[str] = set()
        while any(wanted.values()):
            hops = rng.choices(list(HOP_SHARES), weights=list(HOP_SHARES.values()))[0]
            chain = self.draw_chain(rng, hops)
            drawn = owner.get((chain.names[-2], chain.relations[-1]))
            if drawn is None or not wanted[drawn, hops] or chain.question in seen:
                continue
            seen.add(chain.question)
            wanted[drawn, hops] -= 1
            splits[drawn].append(
                Question(
                    id=f"{drawn}-{len(splits[drawn])}",
                    question=chain.question,
                    golden_answers=[chain.answer],
                    metadata={"hops": hops, "path": list(chain.names)},
                )
            )
        return splits


@cache
def _demo_questions() -> dict[str, list[Question]]:
    return World(DEMO_WORLD_SEED).questions()


def load_demo_questions(split: str) -> list[Question]:
    """The demo's questions of one split, which the caller may change.

    Args:
        split: `train` (2,400), `dev` (200, for tuning) or `test` (500, for evaluation only).
    """
    return [replace(question, metadata=dict(question.metadata)) for question in _demo_questions()[split]]


def write_demo_corpus(path: Path) -> None:
    """Writes the demo's wiki, see `write_corpus`."""
    write_corpus(World(DEMO_WORLD_SEED), path)


def write_corpus(world: World, path: Path) -> None:
    """Writes a wiki as JSONL (`id`, `contents`), one passage a line; `path` never holds a part of it."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_text("".join(f"{json.dumps(passage)}\n" for passage in world.passages()), encoding="utf-8")
    staging.replace(path)
