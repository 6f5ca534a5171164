"""Questions: the demo's, or your own JSONL (`id`, `question`, `golden_answers`)."""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

from searche1_lite.config import Config, GRPOStageConfig
from searche1_lite.errors import UserError
from searche1_lite.seeding import derive_seed
from searche1_lite.trajectory import Question


def load_questions(spec: str, split: str, limit: int = 0, seed: int = 0) -> list[Question]:
    """The questions of `spec`.

    Args:
        spec: `demo`, `demo:SPLIT` or a JSONL file.
        split: which of the demo's splits plain `demo` means: `train`, `dev` or `test`.
        limit: a seeded subset of this size, in file order; 0 for all.

    Raises:
        UserError: with file and line number, for a line that cannot be read, lacks a column or repeats an id.
    """
    if spec == "demo" or spec.startswith("demo:"):
        from searche1_lite.demo.world import SPLIT_SIZES, load_demo_questions

        split = spec.partition(":")[2] or split
        if split not in SPLIT_SIZES:
            raise UserError(f"the demo has no split {split!r}; there are: {', '.join(SPLIT_SIZES)}")
        questions = load_demo_questions(split)
    else:
        questions = _read_questions(Path(spec))
    if limit and limit < len(questions):
        chosen = Random(derive_seed(seed, "subset")).sample(range(len(questions)), limit)
        questions = [questions[index] for index in sorted(chosen)]
    return questions


def load_run_questions(config: Config) -> tuple[list[Question], list[Question]]:
    """A run's training and evaluation questions, which have none in common.

    Raises:
        UserError: as `load_questions`, `check_disjoint` and `check_enough` do.
    """
    train = load_questions(config.data.train, "train")
    evaluation = load_questions(config.data.evaluation, "test", config.data.evaluation_limit, config.seed)
    check_disjoint(train, evaluation)
    check_enough(train, config.grpo)
    return train, evaluation


def check_enough(questions: Sequence[Question], stage: GRPOStageConfig) -> None:
    """Refuses fewer training questions than one GRPO step takes: TRL would stop at step 0 in silence."""
    if stage.steps and len(questions) < stage.questions_per_step:
        raise UserError(
            f"grpo.questions_per_step={stage.questions_per_step} is more than the {len(questions)} training questions; "
            "lower it or give more questions"
        )


def _read_questions(path: Path) -> list[Question]:
    if not path.is_file():
        raise UserError(f"no question file at {path}; give `demo` or a JSONL file")
    questions: list[Question] = []
    seen: dict[str, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{path}:{number}: not a JSON line ({error}); mend or delete it") from error
            if not isinstance(record, dict):
                raise UserError(f"{path}:{number}: not a JSON object; write id, question and golden_answers")
            for column in ("id", "question", "golden_answers"):
                if column not in record:
                    raise UserError(f"{path}:{number}: no `{column}`; a question needs id, question and golden_answers")
            golds = record["golden_answers"]
            # A blank one would be matched by an empty answer.
            if not isinstance(golds, list) or not golds or not all(isinstance(g, str) and g.strip() for g in golds):
                raise UserError(f"{path}:{number}: golden_answers must be a list of at least one string, none blank")
            if not isinstance(record["question"], str) or not record["question"].strip():
                raise UserError(f"{path}:{number}: the question is empty; write one or delete the line")
            if isinstance(record["id"], bool) or not isinstance(record["id"], str | int):
                raise UserError(f"{path}:{number}: the id must be a string or a whole number")
            if not isinstance(record.get("metadata") or {}, dict):
                raise UserError(f"{path}:{number}: metadata must be an object; mend it or leave it out")
            question_id = str(record["id"])
            if question_id in seen:
                raise UserError(f"{path}:{number}: id {question_id!r} was already used on line {seen[question_id]}")
            seen[question_id] = number
            questions.append(Question(question_id, record["question"], golds, record.get("metadata") or {}))
    if not questions:
        raise UserError(f"{path} holds no question; give a JSONL file with id, question and golden_answers")
    return questions


def check_disjoint(train: Sequence[Question], evaluation: Sequence[Question]) -> None:
    """Refuses to evaluate on training questions (compared lower-cased, white space squeezed)."""

    def key(question: Question) -> str:
        return " ".join(question.question.lower().split())

    trained = {key(question): question for question in train}
    for question in evaluation:
        if (same := trained.get(key(question))) is not None:
            raise UserError(
                f"evaluation question {question.id!r} is training question {same.id!r}; take it out of one of them"
            )
