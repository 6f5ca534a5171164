"""A run's folder: what is in it, how it is written, and how a run goes on from it.

Checkpoints are written to a staging folder, synced and renamed, so one that is there is complete. A stage's checkpoint
is its adapter (safetensors) and `state.json`: every stage is seeded on its own, so nothing else is needed to go on.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel

from searche1_lite.config import Config, dump_config, parse_config
from searche1_lite.errors import UserError
from searche1_lite.model import save_adapter


class RunFolder:
    """One run on disk.

    Args:
        path: the folder; made if it is not there.
        config: the run's settings.
        resume: go on with the run that is there, if it has the same settings.

    Raises:
        UserError: if the folder holds another run, or anything else; nothing is overwritten.
    """

    def __init__(self, path: Path, config: Config, resume: bool) -> None:
        self.path = path
        self.summary_path = path / "summary.json"
        existing = path / "config.yaml"
        if existing.is_file():
            if not resume:
                raise UserError(f"{path} already holds a run; add --resume to go on with it, or choose another --out")
            _check_same(parse_config(yaml.safe_load(existing.read_text(encoding="utf-8"))), config, path)
        elif path.is_dir() and any(path.iterdir()):
            raise UserError(f"{path} is not empty and holds no run; choose another --out")
        else:
            path.mkdir(parents=True, exist_ok=True)
            write_atomically(existing, dump_config(config))
        (path / "checkpoints").mkdir(exist_ok=True)
        (path / "trajectories").mkdir(exist_ok=True)

    def log(self, record: dict[str, Any]) -> None:
        """Adds one line to `metrics.jsonl`."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def save_trajectories(self, name: str, records: list[dict[str, Any]]) -> None:
        write_atomically(self.path / "trajectories" / f"{name}.jsonl", "".join(json.dumps(r) + "\n" for r in records))

    def save_summary(self, summary: dict[str, Any]) -> None:
        write_atomically(self.summary_path, json.dumps(summary, indent=2) + "\n")

    def save_checkpoint(self, name: str, model: PeftModel, summary: dict[str, Any]) -> None:
        """Adapter and summary as they stand after stage `name`."""
        final = self.path / "checkpoints" / name
        staging = final.with_name(f".{name}.staging")
        shutil.rmtree(staging, ignore_errors=True)
        save_adapter(model, staging)
        (staging / "state.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        for file in [*staging.iterdir(), staging]:
            _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        staging.rename(final)
        _sync(final.parent)

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint of the last finished stage and its summary; None in a fresh folder."""
        best: tuple[Path, dict[str, Any]] | None = None
        for state in (self.path / "checkpoints").glob("*/state.json"):
            summary = json.loads(state.read_text(encoding="utf-8"))
            if best is None or len(summary["stages"]) > len(best[1]["stages"]):
                best = (state.parent, summary)
        return best


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


def _check_same(saved: Config, asked: Config, path: Path) -> None:
    ours, theirs = _flatten(asdict(saved)), _flatten(asdict(asked))
    different = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
    if different:
        shown = ", ".join(f"{key} ({ours.get(key)!r} there, {theirs.get(key)!r} now)" for key in different[:3])
        raise UserError(f"{path} holds a run with other settings: {shown}; use those, or choose another --out")


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
