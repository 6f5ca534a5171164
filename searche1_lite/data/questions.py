"""Questions by name: the demo's, the public QA sets, or your own files (`id`, `question`, `golden_answers`).

A spec names them: `demo`, `nq`, `hotpotqa:train`, `mine.jsonl`, or several of these joined by `+`; `all` is the seven
sets that search agents are compared on.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from searche1_lite.config import Config, GRPOStageConfig
from searche1_lite.data.demo_world import SPLIT_SIZES, load_demo_questions
from searche1_lite.data.question_files import PUBLIC_SETS, Notice, read_own_file, read_public_set
from searche1_lite.data.trajectory import Question
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.seeds import derive_seed

SEVEN_SETS = ("nq", "triviaqa", "popqa", "hotpotqa", "2wiki", "musique", "bamboogle")
"""What `all` means, in the order of the published tables."""

_EXAMPLES = "`demo`, a set such as `nq`, a JSONL file, or several joined by `+`"


@dataclass(frozen=True)
class _Part:
    """One name in a spec, checked before anything is read or downloaded."""

    name: str
    """`demo`, a public set's name, or a file's path."""
    split: str = ""
    """Empty for a file."""

    @property
    def public(self) -> bool:
        return bool(self.split) and self.name in PUBLIC_SETS

    def __str__(self) -> str:
        return f"{self.name}:{self.split}" if self.split else self.name

    def load(self, notice: Notice | None) -> list[Question]:
        if self.public:
            return read_public_set(self.name, self.split, notice)
        return load_demo_questions(self.split) if self.split else read_own_file(Path(self.name))


def load_questions(
    spec: str, split: str, limit: int = 0, seed: int = 0, notice: Notice | None = None, limit_each: bool = False
) -> list[Question]:
    """The questions of `spec`. If it has several parts, each question's metadata names its `data_set`.

    Args:
        split: of the sets named without one: `train`, `dev` or `test` (dev for a public set without a test split).
        limit: size of a seeded subset, in file order; 0: all.
        notice: receives the number of a public set's questions that are left out for want of a usable answer.
        limit_each: `limit` is of each part, instead of all together.

    Raises:
        UserError: for an unknown set or split, a failed download, or a record of a file that cannot be used.
    """
    loaded, chosen = _load(_parse(spec, split), notice), derive_seed(seed, "subset")
    if limit_each:
        return _join([(part, _subset(questions, limit, chosen)) for part, questions in loaded])
    return _subset(_join(loaded), limit, chosen)


def sample_question(spec: str | None) -> str | None:
    """A question of an evaluation set as an example; None if that needs a download or a file is unreadable."""
    if spec is None or not (spec.partition(":")[0] == "demo" or Path(spec).is_file()):
        return None
    try:
        return load_questions(spec, "test", 1)[0].question
    except UserError:
        return None


def load_run_questions(config: Config, notice: Notice | None = None) -> tuple[list[Question], list[Question]]:
    """A run's training and evaluation questions, which are disjoint.

    Training questions of a public set that occur in the evaluation split are left out, whatever `evaluation_limit` is:
    the whole split may be evaluated later.

    Args:
        notice: receives the number of questions left out.

    Raises:
        UserError: as `load_questions`, `check_disjoint` and `check_enough` do; also if `data.train` or
            `data.evaluation` is not set, or no training question is left.
    """
    parts = _parse(named(config.data.train, "data.train"), "train")
    held_out_parts = _parse(named(config.data.evaluation, "data.evaluation"), "test")  # before any download
    loaded = _load(parts, notice)
    held_out = _join(_load(held_out_parts, notice))
    evaluation = _subset(held_out, config.data.evaluation_limit, derive_seed(config.seed, "subset"))

    keys = {_key(question) for question in held_out}
    every = [(part, question) for part, questions in loaded for question in questions]
    train = [question for part, question in every if not part.public or _key(question) not in keys]
    left_out = len(every) - len(train)
    if left_out and not train:
        raise UserError(
            f"all {left_out} questions of data.train={config.data.train} are in data.evaluation="
            f"{config.data.evaluation} too; choose another split or set to train on"
        )
    check_disjoint(train, evaluation)
    if left_out and notice is not None:
        notice(f"{left_out} questions of {config.data.train} are in {config.data.evaluation} too; not trained on")
    train = _subset(train, config.data.train_limit, derive_seed(config.seed, "training subset"))
    check_enough(train, config.grpo)
    return train, evaluation


def data_set_of(question: Question) -> str | None:
    """The data set that the question's metadata names, if any."""
    name = question.metadata.get("data_set")
    return None if name is None else str(name)


def order_by_data_set(questions: Sequence[Question]) -> list[Question]:
    """Each data set's questions together, otherwise in the given order."""
    names = list(dict.fromkeys(map(data_set_of, questions)))
    return sorted(questions, key=lambda question: names.index(data_set_of(question)))


def named(spec: str | None, key: str) -> str:
    """`spec`, or a `UserError` that names its setting if it is missing."""
    if spec is None or not spec.strip():
        raise UserError(f"{key} is not set; give {_EXAMPLES}")
    return spec


def check_enough(questions: Sequence[Question], stage: GRPOStageConfig) -> None:
    """Refuses fewer training questions than one GRPO step takes: TRL would stop at step 0 without an error."""
    if stage.steps and len(questions) < stage.questions_per_step:
        raise UserError(
            f"grpo.questions_per_step={stage.questions_per_step} is more than the {len(questions)} training questions; "
            "lower it or give more questions"
        )


def check_disjoint(train: Sequence[Question], evaluation: Sequence[Question]) -> None:
    """Refuses to evaluate on training questions (compared in lower case, white space squeezed)."""
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
    """The parts of `spec`; an unknown name, split or file is refused before any download."""
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
    name, _, given = text.partition(":")
    if name == "demo" or (name in PUBLIC_SETS and not (":" in text and Path(text).is_file())):
        splits = list(SPLIT_SIZES if name == "demo" else PUBLIC_SETS[name].files)
        chosen = given or ("dev" if split == "test" and "test" not in splits else split)
        if chosen not in splits:
            shown = "the demo" if name == "demo" else name
            raise UserError(f"{shown} has no split {chosen!r}; there are: {', '.join(splits)}")
        return _Part(name, chosen)
    if not Path(text).is_file():
        near = difflib.get_close_matches(name.lower(), [*PUBLIC_SETS, "demo"], n=1)
        hint = f"did you mean {near[0]}?" if near else f"give {_EXAMPLES} (sets: {', '.join(PUBLIC_SETS)}, or all)"
        raise UserError(f"no question file at {text}; {hint}")
    return _Part(text)


def _load(parts: Sequence[_Part], notice: Notice | None) -> list[tuple[_Part, list[Question]]]:
    """Each part with its questions. Ids repeat across sets, so of several parts each set's ids start with its name."""
    loaded = [(part, part.load(notice)) for part in parts]
    if len(parts) == 1:
        return loaded
    seen: dict[str, _Part] = {}
    for part, questions in loaded:
        for question in questions:
            question.metadata.setdefault("data_set", part.name)
            if part.split:
                question.id = f"{part.name}:{question.id}"
            if question.id in seen:
                raise UserError(f"id {question.id!r} is in {seen[question.id]} and in {part}; rename one of them")
            seen[question.id] = part
    return loaded


def _join(loaded: Sequence[tuple[_Part, list[Question]]]) -> list[Question]:
    return [question for _, questions in loaded for question in questions]
