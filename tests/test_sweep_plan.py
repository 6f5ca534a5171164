from pathlib import Path
from typing import Any

import pytest
import yaml

from searche1_lite.config import load_config
from searche1_lite.evaluate.sweep.plan import common_stages, load_plan, parse_seeds
from searche1_lite.runtime.errors import UserError

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))


def written(folder: Path, **data: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"preset": "demo", **data}, sort_keys=False))
    return path


def test_variants_and_seeds_make_one_run_each_seed_by_seed(tmp_path: Path) -> None:
    variants = {
        "a": {"ofsd.enabled": False},
        "b": {"title": "with it", "ofsd": {"clip": 0.1, "rollouts": 3}},
        "c": None,
    }
    plan = load_plan(written(tmp_path, seeds=[4, 2], settings={"grpo.steps": 3}, variants=variants))
    assert (plan.name, plan.baseline, plan.seeds) == ("mine", "a", [4, 2])
    assert plan.titles == {"a": "a", "b": "with it", "c": "c"}
    assert [(run.variant, run.seed, str(run.folder)) for run in plan.runs] == [
        (name, seed, f"runs/{name}/seed-{seed}") for seed in (4, 2) for name in "abc"
    ]
    assert plan.runs[1].config == load_config(
        "demo", None, ["seed=4", "grpo.steps=3", "ofsd.clip=0.1", "ofsd.rollouts=3", "logging.samples=0"]
    )
    assert not plan.runs[3].config.ofsd.enabled and plan.runs[3].config.seed == 2


def test_a_grid_takes_every_combination(tmp_path: Path) -> None:
    plan = load_plan(written(tmp_path, grid={"ofsd.rollouts": [3, 5], "ofsd.clip": [0, 0.1]}))
    assert list(plan.titles) == [f"rollouts={rollouts},clip={clip}" for rollouts in (3, 5) for clip in (0, 0.1)]
    assert plan.baseline == "rollouts=3,clip=0" and plan.seeds == [0]
    assert [(run.config.ofsd.rollouts, run.config.ofsd.clip) for run in plan.runs] == [
        (3, 0),
        (3, 0.1),
        (5, 0),
        (5, 0.1),
    ]


def test_values_of_a_grid_that_no_folder_can_be_called_are_told_in_the_title(tmp_path: Path) -> None:
    plan = load_plan(written(tmp_path, grid={"model.name": ["demo", "Qwen/Qwen2.5-3B"]}))
    assert plan.titles == {"name=demo": "name=demo", "name=Qwen-Qwen2.5-3B": "name=Qwen/Qwen2.5-3B"}
    assert [run.config.model.name for run in plan.runs] == ["demo", "Qwen/Qwen2.5-3B"]
    with pytest.raises(UserError, match="both called name=a-b"):
        load_plan(written(tmp_path, grid={"model.name": ["a/b", "a b"]}))


def test_keys_of_the_same_last_name_are_told_apart(tmp_path: Path) -> None:
    plan = load_plan(written(tmp_path, grid={"grpo.learning_rate": [0.1], "ofsd.learning_rate": [0.2]}))
    assert list(plan.titles) == ["grpo.learning_rate=0.1,ofsd.learning_rate=0.2"]


def test_the_command_lines_settings_count_more_than_the_files_and_less_than_a_variants(tmp_path: Path) -> None:
    path = written(tmp_path, seeds=[1], settings={"grpo.steps": 3, "rounds": 4}, variants={"a": {"rounds": 5}, "b": {}})
    plan = load_plan(path, ["grpo.steps=6", "rounds=7"], [8, 9])
    assert [(run.seed, run.config.grpo.steps, run.config.rounds) for run in plan.runs] == [
        (8, 6, 5),
        (8, 6, 7),
        (9, 6, 5),
        (9, 6, 7),
    ]


def test_a_configuration_file_is_looked_for_beside_the_sweeps(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("grpo: {steps: 77}\n")
    path = tmp_path / "sweep.yaml"
    path.write_text("config: base.yaml\nvariants: {a: {}}\n")
    assert load_plan(path).runs[0].config.grpo.steps == 77


def test_a_section_of_settings_is_every_variants_own(tmp_path: Path) -> None:
    """None may write into what the others are made from."""
    variants = {"limited": {"budget.updates": 5}, "clipped": {"ofsd.clip": 0.1}}
    plan = load_plan(written(tmp_path, settings={"budget": {"seconds": 60}}, variants=variants), ["ofsd.epochs=3"])
    limited, clipped = (run.config for run in plan.runs)
    assert (limited.budget.seconds, limited.budget.updates) == (60.0, 5)
    assert (clipped.budget.seconds, clipped.budget.updates, clipped.ofsd.clip) == (60.0, 0, 0.1)
    assert limited.ofsd.clip == 0.0 and limited.ofsd.epochs == clipped.ofsd.epochs == 3


@pytest.mark.parametrize("where", ["settings", "override"])
def test_a_seed_in_the_wrong_place_is_refused(tmp_path: Path, where: str) -> None:
    path = written(tmp_path, settings={"seed": 7} if where == "settings" else {}, variants={"a": {}})
    with pytest.raises(UserError, match="`seeds`, not seed"):
        load_plan(path, ["seed=7"] if where == "override" else [])


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"variant": {"a": {}}}, "unknown key variant"),
    "nothing to compare": ({}, "either `variants`"),
    "both": ({"variants": {"a": {}}, "grid": {"seed": [1]}}, "either `variants`"),
    "no list": ({"grid": {"rounds": 3}}, r"grid must hold `key: \[value, ...\]`"),
    "variants in a list": ({"variants": ["a"]}, "variants must hold"),
    "a variant that is no mapping": ({"variants": {"a": 3}}, "variant a must hold"),
    "a way out of the folder": ({"variants": {"../a": {}}}, "becomes a folder"),
    "a hidden folder": ({"variants": {".a": {}}}, "becomes a folder"),
    "unknown setting": ({"variants": {"a": {"ofsd.klip": 1}}}, r"variant a: unknown config key ofsd.klip.*ofsd.clip"),
    "impossible value": ({"variants": {"a": {"rounds": 0}}}, "variant a: rounds=0 is impossible"),
    "a seed of its own": ({"variants": {"a": {"seed": 1}}}, "in `seeds`"),
    "seeds that are no numbers": ({"variants": {"a": {}}, "seeds": ["x"]}, "seeds must be a list"),
    "true for a seed": ({"variants": {"a": {}}, "seeds": [True]}, "seeds must be a list"),
    "a seed twice": ({"variants": {"a": {}}, "seeds": [1, 1]}, "stands twice"),
    "no such baseline": ({"variants": {"a": {}}, "baseline": "b"}, "baseline 'b' is no variant"),
    "the same twice": ({"variants": {"a": {}, "b": {"rounds": 2}}}, "a and b have the same settings"),
    "settings in a list": ({"variants": {"a": {}}, "settings": ["rounds"]}, "settings must hold"),
    "a config that is no name": ({"preset": None, "config": 3, "variants": {"a": {}}}, "config=3 is impossible"),
    "no such preset": ({"preset": "nope", "variants": {"a": {}}}, "no preset 'nope'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_refused_in_a_line_that_names_it(tmp_path: Path, fault: str) -> None:
    data, message = FAULTS[fault]
    path = written(tmp_path, **data)
    with pytest.raises(UserError, match=message) as caught:
        load_plan(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "1,,2", "one", "1 2"])
def test_seeds_that_are_no_numbers_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="write them as 1,2,3"):
        parse_seeds(text)
    assert parse_seeds("3,1, 2") == [3, 1, 2]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_shipped_sweeps_can_be_run_as_they_are(path: Path) -> None:
    plan = load_plan(path)
    assert len(plan.titles) >= 3 and len(plan.seeds) >= 3
    assert not {0, 100, 101} & set(plan.seeds), "seeds that settings were chosen with"
    assert {run.config.data.evaluation for run in plan.runs} == {"demo"}


def test_there_are_the_five_shipped_sweeps() -> None:
    assert [path.stem for path in EXAMPLES] == ["budget", "divergence", "reference", "settle-it", "teacher"]


def test_stages_are_common_up_to_the_first_with_other_settings() -> None:
    def common(one: list[str], other: list[str]) -> list[str]:
        configs = [load_config("demo", None, settings) for settings in (one, other)]
        assert common_stages(*configs) == common_stages(*configs[::-1])
        return common_stages(*configs)

    everything = ["base", "round1.grpo", "round1.ofsd", "round2.grpo", "round2.ofsd"]
    assert common([], []) == everything
    assert common([], ["rounds=9"]) == everything
    assert common([], ["rounds=1"]) == everything[:3]
    assert common([], ["ofsd.clip=0.1"]) == everything[:2]
    assert common([], ["ofsd.enabled=false"]) == everything[:2]
    assert common(["ofsd.enabled=false"], ["ofsd.enabled=false", "ofsd.clip=1"]) == [
        "base",
        "round1.grpo",
        "round2.grpo",
    ]
    assert common([], ["grpo.steps=9"]) == everything[:1]
    for setting in ("seed=1", "model.lora_rank=4", "search.k=2", "protocol.max_searches=3", "data.evaluation_limit=9"):
        assert common([], [setting]) == []
    assert common([], ["budget.updates=9"]) == []
