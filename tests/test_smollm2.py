"""The countries example: its data always, and its training, in miniature, where the real language model is at hand."""

import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import adapter_weights, all_equal, fixed_weights
from safetensors.torch import load_file

from searche1_lite.config import Config, load_config
from searche1_lite.data.trajectory import Question, Search, Trajectory, Turn
from searche1_lite.rollout.metrics import evaluate
from searche1_lite.rollout.reward import exact_match
from searche1_lite.rollout.scheduler import Sampling
from searche1_lite.runtime.console import RichTasks
from searche1_lite.serve.ask import Asker
from searche1_lite.train.diagnostics import watch
from searche1_lite.train.ofsd import train_ofsd
from searche1_lite.train.pairs import Pair
from searche1_lite.train.rounds import run_training
from searche1_lite.train.run_folder import RunFolder
from searche1_lite.train.session import Session
from searche1_lite.train.stage_trainer import StageTraining

EXAMPLE = Path(__file__).parents[1] / "examples" / "countries"
SPLITS = ("train", "dev", "evaluation")
TELLING = {"CAF-demonym-1", "CZE-demonym-1"}
"""The only questions whose own words hold the answer: Central African and Czech people."""


def load_builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("countries_build", EXAMPLE / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    return load_builder()


@pytest.fixture(scope="module")
def built(builder: ModuleType) -> dict[str, list[dict]]:
    return builder.build(seed=0)


def test_every_split_has_questions_of_one_and_of_two_hops(built: dict[str, list[dict]]) -> None:
    assert len(built["corpus"]) > 400 and len({row["id"] for row in built["corpus"]}) == len(built["corpus"])
    assert [len(built[name]) > least for name, least in zip(SPLITS, (800, 200, 350), strict=True)] == [True] * 3
    for name in SPLITS:
        hops = [row["metadata"]["hops"] for row in built[name]]
        assert set(hops) == {1, 2} and 0.3 < hops.count(2) / len(hops) < 0.5


def test_no_country_is_asked_about_in_two_splits_or_shown_in_the_prompt(
    builder: ModuleType, built: dict[str, list[dict]]
) -> None:
    questions = [row for name in SPLITS for row in built[name]]
    assert len({row["id"] for row in questions}) == len({row["question"] for row in questions}) == len(questions)
    countries = {name: {row["id"].partition("-")[0] for row in built[name]} for name in SPLITS}
    assert sum(map(len, countries.values())) == len(set.union(*countries.values())) > 130
    config = load_config(None, EXAMPLE / "smollm2.yaml")
    for name in builder.SHOWN:
        assert name in config.protocol.plain_template
        assert not any(name in row["question"] or name in row["golden_answers"] for row in questions)


def test_each_answer_stands_in_the_last_passage_needed_and_each_passage_leads_to_the_next(
    built: dict[str, list[dict]],
) -> None:
    corpus = {row["id"]: row["contents"] for row in built["corpus"]}
    for row in (row for name in SPLITS for row in built[name]):
        needed = [corpus[name] for name in row["metadata"]["passages"]]
        assert len(needed) == row["metadata"]["hops"]
        assert row["golden_answers"] == list(dict.fromkeys(row["golden_answers"])) and all(row["golden_answers"])
        assert row["golden_answers"][0] in needed[-1], "the first answer is the corpus's own wording"
        told = re.search(rf"\b{re.escape(row['golden_answers'][0])}\b", row["question"])
        assert not told or row["id"] in TELLING
        if len(needed) == 2:
            country = needed[1].partition(":")[0]
            assert country in needed[0] and country not in row["question"], "the country is found by the first passage"
            capital = row["question"].partition("capital is ")[2].removesuffix("?").removesuffix(" called")
            assert capital in needed[0] and capital not in needed[1]


def test_aliases_count_and_look_alikes_do_not(built: dict[str, list[dict]]) -> None:
    rows = {row["id"]: row for name in SPLITS for row in built[name]}
    assert exact_match("51", rows["PER-calling_code-1"]["golden_answers"])
    assert exact_match("30814175", rows["PER-population-2"]["golden_answers"])
    assert exact_match("Peruvians", rows["PER-demonym-1"]["golden_answers"])
    assert exact_match("Brasilia", rows["BRA-capital-1"]["golden_answers"])
    assert exact_match("cote d'ivoire", rows["CIV-country-1"]["golden_answers"])
    assert not exact_match("Guinea", rows["GNQ-country-1"]["golden_answers"])


def test_the_same_seed_writes_the_same_files_and_another_one_splits_otherwise(
    builder: ModuleType, built: dict[str, list[dict]], tmp_path: Path
) -> None:
    counts = builder.write(tmp_path, seed=0)
    assert counts == {name: len(rows) for name, rows in built.items()}
    for name, rows in built.items():
        assert [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] == rows
    other = builder.build(seed=1)
    assert other["corpus"] == built["corpus"]
    assert {row["id"] for row in other["evaluation"]} != {row["id"] for row in built["evaluation"]}


def test_the_teachers_prompt_is_the_students_with_the_reference_as_one_more_turn() -> None:
    protocol = load_config(None, EXAMPLE / "smollm2.yaml").protocol
    shown = protocol.plain_template.removesuffix("{question}")
    assert shown != protocol.plain_template and protocol.privileged_template.startswith(shown)
    extra = protocol.privileged_template.removeprefix(shown)
    assert extra.index("{reference}<|im_end|>") < extra.index("{question}")


def model_folder() -> Path:
    name = os.environ.get("SEARCHE1_LITE_SMOLLM2")
    if not name:
        pytest.skip(
            "set SEARCHE1_LITE_SMOLLM2 to a folder with SmolLM2-135M-Instruct as transformers saves it, such as "
            "`hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir FOLDER` brings"
        )
    return Path(name)


@pytest.fixture(scope="module")
def settings(builder: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Config:
    model = model_folder()
    folder = tmp_path_factory.mktemp("countries")
    builder.write(folder)
    changes = [
        f"model.name={model}",
        f"search.corpus={folder / 'corpus.jsonl'}",
        f"data.train={folder / 'train.jsonl'}",
        f"data.evaluation={folder / 'evaluation.jsonl'}",
        "data.evaluation_limit=2",
        "rounds=1",
        "grpo.steps=1",
        "grpo.questions_per_step=2",
        "grpo.group_size=2",
        "grpo.micro_batch_tokens=1920",
        "ofsd.questions=2",
        "ofsd.rollouts=2",
        "ofsd.epochs=1",
        "ofsd.batch_size=2",
    ]
    return load_config(None, EXAMPLE / "smollm2.yaml", changes)


@pytest.fixture(scope="module")
def work(settings: Config) -> Iterator[Session]:
    """The untrained policy with its search engine, loaded once."""
    yield Session(settings, RichTasks(quiet=True))


QUESTION = Question("MAR-calling_code-2", "What is the calling code of the country whose capital is Rabat?", ["212"])
OTHER = Question("PER-currency-1", "What is the currency code of Peru?", ["PEN"])


def written(work: Session, question: Question, turns: list[str]) -> Trajectory:
    """An episode in which a policy writes these turns and reads what the search engine really finds."""
    protocol, tokenizer = work.protocol, work.tokenizer
    t = Trajectory(question, 0, protocol.prompt_ids(question.question), [], [], [], [], "answer")
    for text in turns:
        ids = tokenizer.encode(text, add_special_tokens=False)
        kind = "search" if text.endswith("</search>") else "answer"
        t.turns.append(Turn(kind, len(t.completion_ids), len(t.completion_ids) + len(ids), text))
        t.completion_ids += ids
        t.loss_mask += [1] * len(ids)
        if kind == "search":
            query = text.removeprefix("<search>").removesuffix("</search>")
            (passages,) = work.retriever.search([query], work.config.search.k)
            t.searches.append(Search(query, passages))
            shown = protocol.information_ids(passages)
            t.completion_ids += shown
            t.loss_mask += [0] * len(shown)
    t.answer = turns[-1].removeprefix("<answer>").removesuffix("</answer>")
    t.reward = exact_match(t.answer, question.golden_answers)
    return t


def test_a_round_in_miniature_runs_and_only_a_spread_of_rewards_moves_the_adapter(
    settings: Config, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    summary = run_training(settings, RunFolder(folder, settings, False), RichTasks(quiet=True))
    assert [stage["name"] for stage in summary["stages"]] == ["base", "round1.grpo", "round1.ofsd"]
    for stage in summary["stages"]:
        assert stage["n"] == 2 and 0 <= stage["em_ci95"][0] <= stage["em"] <= stage["em_ci95"][1] <= 1
        assert {"f1", "searches_per_question", "no_search_rate", "invalid_rate", "tokens_per_answer"} <= stage.keys()
        assert stage["seconds"] >= 0 and stage["peak_memory_mb"] > 100
    assert summary["stages"][2]["pairs"]["questions"] == 2
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (step,) = [record for record in records if record["stage"] == "grpo"]
    assert math.isfinite(step["loss"]) and step["tokens"] > 0
    base, trained = (
        load_file(folder / "checkpoints" / name / "adapter_model.safetensors") for name in ("base", "round1.grpo")
    )
    assert all_equal(base, trained) == (step["zero_std_fraction"] == 1.0)


def test_the_examples_in_the_prompt_are_enough_for_the_base_to_search_and_read(work: Session) -> None:
    result = Asker(work).answer("What is the calling code of Peru?").to_dict()
    assert result["searches"] and result["stopped"] == "answer"
    assert "Peru" in result["searches"][0]["query"] and result["searches"][0]["passages"][0]["id"] == "PER-codes"
    assert result["answer"] == "51"


def test_distillation_moves_the_adapter_towards_the_teacher_and_leaves_the_base(work: Session, tmp_path: Path) -> None:
    right = written(
        work,
        QUESTION,
        [
            "<search>country whose capital is Rabat</search>",
            "<search>calling code of Morocco</search>",
            "<answer>212</answer>",
        ],
    )
    wrong = written(work, QUESTION, ["<search>calling code of Rabat</search>", "<answer>446,550</answer>"])
    short = written(work, OTHER, ["<search>currency code of Peru</search>", "<answer>PEN</answer>"])
    long = written(work, OTHER, ["<search>people of Peru</search>", "<answer>Peruvian</answer>"])
    assert [t.reward for t in (right, wrong, short, long)] == [1, 0, 1, 0], "the search engine finds what is needed"
    pairs = [Pair(right, wrong), Pair(short, long)]
    before, _ = watch(work.model, work.protocol, [right, wrong, short, long], pairs, work.config)
    assert abs(before["plain"]) < 1e-4 < 0.05 < before["pairs"], "the reference tells the model something"

    adapter, fixed = adapter_weights(work.model), fixed_weights(work.model)
    records: list[dict] = []
    result = train_ofsd(
        work.model,
        work.tokenizer,
        work.protocol,
        pairs,
        StageTraining(work.config, round_index=1, output_dir=tmp_path, on_step=records.append),
    )
    assert result["steps"] == len(records) == 1
    assert math.isfinite(records[0]["loss"]) and records[0]["grad_norm"] > 0
    assert records[0]["loss"] == pytest.approx(before["pairs"], rel=0.01), "at first the teacher is the policy itself"
    assert not all_equal(adapter_weights(work.model), adapter)
    assert all_equal(fixed_weights(work.model), fixed)
    with torch.no_grad():
        for name, parameter in work.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(adapter[name.replace(".default.", ".")])


def test_evaluation_reports_both_kinds_of_question(work: Session) -> None:
    questions = [Question(q.id, q.question, q.golden_answers, {"hops": n}) for n, q in ((2, QUESTION), (1, OTHER))]
    metrics = evaluate(work.rollout_task("evaluate", questions, 1, Sampling((0, "evaluate"), greedy=True)), seed=0)
    assert metrics["n"] == 2 and metrics["em_by_hops"].keys() == {"1", "2"}
    assert metrics["searches_per_question"] > 0 and 0 <= metrics["em"] <= 1
