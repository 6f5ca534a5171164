"""Question files: your own JSONL or Parquet, read strictly, and the public sets of the hub, read leniently."""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searche1_lite.data.trajectory import Question
from searche1_lite.runtime.errors import UserError, first_line
from searche1_lite.runtime.jsonl import MAX_LINE, JsonFault, bounded_lines, parse_json

Notice = Callable[[str], None]
"""Receives one-line notices for the user."""

COLUMNS = ("id", "question", "golden_answers")
_NEEDS = f"a question needs {', '.join(COLUMNS[:-1])} and {COLUMNS[-1]}"


@dataclass(frozen=True)
class PublicSet:
    """A question set on the hub; `files` gives each split's file, in the order train, dev, test."""

    repo: str
    files: dict[str, str]


def _flashrag(folder: str, *splits: str) -> PublicSet:
    return PublicSet("RUC-NLPIR/FlashRAG_datasets", {split: f"{folder}/{split}.jsonl" for split in splits})


PUBLIC_SETS = {
    "nq": _flashrag("nq", "train", "dev", "test"),
    "triviaqa": _flashrag("triviaqa", "train", "dev", "test"),
    "popqa": _flashrag("popqa", "test"),
    "hotpotqa": _flashrag("hotpotqa", "train", "dev"),
    "2wiki": _flashrag("2wikimultihopqa", "train", "dev"),
    "musique": _flashrag("musique", "train", "dev"),
    "bamboogle": _flashrag("bamboogle", "test"),
    "search-r1": PublicSet("PeterJinGo/nq_hotpotqa_train", {"train": "train.parquet", "test": "test.parquet"}),
}


def read_own_file(path: Path) -> list[Question]:
    """The questions of a JSONL (`.gz` too) or Parquet file.

    Raises:
        UserError: with file and line number, for a record that is unreadable, incomplete or repeats an id.
    """
    file = _QuestionFile(path, str(path), "write it again")
    lines: dict[str, int] = {}
    questions: list[Question] = []
    for number, record in file.records((*COLUMNS, "metadata"), strict=True):
        if problem := _find_problem(record):
            raise UserError(f"{path}:{number}: {problem}")
        question_id = str(record["id"])
        if question_id in lines:
            before = f"was already used on line {lines[question_id]}"
            raise UserError(f"{path}:{number}: id {question_id!r} {before}; make it unique")
        lines[question_id] = number
        questions.append(
            Question(question_id, record["question"], record["golden_answers"], record.get("metadata") or {})
        )
    if not questions:
        raise UserError(f"{path} holds no question; give a JSONL file with id, question and golden_answers")
    return questions


def _find_problem(record: dict[str, Any]) -> str | None:
    golds, metadata = record["golden_answers"], record.get("metadata") or {}
    # An empty answer would match a blank one.
    if not isinstance(golds, list) or not golds or not all(isinstance(g, str) and g.strip() for g in golds):
        return "golden_answers must be a list of at least one string, none blank"
    if not isinstance(record["question"], str) or not record["question"].strip():
        return "the question is empty; write one or delete the line"
    if isinstance(record["id"], bool) or not isinstance(record["id"], str | int):
        return "the id must be a string or a whole number; fix it"
    if not isinstance(metadata, dict):
        return "metadata must be an object; fix it or leave it out"
    try:
        json.dumps(metadata)
    except TypeError as error:  # such as a date in a Parquet file: trajectories could not be saved
        return f"metadata cannot be written as JSON ({error}); fix it or leave it out"
    return None


def read_public_set(name: str, split: str, notice: Notice | None) -> list[Question]:
    """The questions of a public set that can be scored; downloaded on first use.

    Their metadata keeps scalars only: HotpotQA has ten paragraphs per question there, which every rollout would carry.
    """
    from searche1_lite.runtime.hub import download_file

    public = PUBLIC_SETS[name]
    filename = public.files[split]
    path = download_file(public.repo, filename, repo_type="dataset")
    remedy = f"delete {path.resolve()} and it is downloaded again"
    file = _QuestionFile(path, f"{filename} of {public.repo}", remedy, exit_code=1)
    # The mixture's other columns differ in type from file to file, so they are not read.
    mixture = path.suffix == ".parquet"
    questions: list[Question] = []
    uses: dict[str, int] = {}
    total = 0
    for _, record in file.records((*COLUMNS, "data_source" if mixture else "metadata")):
        total += 1
        golds = [gold for gold in record["golden_answers"] or () if isinstance(gold, str) and gold.strip()]
        if not golds or not isinstance(record["question"], str) or not record["question"].strip():
            continue
        question_id = str(record["id"])
        metadata: dict[str, Any] = {"data_set": name}
        if mixture:
            metadata = {"data_set": str(record["data_source"])}
            question_id = f"{record['data_source']}:{question_id}"
        elif isinstance(given := record.get("metadata"), dict):
            metadata |= {key: value for key, value in given.items() if not isinstance(value, list | dict)}
        if name == "musique" and (hops := re.match(r"(\d+)hop", question_id)):
            metadata.setdefault("hops", int(hops[1]))
        uses[question_id] = uses.get(question_id, 0) + 1
        if uses[question_id] > 1:  # rollouts are seeded and grouped by id
            question_id = f"{question_id}#{uses[question_id]}"
        questions.append(Question(question_id, record["question"], golds, metadata))
    if not questions:
        raise UserError(f"{file.shown} holds no question that can be scored; choose another set", exit_code=1)
    if total > len(questions) and notice is not None:
        notice(f"{total - len(questions)} of {total} questions of {name}:{split} have no usable answer; left out")
    return questions


@dataclass(frozen=True)
class _QuestionFile:
    path: Path
    shown: str
    """Its name in errors."""
    remedy: str
    """What to do if it is damaged."""
    exit_code: int = 2

    def records(self, columns: Sequence[str], strict: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
        """Line or row numbers from 1 with the records; each has all of `columns`, except perhaps `metadata`.

        Args:
            strict: refuse NaN, infinities and duplicate keys.
        """
        needed = [column for column in columns if column != "metadata"]
        if self.path.suffix == ".parquet":
            yield from self._rows(columns, needed)
            return
        for number, line in self._lines():
            place = f"{self.shown}:{number}"
            if line is None:
                raise UserError(f"{place}: a line of more than {MAX_LINE // 2**20} MB; fix or delete it")
            if not line.strip():
                continue
            try:
                record = parse_json(line, strict)
            except JsonFault as error:
                raise UserError(f"{place}: not a JSON line ({error}); fix or delete it") from error
            if not isinstance(record, dict):
                raise UserError(f"{place}: not a JSON object; write id, question and golden_answers")
            _check_columns(needed, record, place)
            yield number, record

    def _lines(self) -> Iterator[tuple[int, bytes | None]]:
        with gzip.open(self.path) if self.path.suffix == ".gz" else self.path.open("rb") as file:
            try:
                yield from bounded_lines(file)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise self._damaged(error) from error

    def _rows(self, columns: Sequence[str], needed: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Reads `columns` only, one row group at a time."""
        import pyarrow
        from pyarrow import parquet

        number = 0
        try:
            with parquet.ParquetFile(self.path) as file:
                names = file.schema_arrow.names
                _check_columns(needed, names, self.shown)
                for group in range(file.num_row_groups):
                    for record in file.read_row_group(group, [name for name in columns if name in names]).to_pylist():
                        number += 1
                        yield number, record
        except (pyarrow.ArrowException, OSError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> UserError:
        reason = first_line(error).rstrip(".")
        return UserError(f"{self.shown} is damaged or cut off ({reason}); {self.remedy}", self.exit_code)


def _check_columns(needed: Sequence[str], names: Any, place: str) -> None:
    for column in needed:
        if column not in names:
            raise UserError(f"{place}: no `{column}`; {_NEEDS}")
