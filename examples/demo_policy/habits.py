"""Scripted episodes on a generated wiki: what the demo policy is pre-trained to imitate, bad habits included.

The policy that ships is deliberately unfinished. On some kinds of question it mostly guesses, stops half-way, searches
half a name, reads a look-alike or searches once more than it needs; on others it mostly does well. Which habit rules
depends on the relation at hand, so that there is a lot to unlearn and it is not the same thing everywhere.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from random import Random

from searche1_lite.data.demo_world import RELATIONS, Chain, World
from searche1_lite.data.trajectory import Passage
from searche1_lite.rollout.protocol import Protocol
from searche1_lite.search.base import Retriever, search_each

ENVIRONMENT_WEIGHT = 0.05
"""Loss weight of environment tokens while pre-training; predicting passages helps learning to copy from them."""
GUESS_WEIGHT = 0.1
"""Loss weight of a guessed name: drawn at random, it has nothing to teach and would drown the decisions."""

GUESSERS = frozenset({"spouse", "capital", "founder", "base"})
"""Last relations of questions that the policy mostly guesses."""
STOPPERS = frozenset({"birthplace", "mayor", "publisher"})
"""Relations after which the policy mostly stops, though the question goes on."""
CARELESS = frozenset({"person", "work"})
"""Kinds of entity that the policy mostly searches by half their name."""
CHECKERS = frozenset({"country", "employer", "leader", "author"})
"""Last relations whose answer the policy mostly looks up once more before it gives it."""

Point = tuple[str, int]
"""A place in an episode where something is decided: its name and the hop it is at."""

Decide = Callable[[Point, dict[str, float]], tuple[str, bool]]
"""Picks one of the options (name -> probability); returns it and whether its tokens are trained on."""


@dataclass(slots=True)
class Episode:
    """Token ids of one scripted episode after the prompt, loss weights, and which tokens the model writes."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    by_model: list[bool] = field(default_factory=list)
    choices: dict[Point, str] = field(default_factory=dict)
    n_searches: int = 0
    answer: str = ""


def choose_by_habit(rng: Random) -> Decide:
    """Draws each decision from its habit's probabilities."""

    def decide(_: Point, options: dict[str, float]) -> tuple[str, bool]:
        return rng.choices(list(options), weights=list(options.values()))[0], True

    return decide


def choose_well(_: Point, options: dict[str, float]) -> tuple[str, bool]:
    """Always the first option, which is the efficient one."""
    return next(iter(options)), True


def choose_as(reference: Episode, rng: Random, slip: float = 0.0) -> Decide:
    """The decisions of `reference`, and the efficient ones where it had none.

    With probability `slip` a needless or careless search is made instead; its tokens carry no loss, so that what is
    learnt is how to go on from there.
    """

    def decide(point: Point, options: dict[str, float]) -> tuple[str, bool]:
        slips = [name for name in ("careless", "check", "repeat", "misread") if name in options]
        if slips and rng.random() < slip:
            return rng.choice(slips), False
        choice = reference.choices.get(point)
        return (choice, True) if choice in options else choose_well(point, options)

    return decide


def _likely(bad: bool, high: float, low: float) -> float:
    return high if bad else low


def write_episode(
    world: World, chain: Chain, protocol: Protocol, rng: Random, decide: Decide
) -> Generator[str, list[Passage], Episode]:
    """Plays one episode: yields each query, is sent the passages found, returns the episode."""
    episode = Episode()
    limit = protocol.config.max_searches
    hops, last = len(chain.relations), chain.relations[-1]

    def act(point: Point, options: dict[str, float]) -> tuple[str, bool]:
        choice, trained = decide(point, options)
        episode.choices[point] = choice
        return choice, trained

    def add(ids: Sequence[int], weight: float, by_model: bool) -> None:
        episode.ids += ids
        episode.weights += [weight] * len(ids)
        episode.by_model += [by_model] * len(ids)

    def say(text: str, weight: float) -> None:
        add(protocol.tokenizer.encode(text, add_special_tokens=False), weight, True)

    def search(thought: str, query: str, trained: bool) -> Generator[str, list[Passage], list[Passage]]:
        say(f"<think>{thought}</think><search> {query}</search>", float(trained))
        passages = yield query
        episode.n_searches += 1
        add(protocol.information_ids(passages), ENVIRONMENT_WEIGHT, False)
        if episode.n_searches == limit:
            add(protocol.no_more_searches_ids(), 0.0, False)
        return passages

    def answer(thought: str, name: str, weight: float = 1.0) -> Episode:
        say(f"<think>{thought}</think><answer>", 1.0)
        say(f" {name}", weight)
        say("</answer>", 1.0)
        episode.answer = name
        return episode

    def guess() -> Episode:
        kind = _target_kind(world, chain)
        names = [entity.name for entity in world.entities.values() if entity.kind == kind]
        return answer(" guess", rng.choice(names), GUESS_WEIGHT)

    known, learnt = chain.start, ""
    for hop, relation in enumerate(chain.relations):
        entity = world.entities[known]
        if relation not in entity.facts:  # an earlier slip led to the wrong kind of thing
            return answer(learnt, known)
        options = {"search": 1.0}
        if hop == 0:
            options["guess"] = _likely(last in GUESSERS, 1.6, 0.15)
        else:
            options["stop"] = _likely(chain.relations[hop - 1] in STOPPERS, 1.6, 0.15)
        if " " in known:
            options["careless"] = _likely(entity.kind in CARELESS, 1.0, 0.1)
        choice, trained = act(("search", hop), options)
        if choice == "guess":
            return guess()
        if choice == "stop" or episode.n_searches >= limit:
            return answer(learnt, known)
        name = known.split(" ")[-1] if choice == "careless" else known
        query = f"{name} {relation}"
        passages = yield from search(f"{learnt} find {relation}", query, trained)
        read = entity
        if all(passage.text != entity.passage(relation) for passage in passages):
            found = [world.entities[passage.title] for passage in passages]
            lookalikes = [
                other
                for other, passage in zip(found, passages, strict=True)
                if relation in other.facts and passage.text == other.passage(relation)
            ]
            options = {"again": 1.0} | ({"misread": 1.0} if lookalikes else {})
            choice, trained = act(("miss", hop), options)
            if choice == "misread":
                read = lookalikes[0]
            elif episode.n_searches >= limit:
                return guess()
            else:
                yield from search(" again", f"{known} {relation}", trained)
        elif episode.n_searches < limit:
            choice, trained = act(("repeat", hop), {"go on": 1.0, "repeat": _likely(relation in STOPPERS, 0.5, 0.15)})
            if choice == "repeat":
                yield from search(" again", query, trained)
        known = read.facts[relation]
        learnt = f" {relation} {known}"
    if episode.n_searches < limit:
        choice, trained = act(("end", hops), {"answer": 1.0, "check": _likely(last in CHECKERS, 1.5, 0.2)})
        if choice == "check":
            yield from search(f"{learnt} check", known, trained)
    return answer(learnt, known)


def _target_kind(world: World, chain: Chain) -> str:
    kind = world.entities[chain.start].kind
    for relation in chain.relations:
        kind = RELATIONS[kind][relation]
    return kind


def play(episodes: Sequence[Generator[str, list[Passage], Episode]], retriever: Retriever, k: int) -> list[Episode]:
    """Plays many episodes side by side, one batch of queries at a time."""
    results: dict[int, Episode] = {}
    replies: dict[int, list[Passage] | None] = dict.fromkeys(range(len(episodes)))
    while replies:
        queries: dict[int, str] = {}
        for index, passages in replies.items():
            try:
                queries[index] = episodes[index].send(passages)  # type: ignore[arg-type]
            except StopIteration as stop:
                results[index] = stop.value
        found = search_each(retriever, list(queries.values()), k) if queries else []
        replies = dict(zip(queries, found, strict=True))
    return [results[index] for index in range(len(episodes))]
