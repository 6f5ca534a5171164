"""A sweep's runs: one after another, or several at once, each in a process of a worker of its own.

A run that fails leaves its error beside its folder, and the others go on. A worker that dies, killed for memory say,
takes only the run with it that it was at.
"""

import json
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from searche1_lite.evaluate.sweep.compare import Outcome, compare
from searche1_lite.evaluate.sweep.plan import Plan, PlannedRun, common_stages
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.interrupt import Stop
from searche1_lite.runtime.jsonl import read_json
from searche1_lite.runtime.sealed_folder import write_atomically
from searche1_lite.train.run_folder import RunFolder
from searche1_lite.train.schedule import next_stage

_LOOK_AGAIN_S = 2.0
"""How often it is looked whether a run may begin that waits for a stage of another one, and whether someone wants to
end."""


def run_sweep(plan: Plan, folder: Path, jobs: int, say: Callable[[str], None], resume: bool = False) -> dict[str, Any]:
    """Does what is not done yet; returns what is also kept in `sweep.json`.

    Args:
        folder: holds `runs/VARIANT/seed-N/` (a run's folder each), `sweep.json`, and `shared/`, the shared answers.
        jobs: runs at the same time.
        say: receives a line about each run.
        resume: go on with the sweep that is there. It may have more seeds or variants by now; failed runs are tried
            again.

    Raises:
        UserError: if the folder holds a sweep and `resume` is not said, or runs with other settings, or if another
            process is at it.
        Interrupted: by Ctrl-C or SIGTERM; runs keep what was done.
    """
    if (folder / "sweep.json").is_file():
        if not resume:
            raise UserError(f"{folder} already holds a sweep; add --resume to go on with it, or choose another --out")
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no sweep; choose another --out")
    for planned in plan.runs:  # refuses runs with other settings, before anything is done
        RunFolder(folder / planned.folder, planned.config, resume=True)
    (folder / "shared").mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "shared" / "lock", blocking=False):
            stop = Stop()
            with stop.listening():
                return _do(_Sweep(plan, folder, say), folder, jobs, stop)
    except Timeout as error:
        raise UserError(f"another process is at the sweep in {folder}; wait for it, or choose another --out") from error


def _do(sweep: "_Sweep", folder: Path, jobs: int, stop: Stop) -> dict[str, Any]:
    sweep.keep()
    not_ours = multiprocessing.active_children()
    workers = [_worker(jobs) for _ in range(jobs)]
    at_work: dict[Future[None], tuple[PlannedRun, int]] = {}
    try:
        while True:
            stop.check()
            for slot in set(range(jobs)) - {slot for _, slot in at_work.values()}:
                if (planned := sweep.next_run()) is not None:
                    sweep.begin(planned)
                    work = (planned, folder, sweep.donor(planned), jobs > 1)
                    try:
                        task = workers[slot].submit(_run, *work)
                    except BrokenProcessPool:  # it died while it had nothing to do
                        workers[slot] = _worker(jobs)
                        task = workers[slot].submit(_run, *work)
                    at_work[task] = planned, slot
            if not at_work:
                return sweep.keep()
            ended, _ = wait(at_work, timeout=_LOOK_AGAIN_S, return_when=FIRST_COMPLETED)
            for task in ended:
                planned, slot = at_work.pop(task)
                error = task.exception()
                if error is not None:  # nobody knows what state it left its process in
                    workers[slot].shutdown()
                    workers[slot] = _worker(jobs)
                if isinstance(error, BrokenProcessPool):
                    error = UserError("its process died; the system's log may say why (out of memory?)")
                sweep.end(planned, error)
    finally:
        for process in multiprocessing.active_children():
            if process not in not_ours:
                process.terminate()  # a run that is at work keeps the steps done
        for worker in workers:
            worker.shutdown(cancel_futures=True)
        for planned, _ in at_work.values():
            sweep.interrupt(planned)


def check_room(plan: Plan, jobs: int) -> None:
    """Refuses more runs at once than the memory plan has room for."""
    if jobs == 1:
        return
    from searche1_lite.policy.capacity import predicted_peak

    shapes = {
        repr((run.config.model, run.config.protocol, run.config.engine, run.config.grpo, run.config.ofsd)): run
        for run in plan.runs
    }
    peaks = {str(run): predicted_peak(run.config) for run in shapes.values()}
    import torch

    if torch.cuda.is_available() and any(run.config.engine.shadow == "auto" for run in plan.runs):
        raise UserError(
            f"--jobs {jobs} on a GPU needs engine.shadow=always or never: with auto, a run decides by the memory that "
            "others have left it"
        )
    worst = max(peaks, key=lambda name: peaks[name][0])
    peak, capacity = peaks[worst]
    if (fitting := capacity // peak) < jobs:
        raise UserError(
            f"--jobs {jobs} does not fit: {worst} may need {peak / 2**30:.1f} of the {capacity / 2**30:.1f} GiB that "
            f"are free; use --jobs {max(1, fitting)}"
        )


def _worker(jobs: int) -> ProcessPoolExecutor:
    """One process that takes one run after another, so that Java is loaded once.

    It is forked from a server that has imported the training modules and nothing else: no CUDA, no Java, no threads.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["searche1_lite.train.rounds"])
    return ProcessPoolExecutor(1, context, _prepare, (jobs,))


def _prepare(jobs: int) -> None:
    """In a worker, before its first run."""
    from searche1_lite.runtime.quiet import quieten

    quieten()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the sweep too, which ends its workers
    threading.Thread(target=_die_with_the_sweep, daemon=True).start()
    if jobs > 1:
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() // jobs))


def _die_with_the_sweep() -> None:
    """Else a worker whose sweep was killed would go on with its run, beside the one that goes on with the sweep."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(planned: PlannedRun, sweep: Path, donor: tuple[Path, list[str]] | None, quiet: bool) -> None:
    """In a worker: one run, from where it is."""
    import gc

    import torch

    from searche1_lite.runtime.console import RichTasks
    from searche1_lite.train.rounds import run_training

    try:
        path = sweep / planned.folder
        folder = RunFolder(path, planned.config, resume=True, shared=sweep / "shared")
        if donor is not None:
            folder.start().adopt(*donor)
        run_training(planned.config, folder, RichTasks(quiet=quiet))
    except Exception as error:
        _error_file(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(_error_file(path), traceback.format_exc())
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(kind + (str(error).strip().splitlines() or ["no message"])[0]) from None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _error_file(run_folder: Path) -> Path:
    return run_folder.with_name(f"{run_folder.name}.error.txt")


def _stages(summary: Path) -> list[dict[str, Any]]:
    """A run's stages, with what a sweep reads of them.

    Raises:
        UserError: if the file cannot be read, or is not what a run writes.
    """
    remedy = "delete the run's folder, and --resume does it again"
    stages = read_json(summary, remedy, 1).get("stages")
    figures = ("em", "searches_per_question", "seconds")
    if not isinstance(stages, list) or not all(
        isinstance(stage, dict)
        and isinstance(stage.get("name"), str)
        and all(isinstance(stage.get(figure), int | float) for figure in figures)
        for stage in stages
    ):
        raise UserError(f"{summary} is not what a run writes; {remedy}", exit_code=1)
    return stages


class _Sweep:
    """How far the runs are."""

    def __init__(self, plan: Plan, folder: Path, say: Callable[[str], None]) -> None:
        self._plan, self._folder, self._say = plan, folder, say
        self._state = {index: "done" if self._is_done(run) else "waiting" for index, run in enumerate(plan.runs)}
        self._errors: dict[int, str] = {}
        self._began: dict[int, float] = {}

    def next_run(self) -> PlannedRun | None:
        """The next one to do: the first that has nothing to gain from a stage that a run at work is about to finish."""
        for index, planned in enumerate(self._plan.runs):
            if self._state[index] == "waiting" and not self._wait_for(index):
                return planned
        return None

    def _wait_for(self, index: int) -> bool:
        planned = self._plan.runs[index]
        if self._finished(planned):
            return False  # it has begun on its own
        for other_index, other in enumerate(self._plan.runs):
            if other_index == index or other.seed != planned.seed or self._state[other_index] != "running":
                continue
            trained = [name for name in common_stages(planned.config, other.config) if name != "base"]
            if set(trained) - set(self._finished(other)):
                return True
        return False

    def donor(self, planned: PlannedRun) -> tuple[Path, list[str]] | None:
        """The run that has the most finished stages in common with this one, and which; None if there is none."""
        found = []
        for other in self._plan.runs:
            if other is planned:
                continue
            there = self._finished(other)
            common = [name for name in common_stages(planned.config, other.config) if name in there]
            if common:
                found.append((self._folder / other.folder, common))
        return max(found, key=lambda item: len(item[1]), default=None)

    def _finished(self, planned: PlannedRun) -> list[str]:
        """The stages that a run has trained and evaluated, in their order."""
        path = self._folder / planned.folder / "summary.json"
        return [stage["name"] for stage in _stages(path)] if path.is_file() else []

    def _is_done(self, planned: PlannedRun) -> bool:
        path = self._folder / planned.folder / "summary.json"
        stages = _stages(path) if path.is_file() else []
        return bool(stages) and next_stage(planned.config, stages) is None

    def begin(self, planned: PlannedRun) -> None:
        index = self._plan.runs.index(planned)
        self._state[index], self._began[index] = "running", time.monotonic()
        _error_file(self._folder / planned.folder).unlink(missing_ok=True)
        self.keep()

    def end(self, planned: PlannedRun, error: BaseException | None) -> None:
        index = self._plan.runs.index(planned)
        self._state[index] = "done" if error is None else "failed"
        if error is not None:
            self._errors[index] = " ".join(str(error).split())
        result = self.keep()
        ended = sum(state in ("done", "failed") for state in self._state.values())
        row = next(row for row in result["variants"] if row["name"] == planned.variant)
        em = next(run["em"] for run in row["runs"] if run["seed"] == planned.seed)
        outcome = f"EM {em:.3f}" if error is None else f"failed: {self._errors[index]}"
        seconds = time.monotonic() - self._began[index]
        self._say(f"[{ended}/{len(self._state)}] {planned}: {outcome}, in {seconds:.0f} s")

    def interrupt(self, planned: PlannedRun) -> None:
        """Nobody is at this run any more; it can be gone on with."""
        self._state[self._plan.runs.index(planned)] = "waiting"
        self.keep()

    def keep(self) -> dict[str, Any]:
        """Compares what there is, and writes `sweep.json`."""
        plan = self._plan
        outcomes = [self._outcome(index) for index in range(len(plan.runs))]
        rows = compare(outcomes, list(plan.titles), plan.baseline, plan.titles)
        result = {"name": plan.name, "baseline": plan.baseline, "seeds": plan.seeds, "variants": rows}
        write_atomically(self._folder / "sweep.json", json.dumps(result, indent=2) + "\n")
        return result

    def _outcome(self, index: int) -> Outcome:
        planned, state = self._plan.runs[index], self._state[index]
        outcome = Outcome(planned.variant, planned.seed, state, str(planned.folder), self._errors.get(index))
        path = self._folder / planned.folder
        if state != "done":
            return outcome
        stages = _stages(path / "summary.json")
        outcome.em, outcome.searches = stages[-1]["em"], stages[-1]["searches_per_question"]
        outcome.seconds = round(sum(stage["seconds"] for stage in stages), 1)
        outcome.updates = sum(stage.get("steps", 0) for stage in stages)
        with (path / "trajectories" / f"{stages[-1]['name']}.evaluation.jsonl").open(encoding="utf-8") as file:
            records = map(json.loads, file)
            outcome.correct = {record["question"]["id"]: record["reward"] for record in records}
        return outcome
