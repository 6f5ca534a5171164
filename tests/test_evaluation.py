"""`eval` through the real command line and the demo: baselines, data sets, and going on after an interruption."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import run_command
from hub_server import HubServer

from searche1_lite.config import Config, load_config
from searche1_lite.data.question_files import PUBLIC_SETS
from searche1_lite.data.questions import SEVEN_SETS, load_questions, order_by_data_set
from searche1_lite.data.trajectory import Question, Trajectory
from searche1_lite.evaluate.run import BATCHES_AT_ONCE, run_evaluation
from searche1_lite.evaluate.saved import EvaluationFolder, describe
from searche1_lite.rollout.metrics import evaluate
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.progress import SILENT
from searche1_lite.train.session import Session

BATCH = 4
SETTINGS = [f"engine.batch_size={BATCH}", "seed=3"]
WORDS = ["eval", "--preset", "demo", "--data", "demo:dev+own.jsonl", "--limit", "40", *SETTINGS]
SETS = {"demo": 40, "own.jsonl": 9}


def command(*words: str, cwd: Path, program: str = "") -> subprocess.CompletedProcess[str]:
    if not program:
        return run_command(*words, cwd=cwd)
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def untimed(figures: Any) -> Any:
    """Without what a clock said."""
    if isinstance(figures, dict):
        timed = ("seconds", "seconds_per_question")
        return {key: untimed(value) for key, value in figures.items() if key not in timed}
    return [untimed(item) for item in figures] if isinstance(figures, list) else figures


def same_answers(one: Path, other: Path) -> bool:
    return all(
        untimed(lines(one / name)) == untimed(lines(other / name)) for name in ("questions.jsonl", "trajectories.jsonl")
    )


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with questions of one's own, and `whole`: an evaluation that nothing interrupted."""
    folder = tmp_path_factory.mktemp("evaluation")
    own = [
        {"id": f"own{n}", "question": question.question, "golden_answers": question.golden_answers}
        for n, question in enumerate(load_questions("demo:train", "train", 9))
    ]
    (folder / "own.jsonl").write_text("".join(json.dumps(record) + "\n" for record in own))
    shown = command(*WORDS, "--out", "whole", "--json", cwd=folder)
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr.splitlines()[-2:] == [
        line for line in shown.stderr.splitlines() if line.startswith("evaluate ")
    ], "a line a data set"
    assert json.loads(shown.stdout) == json.loads((folder / "whole" / "result.json").read_text())
    return folder


def test_the_folder_holds_what_was_asked_every_answer_and_the_figures(desk: Path) -> None:
    folder = desk / "whole"
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "config.yaml", "questions.jsonl", "trajectories.jsonl", "result.json",
    }  # fmt: skip
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["evaluation"]["method"] == "agent" and config["evaluation"]["data"] == "demo:dev+own.jsonl"
    assert config["engine"]["batch_size"] == BATCH and config["seed"] == 3
    result, questions = json.loads((folder / "result.json").read_text()), lines(folder / "questions.jsonl")
    assert {name: block["n"] for name, block in result["by_data_set"].items()} == SETS
    assert [record["data_set"] for record in questions] == [name for name, n in SETS.items() for _ in range(n)]
    blocks = result["by_data_set"].values()
    assert result["em_average"] == pytest.approx(sum(block["em"] for block in blocks) / 2)
    for key in ("f1", "searches_per_question", "no_search_rate", "tokens_per_answer", "retriever_recall"):
        assert result[key] >= 0
    assert (result["method"], result["model"], result["adapter"]) == ("agent", "demo", None)
    assert result["retriever"].startswith("bm25") and result["seconds_per_question"] > 0
    assert sum(result["misses"].values()) == sum(record["em"] < 1 for record in questions) > 0

    trajectories = [Trajectory.from_dict(record) for record in lines(folder / "trajectories.jsonl")]
    assert [t.question.id for t in trajectories] == [record["id"] for record in questions]
    for record, trajectory in zip(questions, trajectories, strict=True):
        assert record["queries"] == [search.query for search in trajectory.searches]
        assert record["searches"] == len(record["queries"]) and record["stopped"] == trajectory.stopped
        assert record["question"] and record["golden_answers"] and record["tokens"] > 0 and record["seconds"] > 0
    assert evaluate(trajectories, 3).items() <= untimed(result).items(), "the kept episodes give the same figures"


class Stopping:
    """Progress that does `act` once this many questions are answered; it notes how many each task was to have."""

    def __init__(self, after: int = -1, act: Callable[[], None] = lambda: None) -> None:
        self.left, self.act, self.totals = after, act, []

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        self.totals.append(total)

        def advance(count: int) -> None:
            before, self.left = self.left, self.left - count
            if before > 0 >= self.left:
                self.act()

        yield advance


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def work() -> Session:
    return Session(load_config("demo", None, SETTINGS), SILENT)


def dev_folder(path: Path, config: Config, questions: list[Question], resume: bool) -> EvaluationFolder:
    return EvaluationFolder(path, config, describe("agent", None, "demo", questions), questions, resume)


@pytest.mark.parametrize("after", [1, 17, 33])
def test_an_interruption_costs_no_more_than_what_was_answered_at_once(
    work: Session, tmp_path: Path, after: int
) -> None:
    at_once = BATCHES_AT_ONCE * BATCH
    questions = load_questions("demo:dev", "test", 3 * at_once)
    whole = run_evaluation(work, questions, "agent")
    kept = after // at_once * at_once
    work.progress = Stopping(after, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(work, questions, "agent", dev_folder(tmp_path / "e", work.config, questions, False))
    assert len(lines(tmp_path / "e" / "questions.jsonl") if kept else []) == kept
    work.progress = Stopping()
    again = run_evaluation(work, questions, "agent", dev_folder(tmp_path / "e", work.config, questions, True))
    assert work.progress.totals == [len(questions) - kept], "what was done is not done again"
    assert untimed(again) == untimed(whole)
    finished = run_evaluation(work, questions, "agent", dev_folder(tmp_path / "e", work.config, questions, True))
    assert finished == again and len(work.progress.totals) == 1


ENDED = """
import os, signal, sys
from searche1_lite.cli import main as cli
from searche1_lite.runtime import console
class Ended(console.RichTasks):
    answered = 0
    def task(self, name, total):
        return super().task(name, total) if not name.startswith("evaluate") else self.watched(name, total)
    from contextlib import contextmanager
    @contextmanager
    def watched(self, name, total):
        def advance(count):
            Ended.answered += count
            if Ended.answered >= 42:
                os.kill(os.getpid(), signal.{signal})
        yield advance
console.RichTasks = Ended
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell runs in the background
cli.main()
"""


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_to_the_same_figures(desk: Path) -> None:
    killed = command(*WORDS, "--out", "killed", cwd=desk, program=ENDED.format(signal="SIGKILL"))
    assert killed.returncode == -signal.SIGKILL
    done = len(lines(desk / "killed" / "questions.jsonl"))
    assert done == SETS["demo"] and not (desk / "killed" / "result.json").exists()
    # As if it had been killed while it wrote: a line cut off, and an episode whose question is not told yet.
    with (desk / "killed" / "questions.jsonl").open("a") as file:
        file.write('{"id": "own0", "quest')
    with (desk / "killed" / "trajectories.jsonl").open("a") as file:
        file.write((desk / "whole" / "trajectories.jsonl").read_text().splitlines()[done] + '\n{"quest')
    resumed = command(*WORDS, "--out", "killed", "--resume", "--json", cwd=desk)
    assert resumed.returncode == 0, resumed.stderr
    assert "evaluate own.jsonl: 9 in" in resumed.stderr and "evaluate demo" not in resumed.stderr
    assert untimed(json.loads(resumed.stdout)) == untimed(json.loads((desk / "whole" / "result.json").read_text()))
    assert same_answers(desk / "killed", desk / "whole")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_it_with_one_line_that_says_how_to_go_on(desk: Path, name: str, code: int) -> None:
    stopped = command(*WORDS, "--out", f"stopped-{name}", cwd=desk, program=ENDED.format(signal=name))
    assert stopped.returncode == code and stopped.stdout == ""
    assert stopped.stderr == "interrupted; answers are kept; continue with the same command and --resume\n"
    assert len(lines(desk / f"stopped-{name}" / "questions.jsonl")) == SETS["demo"]


def test_a_finished_evaluation_prints_its_table_again_without_the_model(desk: Path) -> None:
    before = {path.name: path.read_bytes() for path in (desk / "whole").iterdir()}
    program = """
import sys
from searche1_lite.cli.main import app
try:
    app()
finally:
    assert not {"torch", "transformers"} & sys.modules.keys()
"""
    shown = command(*WORDS, "--out", "whole", "--resume", cwd=desk, program=program)
    assert shown.returncode == 0 and shown.stderr == "", shown.stderr
    assert {path.name: path.read_bytes() for path in (desk / "whole").iterdir()} == before
    table = shown.stdout.splitlines()
    assert max(map(len, table)) <= 100 and not any(line.startswith("\x1b") for line in table)
    figures = json.loads(before["result.json"])
    for name, em in [
        *((name, block["em"]) for name, block in figures["by_data_set"].items()),
        ("all questions", figures["em"]),
        ("average of sets", figures["em_average"]),
    ]:
        (row,) = [line for line in table if name in line and "│" in line]
        assert f"{em:.3f}" in row
    assert f"{sum(figures['misses'].values())} wrong: " in shown.stdout and "EM by hops, demo: 1: " in shown.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "whole"], "whole is not empty; add --resume to go on with what is there, or choose another --out"),
        (["--out", "whole", "--resume", "seed=4"], "whole holds another evaluation: seed (3 there, 4 now)"),
        (["--out", "whole", "--resume", "search.k=2"], "whole holds another evaluation: search.k (3 there, 2 now)"),
        (
            ["--out", "whole", "--resume", "--method", "rag"],
            "whole holds another evaluation: method ('agent' there, 'ra",
        ),
        (
            ["--out", "whole", "--resume", "--limit", "8"],
            "whole holds another evaluation: questions (49 there, 16 now)",
        ),
        (
            ["--out", "whole", "--resume", "--data", "demo:dev+changed.jsonl"],
            "whole holds another evaluation: data ('de",
        ),
        (
            ["--out", "whole", "--resume", "--adapter", "adapter"],
            "whole holds another evaluation: adapter (None there, ",
        ),
        (["--out", "train", "--resume"], "train is not empty and holds no evaluation; choose another --out"),
        (["--out", "train"], "train is not empty and holds no evaluation; choose another --out"),
        (["--out", "notes"], "notes is not empty and holds no evaluation; choose another --out"),
        (["--out", "notes", "--resume"], "notes is not empty and holds no evaluation; choose another --out"),
        (["--out", "own.jsonl"], "cannot write to own.jsonl: own.jsonl is a file; choose another --out"),
        (["--resume"], "--resume continues what is in a folder; name it with --out"),
    ],
)
def test_what_does_not_fit_the_folder_is_refused_in_one_line(desk: Path, words: list[str], message: str) -> None:
    (desk / "notes").mkdir(exist_ok=True)
    (desk / "notes" / "mine.txt").write_text("mine")
    (desk / "train").mkdir(exist_ok=True)
    (desk / "train" / "config.yaml").write_text("seed: 3\n")
    (desk / "changed.jsonl").write_bytes((desk / "own.jsonl").read_bytes().replace(b"own0", b"own9"))
    (desk / "adapter").mkdir(exist_ok=True)
    (desk / "adapter" / "adapter_config.json").write_text("{}")
    before = {path: path.read_bytes() for path in desk.rglob("*") if path.is_file()}
    shown = command(*WORDS, *words, cwd=desk)
    assert (shown.returncode, shown.stdout) == (2, "") and shown.stderr.count("\n") == 1
    assert shown.stderr.startswith(f"error: {message}")
    assert {path: path.read_bytes() for path in desk.rglob("*") if path.is_file()} == before


def test_the_same_questions_under_another_name_are_the_same_evaluation(tmp_path: Path) -> None:
    config, questions = load_config("demo"), load_questions("demo:dev", "test", 4, 0)
    EvaluationFolder(tmp_path / "e", config, describe("agent", None, "demo:dev", questions), questions, False).start()
    again = describe("agent", None, "./mine.jsonl", questions)
    EvaluationFolder(tmp_path / "e", config, again, questions, True)
    other = load_config("demo", None, ["grpo.steps=3", "logging.samples=0"])
    EvaluationFolder(tmp_path / "e", other, again, questions, True)  # training's settings change no answer
    with pytest.raises(UserError, match=r"engine.temperature \(1.0 there, 0.5 now\)"):
        EvaluationFolder(tmp_path / "e", load_config("demo", None, ["engine.temperature=0.5"]), again, questions, True)


def test_an_adapter_or_questions_that_changed_in_place_are_noticed(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"one")
    config, questions = load_config("demo"), [Question("q", "Who?", ["Ada"])]

    def open_folder(asked: list[Question], resume: bool) -> EvaluationFolder:
        return EvaluationFolder(tmp_path / "e", config, describe("agent", adapter, "x", asked), asked, resume)

    open_folder(questions, False).start()
    open_folder(questions, True)
    with pytest.raises(UserError, match="e holds another evaluation: the questions have changed since; "):
        open_folder([Question("q", "Who?", ["Eve"])], True)
    folder = open_folder(questions, True)
    folder.searches("one")
    folder.start()  # one that was begun by an earlier version does not say
    folder.release()
    (adapter / "adapter_model.safetensors").write_bytes(b"two")
    with pytest.raises(UserError, match="e holds another evaluation: the adapter .* has changed since; "):
        open_folder(questions, True)


def test_passages_that_changed_are_noticed_before_another_question_is_answered(tmp_path: Path) -> None:
    config, questions = load_config("demo"), [Question("q", "Who?", ["Ada"])]

    def start(passages: str | None, resume: bool = True) -> None:
        asked = describe("agent", None, "x", questions)
        folder = EvaluationFolder(tmp_path / "e", config, asked, questions, resume)
        folder.searches(passages)
        folder.start()
        folder.release()

    start("one", resume=False)
    start("one")
    start(None)
    with pytest.raises(UserError, match="e holds another evaluation: the passages have changed since; use what it has"):
        start("two")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("questions.jsonl", r"questions.jsonl:1 is not the question that comes there; choose another --out"),
        ("trajectories.jsonl", r"trajectories.jsonl holds 2 of 3 questions that are done; put it back, or choose"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path: Path, name: str, message: str) -> None:
    questions = [Question(str(n), "?", ["x"]) for n in range(3)]
    folder = dev_folder(tmp_path / "e", load_config("demo"), questions, False)
    folder.start()
    folder.add([{"id": question.id} for question in questions], [{"t": n} for n in range(3)])
    path = tmp_path / "e" / name
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=message):
        folder.start()


def test_without_data_it_is_what_training_evaluates_on(desk: Path) -> None:
    joined = "data.evaluation=demo:dev+own.jsonl"
    shown = command("eval", "--preset", "demo", "--json", joined, "data.evaluation_limit=11", *SETTINGS, cwd=desk)
    assert shown.returncode == 0, shown.stderr
    result = json.loads(shown.stdout)
    assert result["n"] == 11 and sum(block["n"] for block in result["by_data_set"].values()) == 11


# All seven sets


def test_all_seven_sets_come_in_one_call_with_their_average(tmp_path: Path, talking_policy_folder: Path) -> None:
    data = tmp_path / "data"
    for index, name in enumerate(SEVEN_SETS):
        files = PUBLIC_SETS[name].files
        path = data / files.get("test", files.get("dev", ""))
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {"id": f"test_{n}", "question": f"Who is {n}?", "golden_answers": ["Lima" if n < index else "Quito"]}
            for n in range(5)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "corpus.jsonl").write_text('{"id": "a", "contents": "Lima\\nLima is the capital of Peru."}\n')
    limits = {"max_turn_tokens": 24, "max_completion_tokens": 200, "max_document_tokens": 40, "max_searches": 1}
    settings = {
        "model": {"name": str(talking_policy_folder), "lora_rank": 4},
        "search": {"corpus": "corpus.jsonl"},
        "protocol": limits | {"plain_template": "Q: {question}", "no_more_searches_message": "!"},
    }
    (tmp_path / "own.yaml").write_text(json.dumps(settings))
    with HubServer().run() as hub:
        hub.add("datasets", "RUC-NLPIR/FlashRAG_datasets", data)
        environment = hub.environment(tmp_path / "home", SEARCHE1_LITE_CACHE=str(tmp_path / "cache"))
        words = ["eval", "--config", "own.yaml", "--data", "all", "--limit", "3", "--json", "--out", "e"]
        shown = subprocess.run(
            [sys.executable, "-m", "searche1_lite", *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert shown.returncode == 0, shown.stderr
        result = json.loads(shown.stdout)
        assert list(result["by_data_set"]) == list(SEVEN_SETS) and result["n"] == 21
        assert all(block["n"] == 3 for block in result["by_data_set"].values())
        blocks = result["by_data_set"].values()
        assert result["em_average"] == pytest.approx(sum(block["em"] for block in blocks) / 7)
        # The policy finds the passage about Lima each time: recall is the share of questions whose answer that is.
        recalls = [block["retriever_recall"] for block in blocks]
        assert recalls[0] == 0.0 and recalls[5] == recalls[6] == 1.0 and recalls == sorted(recalls)
        asked = {request.path.rpartition("/main/")[2] for request in hub.requests if "/resolve/" in request.path}
        assert len([name for name in asked if name.endswith(".jsonl")]) <= 7
    assert len(lines(tmp_path / "e" / "questions.jsonl")) == 21


def test_a_data_sets_questions_are_put_together_in_their_order() -> None:
    mixed = [Question(str(n), "?", ["x"], {} if n % 3 == 0 else {"data_set": "ab"[n % 3 - 1]}) for n in range(7)]
    assert [question.id for question in order_by_data_set(mixed)] == ["0", "3", "6", "1", "4", "2", "5"]


# Baselines on the demo


@pytest.mark.parametrize("method", ["rag", "no-search"])
def test_a_baseline_never_searches(desk: Path, method: str) -> None:
    out = desk / method
    index = [] if method == "rag" else ["search.corpus=null"]  # no index has to be there for what never searches
    shown = command(
        *("eval", "--preset", "demo", "--data", "demo:dev", "--limit", "20", "--method", method, "--out", method),
        "--json", *index, cwd=desk,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    result = json.loads(shown.stdout)
    assert result["method"] == method and result["searches_per_question"] == 0 and result["no_search_rate"] == 1
    trajectories = [Trajectory.from_dict(record) for record in lines(out / "trajectories.jsonl")]
    if method == "no-search":
        assert result["retriever"] is None and result["retriever_recall"] is None
        assert all(not t.given for t in trajectories) and result["misses"]["no_search"] == 20 - 20 * result["em"]
        return
    assert result["retriever"].startswith("bm25") and result["misses"]["no_search"] == 0
    assert 0 < result["retriever_recall"] < 1, "one search finds the end of short chains only"
    for trajectory in trajectories:
        ((given),) = trajectory.given
        assert given.query == trajectory.question.question and len(given.passages) == 3
    records = lines(out / "questions.jsonl")
    assert all(record["given"] == 1 and record["queries"] == [] for record in records)


def test_a_line_that_was_cut_off_is_mended_in_both_files(tmp_path: Path) -> None:
    questions = [Question(str(n), "?", ["x"]) for n in range(3)]
    config = load_config("demo")
    folder = dev_folder(tmp_path / "e", config, questions, False)
    assert folder.start() == []
    folder.add([{"id": "0"}, {"id": "1"}], [{"t": 0}, {"t": 1}])
    os.truncate(tmp_path / "e" / "questions.jsonl", (tmp_path / "e" / "questions.jsonl").stat().st_size - 3)
    folder.release()
    assert dev_folder(tmp_path / "e", config, questions, True).start() == [{"id": "0"}]
    assert lines(tmp_path / "e" / "trajectories.jsonl") == [{"t": 0}]


def test_an_evaluation_that_came_and_went_since_the_folder_was_looked_at_is_not_taken_over(tmp_path: Path) -> None:
    questions, others = load_questions("demo:dev", "test", 3), load_questions("demo:dev", "test", 2)
    late = dev_folder(tmp_path / "e", load_config("demo"), others, True)
    first = dev_folder(tmp_path / "e", load_config("demo"), questions, False)
    first.start()
    first.release()
    with pytest.raises(UserError, match="holds another evaluation"):
        late.start()
    late.release()


def test_a_second_process_is_kept_from_an_evaluation_that_is_at_work(tmp_path: Path) -> None:
    config, questions = load_config("demo"), load_questions("demo:dev", "test", 3)
    first = dev_folder(tmp_path / "e", config, questions, False)
    first.start()
    second = dev_folder(tmp_path / "e", config, questions, True)
    with pytest.raises(UserError, match="another process is at the evaluation"):
        second.start()
    first.release()
    assert second.start() == []
