"""The watch for a collapse: what its figures are, on policies driven into one on purpose, and on healthy ones."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from searche1_lite.config import CollapseConfig, Config, load_config
from searche1_lite.data.questions import load_questions
from searche1_lite.data.trajectory import Passage, Question, Search, Trajectory, Turn
from searche1_lite.rollout.scheduler import Sampling
from searche1_lite.runtime.progress import SILENT
from searche1_lite.train.collapse import CollapseWatch, repetition, signs, step_figures, window_means
from searche1_lite.train.grpo import train_grpo
from searche1_lite.train.rounds import run_training
from searche1_lite.train.run_folder import RunFolder
from searche1_lite.train.session import Session
from searche1_lite.train.stage_trainer import StageTraining

HEALTHY = {
    "unanswered_rate": 0.05, "invalid_rate": 0.1, "no_search_rate": 0.2, "repetition": 0.1, "all_wrong_fraction": 0.4,
    "kl": 0.02, "reward": 0.4,
}  # fmt: skip


def episode(*turns: list[int], answer: str | None = "x", reward: float = 0.0, searches: int = 1) -> Trajectory:
    """An episode of which the policy wrote `turns`, with a token of the environment's after each."""
    ids: list[int] = []
    mask, spans = [], []
    for turn in turns:
        spans.append(Turn("search", len(ids), len(ids) + len(turn), ""))
        ids += [*turn, 99]
        mask += [1] * len(turn) + [0]
    found = [Search("q", [Passage("1", "T", "text")])] * searches
    return Trajectory(Question("q", "Who?", ["x"]), 0, [1], ids, mask, spans, found, "answer", answer, reward)


def told(steps: Sequence[dict[str, Any]], **settings: Any) -> list[dict[str, Any]]:
    """What a watch tells of these steps, each a change of the healthy one."""
    watch = CollapseWatch("round1.grpo", CollapseConfig(**settings))
    for number, step in enumerate(steps, start=1):
        watch.see({"step": number, **HEALTHY, **step})
    return watch.reported


def test_repetition_is_the_share_of_an_episodes_four_grams_that_came_before() -> None:
    assert repetition([episode([1, 2, 3, 4, 5, 6])]) == 0.0
    assert repetition([episode([1] * 13)]) == pytest.approx(0.9), "ten 4-grams, all alike"
    assert repetition([episode([1, 2, 3, 4], [1, 2, 3, 4])]) == 0.5, "over turns"
    assert repetition([episode([1, 2], [3, 4], [1, 2], [3, 4])]) == 0.0, "none reaches over the environment's text"
    assert repetition([episode([1, 2, 3, 4]), episode([1, 2, 3, 4])]) == 0.0, "each episode by itself"
    assert repetition([episode([7])]) == repetition([episode()]) == 0.0


def test_a_steps_figures_are_shares_of_its_episodes_and_groups() -> None:
    lost, invalid = episode([1], answer=None), episode([1], searches=0)
    invalid.turns[0].kind = "invalid"
    right = episode([1], reward=1.0)
    assert step_figures([lost, invalid, right, right], 2) == {
        "unanswered_rate": 0.25, "invalid_rate": 0.25, "no_search_rate": 0.25, "repetition": 0.0,
        "all_wrong_fraction": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("unanswered", {"unanswered_rate": 0.6}), ("invalid", {"invalid_rate": 0.6}),
        ("no_search", {"no_search_rate": 0.95}), ("repetition", {"repetition": 0.7}),
        ("all_wrong", {"all_wrong_fraction": 1.0}), ("kl", {"kl": 1.5}), ("reward_drop", {"reward": 0.1}),
    ],
)  # fmt: skip
def test_each_figure_is_told_once_with_its_value_and_what_to_try(name: str, change: dict[str, float], capsys) -> None:
    steps = [{}] * 5 + [change] * 10
    (sign,) = told(steps)
    assert sign["figure"] == name and 5 < sign["step"] <= 10
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"round1.grpo, step {sign['step']}: ") and f"{sign['value']:.2f}" in line
    assert f"collapse.{name}=" in line and "; " in line.partition(f"collapse.{name}=")[2]
    assert not told(steps, **{name: None}), "null is never reached"
    assert not told(steps, window=20), "nor is anything in fewer steps than a window"


def test_what_a_policy_was_like_from_the_beginning_is_no_collapse() -> None:
    poor = {"unanswered_rate": 0.7, "invalid_rate": 0.8, "no_search_rate": 0.95, "repetition": 0.6}
    assert not told([poor] * 20)
    assert [sign["figure"] for sign in told([poor] * 10 + [poor | {"unanswered_rate": 0.95}] * 5)] == ["unanswered"]


def test_long_plateaus_of_success_and_of_hard_questions_are_no_collapse() -> None:
    success = {"reward": 1.0, "all_wrong_fraction": 0.0, "kl": None, "unanswered_rate": 0.0}
    assert not told([{}] * 5 + [success] * 200)
    assert not told([{"reward": 0.06, "all_wrong_fraction": 0.8}] * 3 + [{"reward": 0.01}] * 100), "too small to drop"
    noisy = [{"reward": 0.4 + 0.15 * (-1) ** step, "kl": 0.1 * (step % 3)} for step in range(200)]
    assert not told(noisy)


def test_a_kl_that_few_steps_know_is_not_judged() -> None:
    unknown = {"kl": None}
    assert not told([{}] + [{"kl": 9.0}, unknown, unknown, unknown, unknown] * 4)
    assert "kl" not in window_means([HEALTHY, unknown]) and window_means([HEALTHY, unknown, HEALTHY])["kl"] == 0.02


def test_signs_are_a_function_of_means_and_thresholds_alone() -> None:
    settings = CollapseConfig()
    means = window_means([HEALTHY])
    assert signs(means, HEALTHY, 0.4, settings) == {}
    assert signs(means | {"reward": 0.2, "kl": 1.0}, HEALTHY, 0.4, settings) == {"kl": 1.0, "reward_drop": 0.5}
    assert signs({}, {}, 0.0, settings) == {}


def test_a_watch_goes_on_where_another_stopped(capsys) -> None:
    steps = [{"step": 1 + number, **HEALTHY, "reward": 0.5 - 0.02 * number} for number in range(25)]
    whole = CollapseWatch("round1.grpo", CollapseConfig())
    for step in steps:
        whole.see(step)
    assert [sign["figure"] for sign in whole.reported] == ["reward_drop"]
    for cut in (1, 4, 12, 20):
        one, other = (CollapseWatch("round1.grpo", CollapseConfig()) for _ in range(2))
        for step in steps[:cut]:
            one.see(step)
        other.restore(json.loads(json.dumps(one.state())))
        for step in steps[cut:]:
            other.see(step)
        assert other.reported == whole.reported and other.state() == whole.state()


class DemoStage:
    """One real GRPO stage of the demo: `records`, `result`, and what the watch told."""

    def __init__(self, folder: Path, reward: Callable[[Trajectory], float] | None = None, **settings: Any) -> None:
        config = load_config("demo", None, [f"{key.replace('__', '.')}={value}" for key, value in settings.items()])
        work = Session(config, SILENT)
        self.records: list[dict[str, Any]] = []

        def answer(asked: Sequence[Question], n: int, seed_parts: Sequence[int | str]) -> list[Trajectory]:
            rollouts = work.rollout(asked, n, Sampling(seed_parts, logprobs=True))
            for rollout in rollouts if reward is not None else ():
                rollout.reward = reward(rollout)
            return rollouts

        self.result = train_grpo(
            work.model,
            work.tokenizer,
            answer,
            load_questions("demo", "train"),
            StageTraining(config, round_index=1, output_dir=folder, on_step=self.records.append),
        )
        self.figures = [sign["figure"] for sign in self.result.get("collapse", ())]


def test_a_healthy_stage_of_the_demo_warns_of_nothing(tmp_path: Path, capsys) -> None:
    stage = DemoStage(tmp_path, grpo__steps=8, grpo__questions_per_step=8, collapse__window=3)
    assert len(stage.records) == 8 and "collapse" not in stage.result and "ended" not in stage.result
    assert "collapse" not in capsys.readouterr().err
    for record in stage.records:
        assert record["unanswered_rate"] < 0.1 and record["repetition"] < 0.1 and record["all_wrong_fraction"] < 0.7


def test_a_reward_that_never_comes_is_told(tmp_path: Path, capsys) -> None:
    stage = DemoStage(tmp_path, lambda rollout: 0.0, grpo__steps=4, grpo__questions_per_step=4, collapse__window=3)
    assert stage.figures == ["all_wrong"] and len(stage.records) == 4
    assert "golden_answers" in capsys.readouterr().err


def test_a_policy_that_is_paid_not_to_search_is_told_to_have_stopped(tmp_path: Path, capsys) -> None:
    stage = DemoStage(
        tmp_path, lambda rollout: float(rollout.n_searches == 0), grpo__steps=14, grpo__questions_per_step=8,
        grpo__learning_rate=5e-3, collapse__window=2, collapse__action="stop",
    )  # fmt: skip
    assert stage.records[0]["no_search_rate"] < 0.3, "it did search"
    assert "no_search" in stage.figures and stage.result["ended"] == "stop"
    assert stage.result["steps"] == len(stage.records) == stage.result["collapse"][0]["step"] < 14
    err = capsys.readouterr().err
    assert "collapse.no_search=0.9" in err and "collapse.action=stop" in err


def test_a_policy_that_is_paid_to_repeat_itself_is_told_to_and_to_have_gone_far(tmp_path: Path, capsys) -> None:
    stage = DemoStage(
        tmp_path, lambda rollout: repetition([rollout]), grpo__steps=6, grpo__questions_per_step=2,
        grpo__learning_rate=4e-2, collapse__window=2, protocol__max_turn_tokens=64,
        protocol__max_completion_tokens=320,
    )  # fmt: skip
    first = stage.records[0]
    assert first["repetition"] < 0.1 and abs(first["kl"]) < 1e-3, "it did neither"
    assert {"repetition", "kl"} <= set(stage.figures)
    err = capsys.readouterr().err
    assert "collapse.repetition=0.5" in err and "collapse.kl=1)" in err


def absurd(action: str) -> Config:
    """A run whose first GRPO stage takes the policy apart at its first step."""
    settings = [
        "grpo.learning_rate=0.3", "grpo.steps=6", "grpo.questions_per_step=4", "rounds=2", "ofsd.enabled=false",
        "data.evaluation_limit=8", "collapse.window=2", f"collapse.action={action}", "protocol.max_turn_tokens=24",
        "protocol.max_completion_tokens=256",
    ]  # fmt: skip
    return load_config("demo", None, settings)


def weights(folder: RunFolder, name: str) -> dict[str, Any]:
    return load_file(folder.path / "checkpoints" / name / "adapter_model.safetensors")


def test_a_collapse_that_stops_ends_the_run_after_its_stage_and_for_good(tmp_path: Path, capsys) -> None:
    config = absurd("stop")
    folder = RunFolder(tmp_path / "run", config, resume=False)
    summary = run_training(config, folder, SILENT)
    assert [stage["name"] for stage in summary["stages"]] == ["base", "round1.grpo"]
    ended = summary["stages"][1]
    assert ended["ended"] == "stop" and ended["steps"] < 6 and "rolled_back_to" not in ended
    assert {"unanswered", "invalid"} <= {sign["figure"] for sign in ended["collapse"]}
    assert ended["em"] == 0.0 and (folder.path / "checkpoints" / "round1.grpo").is_dir(), "kept and evaluated as it is"
    assert json.loads(folder.summary_path.read_text()) == summary
    assert "collapse.unanswered=0.5" in capsys.readouterr().err
    assert run_training(config, RunFolder(tmp_path / "run", config, resume=True), SILENT) == summary


def test_a_collapse_that_rolls_back_ends_the_stage_with_the_best_policy_and_the_run_goes_on(tmp_path: Path) -> None:
    config = absurd("rollback")
    folder = RunFolder(tmp_path / "run", config, resume=False)
    summary = run_training(config, folder, SILENT)
    base, first, second = summary["stages"]
    assert (first["name"], second["name"]) == ("round1.grpo", "round2.grpo")
    for stage in (first, second):
        assert stage["ended"] == "rollback" and stage["em"] == base["em"] > 0 and stage["steps"] < 6
    assert (first["rolled_back_to"], second["rolled_back_to"]) == ("base", "round1.grpo")
    before, after = weights(folder, "base"), weights(folder, "round2.grpo")
    assert before.keys() == after.keys() and all((before[name] == after[name]).all() for name in before)


def test_a_collapse_that_only_warns_lets_the_run_go_on(tmp_path: Path) -> None:
    config = absurd("warn")
    config.rounds = 1
    summary = run_training(config, RunFolder(tmp_path / "run", config, resume=False), SILENT)
    last = summary["stages"][-1]
    assert last["steps"] == 6 and "ended" not in last
    assert {"unanswered", "invalid", "all_wrong", "reward_drop"} <= {sign["figure"] for sign in last["collapse"]}
