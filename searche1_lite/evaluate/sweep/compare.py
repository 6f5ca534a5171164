"""What a sweep's runs say: means, intervals over seeds, and paired differences. Pure functions of runs' figures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
from scipy import stats


@dataclass(slots=True)
class Outcome:
    """One run, as far as it has come."""

    variant: str
    seed: int
    state: str
    """`waiting`, `running`, `done` or `failed`."""
    folder: str = ""
    error: str | None = None
    em: float | None = None
    """Of the last stage, as the figures below are."""
    searches: float | None = None
    seconds: float = 0.0
    """Of training, as if the run had been alone: stages that it shares with others count in full."""
    updates: int = 0
    correct: dict[str, float] = field(default_factory=dict)
    """Exact match by question id."""


def compare(
    outcomes: Sequence[Outcome], variants: Sequence[str], baseline: str, titles: dict[str, str]
) -> list[dict[str, Any]]:
    """A row a variant, in their order; figures are None where no run is done.

    Returns:
        Of each: `name`, `title`, `seeds` (of the runs that are done), `em_mean`, `em_ci95` (95% t-interval over seeds;
        None for fewer than two), `searches_mean`, `em_diff` (mean over the seeds that the baseline has done too),
        `p_value` (see `paired_p`), `p_test`, `p_holm` (p among all the variants compared, by Holm), `searches_diff`
        and `searches_p` (paired t-test over seeds; None for fewer than two), `seconds` and `updates` (means), and
        `runs`.
    """
    done = {name: {o.seed: o for o in outcomes if o.variant == name and o.state == "done"} for name in variants}
    rows: list[dict[str, Any]] = []
    for name in variants:
        runs = list(done[name].values())
        shared = [seed for seed in done[name] if seed in done[baseline]]
        pairs = [(done[name][seed], done[baseline][seed]) for seed in shared]
        p_value, p_test = (None, None) if name == baseline else paired_p(pairs)
        rows.append(
            {
                "name": name,
                "title": titles[name],
                "seeds": sorted(done[name]),
                "em_mean": _mean([run.em for run in runs]),
                "em_ci95": t_interval([run.em for run in runs if run.em is not None]),
                "searches_mean": _mean([run.searches for run in runs]),
                "em_diff": _mean([_difference(ours.em, theirs.em) for ours, theirs in pairs]),
                "p_value": p_value,
                "p_test": p_test,
                "searches_diff": _mean([_difference(ours.searches, theirs.searches) for ours, theirs in pairs]),
                "searches_p": None if name == baseline else _t_test([(o.searches, t.searches) for o, t in pairs]),
                "seconds": _mean([run.seconds for run in runs]),
                "updates": _mean([run.updates for run in runs]),
                "runs": [
                    {
                        key: getattr(o, key)
                        for key in ("seed", "folder", "state", "em", "searches", "seconds", "updates", "error")
                    }
                    for o in outcomes
                    if o.variant == name
                ],
            }
        )
    for row, adjusted in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_holm"] = adjusted
    return rows


def t_interval(values: Sequence[float]) -> list[float] | None:
    """[low, high]: Student's 95% interval of the mean of rates, cut to [0, 1]; None for fewer than two values."""
    if len(values) < 2:
        return None
    mean, error = fmean(values), float(stats.sem(values))
    reach = error * float(stats.t.ppf(0.975, len(values) - 1))
    return [max(0.0, mean - reach), min(1.0, mean + reach)]


def paired_p(pairs: Sequence[tuple[Outcome, Outcome]]) -> tuple[float | None, str | None]:
    """Two-sided p of the difference in exact match between two variants, and how it was found.

    Over seeds, Student's paired t-test. Where there is one seed, or all seeds differ by the same amount, seeds cannot
    tell chance from effect; then it is the exact sign test over the questions that one of both got right in more of its
    runs than the other (McNemar's, for one seed). It says whether other questions would show it, not other seeds.
    """
    if not pairs:
        return None, None
    if (p := _t_test([(ours.em, theirs.em) for ours, theirs in pairs])) is not None:
        return p, "paired t-test over seeds"
    by_question: dict[str, float] = {}
    for ours, theirs in pairs:
        for question in ours.correct.keys() & theirs.correct.keys():
            gain = ours.correct[question] - theirs.correct[question]
            by_question[question] = by_question.get(question, 0.0) + gain
    signs = np.sign(list(by_question.values()))
    better, worse = int((signs > 0).sum()), int((signs < 0).sum())
    if better + worse == 0:
        return 1.0, "sign test over questions"
    return float(stats.binomtest(better, better + worse).pvalue), "sign test over questions"


def _t_test(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    """Two-sided p of Student's paired t-test; None where the differences do not vary."""
    differences = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    if len(differences) < 2 or max(differences) - min(differences) < 1e-9:
        return None
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p values, in the same order; None stays None."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        adjusted[index] = highest
    return adjusted


def _difference(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours - theirs


def _mean(values: Sequence[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
