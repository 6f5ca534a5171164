"""Metrics of a set of episodes, with confidence intervals. Pure functions of trajectories."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from searche1_lite.seeding import derive_seed
from searche1_lite.trajectory import Trajectory

_RESAMPLES = 2000


def evaluate(trajectories: Sequence[Trajectory], seed: int) -> dict[str, Any]:
    """What an evaluation reports. All figures are plain floats, fit for JSON.

    Where questions were answered several times, `em`, `f1` and the interval are over questions' means.

    Args:
        trajectories: the episodes, in any order; at least one.
        seed: of the bootstrap.

    Returns:
        `em`, `em_ci95` ([low, high], 95% percentile bootstrap over questions), `f1`, `n` (questions),
        `searches_per_question`, `searches_per_correct` (all searches / correct episodes; None if none is correct),
        `no_search_rate`, `invalid_rate` (episodes with an invalid turn), `unanswered_rate`, `tokens_per_answer` (mean
        model-written tokens an episode), and `em_by_hops` where the questions' metadata has `hops`.

    Raises:
        ValueError: if there is no trajectory.
    """
    if not trajectories:
        raise ValueError("nothing to evaluate: no trajectories")
    by_question: dict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        by_question[trajectory.question.id].append(trajectory)
    em = np.array([np.mean([t.reward for t in group]) for group in by_question.values()])
    f1 = np.array([np.mean([t.f1 for t in group]) for group in by_question.values()])
    searches = sum(t.n_searches for t in trajectories)
    correct = sum(t.correct for t in trajectories)
    result: dict[str, Any] = {
        "em": float(em.mean()),
        "em_ci95": bootstrap_ci95(em, seed),
        "f1": float(f1.mean()),
        "n": len(by_question),
        "searches_per_question": searches / len(trajectories),
        "searches_per_correct": searches / correct if correct else None,
        "no_search_rate": _share(t.n_searches == 0 for t in trajectories),
        "invalid_rate": _share(t.n_invalid > 0 for t in trajectories),
        "unanswered_rate": _share(t.answer is None for t in trajectories),
        "tokens_per_answer": float(np.mean([t.n_model_tokens for t in trajectories])),
    }
    hops: dict[str, list[float]] = defaultdict(list)
    for group, mean in zip(by_question.values(), em, strict=True):
        if "hops" in group[0].question.metadata:
            hops[str(group[0].question.metadata["hops"])].append(float(mean))
    if hops:
        result["em_by_hops"] = {name: float(np.mean(values)) for name, values in sorted(hops.items())}
    return result


def bootstrap_ci95(values: np.ndarray, seed: int) -> list[float]:
    """[low, high]: the 2.5% and 97.5% percentiles of the mean over 2,000 seeded resamples of `values`."""
    generator = np.random.default_rng(derive_seed(seed, "bootstrap"))
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return [float(low), float(high)]


def _share(flags: "Any") -> float:
    return float(np.mean([bool(flag) for flag in flags]))
