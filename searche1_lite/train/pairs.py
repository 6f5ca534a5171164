"""Which rollouts of a question make a pair, and the teacher's prompt for it. Pure functions of trajectories.

The method: the reference is the correct rollout with the fewest searches, the student the sibling that differs most
from it. The other choices of `ofsd.reference` and `ofsd.teacher_prompt` are ablations of the reference's effect.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from searche1_lite.data.trajectory import Trajectory
from searche1_lite.rollout.protocol import Protocol
from searche1_lite.runtime.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class Pair:
    """Two rollouts of a question: the reference that the teacher sees, and a wrong or less efficient sibling."""

    reference: Trajectory
    student: Trajectory


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs of a stage, at most one a question."""

    chosen: list[Pair]
    counts: dict[str, int]
    """`questions`, `pairs`, `none_correct`, `none_less_efficient`, `wrong_students`, `correct_students`, and
    `other_references` (references that are not the most efficient rollout)."""


def _efficiency(trajectory: Trajectory) -> tuple[int, int]:
    return trajectory.n_searches, trajectory.n_model_tokens


def difference(one: Trajectory, other: Trajectory) -> tuple[int, float, int]:
    """How much two rollouts of a question differ: by number of searches, then by the share of distinct queries they
    do not have in common, then by model-written tokens."""
    ours = {" ".join(search.query.lower().split()) for search in one.searches}
    theirs = {" ".join(search.query.lower().split()) for search in other.searches}
    union = ours | theirs
    apart = 1 - len(ours & theirs) / len(union) if union else 0.0
    return abs(one.n_searches - other.n_searches), apart, abs(one.n_model_tokens - other.n_model_tokens)


def select_pairs(
    trajectories: Sequence[Trajectory], students: str = "any", reference: str = "efficient", seed: int = 0
) -> Pairs:
    """At most one pair a question, in the order of the questions.

    The reference is the correct rollout with the fewest searches, then the fewest model tokens, then the lowest sample.
    The student is the rollout that differs most from it (`difference`; ties: the lowest sample): a wrong one if there
    is one, else a correct one that is less efficient.

    Args:
        trajectories: rollouts of any questions, several each.
        students: `any`, `wrong` or `correct`: which siblings may be students.
        reference: `efficient`, or an ablation that replaces it once the student is chosen: `random_correct`,
            `most_different` or `random` (see `ofsd.reference`).
        seed: of the random references, drawn per question.
    """
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.question.id, []).append(trajectory)
    pairs: list[Pair] = []
    counted = ("none_correct", "none_less_efficient", "wrong_students", "correct_students", "other_references")
    counts = dict.fromkeys(counted, 0)
    for group in groups.values():
        right = [t for t in group if t.correct]
        if not right:
            counts["none_correct"] += 1
            continue
        best = min(right, key=lambda t: (*_efficiency(t), t.sample))
        wrong = [t for t in group if not t.correct] if students != "correct" else []
        worse = [t for t in right if _efficiency(t) > _efficiency(best)] if students != "wrong" else []
        candidates = wrong or worse
        if not candidates:
            counts["none_less_efficient"] += 1
            continue
        student = max(candidates, key=lambda t: (*difference(best, t), -t.sample))
        counts["wrong_students" if wrong else "correct_students"] += 1
        shown = best if reference == "efficient" else _other_reference(group, student, reference, seed)
        counts["other_references"] += shown is not best
        pairs.append(Pair(shown, student))
    return Pairs(pairs, {"questions": len(groups), "pairs": len(pairs), **counts})


def _other_reference(group: Sequence[Trajectory], student: Trajectory, reference: str, seed: int) -> Trajectory:
    """The sibling that an ablation shows instead; the efficient one always qualifies."""
    siblings = [t for t in group if t is not student and (t.correct or reference == "random")]
    siblings.sort(key=lambda t: t.sample)
    if reference == "most_different":
        return max(siblings, key=lambda t: (*difference(student, t), -t.sample))
    return Random(derive_seed(seed, student.question.id)).choice(siblings)


def teacher_prompts(protocol: Protocol, pairs: Sequence[Pair], kind: str, with_documents: bool) -> list[list[int]]:
    """Each pair's teacher prompt: `privileged`, `plain` (the control) or `foreign` (the next pair's reference)."""
    if kind == "plain":
        return [pair.student.prompt_ids for pair in pairs]
    shift = 1 if kind == "foreign" else 0
    return [
        protocol.privileged_prompt_ids(
            pair.student.question.question, pairs[(index + shift) % len(pairs)].reference, with_documents
        )
        for index, pair in enumerate(pairs)
    ]
