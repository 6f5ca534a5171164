"""Your own search engine instead of BM25: any object with a name that finds passages for a batch of queries.

This one ranks the demo's passages by the rarest words that they share with the query. `train`, `evaluate_policy` and
`open_asker` take it as `retriever=`.

python examples/own_retriever.py
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence

import searche1_lite as s1
from searche1_lite.data.demo_world import DEMO_WORLD_SEED, World


class RareWords:
    """Passages by the summed rarity of the words that they share with the query."""

    name = "rare words"

    def __init__(self, passages: Sequence[s1.Passage]) -> None:
        self._passages = passages
        self._holders = defaultdict(set)
        for place, passage in enumerate(passages):
            for word in self._words(f"{passage.title} {passage.text}"):
                self._holders[word].add(place)

    @staticmethod
    def _words(text: str) -> set[str]:
        return set(re.findall(r"\w+", text.lower()))

    def search(self, queries: Sequence[str], k: int) -> list[list[s1.Passage]]:
        return [self._search(query, k) for query in queries]

    def _search(self, query: str, k: int) -> list[s1.Passage]:
        scores: dict[int, float] = defaultdict(float)
        for word in sorted(self._words(query) & self._holders.keys()):
            rarity = math.log(len(self._passages) / len(self._holders[word]))
            for place in self._holders[word]:
                scores[place] += rarity
        best = sorted(scores, key=lambda place: (-scores[place], place))[:k]
        return [self._passages[place] for place in best]


def main() -> None:
    s1.quieten()
    rows = World(DEMO_WORLD_SEED).passages()
    shelf = RareWords([s1.Passage(row["id"], *row["contents"].split("\n", 1)) for row in rows])
    config = s1.load_config("demo", overrides=["data.evaluation_limit=100"])
    for retriever in (None, shelf):
        found = s1.evaluate_policy(config, retriever=retriever)
        print(
            f"{found['retriever']}: {found['em']:.2f} right, {found['searches_per_question']:.2f} searches a question"
        )


if __name__ == "__main__":
    main()
