"""A run's folder: what is in it, how it is written, and how a run goes on from it.

Checkpoints are written to a staging folder, synced and renamed, so one that is there is complete. A stage's checkpoint
is its adapter (safetensors) and `state.json`: every stage is seeded on its own, so nothing else is needed to go on.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searche1_lite.config import Config, dump_config, flatten, load_config
from searche1_lite.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel


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
        existing = path / "config.yaml"
        if existing.is_file():
            if not resume:
                raise UserError(f"{path} already holds a run; add --resume to go on with it, or choose another --out")
            _check_same(_read_config(existing), config, path)
        elif path.is_dir() and any(path.iterdir()):
            raise UserError(f"{path} is not empty and holds no run; choose another --out")
        elif not (nearest := next(place for place in (path, *path.absolute().parents) if place.exists())).is_dir():
            raise UserError(f"cannot write to the run's folder {path}: {nearest} is a file; choose another --out")
        self._config = config

    def start(self) -> "RunFolder":
        """Makes what is not there yet. Called when all a run needs is loaded: what fails before leaves no trace."""
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            (self.path / "trajectories").mkdir(exist_ok=True)
            if not (self.path / "config.yaml").is_file():
                write_atomically(self.path / "config.yaml", dump_config(self._config))
        except OSError as error:
            raise UserError(
                f"cannot write to the run's folder {self.path}: {error.strerror}; choose another --out"
            ) from error
        return self

    def log(self, record: dict[str, Any]) -> None:
        """Adds one line to `metrics.jsonl`."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def metrics_size(self) -> int:
        """Bytes in `metrics.jsonl`; a checkpoint keeps it, for `rewind`."""
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if path.is_file() else 0

    def rewind(self, size: int) -> None:
        """Cuts `metrics.jsonl` to `size` bytes: what it tells of later steps is about to be done again."""
        if self.metrics_size() > size:
            os.truncate(self.path / "metrics.jsonl", size)

    def save_trajectories(self, name: str, records: list[dict[str, Any]]) -> None:
        """Writes `trajectories/NAME.jsonl`, over an earlier one."""
        write_atomically(self.path / "trajectories" / f"{name}.jsonl", "".join(json.dumps(r) + "\n" for r in records))

    def add_trajectories(self, name: str, records: list[dict[str, Any]]) -> None:
        """Adds to `trajectories/NAME.jsonl`."""
        with (self.path / "trajectories" / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def keep_answers(self, name: str, key: str, records: list[dict[str, Any]], seconds: float) -> None:
        """Writes `trajectories/NAME.jsonl`, to be found again under `key`, which tells what the answers depend on."""
        note = self.path / "trajectories" / f"{name}.key.json"
        note.unlink(missing_ok=True)  # it would be about other answers
        self.save_trajectories(name, records)
        write_atomically(note, json.dumps({"key": key, "seconds": seconds}) + "\n")
        if self._shared is not None:
            _copy(self.path / "trajectories" / f"{name}.jsonl", self._shared / f"{key}.jsonl")
            _copy(note, self._shared / f"{key}.key.json")

    def kept_answers(self, name: str, key: str) -> tuple[list[dict[str, Any]], float] | None:
        """The answers kept under `key` and their seconds: this run's, else shared ones, which become its own."""
        answers, note = (self.path / "trajectories" / f"{name}.{kind}" for kind in ("jsonl", "key.json"))
        kept = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {"key": None}
        if kept["key"] != key:
            if self._shared is None or not (self._shared / f"{key}.key.json").is_file():
                return None
            note.unlink(missing_ok=True)
            _copy(self._shared / f"{key}.jsonl", answers)
            _copy(self._shared / f"{key}.key.json", note)
            kept = json.loads(note.read_text(encoding="utf-8"))
        with answers.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file], kept["seconds"]

    def adopt(self, donor: Path, stages: Sequence[str]) -> None:
        """Takes over finished `stages` of another run, in their order: by settings and seed they are this run's too.

        Does nothing in a run that has a checkpoint of its own.
        """
        if not stages or self.latest() is not None:
            return
        state = json.loads((donor / "checkpoints" / stages[-1] / "state.json").read_text(encoding="utf-8"))
        with (donor / "metrics.jsonl").open("rb") as file:
            write_atomically(self.path / "metrics.jsonl", file.read(state["metrics_size"]).decode("utf-8"))
        for file in (donor / "trajectories").iterdir():
            if file.name.startswith(tuple(f"{name}." for name in stages)):
                _copy(file, self.path / "trajectories" / file.name)
        for name in reversed(stages):  # the furthest first: whatever is there then is complete
            final = self.path / "checkpoints" / name
            staging = final.with_name(f".{name}.staging")
            if not (donor / "checkpoints" / name).is_dir():
                continue  # an earlier one, which nothing needs
            shutil.rmtree(staging, ignore_errors=True)
            shutil.copytree(donor / "checkpoints" / name, staging)
            for file in [*staging.iterdir(), staging]:
                _sync(file)
            staging.rename(final)

    def save_summary(self, summary: dict[str, Any]) -> None:
        write_atomically(self.summary_path, json.dumps(summary, indent=2) + "\n")

    def save_checkpoint(self, name: str, model: "PeftModel", state: dict[str, Any]) -> None:
        """The adapter as it stands after stage `name`, and where the run is: `stages`, and `unevaluated` if need be."""
        from searche1_lite.model import save_adapter

        final = self.path / "checkpoints" / name
        staging = final.with_name(f".{name}.staging")
        shutil.rmtree(staging, ignore_errors=True)
        save_adapter(model, staging)
        (staging / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        for file in [*staging.iterdir(), staging]:
            _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        staging.rename(final)
        _sync(final.parent)

    def update_checkpoint(self, name: str, state: dict[str, Any]) -> None:
        """Replaces the state of a checkpoint that is there."""
        write_atomically(self.path / "checkpoints" / name / "state.json", json.dumps(state, indent=2) + "\n")

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint that is furthest in the run, and its state; None in a fresh folder."""
        found: dict[int, tuple[Path, dict[str, Any]]] = {}
        # A folder that begins with a dot is the staging of a save that was interrupted.
        for path in (self.path / "checkpoints").glob("[!.]*/state.json"):
            state = json.loads(path.read_text(encoding="utf-8"))
            found[len(state["stages"]) + ("unevaluated" in state)] = path.parent, state
        return found[max(found)] if found else None


def check_adapter_folder(folder: Path) -> None:
    """Refuses a folder without an adapter, before the model is loaded for it."""
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds no adapter (no adapter_config.json); give a folder written by `train`")


def _copy(source: Path, to: Path) -> None:
    """A copy that is there whole or not at all, whoever else writes the same one; where possible it takes no room.

    None of a run's files is changed in place once it is complete, so both may be the same one.
    """
    staging = to.with_name(f".{to.name}.{os.getpid()}.staging")
    staging.unlink(missing_ok=True)
    try:
        os.link(source, staging)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, staging)
        _sync(staging)
    staging.replace(to)
    staging.unlink(missing_ok=True)  # it is left where both were the same file already


def write_atomically(path: Path, text: str) -> None:
    staging = path.with_name(f".{path.name}.staging")
    staging.write_text(text, encoding="utf-8")
    _sync(staging)
    staging.replace(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_config(path: Path) -> Config:
    try:
        return load_config(file=path)
    except UserError as error:
        raise UserError(f"{path} does not fit this version ({error}); choose another --out") from error


def _check_same(saved: Config, asked: Config, path: Path) -> None:
    ours, theirs = flatten(saved), flatten(asked)
    # How a run is watched makes no other run of it.
    different = [key for key in ours if ours[key] != theirs[key] and not key.startswith("logging.")]
    if different:
        shown = ", ".join(f"{key} ({ours[key]!r} there, {theirs[key]!r} now)" for key in different[:3])
        raise UserError(f"{path} holds a run with other settings: {shown}; use those, or choose another --out")
