"""Metrics of a set of episodes, with confidence intervals. Pure functions of trajectories or their outcomes."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from searche1_lite.data.questions import data_set_of
from searche1_lite.data.trajectory import Passage, Trajectory
from searche1_lite.rollout.reward import UNINFORMATIVE, normalize_answer, plain_words
from searche1_lite.runtime.seeds import derive_seed

_RESAMPLES = 2000


@dataclass(slots=True)
class Outcome:
    """One episode's result, small enough to keep for every question of seven data sets."""

    id: str
    sample: int
    question: str
    golden_answers: list[str]
    data_set: str | None
    """From the question's metadata, as is `hops`."""
    hops: int | str | None
    answer: str | None
    em: float
    f1: float
    searches: int
    queries: list[str]
    given: int
    """Searches made for the policy, whose passages are in its prompt."""
    recall: bool | None
    """Whether a retrieved passage contains a gold answer; None without passages, or where `holds_gold` is undecided."""
    invalid: int
    """Turns that were neither a search nor an answer."""
    stopped: str
    tokens: int
    """Written by the model."""
    seconds: float | None = None
    """Its share of the wall time of its batch, where measured."""
    failed_searches: int = 0
    """Searches that failed, `given` ones included."""


def outcome(trajectory: Trajectory, seconds: float | None = None) -> Outcome:
    question = trajectory.question
    lookups = [*trajectory.searches, *trajectory.given]
    return Outcome(
        id=question.id,
        sample=trajectory.sample,
        question=question.question,
        golden_answers=question.golden_answers,
        data_set=data_set_of(question),
        hops=question.metadata.get("hops"),
        answer=trajectory.answer,
        em=trajectory.reward,
        f1=trajectory.f1,
        searches=trajectory.n_searches,
        queries=[search.query for search in trajectory.searches],
        given=len(trajectory.given),
        recall=holds_gold([p for search in lookups for p in search.passages], question.golden_answers)
        if lookups
        else None,
        invalid=trajectory.n_invalid,
        stopped=trajectory.stopped,
        tokens=trajectory.n_model_tokens,
        seconds=seconds,
        failed_searches=trajectory.n_failed_searches,
    )


def holds_gold(passages: Sequence[Passage], golds: Sequence[str]) -> bool | None:
    """Whether a passage's title or text contains a gold answer, word for word.

    Both are normalised as for exact match, or both split into words at every character that is neither letter nor
    digit: "Nolan's" and "Anglo-French" contain "Nolan" and "French", and "1,200" contains "1200". The whole passage
    counts, not only its `max_document_tokens`. None where every gold answer is yes, no or empty once normalised.
    """
    golds = [gold for gold in golds if normalize_answer(gold) not in UNINFORMATIVE]
    if not golds:
        return None
    for split in (normalize_answer, plain_words):
        wanted = [f" {gold} " for gold in map(split, golds) if gold]
        for passage in passages:
            texts = (f" {split(passage.title)} ", f" {split(passage.text)} ")
            if any(gold in text for text in texts for gold in wanted):
                return True
    return False


def evaluate(trajectories: Sequence[Trajectory], seed: int) -> dict[str, Any]:
    """`summarize` of these episodes, at least one, in any order."""
    if not trajectories:
        raise ValueError("nothing to evaluate: no trajectories")
    return summarize([outcome(trajectory) for trajectory in trajectories], seed)


def summarize(outcomes: Sequence[Outcome], seed: int) -> dict[str, Any]:
    """An evaluation's figures, as plain numbers for JSON.

    Where questions were answered several times, `em`, `f1` and their intervals are over questions' means.

    Args:
        outcomes: at least one, in any order.
        seed: of the bootstrap.

    Returns:
        `em`, `em_ci95` ([low, high], 95%: percentile bootstrap over questions), `f1`, `f1_ci95`, `n` (questions),
        `searches_per_question`, `searches_per_correct` (all searches / correct episodes; None if none is correct),
        `no_search_rate`, `failed_searches` (a count), `invalid_rate` (episodes with an invalid turn),
        `unanswered_rate`, `tokens_per_answer` (mean model-written tokens an episode), `retriever_recall` (share of
        episodes with a gold answer in a passage, of those where `holds_gold` is decided; None if there are none),
        `misses` (wrong episodes: `search` if no passage has a gold answer, `reasoning` if one does, `no_search` without
        a search, else `undecided`), `em_by_hops` if the questions' metadata has `hops`, and `seconds_per_question` if
        measured. `by_data_set`, if the metadata has `data_set`, has the same for each set; for several sets
        `em_average` and `f1_average` are the means over sets, each with its `_ci95` (a bootstrap within each set).

    Raises:
        ValueError: if there is no outcome.
    """
    if not outcomes:
        raise ValueError("nothing to evaluate: no outcomes")
    result = _figures(outcomes, seed)
    sets: dict[str, list[Outcome]] = defaultdict(list)
    for item in outcomes:
        if item.data_set is not None:
            sets[item.data_set].append(item)
    if sets:
        result["by_data_set"] = {name: _figures(items, seed) for name, items in sets.items()}
    if len(sets) > 1:
        # Sets of the same size must not be resampled with the same seed.
        resampled = [_resampled_means(*_scores(items), seed=derive_seed(seed, name)) for name, items in sets.items()]
        for index, key in enumerate(("em", "f1")):
            result[f"{key}_average"] = float(np.mean([block[key] for block in result["by_data_set"].values()]))
            result[f"{key}_average_ci95"] = _middle95(np.mean([means[index] for means in resampled], axis=0))
    return result


def _figures(outcomes: Sequence[Outcome], seed: int) -> dict[str, Any]:
    """The figures of `summarize` for one set of episodes."""
    em, f1 = _scores(outcomes)
    em_means, f1_means = _resampled_means(em, f1, seed=seed)
    searches = sum(item.searches for item in outcomes)
    correct = sum(item.em >= 1.0 for item in outcomes)
    recalls = [item.recall for item in outcomes if item.recall is not None]
    causes = Counter(_cause(item) for item in outcomes if item.em < 1.0)
    result: dict[str, Any] = {
        "em": float(em.mean()),
        "em_ci95": _all_alike(em) or _middle95(em_means),
        "f1": float(f1.mean()),
        "f1_ci95": _all_alike(f1) or _middle95(f1_means),
        "n": len(em),
        "searches_per_question": searches / len(outcomes),
        "searches_per_correct": searches / correct if correct else None,
        "no_search_rate": _share(outcomes, lambda item: item.searches == 0),
        "failed_searches": sum(item.failed_searches for item in outcomes),
        "invalid_rate": _share(outcomes, lambda item: item.invalid > 0),
        "unanswered_rate": _share(outcomes, lambda item: item.answer is None),
        "tokens_per_answer": float(np.mean([item.tokens for item in outcomes])),
        "retriever_recall": float(np.mean(recalls)) if recalls else None,
        "misses": {cause: causes[cause] for cause in ("search", "reasoning", "no_search", "undecided")},
    }
    by_hops: dict[str, list[Outcome]] = defaultdict(list)
    for item in outcomes:
        if item.hops is not None:
            by_hops[str(item.hops)].append(item)
    if by_hops:
        result["em_by_hops"] = {
            name: float(_question_means(items, "em").mean()) for name, items in sorted(by_hops.items())
        }
    if all(item.seconds is not None for item in outcomes):
        result["seconds_per_question"] = sum(item.seconds or 0.0 for item in outcomes) / len(em)
    return result


def _cause(wrong: Outcome) -> str:
    """The part of the agent that a wrong answer is attributed to."""
    if not wrong.searches and not wrong.given:
        return "no_search"
    return {True: "reasoning", False: "search", None: "undecided"}[wrong.recall]


def _scores(outcomes: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray]:
    """Exact match and F1, both (n,), of n questions."""
    return _question_means(outcomes, "em"), _question_means(outcomes, "f1")


def _question_means(outcomes: Sequence[Outcome], key: str) -> np.ndarray:
    """(n,) means of `key` over each question's episodes, by first appearance."""
    by_question: dict[str, list[float]] = defaultdict(list)
    for item in outcomes:
        by_question[item.id].append(getattr(item, key))
    return np.array([sum(values) / len(values) for values in by_question.values()])


def bootstrap_ci95(values: np.ndarray, seed: int) -> list[float]:
    """[low, high]: the 2.5% and 97.5% percentiles of the mean over 2,000 seeded resamples of `values`."""
    return _middle95(_resampled_means(values, seed=seed)[0])


def _resampled_means(*columns: np.ndarray, seed: int) -> np.ndarray:
    """(columns, 2,000) means over seeded resamples of the rows of `columns`, (n,) each.

    One resample is in memory at a time: all resamples of 51,713 questions would take 0.8 GB.
    """
    generator, n = np.random.default_rng(derive_seed(seed, "bootstrap")), len(columns[0])
    means = np.empty((len(columns), _RESAMPLES))
    for resample in range(_RESAMPLES):
        rows = generator.integers(n, size=n)
        means[:, resample] = [column[rows].mean() for column in columns]
    return means


def _all_alike(values: np.ndarray) -> list[float] | None:
    """[low, high] by Clopper and Pearson if all are 0 or all are 1, where a bootstrap has no width; else None."""
    width = 1 - 0.025 ** (1 / len(values))
    return [0.0, width] if not values.any() else [1 - width, 1.0] if (values == 1).all() else None


def _middle95(means: np.ndarray) -> list[float]:
    low, high = np.percentile(means, [2.5, 97.5])
    return [float(low), float(high)]


def _share(outcomes: Sequence[Outcome], flag: Callable[[Outcome], bool]) -> float:
    return sum(map(flag, outcomes)) / len(outcomes)
