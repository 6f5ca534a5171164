"""A run's folder: its files, how they are written, and how a run resumes from them.

    checkpoints/round1.grpo           the policy after a stage; stages are seeded by themselves and need no more
    checkpoints/round2.ofsd.step-20   within a stage: also optimizer, random states, and the policy of its start

Both are adapter folders (safetensors), sealed with checksums (`runtime/sealed_folder.py`).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from searche1_lite.config import Config, dump_config, load_config, what_counts
from searche1_lite.policy.adapter_folder import no_adapter
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.progress import say_on_stderr
from searche1_lite.runtime.ranks import is_first, on_first_process
from searche1_lite.runtime.sealed_folder import (
    SEAL,
    DamagedError,
    cut,
    fingerprint,
    read_sealed,
    recover_sealed,
    remove_sealed,
    sync,
    update_sealed,
    write_atomically,
    write_sealed,
)
from searche1_lite.train.checkpoint_schema import misfit
from searche1_lite.train.schedule import best_stage

if TYPE_CHECKING:
    from peft import PeftModel


KEPT_WITHIN = 2
"""Checkpoints within a stage that are kept, in case the last one is damaged."""

_LOCK = ".lock"


class RunFolder:
    """One run on disk.

    Args:
        path: the folder; looked at now, and made by `start`.
        config: the run's settings.
        resume: go on with the run that is there, if it has the same settings.
        shared: a folder of answers that several runs share; it must be there.

    Raises:
        UserError: if the folder holds another run, or anything else; nothing is overwritten.
    """

    def __init__(self, path: Path, config: Config, resume: bool, shared: Path | None = None) -> None:
        self.path, self._shared = path, shared
        self.summary_path = path / "summary.json"
        self._config, self._resume = config, resume
        self._lock: FileLock | None = None
        self._look()

    def _look(self) -> None:
        """Refuses a folder with another run or other files."""
        path, existing = self.path, self.path / "config.yaml"
        if existing.is_file():
            if not self._resume:
                raise UserError(f"{path} already holds a run; add --resume to go on with it, or choose another --out")
            _check_same(_read_config(existing), self._config, path)
        elif path.is_dir() and any(item.name != _LOCK for item in path.iterdir()):
            raise UserError(f"{path} is not empty and holds no run; choose another --out")
        elif not (nearest := next(place for place in (path, *path.absolute().parents) if place.exists())).is_dir():
            raise UserError(f"cannot write to the run's folder {path}: {nearest} is a file; choose another --out")

    def claim(self) -> None:
        """Locks the run that exists against other processes until `release`; `start` does it too.

        Raises:
            UserError: if another process has it.
        """
        if self._lock is not None or not self.path.is_dir() or not is_first():
            return
        lock = FileLock(self.path / _LOCK, blocking=False)
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(
                f"another process is at the run in {self.path}; wait for it, or choose another --out"
            ) from error
        self._lock = lock

    def release(self) -> None:
        """Unlocks it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def start(self) -> "RunFolder":
        """Creates what is missing. Called when the run has loaded everything, so that earlier errors leave no trace.

        Raises:
            UserError: also if another run has been begun there in the meantime.
        """
        self._make()
        return self

    @on_first_process
    def _make(self) -> None:
        try:
            path = self.path.absolute()
            made = [place for place in (path, *path.parents) if not place.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            for place in made:
                sync(place.parent)
            self.claim()
            self._look()  # again: another process may have been at it, and have ended, since
            self._resume = True  # what is there from now on is its own
            (self.path / "checkpoints").mkdir(exist_ok=True)
            (self.path / "trajectories").mkdir(exist_ok=True)
            recover_sealed(self.path / "checkpoints")
            for left in (self.path / "checkpoints").glob(".*"):  # by a process that died over it
                shutil.rmtree(left, ignore_errors=True)
            if not (self.path / "config.yaml").is_file():
                write_atomically(self.path / "config.yaml", dump_config(self._config))
        except OSError as error:
            raise UserError(
                f"cannot write to the run's folder {self.path}: {error.strerror}; choose another --out"
            ) from error

    @on_first_process
    def log(self, record: dict[str, Any]) -> None:
        """Adds one line to `metrics.jsonl`."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    @on_first_process
    def metrics_size(self) -> int:
        """Bytes in `metrics.jsonl`, for a later `rewind`."""
        return _size(self.path / "metrics.jsonl")

    @on_first_process
    def rewind(self, size: int) -> None:
        """Cuts `metrics.jsonl` to `size` bytes: later steps are repeated. Reports if there are fewer."""
        _rewind(self.path / "metrics.jsonl", size)

    @on_first_process
    def trajectories_size(self, name: str) -> int:
        """Bytes in `trajectories/NAME.jsonl`."""
        return _size(self.path / "trajectories" / f"{name}.jsonl")

    @on_first_process
    def rewind_trajectories(self, name: str, size: int) -> None:
        """`rewind` of `trajectories/NAME.jsonl`."""
        _rewind(self.path / "trajectories" / f"{name}.jsonl", size)

    @on_first_process
    def save_trajectories(self, name: str, records: list[dict[str, Any]]) -> None:
        """Writes or replaces `trajectories/NAME.jsonl`."""
        write_atomically(self.path / "trajectories" / f"{name}.jsonl", "".join(json.dumps(r) + "\n" for r in records))

    @on_first_process
    def add_trajectories(self, name: str, records: list[dict[str, Any]]) -> None:
        """Adds to `trajectories/NAME.jsonl`."""
        with (self.path / "trajectories" / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    @on_first_process
    def keep_answers(self, name: str, key: str, records: list[dict[str, Any]], seconds: float) -> None:
        """Writes `trajectories/NAME.jsonl` under a `key` that identifies what the answers depend on."""
        answers, note = self._answers(name)
        note.unlink(missing_ok=True)  # it would be about other answers
        self.save_trajectories(name, records)
        write_atomically(note, json.dumps({"key": key, "seconds": seconds, **fingerprint(answers)}) + "\n")
        for file in self._part(name):
            file.unlink(missing_ok=True)
        if self._shared is not None:
            _copy(self.path / "trajectories" / f"{name}.jsonl", self._shared / f"{key}.jsonl")
            _copy(note, self._shared / f"{key}.key.json")

    @on_first_process
    def kept_answers(self, name: str, key: str) -> tuple[list[dict[str, Any]], float] | None:
        """The answers under `key` and their seconds: this run's, or shared ones, which are copied."""
        answers, note = self._answers(name)
        if (found := _read_answers(answers, note, key)) is None and self._shared is not None:
            if not (self._shared / f"{key}.key.json").is_file():
                return None
            note.unlink(missing_ok=True)
            _copy(self._shared / f"{key}.jsonl", answers)
            _copy(self._shared / f"{key}.key.json", note)
            found = _read_answers(answers, note, key)
        return found

    @on_first_process
    def add_answers(self, name: str, key: str, records: list[dict[str, Any]], seconds: float) -> None:
        """Saves the next part of what `keep_answers` will save; `seconds` is that of all parts so far."""
        answers, note = self._part(name)
        if _read_answers(answers, note, key) is None:
            answers.unlink(missing_ok=True)
        else:
            cut(answers, json.loads(note.read_text(encoding="utf-8"))["bytes"])
        with answers.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        write_atomically(note, json.dumps({"key": key, "seconds": seconds, **fingerprint(answers)}) + "\n")

    @on_first_process
    def begun_answers(self, name: str, key: str) -> tuple[list[dict[str, Any]], float]:
        """The saved parts under `key`, and their seconds."""
        return _read_answers(*self._part(name), key) or ([], 0.0)

    def _answers(self, name: str) -> tuple[Path, Path]:
        """The files of complete answers and of their key."""
        return self.path / "trajectories" / f"{name}.jsonl", self.path / "trajectories" / f"{name}.key.json"

    def _part(self, name: str) -> tuple[Path, Path]:
        """The files of partial answers and of their key."""
        return self.path / "trajectories" / f"{name}.part", self.path / "trajectories" / f"{name}.part.json"

    def adopt(self, donor: Path, stages: Sequence[str]) -> None:
        """Copies finished `stages` of another run with the same settings and seed, in their order.

        Does nothing in a run with a checkpoint of its own; an interrupted copy is continued.
        """
        there = [name for name in stages if (donor / "checkpoints" / name).is_dir()]  # not all, with `keep_stages`
        if (latest := self.latest()) is not None:
            path, state = latest
            if path.name not in there or state != _state_or_none(donor / "checkpoints" / path.name):
                return  # the same stage, trained by both, took other times
            there = there[there.index(path.name) + 1 :]
        if not there:
            return
        stages = stages[: stages.index(there[-1]) + 1]
        try:
            state = _read_state(donor / "checkpoints" / stages[-1])
        except DamagedError as error:
            say_on_stderr(f"{error}; {self.path} does these stages itself")
            return
        with (donor / "metrics.jsonl").open("rb") as file:
            write_atomically(self.path / "metrics.jsonl", file.read(state["metrics_size"]).decode("utf-8"))
        for path in (donor / "trajectories").iterdir():
            if path.name.startswith(tuple(f"{name}." for name in stages)):
                _copy(path, self.path / "trajectories" / path.name)
        for name in there:  # in their order: killed in between, it goes on from what it has, and lacks none before that
            final = self.path / "checkpoints" / name
            staging = final.with_name(f".{name}.staging")
            shutil.rmtree(staging, ignore_errors=True)
            try:
                shutil.copytree(donor / "checkpoints" / name, staging)
            except OSError:
                if (donor / "checkpoints" / name).is_dir():
                    raise
                shutil.rmtree(staging, ignore_errors=True)
                continue  # the donor, which goes on with its own stages, has just removed it
            for path in [*staging.iterdir(), staging]:
                sync(path)
            staging.rename(final)

    @on_first_process
    def save_summary(self, summary: dict[str, Any]) -> None:
        write_atomically(self.summary_path, json.dumps(summary, indent=2) + "\n")

    @on_first_process
    def save_checkpoint(self, name: str, model: "PeftModel", state: dict[str, Any]) -> None:
        """Saves the adapter after stage `name` with the run's state, and drops the checkpoints within that stage."""
        from searche1_lite.policy.adapter import save_adapter

        final = self.path / "checkpoints" / name
        write_sealed(final, lambda folder: save_adapter(model, folder), state)
        _check_written(final)  # it is good: then others may go
        self.drop_within(name)

    @on_first_process
    def save_within(self, name: str, step: int, write: Callable[[Path], None], state: dict[str, Any]) -> None:
        """Saves what `write` puts into a folder, after `step` updates of stage `name`; the last few are kept."""
        final = self.path / "checkpoints" / f"{name}.step-{step}"
        write_sealed(final, write, state)
        _check_written(final)
        earlier = [path for number, path in self._within(name) if number < step]
        for path in earlier[: -(KEPT_WITHIN - 1)]:
            remove_sealed(path)

    @on_first_process
    def drop_within(self, name: str) -> None:
        """Drops the checkpoints within stage `name`."""
        for _, path in self._within(name):
            remove_sealed(path)

    def _within(self, name: str) -> list[tuple[int, Path]]:
        """Steps and folders of the checkpoints within stage `name`, in ascending order."""
        start = f"{name}.step-"
        numbers = ((path.name.removeprefix(start), path) for path in (self.path / "checkpoints").glob("[!.]*"))
        return sorted((int(number), path) for number, path in numbers if number.isdecimal())

    @on_first_process
    def update_checkpoint(self, name: str, state: dict[str, Any]) -> None:
        """Replaces the state of a stage's checkpoint, and removes earlier ones by `checkpoint.keep_stages`."""
        update_sealed(self.path / "checkpoints" / name, state)
        _check_written(self.path / "checkpoints" / name)
        self.drop_within(name)  # a kill may have come between the stage's own and this
        keep, stages = self._config.checkpoint.keep_stages, state["stages"]
        if keep:
            kept = {stage["name"] for stage in stages[-keep:]} | {best_stage(stages)}
            for stage in stages:
                path = self.path / "checkpoints" / stage["name"]
                if stage["name"] not in kept and path.is_dir():
                    remove_sealed(path)

    @on_first_process
    def is_whole(self, name: str) -> bool:
        """Whether stage `name` has an undamaged checkpoint."""
        return _state_or_none(self.path / "checkpoints" / name) is not None

    @on_first_process
    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The furthest undamaged checkpoint and its state; None in a fresh folder. Damaged ones are reported.

        Raises:
            UserError: if all are damaged.
        """
        damaged: list[str] = []
        found: list[tuple[tuple[int, int], Path]] = []
        # A folder that begins with a dot is the staging of a save that was interrupted.
        for path in sorted((self.path / "checkpoints").glob("[!.]*")):
            try:
                state = _read_state(path, files=False)
                step = state["within"]["step"] if "within" in state else 0
                found.append(((len(state["stages"]) + ("unevaluated" in state), step), path))
            except DamagedError as error:
                damaged.append(str(error))
        for _, path in sorted(found, reverse=True):
            try:
                state = _read_state(path)
            except DamagedError as error:
                damaged.append(str(error))
                continue
            for fault in damaged:
                say_on_stderr(f"{fault}; going on from {path.name}, the last whole checkpoint")
            return path, state
        if damaged:
            raise UserError(
                f"no checkpoint in {self.path / 'checkpoints'} is whole: {damaged[0]}; put it back, or choose another "
                "--out to begin again",
                exit_code=1,
            )
        return None


def check_adapter_folder(folder: Path) -> None:
    """Refuses a folder without an adapter, or a damaged checkpoint, before the model is loaded."""
    if not (folder / "adapter_config.json").is_file():
        raise no_adapter(folder)
    if (folder / SEAL).is_file():
        try:
            read_sealed(folder)
        except DamagedError as error:
            raise UserError(f"{error}; give another checkpoint", exit_code=1) from error


def _copy(source: Path, to: Path) -> None:
    """An atomic copy; a hard link where possible.

    A run's complete files are never changed in place; `cut` breaks the link first.
    """
    staging = to.with_name(f".{to.name}.{os.getpid()}.staging")
    staging.unlink(missing_ok=True)
    try:
        os.link(source, staging)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, staging)
        sync(staging)
    staging.replace(to)
    staging.unlink(missing_ok=True)  # it is left where both were the same file already


def _check_written(folder: Path) -> None:
    """Reads back a checkpoint that was just written."""
    try:
        read_sealed(folder)
    except DamagedError as error:
        raise UserError(
            f"{error} just now: the disk does not keep what it is given; what was kept before is there", exit_code=1
        ) from error


def _read_answers(answers: Path, note: Path, key: str) -> tuple[list[dict[str, Any]], float] | None:
    """The answers and seconds if the note has this key and the checksum matches; else None, with a notice."""
    try:
        kept = json.loads(note.read_text(encoding="utf-8"))
        if kept["key"] != key:
            return None
        with answers.open("rb") as file:
            text = file.read(kept["bytes"])
        if hashlib.sha256(text).hexdigest() != kept["sha256"]:
            say_on_stderr(f"{answers} has changed since it was written (its checksum differs); it is made again")
            return None
        return [json.loads(line) for line in text.splitlines()], kept["seconds"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _read_state(folder: Path, files: bool = True) -> dict[str, Any]:
    """`read_sealed`; a state that no run can resume from counts as damaged."""
    state = read_sealed(folder, files)
    if (wrong := misfit(state)) is not None:
        raise DamagedError(f"{folder / SEAL} does not fit this version ({wrong} is of another form)")
    return state


def _state_or_none(folder: Path) -> dict[str, Any] | None:
    """The state of an undamaged checkpoint, or None."""
    try:
        return _read_state(folder)
    except DamagedError:
        return None


def _rewind(path: Path, size: int) -> None:
    if (there := _size(path)) < size:
        say_on_stderr(
            f"{path} has lost {size - there} of {size} bytes, so lines are missing from the report; training goes on "
            "without them"
        )
        size = path.read_bytes().rfind(b"\n") + 1 if there else 0  # what follows would be added to half a line
    cut(path, size)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _read_config(path: Path) -> Config:
    try:
        return load_config(file=path)
    except UserError as error:
        raise UserError(f"{path} does not fit this version ({error}); choose another --out") from error


def _check_same(saved: Config, asked: Config, path: Path) -> None:
    ours, theirs = what_counts(saved), what_counts(asked)
    different = [key for key in ours if ours[key] != theirs[key]]
    if different:
        shown = ", ".join(f"{key} ({ours[key]!r} there, {theirs[key]!r} now)" for key in different[:3])
        raise UserError(f"{path} holds a run with other settings: {shown}; use those, or choose another --out")
