"""Settings: merged in one order, strict about keys and values, and written so that they read back the same."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from searche1_lite.config import (
    DEFAULT_PRESETS,
    PRESETS,
    Config,
    ProtocolConfig,
    default_preset,
    dump_config,
    flatten,
    load_config,
    parse_config,
    preset_names,
)
from searche1_lite.runtime.errors import UserError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refusal(*overrides: str, preset: str | None = None, file: Path | None = None) -> str:
    """The message that these settings are refused with: one line, and wrong usage."""
    with pytest.raises(UserError) as caught:
        load_config(preset, file, overrides)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_last_of_preset_file_and_overrides_counts(tmp_path: Path) -> None:
    preset, default = load_config("demo"), Config()
    assert preset.protocol.max_turn_tokens != default.protocol.max_turn_tokens, "else this test shows nothing"
    file = write(tmp_path / "own.yaml", "protocol: {max_turn_tokens: 30, max_searches: 2}\ngrpo: {steps: 7}\n")
    merged = load_config("demo", file, ["protocol.max_searches=1", "seed=3", "seed=4"])
    assert merged.protocol.max_searches == 1, "override over file"
    assert merged.protocol.max_turn_tokens == 30, "file over preset"
    assert merged.protocol.plain_template == preset.protocol.plain_template, "what the file leaves out stays"
    assert merged.grpo == replace(preset.grpo, steps=7)
    assert merged.seed == 4, "the later of two overrides"
    assert load_config() == default


@pytest.mark.parametrize(
    ("overrides", "index"),
    [
        (["search.corpus=mine"], None),
        (["search.corpus=mine", "search.index=wiki-18"], "wiki-18"),
        (["search.index=wiki-18", "search.corpus=mine"], "wiki-18"),
        (["search.k=5"], "wikipedia-dpr-100w"),
    ],
)
def test_a_corpus_of_ones_own_takes_the_place_of_the_presets_index(
    overrides: list[str], index: str | None, tmp_path: Path
) -> None:
    assert load_config("qwen2.5-3b-12gb", None, overrides).search.index == index
    file = write(tmp_path / "mine.yaml", "search: {corpus: mine}")
    assert load_config("qwen2.5-3b-12gb", file).search.index is None
    assert load_config("qwen2.5-3b-12gb", file, ["search.index=wiki-18"]).search.index == "wiki-18"
    both = write(tmp_path / "both.yaml", "search: {corpus: mine, index: bare}")
    assert load_config(None, both, ["search.corpus=other"]).search.index == "bare", "the two belong together"
    run = write(tmp_path / "config.yaml", dump_config(load_config("qwen2.5-3b-12gb")))
    assert load_config(None, run, ["search.corpus=mine"]).search.index is None, "nor that of a run's own settings"
    assert load_config(None, run, before={"search.corpus": "mine"}).search.index is None
    assert load_config(None, run, before={"search.index": "bare"}, after={"search.corpus": "mine"}).search.index is None


def test_an_override_that_is_a_section_keeps_the_sections_other_keys(tmp_path: Path) -> None:
    file = write(tmp_path / "own.yaml", "grpo: {steps: 7, clip: 0.3}\n")
    grpo = load_config(None, file, ["grpo={steps: 8}"]).grpo
    assert (grpo.steps, grpo.clip) == (8, 0.3)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("grpo.steps=20", "grpo.steps", 20),
        ("grpo.learning_rate=1e-5", "grpo.learning_rate", 1e-5),
        ("ofsd.enabled=false", "ofsd.enabled", False),
        ("model.revision=null", "model.revision", None),
        ("model.revision='2'", "model.revision", "2"),
        ("data.train=a=b.jsonl", "data.train", "a=b.jsonl"),
        ("protocol.plain_template='{question}: now'", "protocol.plain_template", "{question}: now"),
        (" seed =5", "seed", 5),
    ],
)
def test_an_override_is_read_as_yaml(override: str, key: str, value: object) -> None:
    read = flatten(load_config(overrides=[override]))[key]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.step=3", "unknown config key grpo.step; did you mean grpo.steps?"),
        ("gropo.steps=3", "unknown config key gropo; did you mean grpo?"),
        ("steps=3", "unknown config key steps; did you mean grpo.steps?"),
        ("grpo.temperature=1", "unknown config key grpo.temperature; did you mean engine.temperature?"),
        ("micro_batch_tokens=1", "did you mean grpo.micro_batch_tokens or ofsd.micro_batch_tokens?"),
        ("search.zzz=1", "unknown config key search.zzz; known here: corpus, index, k, k1, b, threads"),
    ],
)
def test_an_unknown_key_is_refused_with_what_was_meant(override: str, message: str) -> None:
    assert message in refusal(override)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("grpo.steps=many", "grpo.steps='many'"),
        ("grpo.steps=1.5", "grpo.steps=1.5"),
        ("grpo.steps=[1, 2]", "grpo.steps=[1, 2]"),
        ("grpo.steps.x=1", "grpo.steps={'x': 1}"),
        ("seed=2026-01-01", "seed="),
        ("model.name=3", "model.name=3"),
        ("model.name=", "model.name=None"),
        ("search.index=[a]", "search.index=['a']"),
        ("ofsd.enabled=3", "ofsd.enabled=3"),
        ("grpo=3", "grpo is a section"),
        ("grpo=", "grpo is a section"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_its_key(override: str, key: str) -> None:
    assert refusal(override).startswith(key)


@pytest.mark.parametrize(
    "key", [key for key, value in flatten(Config()).items() if not isinstance(value, bool)], ids=str
)
def test_only_a_true_or_false_setting_takes_true(key: str) -> None:
    told = refusal(f"{key}=true")
    assert told.startswith(f"{key}=true is impossible: this is not a true/false setting")
    # YAML reads a bare `on` as true: where words are to be chosen from, they are named.
    assert told.endswith("; choose auto, always, never") or key != "engine.shadow"


@pytest.mark.parametrize(
    "override",
    [
        "seed=-1",
        "rounds=0",
        "model.lora_rank=0",
        "model.quantization=int8",
        "search.k=0",
        "search.b=1.5",
        "search.k1=-0.1",
        "engine.temperature=0",
        "engine.batch_size=0",
        "grpo.group_size=1",
        "grpo.steps=-1",
        "grpo.learning_rate=0",
        "grpo.learning_rate=.inf",
        "grpo.clip=.nan",
        "grpo.warmup_ratio=1.1",
        "ofsd.rollouts=1",
        "ofsd.divergence=mse",
        "protocol.max_turn_tokens=0",
        "data.evaluation_limit=-1",
    ],
)
def test_an_impossible_value_is_refused_by_its_key(override: str) -> None:
    key, value = override.split("=")
    message = refusal(override)
    assert message.startswith(f"{key}=") and "is impossible" in message
    assert value.strip("'.") in message


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["protocol.max_turn_tokens=4000"], ["protocol.max_turn_tokens=4000", "protocol.max_completion_tokens=3072"]),
        (["protocol.plain_template=Hello"], ["protocol.plain_template", "{question}"]),
        (["protocol.plain_template='{question} {question}'"], ["protocol.plain_template", "exactly once"]),
        (["protocol.privileged_template='{question}'"], ["protocol.privileged_template", "{reference}"]),
        (["protocol.direct_template=Answer"], ["protocol.direct_template", "{question}"]),
        (["protocol.rag_template='{question}'"], ["protocol.rag_template", "{documents}"]),
        (["protocol.rag_template='{documents} {documents}: {question}'"], ["protocol.rag_template", "exactly once"]),
        (["protocol.information_template=none"], ["protocol.information_template", "{documents}"]),
        (["protocol.document_template='{title}'"], ["protocol.document_template", "{text}"]),
    ],
)
def test_values_that_do_not_go_together_are_refused_and_named(overrides: list[str], named: list[str]) -> None:
    message = refusal(*overrides)
    assert all(part in message for part in named), message


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("seed: 1\nseed: 2\n", ":2:", "duplicate key 'seed'"),
        ("grpo:\n  steps: 1\n  clip: 0.1\n  steps: 2\n", ":4:", "duplicate key 'steps'"),
        ("seed: 1\nrounds: [1\n", ":3:", "not valid YAML"),
        ("seed: 1\n\tx: 1\n", ":2:", "not valid YAML"),
        ("? [a, b]\n: 3\n", ":1:", "not valid YAML"),
        ("? {a: b}\n: 3\n", ":1:", "not valid YAML"),
        ("seed: !!python/object/apply:os.getcwd []\n", ":1:", "not valid YAML"),
        ("seed: 1\n---\nseed: 2\n", ":2:", "not valid YAML"),
        ("- seed\n", " ", "must hold `key: value` lines, not a list"),
        ("seed\n", " ", "must hold `key: value` lines, not a str"),
    ],
)
def test_a_broken_config_file_is_refused_with_its_line(tmp_path: Path, text: str, place: str, problem: str) -> None:
    file = write(tmp_path / "own.yaml", text)
    message = refusal(file=file)
    assert message.startswith(f"{file}{place}") and problem in message


@pytest.mark.parametrize("text", ["", "# nothing yet\n"])
def test_an_empty_config_file_changes_nothing(tmp_path: Path, text: str) -> None:
    assert load_config(None, write(tmp_path / "own.yaml", text)) == Config()


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_config_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path, name: str) -> None:
    assert str(tmp_path / name) in refusal(file=tmp_path / name)


@pytest.mark.parametrize("preset", ["demonstration", "", "../presets/demo", "demo.yaml"])
def test_an_unknown_preset_is_refused_with_those_there_are(preset: str) -> None:
    message = refusal(preset=preset)
    assert message.startswith(f"no preset {preset!r}") and all(name in message for name in preset_names())


@pytest.mark.parametrize("override", ["grpo.steps", "=3", "grpo.=3", ".seed=3", "grpo steps=3", "--seed=3", ""])
def test_an_override_that_is_not_key_and_value_is_refused(override: str) -> None:
    assert refusal(override) == f"{override!r} is not an override; write key=value, such as grpo.steps=20"


@pytest.mark.parametrize("override", ["rounds={a", "seed=*a", "grpo={steps: 1, steps: 2}", "grpo={[a]: 1}"])
def test_an_override_whose_value_is_not_yaml_is_refused(override: str) -> None:
    assert refusal(override).startswith(f"the value in {override!r} is not valid YAML")


@pytest.mark.parametrize("name", preset_names())
def test_every_shipped_preset_loads_and_round_trips(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert load_config(file=PRESETS / f"{name}.yaml") == config
    assert load_config(file=write(tmp_path / "config.yaml", dump_config(config))) == config


def test_each_card_that_has_a_preset_has_one_that_is_shipped_and_no_other_is() -> None:
    assert sorted(["demo", *DEFAULT_PRESETS.values()]) == preset_names()


@pytest.mark.parametrize(("size", "name"), DEFAULT_PRESETS.items())
def test_a_cards_preset_takes_search_r1s_4096_tokens_and_says_which_card_it_is_for(size: int, name: str) -> None:
    protocol = load_config(name).protocol
    assert protocol.max_prompt_tokens + protocol.max_completion_tokens == 4096
    head = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8").partition("\nseed:")[0]
    assert f"{size} GB" in head and f"--preset {name}`" in head


def test_larger_cards_presets_do_the_same_faster() -> None:
    configs = [load_config(DEFAULT_PRESETS[size]) for size in sorted(DEFAULT_PRESETS)]
    for (smaller, larger), size in zip(itertools.pairwise(configs), (12, 16, 24), strict=True):
        # The 16 GB card spends its room on plain weights instead (`test_memory.py` has who plans for them).
        assert smaller.engine.batch_size < larger.engine.batch_size or size == 16
        assert smaller.grpo.micro_batch_tokens <= larger.grpo.micro_batch_tokens
        differing = {key for key, value in flatten(smaller).items() if flatten(larger)[key] != value}
        adapter = {"model.lora_rank", "model.lora_alpha"}
        assert differing <= {"engine.batch_size", "grpo.micro_batch_tokens", "ofsd.micro_batch_tokens"} | adapter


@pytest.mark.parametrize(
    ("gib", "size"),
    [(7.6, 8), (8.0, 8), (10.9, 8), (11.6, 12), (12.0, 12), (14.7, 12), (15.6, 16), (23.5, 24), (24.0, 24), (79.1, 24)],
)
def test_a_gpu_gets_the_preset_of_the_largest_card_that_it_can_pass_for(gib: float, size: int) -> None:
    assert default_preset(gib) == DEFAULT_PRESETS[size]


@pytest.mark.parametrize(("gib", "message"), [(None, "try --preset demo"), (5.8, "the GPU has 5.8 GiB")])
def test_without_a_gpu_that_will_do_no_preset_is_chosen(gib: float | None, message: str) -> None:
    with pytest.raises(UserError) as caught:
        default_preset(gib)
    assert caught.value.exit_code == 2 and message in str(caught.value) and "--preset" in str(caught.value)
    assert gib is not None or all(name in str(caught.value) for name in preset_names())


def test_a_dumped_config_holds_every_setting_and_reads_back_the_same(tmp_path: Path) -> None:
    changed = load_config(
        overrides=[
            "seed=9",
            "model.revision='0123'",
            "data.train='yes'",
            "grpo.learning_rate=3e-6",
            "ofsd.enabled=false",
            "protocol.no_result_message='null'",
            "protocol.correction_message='Überleg: ‹noch› einmal'",
        ]
    )
    file = write(tmp_path / "config.yaml", dump_config(changed))
    assert load_config(file=file) == changed != Config()
    assert load_config("demo", file) == changed, "nothing of a preset shows through"


@settings(deadline=None)
@example("a\x85b\u2028c")  # line breaks to YAML, which would read them back as blanks
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_round_trip_through_a_file(
    tmp_path_factory: pytest.TempPathFactory, message: str
) -> None:
    config = Config(protocol=ProtocolConfig(no_result_message=message))
    file = write(tmp_path_factory.getbasetemp() / "round_trip.yaml", dump_config(config))
    assert load_config(file=file) == config


def test_parsing_leaves_the_given_data_as_it_was() -> None:
    data = {"grpo": {"steps": 3}}
    assert parse_config(data).grpo.steps == 3
    assert data == {"grpo": {"steps": 3}}
