"""Detects a collapse of the policy from a GRPO stage's rollouts, step by step.

Each figure is a mean over the last few steps. Rates count only where they have risen since the stage's first step,
whose rollouts are those of the initial policy. OFSD steps have no rollouts; the evaluation after them shows a collapse.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from searche1_lite.config import CollapseConfig
from searche1_lite.data.trajectory import Trajectory
from searche1_lite.runtime.progress import say_on_stderr

NGRAM = 4
"""Tokens in a row that count as repeated when they occur again in their episode."""

RISE = 0.2
"""The least increase of a rate since the stage's first step."""

REWARD_LOSS = 0.1
"""The least drop of the mean reward: a small reward halves by chance."""

RATES = {
    "unanswered": "unanswered_rate",
    "invalid": "invalid_rate",
    "no_search": "no_search_rate",
    "repetition": "repetition",
}
"""Threshold in the config -> figure in a step's record."""

_WATCHED = (*RATES.values(), "all_wrong_fraction", "kl", "reward")

_CALMER = "lower grpo.learning_rate or raise grpo.kl_coefficient"

_EXPLAINED = {
    "unanswered": ("episodes without an answer", f"{_CALMER}; if episodes are cut off, see protocol.max_*_tokens"),
    "invalid": ("episodes with a turn that is neither a search nor an answer", _CALMER),
    "no_search": ("episodes without a search", f"{_CALMER}, or train on questions that cannot be answered from memory"),
    "repetition": ("repeated text in what the policy writes", _CALMER),
    "all_wrong": (
        "groups with no right answer, from which nothing is learnt",
        "train on easier questions, raise grpo.group_size, and look whether golden_answers are what it answers",
    ),
    "kl": ("KL in nats a token to the policy as the stage began", _CALMER),
    "reward_drop": ("loss of mean reward since its best", _CALMER),
}
"""Each sign's description, and the remedy."""


def step_figures(trajectories: Sequence[Trajectory], group_size: int) -> dict[str, float]:
    """Figures in [0, 1] of a step's rollouts, at least one, question by question.

    Returns:
        `unanswered_rate`, `invalid_rate` and `no_search_rate`, shares of episodes as in an evaluation; `repetition`;
        and `all_wrong_fraction`, the share of groups in which no rollout is right.
    """
    count = len(trajectories)
    groups = [trajectories[first : first + group_size] for first in range(0, count, group_size)]
    return {
        "unanswered_rate": sum(t.answer is None for t in trajectories) / count,
        "invalid_rate": sum(t.n_invalid > 0 for t in trajectories) / count,
        "no_search_rate": sum(t.n_searches == 0 for t in trajectories) / count,
        "repetition": round(repetition(trajectories), 4),
        "all_wrong_fraction": sum(not any(t.correct for t in group) for group in groups) / len(groups),
    }


def repetition(trajectories: Sequence[Trajectory]) -> float:
    """The share of 4-grams, within a model turn, that occurred before in their episode; 0.0 where all are too short."""
    total = distinct = 0
    for trajectory in trajectories:
        grams: list[tuple[int, ...]] = []
        for turn in trajectory.turns:
            ids = trajectory.completion_ids[turn.start : turn.end]
            grams += zip(*(ids[shift:] for shift in range(NGRAM)), strict=False)
        total += len(grams)
        distinct += len(set(grams))
    return 1 - distinct / total if total else 0.0


def window_means(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of each figure over the steps that have it; left out where at most half of them do.

    A step without a trained group has no KL.
    """
    means: dict[str, float] = {}
    for name in _WATCHED:
        values = [step[name] for step in steps if step.get(name) is not None]
        if 2 * len(values) > len(steps):
            means[name] = sum(values) / len(values)
    return means


def signs(
    means: Mapping[str, float], first: Mapping[str, float | None], best_reward: float, settings: CollapseConfig
) -> dict[str, float]:
    """The figures that have reached their thresholds, by the thresholds' names.

    Args:
        means: `window_means` of the last full window.
        first: the figures of the stage's first step.
        best_reward: the highest mean reward of any full window.
    """
    found: dict[str, float] = {}

    def reaches(name: str, value: float | None) -> bool:
        threshold = getattr(settings, name)
        return value is not None and threshold is not None and value >= threshold

    for name, figure in RATES.items():
        value = means.get(figure)
        if reaches(name, value) and value is not None and value - (first.get(figure) or 0.0) >= RISE:
            found[name] = value
    for name, figure in (("all_wrong", "all_wrong_fraction"), ("kl", "kl")):
        if reaches(name, means.get(figure)):
            found[name] = means[figure]
    lost = best_reward - means.get("reward", best_reward)
    if lost >= REWARD_LOSS and reaches("reward_drop", lost / best_reward):
        found["reward_drop"] = lost / best_reward
    return found


class CollapseWatch(TrainerCallback):
    """Reports each sign of a collapse once, and ends the stage if `collapse.action` says so.

    Args:
        stage: for messages, such as `round1.grpo`.
    """

    def __init__(self, stage: str, settings: CollapseConfig) -> None:
        self._stage, self._settings = stage, settings
        self._first: dict[str, float | None] = {}
        self._recent: list[dict[str, float | None]] = []
        self._best_reward = 0.0
        self.reported: list[dict[str, Any]] = []
        """`figure`, `value` and `step` of each sign, in order."""

    @property
    def ended(self) -> bool:
        """Whether a collapse has ended the stage."""
        return bool(self.reported) and self._settings.action != "warn"

    def see(self, record: Mapping[str, Any]) -> None:
        """Takes a step's record, as in `metrics.jsonl`."""
        settings = self._settings
        step = {name: record.get(name) for name in _WATCHED}
        self._first = self._first or step
        self._recent = [*self._recent, step][-settings.window :]
        if len(self._recent) < settings.window or self.ended:
            return
        means = window_means(self._recent)
        self._best_reward = max(self._best_reward, means.get("reward", 0.0))
        reported = {sign["figure"] for sign in self.reported}
        for name, value in signs(means, self._first, self._best_reward, settings).items():
            if name in reported:
                continue
            self.reported.append({"figure": name, "value": round(value, 4), "step": record["step"]})
            what, remedy = _EXPLAINED[name]
            say_on_stderr(
                f"{self._stage}, step {record['step']}: this may be a collapse: {what}: {value:.2f} over the last "
                f"{settings.window} steps (collapse.{name}={getattr(settings, name):g}); {remedy}"
            )
        if self.ended:
            what = "the run ends with this stage" if settings.action == "stop" else "the stage ends, and goes back"
            say_on_stderr(f"{self._stage}: {what} (collapse.action={settings.action})")

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Comes after the callback that passes on the record."""
        if self.ended:
            control.should_training_stop = True

    def figures(self) -> dict[str, Any]:
        """For the stage's figures: `collapse`, the reported signs, and `ended`, the action taken; each if any."""
        return ({"collapse": self.reported} if self.reported else {}) | (
            {"ended": self._settings.action} if self.ended else {}
        )

    def state(self) -> dict[str, Any]:
        """For a checkpoint; see `restore`."""
        return {
            "first": self._first,
            "recent": self._recent,
            "best_reward": self._best_reward,
            "reported": [*self.reported],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._first, self._recent = dict(state["first"]), [dict(step) for step in state["recent"]]
        self._best_reward, self.reported = state["best_reward"], [dict(sign) for sign in state["reported"]]
