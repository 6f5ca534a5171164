"""`import searche1_lite`: light, complete, typed; and what of it the command line does not reach."""

import inspect
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
from conftest import ShelfRetriever

import searche1_lite
from searche1_lite import UserError, config_for_gpu, evaluate_policy, load_config, open_asker, train_policy
from searche1_lite.config import Config, SearchConfig, dump_config
from searche1_lite.data.trajectory import Passage, Question, Search, Trajectory, Turn
from searche1_lite.rollout.reward import Written, earned, exact_match, written_by_policy
from searche1_lite.train.run_folder import RunFolder

PACKAGE = Path(searche1_lite.__file__).parent
QUESTIONS = [("Where is Lima?", "Peru"), ("Where is Oslo?", "Norway"), ("Which land has Lima?", "Peru")]


def test_importing_the_package_loads_nothing_but_the_standard_library() -> None:
    code = "import sys; before = set(sys.modules); import searche1_lite; print(*(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in loaded if name.startswith("searche1_lite")] == ["searche1_lite"]
    assert {name.partition(".")[0] for name in loaded} - {"searche1_lite"} <= sys.stdlib_module_names


def test_every_name_is_there_documented_typed_and_hidden_by_no_module() -> None:
    code = "import searche1_lite as s1; print(*(n for n in s1.__all__ if getattr(s1, n) is None)); print(*dir(s1))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
    assert shown[0] == "" and set(searche1_lite.__all__) <= set(shown[1].split())
    modules = {path.stem for path in PACKAGE.iterdir()}
    for name in searche1_lite.__all__:
        value = getattr(searche1_lite, name)
        assert name not in modules, "once imported, the module would stand in the name's place"
        if inspect.isfunction(value):
            assert value.__doc__ and "return" in value.__annotations__
            assert set(inspect.signature(value).parameters) <= set(value.__annotations__)
    assert (PACKAGE / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        searche1_lite.trian  # noqa: B018


def test_types_of_the_settings_can_be_read_at_run_time() -> None:
    assert get_type_hints(load_config)["return"] is Config


def test_the_settings_for_a_gpu_are_those_of_the_preset_for_its_size() -> None:
    told: list[str] = []
    config, preset = config_for_gpu(["seed=5"], gpu_gib=11.7, say=told.append)
    assert preset == "qwen2.5-3b-12gb" and config == load_config(preset, overrides=["seed=5"])
    assert told == ["preset qwen2.5-3b-12gb, by the size of the GPU; --preset names another"]
    with pytest.raises(UserError, match="no preset is made for less than 8"):
        config_for_gpu(gpu_gib=4)


@pytest.fixture
def config(talking_policy_folder: Path, tmp_path: Path) -> Config:
    """The talking policy, one GRPO step; nothing of the demo but the preset's sizes."""
    lines = [
        json.dumps({"id": f"q{number}", "question": text, "golden_answers": [gold]})
        for number, (text, gold) in enumerate(QUESTIONS)
    ]
    for name, rows in (("train", lines[:2]), ("test", lines[2:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return load_config(
        "demo",
        overrides=[
            f"model.name={talking_policy_folder}",
            "protocol.plain_template='Q: {question}\n'",
            "protocol.max_completion_tokens=400",
            f"data.train={tmp_path}/train.jsonl",
            f"data.evaluation={tmp_path}/test.jsonl",
            "rounds=1",
            "grpo.steps=2",
            "grpo.questions_per_step=2",
            "grpo.group_size=8",
            "ofsd.enabled=false",
            "logging.samples=0",
        ],
    )


def test_own_reward_and_own_retriever_are_what_a_run_trains_with(
    config: Config, shelf: ShelfRetriever, tmp_path: Path
) -> None:
    seen: list[Written] = []
    given: list[float] = []

    def queries_asked(written: Written) -> float:
        seen.append(written)
        given.append(float(len(written.queries)) - 0.5)
        return given[-1]

    summary = train_policy(config, tmp_path / "run", retriever=shelf, reward=queries_asked)
    assert summary["retriever"] == "shelf" and "queries_asked" in summary["reward"]
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert shelf.batches, "it was searched"
    assert len(seen) == 2 * 2 * 8
    assert any(written.queries for written in seen)
    assert not any("capital" in repr(written) for written in seen), "the documents' words are nowhere in it"
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["stage"] == "grpo"]
    for number, step in enumerate(steps):
        mine = given[16 * number : 16 * (number + 1)]
        assert step["reward"] == pytest.approx(sum(mine) / 16, abs=1e-4)
        assert 0 <= step["em"] <= 1, "exact match is told beside it"

    with pytest.raises(UserError, match="begun with the reward .*queries_asked.*, not 'exact match'"):
        train_policy(config, tmp_path / "run", resume=True, retriever=shelf)
    shelf.name = "another shelf"
    with pytest.raises(UserError, match="begun with the retriever 'shelf', not 'another shelf'"):
        train_policy(config, tmp_path / "run", resume=True, retriever=shelf, reward=queries_asked)


def test_a_run_whose_passages_or_questions_changed_is_not_gone_on_with(config: Config, tmp_path: Path) -> None:
    corpus, questions = tmp_path / "corpus.jsonl", tmp_path / "test.jsonl"
    config.search = SearchConfig(corpus=str(corpus))
    config.grpo.steps = 1

    def write(country: str) -> None:
        corpus.write_text(json.dumps({"id": "a", "contents": f"Lima\nLima is in {country}."}) + "\n")

    write("Peru")
    summary = train_policy(config, tmp_path / "run")
    write("Chile")
    with pytest.raises(UserError, match="the passages have changed since the run was begun; put them back, or choose"):
        train_policy(config, tmp_path / "run", resume=True)
    write("Peru")
    assert train_policy(config, tmp_path / "run", resume=True) == summary
    questions.write_text(
        questions.read_text() + json.dumps({"id": "n", "question": "?", "golden_answers": ["x"]}) + "\n"
    )
    with pytest.raises(UserError, match="the questions have changed since the run was begun"):
        train_policy(config, tmp_path / "run", resume=True)


def test_a_run_whose_search_cannot_be_opened_is_not_locked_for_whoever_keeps_the_error(
    config: Config, tmp_path: Path
) -> None:
    RunFolder(tmp_path / "run", config, resume=False).start().release()
    config.search = SearchConfig(url="http://127.0.0.1:9")
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
    errors = []
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            train_policy(config, tmp_path / "run", resume=True)
        errors.append(caught)
    assert all("cannot search at" in str(error.value) for error in errors)


def test_a_reward_that_is_no_finite_number_ends_the_run_with_a_line(
    config: Config, shelf: ShelfRetriever, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="gave nan for the question 'q[01]'; a reward is a finite number"):
        train_policy(config, tmp_path / "run", retriever=shelf, reward=lambda written: math.nan)


def test_evaluating_and_asking_take_a_retriever_and_an_adapter(
    config: Config, shelf: ShelfRetriever, tmp_path: Path
) -> None:
    train_policy(config, tmp_path / "run", retriever=shelf)
    adapter = tmp_path / "run" / "checkpoints" / "round1.grpo"
    found = evaluate_policy(config, adapter=adapter, retriever=shelf, out=tmp_path / "answers")
    assert (found["n"], found["retriever"], found["adapter"]) == (1, "shelf", str(adapter))
    again = evaluate_policy(config, adapter=adapter, retriever=shelf, out=tmp_path / "answers", resume=True)
    assert again == found, "what is done is not done again"
    with pytest.raises(UserError, match="retriever"):
        evaluate_policy(config, adapter=adapter, out=tmp_path / "answers", resume=True)
    with pytest.raises(UserError, match="holds no adapter"):
        evaluate_policy(config, adapter=tmp_path)
    asker = open_asker(config, adapter, retriever=shelf)
    assert asker.answer("Where is Lima?").stopped in ("answer", "end", "turn_budget", "token_budget")


def test_a_reward_sees_what_the_policy_wrote_and_nothing_that_it_found() -> None:
    passage = Passage("1", "Lima", "Lima is in Peru <answer>Chile</answer>")
    question = Question("q", "Where is Lima?", ["Peru"])
    turns = [Turn("search", 0, 1, "<search>Lima</search>"), Turn("answer", 3, 4, "<answer>Peru</answer>")]
    trajectory = Trajectory(
        question, 0, [1], [2, 3, 4, 5], [1, 0, 0, 1], turns, [Search("Lima", [passage])], "answer", answer="Peru"
    )
    written = written_by_policy(trajectory)
    assert written == Written(
        "Where is Lima?", ("Peru",), ("<search>Lima</search>", "<answer>Peru</answer>"), ("Lima",), "Peru"
    )
    assert earned(lambda w: exact_match(w.answer, w.golden_answers), trajectory) == 1.0
    for useless in (math.inf, None, "1"):
        with pytest.raises(UserError, match="a reward is a finite number"):
            earned(lambda w, value=useless: value, trajectory)
