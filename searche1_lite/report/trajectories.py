"""A run's trajectories as the viewer wants them: a light index up front, the rest in compressed chunks.

A group is what one looks at together: the siblings of one question in a file of rollouts, or the answers to one
question at all evaluated stages. Chunks hold the groups whole, gzip in base64, and are unpacked when a group is opened.
"""

import base64
import gzip
import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from searche1_lite.report.record import Lines, finite

BUDGET = 20_000
"""About how many trajectories a report holds; of more, questions are chosen by a hash of their ids."""
_CHUNK_CHARACTERS = 120_000

_TrajectoryKL = dict[tuple[str, int], dict[str, Any]]


@dataclass
class TrajectoryFile:
    """One file of the run's `trajectories/`."""

    stage: str
    kind: str
    """`evaluation` or `rollouts`."""
    total: int = 0
    """Trajectories in the file; the viewer may hold fewer."""
    spread: dict[str, int] = field(default_factory=dict)
    """Rollouts: groups by how many siblings were right, under `none`, `some`, `all`."""
    improved: int | None = None
    """Evaluation: questions right now that were wrong at the stage before."""
    worse: int | None = None

    @property
    def name(self) -> str:
        return f"{self.stage}.{self.kind}"


@dataclass
class Trajectories:
    """All that the viewer needs."""

    files: list[TrajectoryFile] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    """The index, an entry a group: `file` (None for evaluations), `id`, `visit`, `question`, `hops`, `kl` (mean, in
    nats, or None), `chunk`, `place`, `rows` ([file or sample, reward, searches] a trajectory)."""
    chunks: list[str] = field(default_factory=list)
    kl_by_part: dict[str, dict[str, tuple[float, int]]] = field(default_factory=dict)
    """Stage -> part of the text -> (summed KL of the watched students' tokens, how many)."""
    notes: list[str] = field(default_factory=list)

    def index(self) -> dict[str, Any]:
        files = [{"name": f.name, "stage": f.stage, "kind": f.kind} for f in self.files]
        return {"files": files, "groups": self.groups}


def stage_order(stage: str) -> tuple[int, int, str]:
    """Sorts stages as a run goes through them."""
    match = re.fullmatch(r"round(\d+)\.(grpo|ofsd)", stage)
    return (int(match[1]), int(match[2] == "ofsd"), stage) if match else (0 if stage == "base" else 10**6, 0, stage)


def read_trajectories(folder: Path, budget: int = BUDGET) -> Trajectories:
    """Reads `folder/trajectories`, leaving out what is not there or broken."""
    found, packer = Trajectories(), _Packer()
    paths = {
        (path.name.removesuffix(f".{kind}.jsonl"), kind): path
        for kind in ("evaluation", "rollouts")
        for path in (folder / "trajectories").glob(f"*.{kind}.jsonl")
    }
    ordered = sorted(paths, key=lambda key: (key[1], stage_order(key[0])))
    share = min(1.0, budget / max(1, sum(_count_lines(path) for path in paths.values())))
    asked: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    before: dict[str, bool] = {}
    for index, (stage, kind) in enumerate(ordered):
        file, lines = TrajectoryFile(stage, kind), Lines(paths[stage, kind])
        found.files.append(file)
        records = [record for record in map(_compact, lines) if record is not None]
        file.total = len(records)
        found.notes += lines.note()
        if kind == "evaluation":
            for record in records:
                if _kept(record["question"]["id"], share):
                    asked.setdefault(record["question"]["id"], []).append((index, record))
            before = _compare(file, before, {r["question"]["id"]: r["reward"] >= 1 for r in records})
            continue
        kl_lines = Lines(folder / "trajectories" / f"{stage}.kl.jsonl")
        kl = _read_kl(kl_lines)
        found.notes += kl_lines.note()
        watched = {question for question, _ in kl}
        for visit, group in _visits(records):
            right = sum(record["reward"] >= 1 for record in group)
            sort = "none" if right == 0 else "all" if right == len(group) else "some"
            file.spread[sort] = file.spread.get(sort, 0) + 1
            question = group[0]["question"]
            if question["id"] in watched or _kept(question["id"], share):
                mean = _attach_kl(group, kl, found.kl_by_part.setdefault(stage, {}))
                rows = [[r["sample"], r["reward"], len(r["searches"])] for r in group]
                found.groups.append(_entry(question, index, visit, rows, mean) | packer.add(question, group))
        if not found.kl_by_part.get(stage):
            found.kl_by_part.pop(stage, None)
    for alike in asked.values():
        question = alike[0][1]["question"]
        rows = [[index, r["reward"], len(r["searches"])] for index, r in alike]
        records = [record | {"file": index} for index, record in alike]
        found.groups.append(_entry(question, None, 0, rows, None) | packer.add(question, records))
    found.chunks = packer.finish()
    shown, total = sum(len(group["rows"]) for group in found.groups), sum(file.total for file in found.files)
    if shown < total:
        found.notes.append(
            f"The viewer holds {shown:,} of {total:,} trajectories, those of questions chosen by a hash of their ids; "
            "the charts are of all."
        )
    return found


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _kept(question_id: str, share: float) -> bool:
    """The same questions in every file."""
    return zlib.crc32(question_id.encode("utf-8", "replace")) < share * 2**32


def _compact(record: dict[str, Any]) -> dict[str, Any] | None:
    """What is shown of a trajectory, without its ids; None if it is none."""
    try:
        question = record["question"]
        return {
            "question": {
                "id": str(question["id"]),
                "question": str(question["question"]),
                "golds": [str(gold) for gold in question["golden_answers"]],
                "metadata": _json_safe(question.get("metadata") or {}),
            },
            "sample": int(record["sample"]),
            "turns": [[str(turn["kind"]), str(turn["text"])] for turn in record["turns"]],
            "searches": [
                [
                    str(search["query"]),
                    [[str(p["title"]), str(p["text"]), finite(p.get("score"))] for p in search["passages"]],
                    *([str(search["failed"])] if search.get("failed") else []),
                ]
                for search in record["searches"]
            ],
            "stopped": str(record["stopped"]),
            "answer": None if record["answer"] is None else str(record["answer"]),
            "reward": finite(record["reward"]) or 0.0,
            "f1": finite(record.get("f1")) or 0.0,
            "tokens": sum(record.get("loss_mask") or []),
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None


def _json_safe(value: Any) -> Any:
    """Free-form metadata without the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _json_safe(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_json_safe(inner) for inner in value]
    return str(value) if isinstance(value, float) and finite(value) is None else value


def _compare(file: TrajectoryFile, before: dict[str, bool], now: dict[str, bool]) -> dict[str, bool]:
    """Counts what changed since the stage before; returns what the next one is compared with."""
    if before and now:
        both = before.keys() & now.keys()
        file.improved = sum(now[key] and not before[key] for key in both)
        file.worse = sum(before[key] and not now[key] for key in both)
    return now or before


def _visits(records: Iterable[dict[str, Any]]) -> list[tuple[int, list[dict[str, Any]]]]:
    """Siblings together: a question that a stage comes back to makes a new group when a sample number comes again."""
    groups: list[tuple[int, list[dict[str, Any]]]] = []
    latest: dict[str, tuple[int, list[dict[str, Any]]]] = {}
    for record in records:
        key = record["question"]["id"]
        visit, group = latest.get(key, (-1, []))
        if visit < 0 or any(other["sample"] == record["sample"] for other in group):
            latest[key] = visit, group = visit + 1, []
            groups.append(latest[key])
        group.append(record)
    return groups


def _entry(
    question: dict[str, Any], file: int | None, visit: int, rows: list[list[Any]], mean: float | None
) -> dict[str, Any]:
    hops = question["metadata"].get("hops") if isinstance(question["metadata"], dict) else None
    return {
        "file": file,
        "id": question["id"],
        "visit": visit,
        "question": question["question"],
        "hops": None if hops is None else str(hops),
        "rows": rows,
        "kl": mean,
    }


def _read_kl(lines: Lines) -> _TrajectoryKL:
    """(question id, sample) -> its role and, for each turn, pieces, KL and the teacher's likeliest tokens."""
    kl: _TrajectoryKL = {}
    for record in lines:
        try:
            turns: list[list[list[Any]]] = [
                [
                    [str(piece) for piece in turn["pieces"]],
                    [_rounded(value) for value in turn["kl"]],
                    [str(piece) for piece in turn["teacher"]],
                ]
                for turn in record["turns"]
            ]
            whole = all(len(pieces) == len(values) == len(teacher) for pieces, values, teacher in turns)
            if whole:
                key = str(record["question_id"]), int(record["sample"])
                kl[key] = {"role": str(record["role"]), "turns": turns}
        except (KeyError, TypeError, ValueError):
            continue
    return kl


def _rounded(value: Any) -> float | None:
    number = finite(value)
    return None if number is None else float(f"{number:.4g}")


def _attach_kl(group: list[dict[str, Any]], kl: _TrajectoryKL, by_part: dict[str, tuple[float, int]]) -> float | None:
    """Adds `role` and `kl` to the siblings that have them; returns the mean KL of the student's tokens."""
    total, count = 0.0, 0
    for record in group:
        found = kl.get((record["question"]["id"], record["sample"]))
        if found is None or len(found["turns"]) != len(record["turns"]):
            continue
        record["role"], record["kl"] = found["role"], found["turns"]
        if found["role"] != "student":
            continue
        for pieces, values, _ in found["turns"]:
            for part, value in zip(parts_of(pieces), values, strict=True):
                if value is not None:
                    summed, tokens = by_part.get(part, (0.0, 0))
                    by_part[part] = summed + value, tokens + 1
                    total, count = total + value, count + 1
    return _rounded(total / count) if count else None


def parts_of(pieces: list[str]) -> list[str]:
    """For each token of a turn, the part of the text it stands in: `think`, `search`, `answer`, `tags` or `other`."""
    text = "".join(pieces)
    spans = [(match.start(), match.end(), "tags") for match in re.finditer(r"</?(?:think|search|answer)>", text)]
    for match in re.finditer(r"<(think|search|answer)>(.*?)(?=<(?:search|answer)>|</\1>|$)", text, re.DOTALL):
        spans.append((match.start(2), match.end(2), match[1]))
    parts, position = [], 0
    for piece in pieces:
        middle = position + len(piece) // 2
        parts.append(next((part for start, end, part in spans if start <= middle < end), "other"))
        position += len(piece)
    return parts


class _Packer:
    """Fills chunks with groups; a passage that comes again in a chunk is kept once."""

    def __init__(self) -> None:
        self._chunks: list[str] = []
        self._begin()

    def _begin(self) -> None:
        self._groups: list[str] = []
        self._passages: dict[tuple[str, str], int] = {}
        self._size = 0

    def add(self, question: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, int]:
        """Where the group is: `chunk` and its `place` there."""
        packed = json.dumps(
            {
                "golds": question["golds"],
                "metadata": question["metadata"],
                "trajectories": [
                    {key: value for key, value in record.items() if key not in ("question", "searches")}
                    | {
                        "searches": [
                            [query, [self._numbered(p) for p in found], *failed]
                            for query, found, *failed in record["searches"]
                        ]
                    }
                    for record in records
                ],
            },
            separators=(",", ":"),
        )
        where = {"chunk": len(self._chunks), "place": len(self._groups)}
        self._groups.append(packed)
        self._size += len(packed)
        if self._size >= _CHUNK_CHARACTERS:
            self._close()
        return where

    def _numbered(self, passage: list[Any]) -> list[Any]:
        title, text, score = passage
        if (title, text) not in self._passages:
            self._passages[title, text] = len(self._passages)
            self._size += len(title) + len(text)
        return [self._passages[title, text], _rounded(score)]

    def _close(self) -> None:
        passages = json.dumps(list(self._passages), separators=(",", ":"))
        text = f'{{"passages":{passages},"groups":[{",".join(self._groups)}]}}'
        self._chunks.append(base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode())
        self._begin()

    def finish(self) -> list[str]:
        if self._groups:
            self._close()
        return self._chunks
