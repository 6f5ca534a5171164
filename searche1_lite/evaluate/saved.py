"""An evaluation's folder: its files, and how an evaluation resumes from them.

    config.yaml          the settings, and under `evaluation` the method, adapter and data
    trajectories.jsonl   a line per episode
    questions.jsonl      a line per answered question
    result.json          the figures, once complete
    .lock                held by the process that evaluates

Both JSONL files grow together in the order of the questions, trajectories first. The lines of `questions.jsonl` are the
finished work; whatever else an interruption left is cut off.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from searche1_lite.config import Config, dump_config, parse_config, what_counts
from searche1_lite.data.trajectory import Question
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.jsonl import JsonFault, bounded_lines, parse_json, read_json
from searche1_lite.runtime.sealed_folder import cut, write_atomically
from searche1_lite.runtime.yaml_file import read_yaml

_LOCK = ".lock"


class EvaluationFolder:
    """One evaluation on disk.

    Args:
        path: the folder; looked at now, and made by `start`.
        config: the settings.
        asked: what was asked beside them, from `describe`.
        questions: all that are to be answered, in their order.
        resume: go on with the evaluation that is there, if it asks the same.

    Raises:
        UserError: if the folder holds another evaluation, or anything else; nothing is overwritten.
    """

    def __init__(
        self, path: Path, config: Config, asked: dict[str, Any], questions: Sequence[Question], resume: bool
    ) -> None:
        self.path = path
        self._lock = FileLock(path / _LOCK, blocking=False)
        self._config, self._asked, self._ids = config, asked, [question.id for question in questions]
        self._resume = resume
        self._look()

    def _look(self) -> None:
        """Refuses a folder with another evaluation or other files."""
        path = self.path
        if (path / "config.yaml").is_file():
            settings, there = _read(path)
            if not self._resume:
                raise UserError(
                    f"{path} is not empty; add --resume to go on with what is there, or choose another --out"
                )
            _check_same(path, _what_counts(settings) | there, _what_counts(self._config) | self._asked)
        elif path.is_dir() and any(item.name != _LOCK for item in path.iterdir()):
            raise UserError(f"{path} is not empty and holds no evaluation; choose another --out")
        elif not (nearest := next(place for place in (path, *path.absolute().parents) if place.exists())).is_dir():
            raise UserError(f"cannot write to {path}: {nearest} is a file; choose another --out")

    def searches(self, fingerprint: str | None) -> None:
        """Adds the passages' fingerprint, if the retriever has one; checked by `start`."""
        if fingerprint is not None:
            self._asked = self._asked | {"passages": fingerprint}

    def result(self) -> dict[str, Any] | None:
        """The figures, if the evaluation is done."""
        path = self.path / "result.json"
        return read_json(path, "delete it, and --resume counts anew") if path.is_file() else None

    def start(self) -> list[dict[str, Any]]:
        """Makes what is not there yet, mends what was cut off, and gives the lines of the questions that are done.

        Other processes are kept from it until `release`, or this process's end.

        Raises:
            UserError: where nothing can be written, another process is at it or began another evaluation in the
                meantime, or the files do not belong together.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._look()  # again: another process may have been at it, and have ended, since
            self._resume = True  # what is there from now on is its own
            if not (self.path / "config.yaml").is_file():
                text = yaml.safe_dump({"evaluation": self._asked}, sort_keys=False)
                write_atomically(self.path / "config.yaml", text + dump_config(self._config))
            done = self._mend_questions()
            self._mend_trajectories(len(done))
        except Timeout as error:
            raise UserError(
                f"another process is at the evaluation in {self.path}; wait for it, or choose another --out"
            ) from error
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}; choose another --out") from error
        return done

    def release(self) -> None:
        """Unlocks it."""
        self._lock.release(force=True)

    def add(self, outcomes: Sequence[dict[str, Any]], trajectories: Sequence[dict[str, Any]]) -> None:
        """Saves the next answered questions."""
        _append(self.path / "trajectories.jsonl", trajectories)
        _append(self.path / "questions.jsonl", outcomes)

    def finish(self, result: dict[str, Any]) -> None:
        write_atomically(self.path / "result.json", json.dumps(result, indent=2) + "\n")

    def _mend_questions(self) -> list[dict[str, Any]]:
        """The complete lines of `questions.jsonl`; the rest is cut off."""
        path = self.path / "questions.jsonl"
        done: list[dict[str, Any]] = []
        size = 0
        if not path.is_file():
            return done
        with path.open("rb") as file:
            for number, line in bounded_lines(file):
                try:
                    record = parse_json(line) if line is not None and line.endswith(b"\n") else None
                except JsonFault:
                    record = None
                if line is None or not isinstance(record, dict):
                    break  # as a crash of the machine leaves it
                if number > len(self._ids) or record.get("id") != self._ids[number - 1]:
                    raise UserError(f"{path}:{number} is not the question that comes there; choose another --out")
                done.append(record)
                size += len(line)
        cut(path, size)
        return done

    def _mend_trajectories(self, count: int) -> None:
        """Cuts `trajectories.jsonl` to the answered questions."""
        path = self.path / "trajectories.jsonl"
        size = lines = 0
        if path.is_file() and count:
            with path.open("rb") as file:
                for line in file:
                    if lines == count or not line.endswith(b"\n"):
                        break
                    lines, size = lines + 1, size + len(line)
        if lines < count:
            raise UserError(
                f"{path} holds {lines} of {count} questions that are done; put it back, or choose another --out"
            )
        cut(path, size)


def describe(method: str, adapter: Path | None, data: str, questions: Sequence[Question]) -> dict[str, Any]:
    """What an evaluation asks beside its settings; adapter and questions are identified by content too."""
    content = [[q.id, q.question, q.golden_answers] for q in questions]
    return {
        "method": method,
        "adapter": None if adapter is None else str(adapter),
        "adapter_digest": None if adapter is None else _adapter_digest(adapter),
        "data": data,
        "questions": len(questions),
        "questions_digest": _digest(json.dumps(content).encode()),
    }


def _adapter_digest(folder: Path) -> str:
    names = ("adapter_config.json", "adapter_model.safetensors")
    return _digest(*((folder / name).read_bytes() for name in names if (folder / name).is_file()))


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(hashlib.blake2b(part).digest())
    return digest.hexdigest()


def _read(path: Path) -> tuple[Config, dict[str, Any]]:
    """The settings of the saved evaluation, and its method, adapter and data."""
    file = path / "config.yaml"
    try:
        saved = read_yaml(file)
        there = dict(saved.pop("evaluation"))
    except (UserError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not empty and holds no evaluation; choose another --out") from error
    try:
        return parse_config(saved), there
    except UserError as error:
        raise UserError(f"{file} does not fit this version ({error}); choose another --out") from error


def _what_counts(config: Config) -> dict[str, Any]:
    """The settings that affect answers, without those of training."""
    sections = ("seed", "model.", "search.", "protocol.", "engine.")
    return {key: value for key, value in what_counts(config).items() if key.startswith(sections)}


def _check_same(path: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    told_by_content = ("adapter", "data", "questions")  # the same one may be named otherwise
    unsaid = set() if "passages" in there else {"passages"}  # by earlier versions
    different = [key for key in now if key not in {*told_by_content, *unsaid} and now[key] != there.get(key)]
    if different:
        shown = ", ".join(_tell(key, there, now) for key in different[:3])
        raise UserError(f"{path} holds another evaluation: {shown}; use what it has, or choose another --out")


def _tell(key: str, there: dict[str, Any], now: dict[str, Any]) -> str:
    if key == "adapter_digest":
        if there.get("adapter") == now["adapter"]:
            return f"the adapter {now['adapter']} has changed since"
        key = "adapter"
    if key == "passages":
        return "the passages have changed since"
    if key == "questions_digest":
        changed = [name for name in ("data", "questions") if there.get(name) != now[name]]
        if not changed:
            return "the questions have changed since"
        key = changed[0]
    return f"{key} ({there.get(key)!r} there, {now[key]!r} now)"


def _append(path: Path, records: Sequence[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
        file.flush()
        os.fsync(file.fileno())
