"""The whole train command on the demo, two steps a stage, through the real command line; then eval and ask on it."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from command import run_command

from searche1_lite.config import load_config
from searche1_lite.report.trajectories import read_trajectories
from searche1_lite.runtime.console import RichTasks
from searche1_lite.runtime.errors import UserError
from searche1_lite.train.rounds import run_training
from searche1_lite.train.run_folder import RunFolder

SETTINGS = [
    "grpo.steps=2",
    "grpo.questions_per_step=4",
    "grpo.micro_batch_tokens=2000",
    "ofsd.questions=24",
    "ofsd.batch_size=4",
    "ofsd.micro_batch_tokens=800",
    "data.evaluation_limit=16",
    "seed=3",
]
STAGES = ["base", "round1.grpo", "round1.ofsd", "round2.grpo", "round2.ofsd"]


def command(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run_command(*words, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    shown = command("train", "--preset", "demo", "--out", "run", *SETTINGS, cwd=folder)
    assert shown.returncode == 0, shown.stderr
    assert all(stage in shown.stdout for stage in STAGES), "it ends with the table"
    assert "Traceback" not in shown.stderr and "Warning" not in shown.stderr
    return folder


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_run_folder_is_what_the_design_promises(folder: Path) -> None:
    run = folder / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["seed"] == 3 and summary["model"] == "demo"
    assert [stage["name"] for stage in summary["stages"]] == STAGES
    for stage in summary["stages"]:
        assert 0 <= stage["em_ci95"][0] <= stage["em"] <= stage["em_ci95"][1] <= 1
        for key in ("f1", "searches_per_question", "no_search_rate", "invalid_rate", "tokens_per_answer", "seconds"):
            assert stage[key] >= 0
        assert stage["n"] == 16 and stage["peak_memory_mb"] > 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["grpo"]["steps"] == 2 and config["ofsd"]["questions"] == 24
    metrics = records(run / "metrics.jsonl")
    assert [(r["round"], r["step"]) for r in metrics if r["stage"] == "grpo"] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(key in r for r in metrics if r["stage"] == "grpo" for key in ("loss", "reward", "em", "kl", "searches"))
    assert [r["name"] for r in metrics if r["stage"] == "evaluate"] == STAGES
    for number in (1, 2):
        assert len(records(run / "trajectories" / f"round{number}.grpo.rollouts.jsonl")) == 2 * 4 * 5
        assert len(records(run / "trajectories" / f"round{number}.ofsd.rollouts.jsonl")) == 24 * 5
    for name in STAGES:
        evaluated = records(run / "trajectories" / f"{name}.evaluation.jsonl")
        assert len(evaluated) == 16 and all(len(t["completion_ids"]) == len(t["loss_mask"]) for t in evaluated)
        assert {file.name for file in (run / "checkpoints" / name).iterdir()} >= {
            "adapter_model.safetensors", "adapter_config.json", "state.json",
        }  # fmt: skip


def test_each_distillation_reports_its_pairs_their_kl_and_the_teachers_answers(folder: Path) -> None:
    summary = json.loads((folder / "run" / "summary.json").read_text())
    for stage in summary["stages"]:
        if stage["name"].endswith(".ofsd"):
            counts = stage["pairs"]
            assert counts["questions"] == 24
            assert counts["pairs"] == 24 - counts["none_correct"] - counts["none_less_efficient"] > 0
            assert stage["steps"] == -(-2 * counts["pairs"] // 4), "the preset makes two passes"
            assert abs(stage["kl"]["plain"]) < 1e-6 < min(stage["kl"]["pairs"], stage["kl"]["foreign"])
            assert {"em", "searches_per_question"} == stage["privilege"]["teacher"].keys()
            assert stage["privilege"]["teacher"].keys() == stage["privilege"]["student"].keys()


def test_the_report_shows_the_kl_of_every_rollout_of_the_pairs_questions(folder: Path) -> None:
    assert "round2.ofsd" in (folder / "run" / "report.html").read_text()
    stages = {stage["name"]: stage for stage in json.loads((folder / "run" / "summary.json").read_text())["stages"]}
    for name in ("round1.ofsd", "round2.ofsd"):
        pairs = stages[name]["pairs"]["pairs"]
        lines = records(folder / "run" / "trajectories" / f"{name}.kl.jsonl")
        assert len(lines) == 5 * pairs and sum(line["role"] == "student" for line in lines) == pairs
        rollouts = records(folder / "run" / "trajectories" / f"{name}.rollouts.jsonl")
        turns = {(r["question"]["id"], r["sample"]): [turn["text"] for turn in r["turns"]] for r in rollouts}
        for line in lines:
            shown = ["".join(turn["pieces"]) for turn in line["turns"]]
            assert shown == turns[line["question_id"], line["sample"]]
    found = read_trajectories(folder / "run")
    assert sum(group["kl"] is not None for group in found.groups) == sum(
        stages[name]["pairs"]["pairs"] for name in ("round1.ofsd", "round2.ofsd")
    )


@pytest.mark.slow
def test_a_run_that_lost_its_last_stages_comes_to_the_same_end(folder: Path) -> None:
    again = folder / "again"
    shutil.copytree(folder / "run", again)
    (again / "summary.json").unlink()
    with (again / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "grpo", "round": 2, "st')  # a line that was cut off
    for name in STAGES[2:]:
        shutil.rmtree(again / "checkpoints" / name)
    shown = command("train", "--preset", "demo", "--out", "again", "--resume", *SETTINGS, cwd=folder)
    assert shown.returncode == 0, shown.stderr
    first, second = (json.loads((path / "summary.json").read_text()) for path in (folder / "run", again))
    measured = {"seconds", "evaluation_seconds", "diagnostic_seconds", "peak_memory_mb", "rollout_seconds"}
    for one, other in zip(first["stages"], second["stages"], strict=True):
        assert {k: v for k, v in one.items() if k not in measured} == {
            k: v for k, v in other.items() if k not in measured
        }
    steps = [
        [(r["stage"], r.get("round"), r.get("step")) for r in records(p / "metrics.jsonl")]
        for p in (folder / "run", again)
    ]
    assert steps[0] == steps[1], "what was done twice is told once"
    adapters = [
        (path / "checkpoints" / STAGES[-1] / "adapter_model.safetensors").read_bytes()
        for path in (folder / "run", again)
    ]
    assert adapters[0] == adapters[1]


def steps_told(run: Path) -> int:
    path = run / "metrics.jsonl"
    return sum('"step"' in line for line in path.read_text().splitlines()) if path.is_file() else 0


@pytest.mark.slow
def test_ctrl_c_and_sigterm_keep_the_steps_done_and_say_how_to_go_on(folder: Path) -> None:
    words = ["train", "--preset", "demo", "--out", "stopped", "--resume", *SETTINGS]
    run = folder / "stopped"
    for signum, at in ((signal.SIGINT, 1), (signal.SIGTERM, 5)):
        process = subprocess.Popen(
            [sys.executable, "-m", "searche1_lite", *words],
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        while steps_told(run) < at:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.01)
        with pytest.raises(UserError, match="another process is at the run"):
            RunFolder(run, load_config("demo", None, SETTINGS), True).claim()
        process.send_signal(signum)
        _, told = process.communicate(timeout=60)
        assert process.returncode == 128 + signum
        assert told.rstrip().endswith("interrupted; finished work is kept, continue with --resume --out stopped")
        assert "Traceback" not in told
        done = steps_told(run)
    resumed = command(*words, cwd=folder)
    assert resumed.returncode == 0, resumed.stderr
    assert steps_told(run) > done >= 5
    last = Path("checkpoints") / STAGES[-1] / "adapter_model.safetensors"
    assert (run / last).read_bytes() == (folder / "run" / last).read_bytes()


def test_a_finished_run_prints_its_table_again_and_refuses_to_be_overwritten(folder: Path) -> None:
    before = (folder / "run" / "summary.json").read_bytes()
    refused = command("train", "--preset", "demo", "--out", "run", *SETTINGS, cwd=folder)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    (folder / "run" / "summary.json").unlink()  # as after a death between the last checkpoint and its summary
    resumed = command("train", "--out", "run", "--resume", cwd=folder)  # its settings are in its folder
    assert resumed.returncode == 0 and all(stage in resumed.stdout for stage in STAGES)
    assert (folder / "run" / "summary.json").read_bytes() == before


def test_eval_on_the_last_adapter_gives_the_figures_of_the_summary(folder: Path) -> None:
    adapter = "run/checkpoints/round2.ofsd"
    shown = command("eval", "--preset", "demo", "--adapter", adapter, "--json", "--limit", "16", "seed=3", cwd=folder)
    assert shown.returncode == 0, shown.stderr
    result = json.loads(shown.stdout)
    last = json.loads((folder / "run" / "summary.json").read_text())["stages"][-1]
    for key in ("em", "em_ci95", "f1", "n", "searches_per_question", "no_search_rate"):
        assert result[key] == last[key]
    assert result["retriever"].startswith("bm25") and (result["model"], result["data"]) == ("demo", "demo")
    assert result["adapter"] == adapter


def test_ask_answers_one_question_with_its_searches(folder: Path) -> None:
    question = records(folder / "run" / "trajectories" / "base.evaluation.jsonl")[0]["question"]["question"]
    shown = command(
        "ask", question, "--preset", "demo", "--adapter", "run/checkpoints/round2.ofsd", "--json", cwd=folder
    )
    assert shown.returncode == 0, shown.stderr
    result = json.loads(shown.stdout)
    assert result["question"] == question and result["seconds"] > 0 and result["tokens"] > 0
    assert result["stopped"] in {"answer", "end", "turn_budget", "token_budget"}
    assert result["answer"] is None or f"<answer> {result['answer']}</answer>" in result["text"]
    for search in result["searches"]:
        assert f"<search> {search['query']}</search>" in result["text"]
        assert all(passage.keys() == {"id", "title", "text", "score"} for passage in search["passages"])


class Interrupted(RichTasks):
    """Progress that notes the tasks begun and is interrupted as one of them begins."""

    def __init__(self, at: str = "") -> None:
        super().__init__(quiet=True)
        self.at, self.begun = at, []

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        self.begun.append(name)
        if name == self.at:
            raise KeyboardInterrupt
        with super().task(name, total) as advance:
            yield advance


def test_a_stage_interrupted_in_its_evaluation_is_not_trained_again(tmp_path: Path) -> None:
    settings = [
        "rounds=1",
        "ofsd.enabled=false",
        "grpo.steps=1",
        "grpo.questions_per_step=4",
    ]
    config = load_config("demo", None, [*settings, "data.evaluation_limit=4"])
    with pytest.raises(KeyboardInterrupt):
        run_training(config, RunFolder(tmp_path / "run", config, False), Interrupted("round1.grpo: evaluate"))
    trained = (tmp_path / "run" / "checkpoints" / "round1.grpo" / "adapter_model.safetensors").read_bytes()
    resumed = Interrupted()
    summary = run_training(config, RunFolder(tmp_path / "run", config, True), resumed)
    assert resumed.begun == ["round1.grpo: evaluate"]
    assert [stage["name"] for stage in summary["stages"]] == ["base", "round1.grpo"]
    assert summary["stages"][1]["steps"] == 1 and summary["stages"][1]["n"] == 4
    assert (tmp_path / "run" / "checkpoints" / "round1.grpo" / "adapter_model.safetensors").read_bytes() == trained
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    told = [(r["stage"], r.get("name"), r.get("step")) for r in records(tmp_path / "run" / "metrics.jsonl")]
    assert told == [("evaluate", "base", None), ("grpo", None, 1), ("evaluate", "round1.grpo", None)]


def test_a_question_too_long_for_a_prompt_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    questions = tmp_path / "train.jsonl"
    texts = [f"What is the base of {'Port ' * (200 if number == 3 else 1)}{number}?" for number in range(16)]
    rows = [{"id": text[-4:], "question": text, "golden_answers": ["x"]} for text in texts]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config("demo", None, [f"data.train={questions}"])
    with pytest.raises(UserError, match="protocol.max_prompt_tokens=128"):
        run_training(config, RunFolder(tmp_path / "run", config, False), RichTasks(quiet=True))
    assert not (tmp_path / "run").exists()


def test_an_error_that_a_command_raises_shows_its_traceback() -> None:
    """Also where the tests fork it: else none of them could tell a crash."""
    shown = run_command("eval", "--preset", "nope", SEARCHE1_LITE_DEBUG="1")
    assert shown.returncode == 1 and "Traceback (most recent call last)" in shown.stderr
