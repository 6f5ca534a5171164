"""`searche1-lite config`: what it tells of each setting, and that its YAML comes back as the same settings."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from searche1_lite.cli.main import app
from searche1_lite.config import Config, flatten, load_config, preset_names
from searche1_lite.config.listing import as_commented_yaml, list_settings
from searche1_lite.runtime.errors import UserError


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["config", *words], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("preset", [None, *preset_names()])
def test_its_yaml_is_read_back_as_the_same_settings(preset: str | None, tmp_path: Path) -> None:
    settings = ["grpo.steps=7", "data.train=a.jsonl", 'protocol.plain_template="two: lines\\n# {question}"']
    config = load_config(preset, None, settings)
    file = tmp_path / "mine.yaml"
    file.write_text(as_commented_yaml(list_settings(config)))
    assert load_config(None, file, []) == config


def test_every_setting_is_told_once_with_what_it_means_and_may_be() -> None:
    sections = list_settings(Config())
    told = [f"{part.name}.{setting.name}".lstrip(".") for part in sections for setting in part.settings]
    assert sorted(told) == sorted(flatten(Config()))
    for part in sections:
        assert part.meaning or not part.name
        for setting in part.settings:
            assert setting.meaning.endswith((".", ")")) and setting.kind, f"{part.name}.{setting.name}"


def test_a_part_of_them_is_told_on_request() -> None:
    names = [item.name for item in fields(type(Config().budget))]
    assert is_dataclass(Config().budget)
    (section,) = list_settings(Config(), ["budget"])
    assert [setting.name for setting in section.settings] == names
    (section,) = list_settings(Config(), ["grpo.clip"])
    assert section.name == "grpo" and [setting.name for setting in section.settings] == ["clip"]


def test_the_command_tells_value_default_and_choices() -> None:
    told = run("--preset", "demo", "grpo", "model.quantization", "grpo.steps=21")
    assert "ofsd." not in told and "nf4 | none" in told
    (steps,) = [line for line in told.splitlines() if "grpo.steps " in line]
    assert " 21 " in steps and "whole number, at least 0; default: 100" in steps
    assert run("--yaml", "seed") == "# Seed of all random numbers of a run. [whole number, at least 0]\nseed: 0\n"


@pytest.mark.parametrize(("word", "meant"), [("grop", "did you mean grpo?"), ("steps", "did you mean grpo.steps?")])
def test_what_there_is_not_is_told_with_what_there_is(word: str, meant: str) -> None:
    with pytest.raises(UserError) as caught:
        list_settings(Config(), [word])
    assert meant in str(caught.value) and "there are seed, rounds, model" in str(caught.value)
    assert "\n" not in str(caught.value)
