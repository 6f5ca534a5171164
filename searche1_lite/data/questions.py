"""Questions: the demo's, the public QA sets, or your own files (`id`, `question`, `golden_answers`).

A spec names them: `demo`, `nq`, `hotpotqa:train`, `mine.jsonl`, or several of these joined by `+`; `all` is the seven
sets that search agents are compared on. The public sets are fetched from the hub when they are first asked for.
Training questions that a public set shares with the evaluation are left out; the other kinds are refused, as they are
yours to mend.
"""

import difflib
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from searche1_lite.config import Config, GRPOStageConfig
from searche1_lite.data.trajectory import Question
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.jsonl import MAX_LINE, JsonFault, bounded_lines, parse_json
from searche1_lite.runtime.seeds import derive_seed

Notice = Callable[[str], None]
"""Takes one line that the user should see."""

COLUMNS = ("id", "question", "golden_answers")


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

SEVEN_SETS = ("nq", "triviaqa", "popqa", "hotpotqa", "2wiki", "musique", "bamboogle")
"""What `all` stands for, in the order of the published tables."""

_EXAMPLES = "`demo`, a set such as `nq`, a JSONL file, or several joined by `+`"


@dataclass(frozen=True)
class _Part:
    """One name out of a spec, checked before anything is read or fetched."""

    name: str
    """`demo`, a public set's name, or an own file's path."""
    split: str = ""
    """Empty for an own file."""

    @property
    def public(self) -> bool:
        return bool(self.split) and self.name in PUBLIC_SETS

    def __str__(self) -> str:
        return f"{self.name}:{self.split}" if self.split else self.name


def load_questions(
    spec: str, split: str, limit: int = 0, seed: int = 0, notice: Notice | None = None, limit_each: bool = False
) -> list[Question]:
    """The questions of `spec`.

    Args:
        spec: `demo`, a public set, either with `:SPLIT`, a question file, several of them joined by `+`, or `all`.
            Where there are several, each question's metadata names its `data_set`, if it did not already.
        split: what a set named without a split means: `train`, `dev` or `test` (of a public set without a test split:
            dev).
        limit: a seeded subset of this size, in file order; 0 for all.
        notice: told how many of a public set's questions have no usable answer; they are left out.
        limit_each: `limit` is of each part of the spec, not of all together.

    Raises:
        UserError: for an unknown set or split, a set that cannot be fetched, and, with file and line number, for a line
            that cannot be read, lacks a column or repeats an id.
    """
    loaded, chosen = _load(_parse(spec, split), notice), derive_seed(seed, "subset")
    if limit_each:
        return _join([(part, _subset(questions, limit, chosen)) for part, questions in loaded])
    return _subset(_join(loaded), limit, chosen)


def sample_question(spec: str | None) -> str | None:
    """One question of an evaluation set, to give someone an idea; None where that would have to be fetched or read
    with faults."""
    if spec is None or not (spec.partition(":")[0] == "demo" or Path(spec).is_file()):
        return None
    try:
        return load_questions(spec, "test", 1)[0].question
    except UserError:
        return None


def load_run_questions(config: Config, notice: Notice | None = None) -> tuple[list[Question], list[Question]]:
    """A run's training and evaluation questions, which have none in common.

    A public set's training questions that stand in the evaluation data, its whole split, are left out, whatever the
    evaluation is limited to: one may evaluate on all of it later.

    Args:
        notice: told how many were left out.

    Raises:
        UserError: as `load_questions`, `check_disjoint` and `check_enough` do; also where `data.train` or
            `data.evaluation` is not set, or nothing is left to train on.
    """
    parts = _parse(named(config.data.train, "data.train"), "train")
    held_out_parts = _parse(named(config.data.evaluation, "data.evaluation"), "test")  # before the first is fetched
    loaded = _load(parts, notice)
    held_out = _join(_load(held_out_parts, notice))
    evaluation = _subset(held_out, config.data.evaluation_limit, derive_seed(config.seed, "subset"))

    keys = {_key(question) for question in held_out}
    kept = [
        (part, [question for question in questions if not part.public or _key(question) not in keys])
        for part, questions in loaded
    ]
    left_out = sum(len(questions) for _, questions in loaded) - sum(len(questions) for _, questions in kept)
    train = _join(kept)
    if left_out and not train:
        raise UserError(
            f"all {left_out} questions of data.train={config.data.train} are in data.evaluation="
            f"{config.data.evaluation} too; give another split or set to train on"
        )
    check_disjoint(train, evaluation)
    if left_out and notice is not None:
        notice(f"{left_out} questions of {config.data.train} are in {config.data.evaluation} too; not trained on")
    train = _subset(train, config.data.train_limit, derive_seed(config.seed, "training subset"))
    check_enough(train, config.grpo)
    return train, evaluation


def data_set_of(question: Question) -> str | None:
    """The data set that the question's metadata names, if it does."""
    name = question.metadata.get("data_set")
    return None if name is None else str(name)


def order_by_data_set(questions: Sequence[Question]) -> list[Question]:
    """Each data set's questions together, otherwise as they come."""
    names = list(dict.fromkeys(map(data_set_of, questions)))
    return sorted(questions, key=lambda question: names.index(data_set_of(question)))


def named(spec: str | None, key: str) -> str:
    """`spec`, refused with the name of its setting where there is none."""
    if spec is None or not spec.strip():
        raise UserError(f"{key} is not set; give {_EXAMPLES}")
    return spec


def check_enough(questions: Sequence[Question], stage: GRPOStageConfig) -> None:
    """Refuses fewer training questions than one GRPO step takes: TRL would stop at step 0 in silence."""
    if stage.steps and len(questions) < stage.questions_per_step:
        raise UserError(
            f"grpo.questions_per_step={stage.questions_per_step} is more than the {len(questions)} training questions; "
            "lower it or give more questions"
        )


def check_disjoint(train: Sequence[Question], evaluation: Sequence[Question]) -> None:
    """Refuses to evaluate on training questions (compared lower-cased, white space squeezed)."""
    trained = {_key(question): question for question in train}
    for question in evaluation:
        if (same := trained.get(_key(question))) is not None:
            raise UserError(
                f"evaluation question {question.id!r} is training question {same.id!r}; take it out of one of them"
            )


def _key(question: Question) -> str:
    return " ".join(question.question.lower().split())


def _subset(questions: list[Question], limit: int, seed: int) -> list[Question]:
    if not limit or limit >= len(questions):
        return questions
    return [questions[index] for index in sorted(Random(seed).sample(range(len(questions)), limit))]


def _parse(spec: str, split: str) -> list[_Part]:
    """The parts of `spec`; an unknown name, split or file is refused here, before any download."""
    texts = [spec] if spec != "all" and Path(spec).is_file() else spec.split("+")
    texts = [name for text in texts for name in (SEVEN_SETS if text.strip() == "all" else [text])]
    parts = [_parse_one(text.strip() if len(texts) > 1 else text, spec, split) for text in texts]
    for index, part in enumerate(parts):
        if part in parts[:index]:
            raise UserError(f"{spec!r} names {part} twice; name it once")
    return parts


def _parse_one(text: str, spec: str, split: str) -> _Part:
    if not text:
        raise UserError(f"{spec!r} has an empty part; give {_EXAMPLES}")
    name, _, asked = text.partition(":")
    if name == "demo":
        from searche1_lite.data.demo_world import SPLIT_SIZES

        if (asked or split) not in SPLIT_SIZES:
            raise UserError(f"the demo has no split {asked or split!r}; there are: {', '.join(SPLIT_SIZES)}")
        return _Part(name, asked or split)
    if name in PUBLIC_SETS and not (":" in text and Path(text).is_file()):
        splits = PUBLIC_SETS[name].files
        if not asked:
            asked = "dev" if split == "test" and "test" not in splits else split
        if asked not in splits:
            raise UserError(f"{name} has no split {asked!r}; there are: {', '.join(splits)}")
        return _Part(name, asked)
    if not Path(text).is_file():
        near = difflib.get_close_matches(name.lower(), [*PUBLIC_SETS, "demo"], n=1)
        hint = f"did you mean {near[0]}?" if near else f"give {_EXAMPLES} (sets: {', '.join(PUBLIC_SETS)}, or all)"
        raise UserError(f"no question file at {text}; {hint}")
    return _Part(text)


def _load(parts: Sequence[_Part], notice: Notice | None) -> list[tuple[_Part, list[Question]]]:
    """Each part with its questions. Ids repeat across sets, so where parts are joined, a set's begin with its name."""
    loaded = [(part, _load_part(part, notice)) for part in parts]
    if len(parts) > 1:
        for part, questions in loaded:
            for question in questions:
                question.metadata.setdefault("data_set", part.name)
                if part.split:
                    question.id = f"{part.name}:{question.id}"
        seen: dict[str, _Part] = {}
        for part, questions in loaded:
            for question in questions:
                if question.id in seen:
                    raise UserError(f"id {question.id!r} is in {seen[question.id]} and in {part}; rename one of them")
                seen[question.id] = part
    return loaded


def _join(loaded: Sequence[tuple[_Part, list[Question]]]) -> list[Question]:
    return [question for _, questions in loaded for question in questions]


def _load_part(part: _Part, notice: Notice | None) -> list[Question]:
    if part.public:
        return _load_public(part, notice)
    if part.name == "demo" and part.split:
        from searche1_lite.data.demo_world import load_demo_questions

        # Copies, as the demo keeps its own.
        return [Question(q.id, q.question, q.golden_answers, dict(q.metadata)) for q in load_demo_questions(part.split)]
    return _read_questions(Path(part.name))


def _read_questions(path: Path) -> list[Question]:
    """The questions of one's own file, read strictly."""
    questions: list[Question] = []
    seen: dict[str, int] = {}
    try:
        for number, record in _records(path, (*COLUMNS, "metadata"), str(path)):
            question = _check_record(record, f"{path}:{number}")
            if question.id in seen:
                before = f"was already used on line {seen[question.id]}"
                raise UserError(f"{path}:{number}: id {question.id!r} {before}; make it unique")
            seen[question.id] = number
            questions.append(question)
    except _DamagedError as error:
        raise UserError(f"{path} is damaged or cut off ({error}); write it anew") from error
    if not questions:
        raise UserError(f"{path} holds no question; give a JSONL file with id, question and golden_answers")
    return questions


def _check_record(record: dict[str, Any], place: str) -> Question:
    golds = record["golden_answers"]
    # A blank one would be matched by an empty answer.
    if not isinstance(golds, list) or not golds or not all(isinstance(g, str) and g.strip() for g in golds):
        raise UserError(f"{place}: golden_answers must be a list of at least one string, none blank")
    if not isinstance(record["question"], str) or not record["question"].strip():
        raise UserError(f"{place}: the question is empty; write one or delete the line")
    if isinstance(record["id"], bool) or not isinstance(record["id"], str | int):
        raise UserError(f"{place}: the id must be a string or a whole number; mend it")
    metadata = record.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise UserError(f"{place}: metadata must be an object; mend it or leave it out")
    try:
        json.dumps(metadata)
    except TypeError as error:  # a date, say, in a Parquet file: no rollout could be saved
        raise UserError(f"{place}: metadata cannot be written as JSON ({error}); mend it or leave it out") from error
    return Question(str(record["id"]), record["question"], golds, metadata)


def _load_public(part: _Part, notice: Notice | None) -> list[Question]:
    """A public set's questions that can be scored.

    Their metadata keeps its plain values. Lists and objects in it are left out: HotpotQA has ten paragraphs a question
    there, which every rollout would carry along.
    """
    from searche1_lite.runtime.hub import download_file

    public = PUBLIC_SETS[part.name]
    filename = public.files[part.split]
    mixture = filename.endswith(".parquet")
    path = download_file(public.repo, filename, repo_type="dataset")
    shown = f"{filename} of {public.repo}"
    # The mixture's other columns differ in their types from file to file, so they are never looked at.
    columns = (*COLUMNS, "data_source") if mixture else (*COLUMNS, "metadata")
    questions: list[Question] = []
    ids: dict[str, int] = {}
    total = 0
    try:
        for _, record in _records(path, columns, shown, () if mixture else ("metadata",), strict=False):
            total += 1
            text, golds = record["question"], record["golden_answers"]
            golds = [gold for gold in golds or () if isinstance(gold, str) and gold.strip()]
            if not golds or not isinstance(text, str) or not text.strip():
                continue
            question_id = str(record["id"])
            metadata: dict[str, Any] = {"data_set": part.name}
            if mixture:
                metadata["data_set"] = str(record["data_source"])
                question_id = f"{metadata['data_set']}:{question_id}"
            elif isinstance(given := record.get("metadata"), dict):
                metadata |= {key: value for key, value in given.items() if not isinstance(value, list | dict)}
            if part.name == "musique" and (hops := re.match(r"(\d+)hop", question_id)):
                metadata.setdefault("hops", int(hops[1]))
            # Rollouts are seeded and grouped by id.
            ids[question_id] = ids.get(question_id, 0) + 1
            if ids[question_id] > 1:
                question_id = f"{question_id}#{ids[question_id]}"
            questions.append(Question(question_id, text, golds, metadata))
    except _DamagedError as error:
        raise UserError(
            f"{shown} is damaged or cut off ({error}); delete {path.resolve()} and it is fetched again", exit_code=1
        ) from error
    if not questions:
        raise UserError(f"{shown} holds no question that can be scored; take another set", exit_code=1)
    if total > len(questions) and notice is not None:
        notice(f"{total - len(questions)} of {total} questions of {part} have no usable answer; they are left out")
    return questions


class _DamagedError(Exception):
    """A file that is not what its name says; the message is a reason in one line."""


def _records(
    path: Path, columns: Sequence[str], shown: str, optional: Sequence[str] = ("metadata",), strict: bool = True
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line or row number from 1, record) of a JSONL file, gzipped or not, or of a Parquet file.

    Every record has all of `columns` but the optional ones; `shown` names the file in errors. `strict` refuses NaN,
    infinities and keys that stand twice.
    """
    needed = [column for column in columns if column not in optional]
    needs = f"a question needs {', '.join(needed[:-1])} and {needed[-1]}"
    if path.suffix == ".parquet":
        yield from _parquet_records(path, columns, needed, f"{shown}: no `{{}}`; {needs}")
        return
    for number, line in _lines(path):
        if line is None:
            raise UserError(f"{shown}:{number}: a line of more than {MAX_LINE // 2**20} MB; mend or delete it")
        if not line.strip():
            continue
        try:
            record = parse_json(line, strict)
        except JsonFault as error:
            raise UserError(f"{shown}:{number}: not a JSON line ({error}); mend or delete it") from error
        if not isinstance(record, dict):
            raise UserError(f"{shown}:{number}: not a JSON object; write id, question and golden_answers")
        for column in needed:
            if column not in record:
                raise UserError(f"{shown}:{number}: no `{column}`; {needs}")
        yield number, record


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            yield from bounded_lines(file)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise _DamagedError(str(error)) from error


def _parquet_records(
    path: Path, columns: Sequence[str], needed: Sequence[str], missing: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of `columns` only, one row group in memory at a time."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            there = file.schema_arrow.names
            for column in needed:
                if column not in there:
                    raise UserError(missing.format(column))
            number = 0
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=[column for column in columns if column in there])
                for record in table.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, OSError) as error:
        raise _DamagedError(str(error).strip().splitlines()[0].rstrip(".")) from error
