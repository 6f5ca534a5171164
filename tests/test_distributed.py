"""Two processes, started by `accelerate launch`, come to what one does; one that is killed or stopped ends both."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from conftest import fresh_policy
from safetensors.torch import load_file
from transformers import TrainerState

from searche1_lite.config import load_config
from searche1_lite.runtime.console import RichTasks
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.ranks import share
from searche1_lite.train.processes import check_share
from searche1_lite.train.rounds import run_training
from searche1_lite.train.run_folder import RunFolder
from searche1_lite.train.stage_checkpoint import StageKeeper

SETTINGS = [
    "rounds=1",
    "engine.batch_size=4",
    "grpo.steps=3",
    "grpo.questions_per_step=4",
    "grpo.micro_batch_tokens=400",
    "ofsd.questions=14",
    "ofsd.batch_size=4",
    "ofsd.micro_batch_tokens=400",
    "data.evaluation_limit=11",  # not to be shared out evenly
    "checkpoint.every_steps=1",
    "logging.samples_every=1",
    "seed=3",
]

TOLERANCE = 2e-4
"""Of an adapter's weights: a tenth of what Adam moves one by in two updates, and far above what rounding does."""


DECISIONS = """
import errno
from pathlib import Path

import pytest, torch
from searche1_lite.config import Config
from searche1_lite.runtime.ranks import average_gradients, check_same, fail_together, from_first, gather, is_first
from searche1_lite.runtime.ranks import leave, local_main_first, rank
from searche1_lite.train.processes import join
from searche1_lite.runtime.errors import UserError
from searche1_lite.train.update_guard import UpdateGuard
from searche1_lite.runtime.interrupt import Interrupted, Stop

join(Config())
assert gather([rank()]) == [0, 1]

with pytest.raises(UserError, match="one is too long" if rank() else "process 1 has failed: one is too long") as failed:
    with fail_together(Stop()):
        if rank() == 1:
            raise UserError("one is too long")
assert failed.value.reported_elsewhere is (rank() == 0)

with pytest.raises(UserError, match="both fail") as failed, fail_together():
    raise UserError("both fail")
assert failed.value.reported_elsewhere is (rank() == 1)

order = []
with local_main_first():
    order.append("within")
    if rank() == 0:
        Path("made").write_text("by the first")
    assert Path("made").read_text() == "by the first"
with pytest.raises(UserError, match="no such corpus") as failed, local_main_first():
    assert is_first(), "the others do not begin"
    raise UserError("no such corpus")
assert failed.value.reported_elsewhere is (rank() == 1)

check_same({"seed": 0})
with pytest.raises(UserError, match="grpo.group_size is 5 in the first and 4 in process 1") as failed:
    check_same({"seed": 0, "grpo.group_size": 5 - rank()})
assert failed.value.reported_elsewhere is (rank() == 1)

with pytest.raises(UserError, match="no space left on the disk: full") as failed:
    from_first(lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space", "full")))
assert failed.value.reported_elsewhere is (rank() == 1)

stop = Stop()
stop.signum = 15 if rank() == 1 else None
with pytest.raises(Interrupted), fail_together(stop):
    stop.check()

with pytest.raises(UserError, match="only the first looks"):
    from_first(lambda: (_ for _ in ()).throw(UserError(f"only the first looks, {rank()} is it")))
assert from_first(lambda: rank()) == 0
assert from_first(lambda: (Path("a"), {"b": 0.1, "c": [None]})) == [Path("a"), {"b": 0.1, "c": [None]}]
with pytest.raises(TypeError, match="object is not sent"):
    gather([object()])

model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(2)) for _ in range(3)])
model[0].grad = torch.full((2,), 4.0 * rank())
if rank() == 1:
    model[1].grad = torch.ones(2)
average_gradients(model)
assert [None if p.grad is None else p.grad.tolist() for p in model] == [[2.0, 2.0], [0.5, 0.5], None]

guard = UpdateGuard("round1.grpo", "grpo.learning_rate")
if rank() == 1:
    guard.see("log-probs", torch.tensor([0.0, float("nan")]))
guard.on_pre_optimizer_step(None, type("State", (), {"global_step": 0}), None, model=model)
assert guard.reason == "log-probs" and guard.skipped == 1 and all(p.grad is None for p in model)
leave()
print(f"process {rank()} is done")
"""


@contextmanager
def launched(out: Path, *arguments: str, processes: int = 2) -> Iterator[subprocess.Popen[str]]:
    command = ("-m", "searche1_lite", "train", "--preset", "demo", "--out", str(out), *SETTINGS, *arguments)
    with launch(*command, processes=processes) as run:
        yield run


@contextmanager
def launch(*program: str, processes: int = 2) -> Iterator[subprocess.Popen[str]]:
    """So many processes of a program; what they say comes through one pipe."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"),
        *("--num_processes", str(processes), "--main_process_port", "0"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *program,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"}
    launcher = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    try:
        yield launcher
    finally:
        for process in [*psutil.Process(launcher.pid).children(recursive=True)] if launcher.poll() is None else []:
            process.kill()
        launcher.kill()
        launcher.wait()


def finish(launcher: subprocess.Popen[str]) -> str:
    return launcher.communicate(timeout=240)[0]


def signal_second(launcher: subprocess.Popen[str], line: str, signum: signal.Signals) -> str:
    """Sends a signal to the second process when `line` is told; all that is told from then on."""
    assert launcher.stdout is not None
    told = next((said for said in launcher.stdout if line in said), None)
    assert told is not None, f"it ended without {line!r}"
    processes = psutil.Process(launcher.pid).children()
    [second] = [process for process in processes if process.environ().get("RANK") == "1"]
    second.send_signal(signum)
    return finish(launcher)


def tree(folder: Path) -> dict[str, str]:
    """Everything below `folder`, and the checksum of what is a file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest()
        for path in folder.rglob("*")
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    """The same rollouts, token by token and in the same order; figures and weights to rounding."""
    for file in sorted((one / "trajectories").glob("*.jsonl")):
        if file.name.endswith(".kl.jsonl"):
            continue
        ours, theirs = lines(file), lines(other / "trajectories" / file.name)
        played = [[(t["question"]["id"], t["sample"], t["completion_ids"]) for t in found] for found in (ours, theirs)]
        assert played[0] == played[1], file.name
    steps, theirs = lines(one / "metrics.jsonl"), lines(other / "metrics.jsonl")
    assert len(steps) == len(theirs)
    for step, their in zip(steps, theirs, strict=True):
        for name in {"loss", "grad_norm", "kl", "reward", "em", "tokens", "skipped_groups", "searches"} & step.keys():
            assert their[name] == pytest.approx(step[name], rel=1e-3, abs=1e-6), (step["stage"], name)
    for stage in ("base", "round1.grpo", "round1.ofsd"):
        ours, theirs = (load_file(p / "checkpoints" / stage / "adapter_model.safetensors") for p in (one, other))
        for name, weights in ours.items():
            assert (weights - theirs[name]).abs().max() < TOLERANCE, (stage, name)
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (one, other))
    assert [stage["em"] for stage in ours["stages"]] == [stage["em"] for stage in theirs["stages"]]
    assert ours["stages"][2]["pairs"] == theirs["stages"][2]["pairs"] and ours["stages"][2]["pairs"]["pairs"] > 4


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as one process makes it."""
    path, config = tmp_path_factory.mktemp("alone") / "run", load_config("demo", None, SETTINGS)
    run_training(config, RunFolder(path, config, resume=False), RichTasks(quiet=True))
    return path


def test_two_processes_make_the_run_that_one_makes(alone: Path, tmp_path: Path) -> None:
    with launched(tmp_path / "run") as launcher:
        told = finish(launcher)
    assert launcher.returncode == 0, told
    assert_same_run(alone, tmp_path / "run")
    assert told.count("round1: GRPO: 3 in") == 1 and told.count("run: ") == 1, "one of them speaks"
    # The command line writes the report; beside that nothing is there but what one process writes.
    assert tree(tmp_path / "run").keys() == tree(alone).keys() | {"report.html"}


@pytest.mark.slow
def test_a_run_goes_on_after_one_process_was_killed_and_one_stopped_on_another_number_of_processes(
    alone: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    with launched(path) as launcher:
        told = signal_second(launcher, "round1.grpo, step 2", signal.SIGKILL)
    assert launcher.returncode not in (0, None)
    assert "error: another of the 2 processes is gone" in told and "--resume" in told
    assert (path / "checkpoints" / "round1.grpo.step-1").is_dir()
    assert not (path / "checkpoints" / "round1.grpo").exists()

    before = tree(path)
    with launched(path, "--resume", processes=3) as launcher:
        told = finish(launcher)
    said = [line for line in told.splitlines() if line.startswith("error:")]
    assert launcher.returncode not in (0, None) and len(said) == 1
    assert "grpo.questions_per_step=4" in said[0] and "multiple of 3" in said[0]
    assert tree(path) == before, "a number of processes that does not fit changes nothing"

    with launched(path, "--resume") as launcher:
        told = signal_second(launcher, "round1: teacher (privileged)", signal.SIGTERM)
    assert launcher.returncode not in (0, None)
    assert told.count("interrupted; finished work is kept") == 1 and "error:" not in told
    assert not (path / "checkpoints" / "round1.ofsd").exists()

    config = load_config("demo", None, SETTINGS)
    run_training(config, RunFolder(path, config, resume=True), RichTasks(quiet=True))
    assert_same_run(alone, path)


def test_what_could_come_out_differently_is_agreed_upon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "decisions.py").write_text(DECISIONS)
    monkeypatch.chdir(tmp_path)
    with launch(str(tmp_path / "decisions.py")) as launcher:
        told = finish(launcher)
    assert launcher.returncode == 0 and "process 0 is done" in told and "process 1 is done" in told, told
    assert told.count("this update is skipped") == 1


LATE = """
import sys, time
from searche1_lite.cli.main import main
from searche1_lite.runtime.ranks import rank

if rank() == 0:
    time.sleep(4)
main()
"""


def test_a_step_that_cannot_be_shared_out_is_refused_in_one_line_however_late_the_first_process_is(
    tmp_path: Path,
) -> None:
    (tmp_path / "late.py").write_text(LATE)
    arguments = ["train", "--preset", "demo", "--out", str(tmp_path / "run"), *SETTINGS, "grpo.questions_per_step=3"]
    with launch(str(tmp_path / "late.py"), *arguments) as launcher:
        told = finish(launcher)
    said = [line for line in told.splitlines() if line.startswith("error:")]
    assert launcher.returncode not in (0, None) and len(said) == 1
    assert "grpo.questions_per_step=3" in said[0] and "multiple of 2" in said[0]
    assert not (tmp_path / "run").exists()


def test_vllm_in_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    config = load_config("demo", None, ["engine.backend=vllm"])
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_share(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="engine.backend=vllm is for one process"):
        check_share(config)


REWARD = """
import sys
import searche1_lite as s1
from searche1_lite.runtime.ranks import rank

def picky(trajectory):
    return float("nan") if rank() == 1 else 0.0

s1.quieten()
s1.train_policy(s1.load_config("demo", overrides=sys.argv[2:]), sys.argv[1], reward=picky)
"""


def test_a_reward_that_fails_in_one_process_ends_both_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(REWARD)
    with launch(str(tmp_path / "own.py"), str(tmp_path / "run"), *SETTINGS, "data.evaluation_limit=4") as launcher:
        told = finish(launcher)
    assert launcher.returncode not in (0, None) and "picky" in told and "nan" in told
    assert "gloo" not in told and "is gone" not in told


def test_an_update_that_was_not_noted_is_not_kept_as_the_one_before(tmp_path: Path, tiny_policy_folder: Path) -> None:
    """A process may be lost between the two."""
    config = load_config("demo", None, SETTINGS)
    folder = RunFolder(tmp_path / "run", config, resume=False).start()
    model, _ = fresh_policy(tiny_policy_folder)
    keeper = StageKeeper(folder, "round1.grpo", model, every=0, state={"stages": []})
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    trainer = SimpleNamespace(
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer),
        state=TrainerState(global_step=2),
    )
    keeper.note(1)
    keeper.save(trainer)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    keeper.note(2)
    keeper.save(trainer)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["round1.grpo.step-2"]


@pytest.mark.parametrize("name", ["ddp", "multi_node"])
def test_accelerate_reads_the_shipped_files_and_leaves_the_precision_to_us(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    examples = Path(__file__).parent.parent / "examples" / "accelerate"
    settings = load_config_from_file(str(examples / f"{name}.yaml"))
    assert (settings.distributed_type, settings.mixed_precision) == ("MULTI_GPU", "no") and settings.num_processes > 1


@pytest.mark.parametrize("count", [0, 1, 7, 64])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_every_question_is_in_exactly_one_share(monkeypatch: pytest.MonkeyPatch, count: int, processes: int) -> None:
    things = list(range(count))
    shares: list[list[int]] = []
    for place in range(processes):
        told = {"RANK": place, "LOCAL_RANK": place, "WORLD_SIZE": processes, "MASTER_ADDR": "::1", "MASTER_PORT": 1}
        for name, value in told.items():
            monkeypatch.setenv(name, str(value))
        shares.append(things[share(count)])
    assert sum(shares, []) == things
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
