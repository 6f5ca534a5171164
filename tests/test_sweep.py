"""Whole sweeps on the demo, a step or two a stage, through the real command line."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from searche1_lite.cli.tables import sweep_table
from searche1_lite.evaluate.sweep.plan import load_plan
from searche1_lite.evaluate.sweep.runs import check_room, run_sweep
from searche1_lite.runtime.errors import UserError

SWEEP = """
preset: demo
settings:
  rounds: 1
  budget.updates: 2  # one of GRPO, and one of OFSD: three would come of its pairs
  grpo.steps: 1
  grpo.questions_per_step: 4
  ofsd.questions: 12
  ofsd.batch_size: 8
  data.evaluation_limit: 16
seeds: [1, 2]
baseline: grpo
variants:
  grpo: {title: GRPO only, ofsd.enabled: false}
  ofsd: {}
  plain: {ofsd.teacher_prompt: plain}
  hopeless: {protocol.max_prompt_tokens: 4}  # last: after a failure the next run gets a process of its own
"""
CONTRACT = {"name", "seeds", "em_mean", "em_ci95", "searches_mean", "em_diff", "p_value", "seconds"}


def words(*more: str, file: str = "mine.yaml") -> list[str]:
    return [sys.executable, "-m", "searche1_lite", "sweep", file, "--json", *more]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def sweep(folder: Path, *more: str, file: str = "mine.yaml") -> subprocess.CompletedProcess[str]:
    return subprocess.run(words(*more, file=file), capture_output=True, text=True, cwd=folder, env=environment())


def untimed(result: dict[str, Any]) -> dict[str, Any]:
    """Without what a clock says."""
    text = re.sub(r'"seconds": [0-9.]+', '"seconds": 0', json.dumps(result))
    return json.loads(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "mine.yaml").write_text(SWEEP)
    shown = sweep(folder, "--out", "whole")
    assert shown.returncode == 1, "one variant failed"
    assert "Traceback" not in shown.stderr
    assert json.loads(shown.stdout) == json.loads((folder / "whole" / "sweep.json").read_text())
    (folder / "stderr.txt").write_text(shown.stderr)
    return folder


@pytest.fixture
def whole(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "whole" / "sweep.json").read_text())


def test_every_variant_stands_beside_the_baseline(folder: Path, whole: dict[str, Any]) -> None:
    assert whole["baseline"] == "grpo" and [row["name"] for row in whole["variants"]] == [
        "grpo", "ofsd", "plain", "hopeless",
    ]  # fmt: skip
    for row in whole["variants"]:
        assert row.keys() >= CONTRACT
    for row in whole["variants"][:3]:
        ems = []
        for run in row["runs"]:
            stages = json.loads((folder / "whole" / run["folder"] / "summary.json").read_text())["stages"]
            assert run["em"] == stages[-1]["em"] and run["updates"] == sum(stage.get("steps", 0) for stage in stages)
            ems.append(run["em"])
            assert run["updates"] == (1 if row["name"] == "grpo" else 2), "the budget ends it within the stage"
        assert row["seeds"] == [1, 2] and row["em_mean"] == pytest.approx(sum(ems) / 2)
        assert 0 <= row["em_ci95"][0] <= row["em_mean"] <= row["em_ci95"][1] <= 1
    plain = whole["variants"][2]
    assert (plain["em_diff"], plain["p_value"]) == (0.0, 1.0), "the control's loss is zero: it stays where GRPO left it"


def test_a_run_that_fails_says_why_and_does_not_stop_the_others(folder: Path, whole: dict[str, Any]) -> None:
    hopeless = whole["variants"][3]
    assert [run["state"] for run in hopeless["runs"]] == ["failed", "failed"] and hopeless["em_mean"] is None
    for run in hopeless["runs"]:
        assert "protocol.max_prompt_tokens=4" in run["error"]
        told = (folder / "whole" / f"{run['folder']}.error.txt").read_text()
        assert "UserError" in told and "Traceback" in told
    assert [run["state"] for run in whole["variants"][0]["runs"]] == ["done", "done"], "the second came after a failure"


def test_what_runs_have_in_common_is_computed_once(folder: Path) -> None:
    lines = (folder / "stderr.txt").read_text().splitlines()
    for task in ("base: evaluate", "round1: GRPO", "round1.grpo: evaluate", "round1: roll out"):
        assert sum(line.startswith(f"{task}: ") for line in lines) == 2, f"{task}: once a seed"
    for seed in (1, 2):
        donor, taker = (folder / "whole" / "runs" / name / f"seed-{seed}" for name in ("grpo", "plain"))
        for stage in ("base", "round1.grpo"):
            weights = [path / "checkpoints" / stage / "adapter_model.safetensors" for path in (donor, taker)]
            assert weights[0].read_bytes() == weights[1].read_bytes()
        steps = [json.loads(line) for line in (taker / "metrics.jsonl").read_text().splitlines()]
        assert [r["stage"] for r in steps][:3] == ["evaluate", "grpo", "evaluate"], "its curves are whole"


@pytest.mark.slow
def test_a_killed_sweep_goes_on_without_repeating_what_is_done_and_ends_the_same(folder: Path, whole) -> None:
    killed = folder / "killed"
    with subprocess.Popen(
        words("--out", "killed"), stderr=subprocess.PIPE, text=True, cwd=folder, env=environment()
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("[2/8]"):
                workers = descendants(process.pid)
                with pytest.raises(UserError, match="another process is at the sweep"):
                    run_sweep(load_plan(folder / "mine.yaml"), killed, 1, print, resume=True)
                process.kill()
                break
    assert workers
    for worker in workers:  # else it would write to the run that is gone on with
        wait_for_end(worker)
    before = {path: path.stat().st_mtime_ns for path in killed.glob("runs/*/*/summary.json")}
    finished = [path for path in before if path.parts[-3:-1] in (("grpo", "seed-1"), ("ofsd", "seed-1"))]
    assert len(finished) == 2
    refused = sweep(folder, "--out", "killed")
    assert refused.returncode == 2 and "--resume" in refused.stderr
    resumed = sweep(folder, "--out", "killed", "--resume")
    assert untimed(json.loads(resumed.stdout)) == untimed(whole)
    assert all(path.stat().st_mtime_ns == before[path] for path in finished)
    assert resumed.stderr.count("round1: GRPO") == 1, "seed 2's; seed 1's was done"


def children(pid: int) -> list[int]:
    """Processes that have it for their parent."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def descendants(pid: int) -> list[int]:
    return [process for child in children(pid) for process in (child, *descendants(child))]


def wait_for_end(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    import select

    ready, _, _ = select.select([descriptor], [], [], 60)
    os.close(descriptor)
    assert ready, f"process {pid} has outlived its sweep"


@pytest.mark.slow
def test_two_at_a_time_give_the_same_figures_and_workers_that_die_take_no_other_run_with_them(
    folder: Path, whole
) -> None:
    (folder / "fewer.yaml").write_text(SWEEP.partition("  plain: ")[0])
    with subprocess.Popen(
        words("--out", "two", "--jobs", "2", file="fewer.yaml"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment(),
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        told = []
        for line in process.stderr:
            told.append(line)
            if line.startswith("[1/4]"):
                # One has just ended its run and may have none yet; the other is at one.
                for server in children(process.pid):
                    for pid in children(server):  # of the fork server
                        os.kill(pid, signal.SIGKILL)
        result = json.loads(process.stdout.read())
    assert process.returncode == 1
    died = [run for row in result["variants"] for run in row["runs"] if "its process died" in (run["error"] or "")]
    assert 1 <= len(died) <= 2 and all(run["state"] == "failed" for run in died)
    runs = [run for row in result["variants"] for run in row["runs"]]
    assert all(run["state"] == "done" for run in runs if run not in died), (runs, told)
    resumed = json.loads(sweep(folder, "--out", "two", "--jobs", "2", "--resume", file="fewer.yaml").stdout)
    for one, other in zip(resumed["variants"], whole["variants"], strict=False):
        assert all(one[key] == other[key] for key in CONTRACT - {"seconds"})
        assert [run["em"] for run in one["runs"]] == [run["em"] for run in other["runs"]]


def test_sigterm_ends_a_sweep_with_the_steps_done_kept_and_a_line_that_says_how_to_go_on(tmp_path: Path) -> None:
    slow = "settings: {rounds: 1, ofsd.enabled: false, data.evaluation_limit: 8, checkpoint.every_steps: 0}"
    (tmp_path / "mine.yaml").write_text(
        f"preset: demo\n{slow}\nvariants: {{a: {{grpo.steps: 500}}, b: {{grpo.steps: 501}}}}"
    )
    run = tmp_path / "out" / "runs" / "a" / "seed-0"
    with subprocess.Popen(
        words("--out", "out"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment(),
    ) as process:
        metrics = run / "metrics.jsonl"
        while process.poll() is None and (not metrics.is_file() or metrics.read_text().count('"grpo"') < 2):
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=120)
    assert process.returncode == 143
    assert told.rstrip().endswith("interrupted; finished work is kept, continue with --resume --out out")
    assert list((run / "checkpoints").glob("round1.grpo.step-*")), "the steps of the stage are kept too"
    states = [row["runs"][0]["state"] for row in json.loads((tmp_path / "out" / "sweep.json").read_text())["variants"]]
    assert states == ["waiting", "waiting"]


def test_more_runs_at_once_than_memory_are_refused(folder: Path) -> None:
    plan = load_plan(folder / "mine.yaml")
    check_room(plan, 1)
    with pytest.raises(UserError, match=r"--jobs 100000 does not fit: .* use --jobs [1-9]"):
        check_room(plan, 100_000)


def test_a_sweep_may_grow_but_not_change(folder: Path) -> None:
    plan = load_plan(folder / "mine.yaml", ["grpo.steps=2"])
    with pytest.raises(UserError, match=r"grpo.steps \(1 there, 2 now\)"):
        run_sweep(plan, folder / "whole", 1, print, resume=True)
    (folder / "other").mkdir()
    (folder / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no sweep"):
        run_sweep(load_plan(folder / "mine.yaml"), folder / "other", 1, print)
    assert [path.name for path in (folder / "other").iterdir()] == ["notes.txt"]


def test_the_table_says_what_is_missing_and_fits_a_terminal(whole: dict[str, Any]) -> None:
    shown = {}
    for width in (80, 120):
        console = Console(file=io.StringIO(), width=width)
        console.print(sweep_table(whole))
        shown[width] = console.file.getvalue()
    assert "GRPO only (baseline)" in shown[120] and "hopeless (0 of 2 runs, 2 failed)" in shown[120]
    assert max(map(len, shown[80].splitlines())) <= 80 and "baseline" in shown[80]
    for row in whole["variants"]:
        assert row["em_mean"] is None or all(f"{row['em_mean']:.3f}" in text for text in shown.values())
