"""Watching a run: what TensorBoard, trackio and wandb are told, read from their own files; and the sample table."""

import io
import json
import re
import shutil
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest
from command import run_command
from rich.cells import cell_len
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from searche1_lite.config import Config, LoggingConfig, dump_config, load_config
from searche1_lite.data.trajectory import Passage, Question, Search, Trajectory, Turn
from searche1_lite.rollout.samples import choose_samples, is_due, sample_table
from searche1_lite.runtime.console import RichTasks
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.terminal import one_line
from searche1_lite.train.run_folder import RunFolder
from searche1_lite.train.tracking import (
    Tracked,
    _closing,
    check_trackers,
    figures_of,
    report_evaluations,
    reporting_arguments,
)

SETTINGS = [
    "rounds=1", "grpo.steps=2", "grpo.questions_per_step=4", "grpo.micro_batch_tokens=2000", "ofsd.questions=24",
    "ofsd.batch_size=8", "ofsd.micro_batch_tokens=800", "data.evaluation_limit=16", "seed=3",
]  # fmt: skip
STAGES = ["base", "round1.grpo", "round1.ofsd"]


def train(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_command("train", "--preset", "demo", *SETTINGS, *words, cwd=folder, **environment)


def records(run: Path, stage: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["stage"] == stage]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar that TensorBoard would show of the run in `folder`."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


# What is asked for


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("tensorboard", ["tensorboard"]),
        ("[tensorboard]", ["tensorboard"]),
        ("wandb,tensorboard", ["wandb", "tensorboard"]),
        ("[trackio, wandb, trackio]", ["trackio", "wandb"]),
        ("none", []),
        ("[none]", []),
        ("[]", []),
        ("null", []),
    ],
)
def test_trackers_may_be_named_in_any_of_the_usual_ways(text: str, names: list[str], tmp_path: Path) -> None:
    config = load_config("demo", None, [f"logging.report_to={text}"])
    assert config.logging.report_to == names
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(file=tmp_path / "config.yaml") == config


@pytest.mark.parametrize("text", ["mlflow", "all", "[tensorboard, mlflow]", "3", "[1]", "true", "{a: b}"])
def test_a_tracker_that_is_not_known_is_refused_with_the_ones_that_are(text: str) -> None:
    with pytest.raises(UserError, match=r"^logging\.report_to") as caught:
        load_config("demo", None, [f"logging.report_to={text}"])
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_refused_by_its_extra_before_anything_is_loaded_or_written(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['trackio'] = None\n"  # as where it is not installed
        "from searche1_lite.cli.main import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules)"
    )
    words = ["train", "--preset", "demo", "--out", "run", "logging.report_to=trackio"]
    shown = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 2 and shown.stdout == "False\n"
    assert shown.stderr.count("\n") == 1 and "pip install -e '.[trackio]' in the" in shown.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_without_a_key_is_refused_unless_it_is_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(UserError, match="wandb login") as caught:
        check_trackers(LoggingConfig(report_to=["wandb"]))
    assert "\n" not in str(caught.value) and "WANDB_MODE=offline" in str(caught.value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(LoggingConfig(report_to=["wandb"]))


def test_nothing_is_told_or_written_where_nobody_is_asked_to(tmp_path: Path) -> None:
    assert reporting_arguments(None) == {"report_to": "none"}
    assert reporting_arguments(Tracked(Config(), tmp_path, "round1.grpo")) == {"report_to": "none"}
    report_evaluations(Config(), tmp_path, [{"name": "base", "em": 0.5}])
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_watched_in_another_way_is_still_the_same_run(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", load_config("demo"), resume=False).start()
    watched = ["logging.report_to=tensorboard", "logging.samples=0", "logging.samples_every=5", "logging.project=mine"]
    RunFolder(tmp_path / "run", load_config("demo", None, watched), resume=True)
    with pytest.raises(UserError, match="seed") as caught:
        RunFolder(tmp_path / "run", load_config("demo", None, [*watched, "seed=9"]), resume=True)
    assert "logging" not in str(caught.value)


def test_figures_are_the_numbers_of_a_record_without_its_place() -> None:
    record = {
        "stage": "grpo", "round": 2, "step": 3, "em": 0.5, "tokens": 7, "kl": None, "em_ci95": [0.1, 0.9], "done": True,
        "privilege": {"teacher": {"em": 0.75}, "student": {}},
    }  # fmt: skip
    assert figures_of(record) == {"em": 0.5, "tokens": 7, "privilege/teacher/em": 0.75}


# TensorBoard


@pytest.fixture(scope="module")
def tracked_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracked")
    shown = train(folder, "--out", "run", "logging.report_to=tensorboard", "logging.samples_every=1")
    assert shown.returncode == 0, shown.stderr
    assert "Traceback" not in shown.stderr and "Warning" not in shown.stderr
    assert [path.name for path in folder.iterdir()] == ["run"], "nothing lies beside the run's folder"
    titles = ("round1.grpo, step 1", "round1.grpo, step 2", "round1.ofsd, fresh rollouts")
    assert all(shown.stderr.count(title) == 1 for title in titles)
    assert "reward" not in shown.stdout and "\x1b" not in shown.stderr, "tables go to stderr, as plain text"
    return folder / "run"


def test_a_tracker_that_fails_at_a_stages_end_costs_a_line_and_not_the_stage(capsys: pytest.CaptureFixture) -> None:
    class Failing(ExitStack):
        def __exit__(self, *details: object) -> None:
            super().__exit__(*details)
            raise OSError("connection lost\nand more")

    with _closing(Failing()) as opened:
        assert isinstance(opened, Failing)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "OSError: connection lost" in told
    with pytest.raises(ValueError, match="in the stage"), _closing(Failing()):
        raise ValueError("in the stage")


@pytest.mark.parametrize("stage", ["grpo", "ofsd"])
def test_tensorboard_has_a_run_a_stage_with_our_figures_and_trls(tracked_run: Path, stage: str) -> None:
    found = scalars(tracked_run / "tensorboard" / f"round1.{stage}")
    expected = [(record["step"], figures_of(record)) for record in records(tracked_run, stage)]
    assert len(expected) > 1
    for name in expected[0][1]:
        values = found[f"train/{name}"]
        assert [step for step, _ in values] == [step for step, _ in expected]
        assert [value for _, value in values] == pytest.approx([figures[name] for _, figures in expected], rel=1e-6)
    if stage == "grpo":
        assert {"train/em", "train/searches", "train/tokens_per_second", "train/kl"} <= set(found)
        assert {"train/entropy", "train/completions/mean_length", "train/reward_std"} <= set(found), "TRL's own"
        assert not any("clipped_ratio" in name or "terminated" in name for name in found), "TRL misreads our endings"


def evaluations(run: Path) -> list[float]:
    values = scalars(run / "tensorboard" / "evaluation")["eval/em"]
    assert [step for step, _ in values] == [0, 1, 2]
    return [value for _, value in values]


def test_tensorboard_has_the_evaluations_as_a_run_with_a_step_a_stage(tracked_run: Path) -> None:
    stages = json.loads((tracked_run / "summary.json").read_text())["stages"]
    assert [stage["name"] for stage in stages] == STAGES
    assert evaluations(tracked_run) == pytest.approx([stage["em"] for stage in stages])
    found = scalars(tracked_run / "tensorboard" / "evaluation")
    assert found["eval/searches_per_question"][-1] == (2, pytest.approx(stages[-1]["searches_per_question"]))
    assert [step for step, _ in found["eval/pairs/pairs"]] == [2], "what only one stage has"


@pytest.mark.slow
def test_a_resumed_run_tells_each_step_once_and_leaves_finished_stages_alone(tracked_run: Path, tmp_path: Path) -> None:
    again = tmp_path / "run"
    shutil.copytree(tracked_run, again)
    before = scalars(again / "tensorboard" / "round1.grpo")
    shutil.rmtree(again / "checkpoints" / "round1.ofsd")
    shown = train(tmp_path, "--out", "run", "--resume", "logging.report_to=tensorboard", "logging.samples=0")
    assert shown.returncode == 0, shown.stderr
    assert "fresh rollouts" not in shown.stderr
    assert scalars(again / "tensorboard" / "round1.grpo") == before
    for run in (tracked_run, again):
        losses = scalars(run / "tensorboard" / "round1.ofsd")["train/loss"]
        assert losses == [(r["step"], pytest.approx(r["loss"])) for r in records(run, "ofsd")]
    assert evaluations(again) == evaluations(tracked_run)


# trackio and wandb, where they are installed


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_has_a_run_a_stage_and_the_evaluations_each_step_once(tmp_path: Path) -> None:
    words = ["--out", "run", "logging.report_to=trackio", "logging.project=tried"]
    kept = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    for resume in ([], ["--resume"]):
        shown = train(tmp_path, *words, *resume, **kept)
        assert shown.returncode == 0, shown.stderr
        assert "rackio" not in shown.stdout
        if not resume:
            shutil.rmtree(tmp_path / "run" / "checkpoints" / "round1.ofsd")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "trackio"}
    rows: dict[str, list[dict]] = {}
    with sqlite3.connect(tmp_path / "trackio" / "tried.db") as database:
        for name, step, text in database.execute("select run_name, step, metrics from metrics order by id"):
            rows.setdefault(name.partition("/")[2], []).append({"step": step, **json.loads(text)})
    assert rows.keys() == {"round1.grpo", "round1.ofsd", "evaluation"}
    told = [(row["train/global_step"], row["train/em"]) for row in rows["round1.grpo"] if "train/em" in row]
    assert told == [(r["step"], pytest.approx(r["em"])) for r in records(tmp_path / "run", "grpo")]
    told = [(row["train/global_step"], row["train/loss"]) for row in rows["round1.ofsd"] if "train/loss" in row]
    assert told == [(r["step"], pytest.approx(r["loss"])) for r in records(tmp_path / "run", "ofsd")]
    told = [(row["step"], row["eval/em"]) for row in rows["evaluation"]]
    assert told == list(enumerate(r["em"] for r in records(tmp_path / "run", "evaluate")))


def wandb_records(path: Path) -> Iterator:
    """The records of a file that wandb wrote offline: a log in LevelDB's format behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_has_a_run_a_stage_in_one_group_and_the_evaluations(tmp_path: Path) -> None:
    shown = train(tmp_path, "--out", "run", "logging.report_to=wandb", WANDB_MODE="offline")
    assert shown.returncode == 0, shown.stderr
    assert "wandb" not in shown.stdout.lower() and shown.stdout.count("\n") == 9, "the table alone"
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "wandb's files lie in the run's folder"
    history: dict[str, list[dict]] = {}
    groups = set()
    for path in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")):
        found = list(wandb_records(path))
        (run,) = [record.run for record in found if record.HasField("run")][:1]
        groups.add(run.run_group)
        assert run.project == "searche1-lite" and run.display_name.startswith(f"{run.run_group}/")
        # A run of the same id takes the place of the earlier one.
        history[run.run_id.partition("-")[2]] = [
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in found
            if record.HasField("history")
        ]
        assert [record.exit.exit_code for record in found if record.HasField("exit")] == [0]
    assert len(groups) == 1 and groups.pop().startswith("run-")
    assert history.keys() == {"round1.grpo", "round1.ofsd", "evaluation"}
    told = [(row["train/global_step"], row["train/searches"]) for row in history["round1.grpo"] if "train/em" in row]
    assert told == [(r["step"], pytest.approx(r["searches"])) for r in records(tmp_path / "run", "grpo")]
    told = [(row["_step"], row["eval/em"]) for row in history["evaluation"]]
    assert told == list(enumerate(r["em"] for r in records(tmp_path / "run", "evaluate")))


def test_offline_wandb_in_the_environment_leaves_stdout_to_the_results(tmp_path: Path) -> None:
    words = ["eval", "--preset", "demo", "--limit", "2", "--json"]
    shown = run_command(*words, cwd=tmp_path, WANDB_MODE="offline")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["n"] == 2


# The sample table

HOSTILE = "[red]x[/red] [/]\x1b[2J\x1b]0;title\x07\r\n\t\x9b31m\u202etxt\u2028\ud800 :smile: " + "long " * 1000


def answered(name: str, sample: int, reward: float, searches: int = 1, **fields: object) -> Trajectory:
    question = Question(name, fields.pop("question", f"What about {name}?"), fields.pop("gold", ["Peru", "Lima"]))
    given = {"answer": "Peru" if reward else "Oslo", "stopped": "answer", "reward": reward, **fields}
    query = given.pop("query", "q")
    return Trajectory(
        question, sample, [1], [2], [1], [Turn("answer", 0, 1, "")],
        [Search(f"{query} {number}", [Passage("1", "t", "x")]) for number in range(searches)], **given,
    )  # fmt: skip


def printed(table: object, width: int, **how: object) -> str:
    file = io.StringIO()
    Console(file=file, width=width, **how).print(table)
    return file.getvalue()


def test_samples_are_a_right_and_a_wrong_one_of_groups_with_both_then_one_of_each_other_group() -> None:
    batch = [
        *(answered("dull", sample, 0.0) for sample in range(3)),
        answered("rivers", 0, 0.0), answered("rivers", 1, 1.0, searches=3), answered("rivers", 2, 1.0, searches=1),
        *(answered("easy", sample, 1.0) for sample in range(3)),
        answered("hills", 0, 1.0), answered("hills", 1, 1.0), answered("hills", 2, 0.0),
    ]  # fmt: skip
    ranked = [("rivers", 2), ("rivers", 0), ("hills", 0), ("hills", 2), ("dull", 0), ("easy", 0)]
    for count in range(8):
        assert [(t.question.id, t.sample) for t in choose_samples(batch, count)] == ranked[:count]


def test_a_row_shows_the_question_once_the_queries_the_answer_the_gold_answers_and_the_reward() -> None:
    batch = [
        answered("rivers", 0, 1.0, searches=2, query="Amazon"),
        answered("rivers", 1, 0.0, searches=0, answer=None, stopped="turn_budget"),
    ]
    shown = printed(sample_table("round1.grpo, step 2", batch, 4), 100)
    assert shown.count("What about rivers?") == 1 and "round1.grpo, step 2" in shown
    assert "1. Amazon 0" in shown and "2. Amazon 1" in shown and "(none)" in shown
    assert shown.count("Peru (+1)") == 2 and "(turn_budget)" in shown
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert [row[-1] for row in rows if row[-1]] == ["1", "0"]


@pytest.mark.parametrize("width", [30, 80, 200])
@pytest.mark.parametrize("terminal", [False, True], ids=["file", "terminal"])
def test_what_a_model_wrote_can_neither_format_nor_steer_the_terminal(width: int, terminal: bool) -> None:
    batch = [answered("a", 0, 0.0, question=HOSTILE, gold=[HOSTILE], answer=HOSTILE, query=HOSTILE)]
    shown = printed(sample_table(HOSTILE, batch, 4), width, force_terminal=terminal, no_color=True)
    bare = re.sub(r"\x1b\[[\d;]*m", "", shown) if terminal else shown  # Rich's own bold and italics
    assert all(cell_len(line) <= width for line in bare.splitlines()) and len(bare) < 20_000
    assert not any(c != "\n" and (ord(c) < 32 or 127 <= ord(c) < 160) for c in bare)
    assert not any(c in bare for c in "\u202e\u2028\ud800")
    if width == 200:
        assert "[red]x[/red] [/]" in bare and ":smile:" in bare, "markup is shown, not obeyed"


def test_a_line_is_cut_to_its_limit_and_says_so() -> None:
    assert one_line("a\n\n b\x1b c", 10) == "a b c"
    assert one_line("x" * 10, 10) == "x" * 10 and one_line("x" * 11, 10) == "x" * 9 + "…"
    assert one_line(" " * 1000 + "x", 10) == "…", "not looked through to its end"


def test_a_table_is_due_with_the_last_step_and_every_so_many() -> None:
    assert [step for step in range(1, 8) if is_due(step, 7, 0)] == [7]
    assert [step for step in range(1, 8) if is_due(step, 7, 3)] == [3, 6, 7]


def test_a_table_shown_while_a_bar_is_drawn_goes_whole_to_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    tasks = RichTasks()
    table = sample_table("samples", [answered("rivers", 0, 1.0), answered("rivers", 1, 0.0)], 4)
    with tasks.task("round1: GRPO", 2) as advance:
        advance(1)
        tasks.show(table)
        advance(1)
    shown = capsys.readouterr()
    assert shown.out == ""
    start = shown.err.index("samples")
    lines = shown.err[start:].splitlines()[1 : len(printed(table, 80).splitlines())]
    assert [line.strip() for line in lines] == [line.strip() for line in printed(table, 80).splitlines()[1:]]
    assert "\x1b[32m" not in shown.err and "\x1b[31m" not in shown.err, "NO_COLOR"
