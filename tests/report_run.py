"""Folders of runs and of a sweep, made up, as `train` and `sweep` write them; for the tests of the report."""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searche1_lite.config import dump_config, load_config
from searche1_lite.data.trajectory import Passage, Question, Search, Trajectory, Turn

STAGES = ["base", "round1.grpo", "round1.ofsd"]


@dataclass
class Texts:
    """What somebody else might have written; each is put where it belongs."""

    question: str = "What is the capital of Peru?"
    gold: str = "Lima"
    query: str = "capital of Peru"
    title: str = "Lima"
    document: str = "Lima is the capital of Peru."
    wrong: str = "Quito"


def pieces_of(text: str) -> list[str]:
    """A text in tokens: the protocol's tags, and words with the blank before them."""
    return re.findall(r"</?(?:think|search|answer)>|\s?[^\s<]+|<|\s", text)


def trajectory(number: int, sample: int, right: bool, searches: int, texts: Texts, split: str = "train") -> Trajectory:
    """An episode of question `number`; ids count up, as nobody reads them here."""
    hops = 1 + number % 3
    question = Question(f"{split}-{number}", f"{texts.question} ({number})", [texts.gold], {"hops": hops})
    turns, found, ids, mask = [], [], [], []

    def write(kind: Any, text: str) -> None:
        start = len(ids)
        length = len(pieces_of(text))
        ids.extend(range(length))
        mask.extend([1] * length)
        turns.append(Turn(kind, start, len(ids), text))

    for search in range(searches):
        query = f"{texts.query} {search}"
        write("search", f"<think> look it up</think><search> {query}</search>")
        found.append(Search(query, [Passage(f"{n}", texts.title, f"{texts.document} {n}", 3.5 - n) for n in range(3)]))
        ids.extend([0] * 20)
        mask.extend([0] * 20)
    answer = texts.gold if right else texts.wrong
    write("answer", f"<think> so it is</think><answer> {answer}</answer>")
    reward = float(right)
    return Trajectory(question, sample, [1, 2], ids, mask, turns, found, "answer", answer, reward, reward)


def rollouts(questions: int, siblings: int, texts: Texts) -> list[Trajectory]:
    """Of question q, as many siblings are right as q modulo (siblings + 1); the first is the most efficient."""
    return [
        trajectory(number, sample, sample < number % (siblings + 1), 1 + sample % 3, texts)
        for number in range(questions)
        for sample in range(siblings)
    ]


def is_right(stage: int, number: int) -> bool:
    """Evaluation: question q becomes right at stage q modulo 4, and every fifth one is wrong again in the end."""
    return stage >= number % 4 and not (stage == len(STAGES) - 1 and number % 5 == 0)


def token_kl(group: list[Trajectory]) -> list[dict[str, Any]]:
    """The lines of `roundN.ofsd.kl.jsonl` for one question's siblings; sample 0 is the reference, the last the student.

    KL is 2.31 nats at the first word of a turn, where the teacher would say " mayor", and small elsewhere. Of the
    tokens of the last turn the second is an empty piece, as where a character spans several.
    """
    lines = []
    for t in group:
        role = {0: "reference", len(group) - 1: "student"}.get(t.sample, "sibling")
        turns = []
        for turn in t.turns:
            pieces = pieces_of(turn.text)
            kl = [2.31 if index == 1 else 0.002 * index for index in range(len(pieces))]
            teacher = [" mayor" if index == 1 else piece for index, piece in enumerate(pieces)]
            turns.append({"pieces": pieces, "kl": kl, "teacher": teacher})
        last = turns[-1]
        last["pieces"][1:1], last["kl"][1:1], last["teacher"][1:1] = [""], [0.5], ["é"]
        lines.append(
            {
                "question_id": t.question.id,
                "sample": t.sample,
                "role": role,
                "reference_sample": 0,
                "student_sample": len(group) - 1,
                "turns": turns,
            }  # fmt: skip
        )
    return lines


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def stage_figures(name: str, em: float) -> dict[str, Any]:
    figures = {
        "name": name, "em": em, "em_ci95": [em - 0.05, em + 0.05], "f1": em + 0.01, "n": 40,
        "searches_per_question": 2.0, "searches_per_correct": 2.0 / em, "no_search_rate": 0.0, "invalid_rate": 0.025,
        "unanswered_rate": 0.0, "tokens_per_answer": 30.0, "em_by_hops": {"1": em, "2": em - 0.1}, "seconds": 11.0,
        "peak_memory_mb": 2048.0, "evaluation_seconds": 3.0,
    }  # fmt: skip
    if name.endswith("grpo"):
        figures["rollout_seconds"] = 5.0
    if name.endswith("ofsd"):
        figures |= {
            "kl": {"pairs": 0.152, "plain": 0.0, "foreign": 0.189},
            "pairs": {"questions": 20, "pairs": 12},
            "privilege": {"student": {"em": 0.56}, "teacher": {"em": 0.88}},
            "diagnostic_seconds": 2.4,
        }
    return figures


def write_run(
    folder: Path,
    *,
    questions: int = 20,
    siblings: int = 4,
    asked: int = 40,
    watched: int = 8,
    texts: Texts | None = None,
) -> Path:
    """A run with one round: `questions` x `siblings` rollouts a stage, `asked` questions evaluated after each stage."""
    texts = texts or Texts()
    folder.mkdir(parents=True)
    settings = load_config("demo", overrides=["rounds=1", "seed=7"])
    (folder / "config.yaml").write_text(dump_config(settings), encoding="utf-8")
    stages = [stage_figures(name, em) for name, em in zip(STAGES, (0.45, 0.59, 0.79), strict=True)]
    summary = {
        "seed": 7, "model": "demo", "retriever": "bm25(k1=0.9, b=0.4)", "training": {"data": "demo", "n": 2400},
        "evaluation": {"data": "demo", "n": asked}, "stages": stages,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    rng, metrics = random.Random(0), []
    for step in range(1, 9):
        grpo = {"reward": rng.random(), "kl": 0.001 * step, "zero_std_fraction": 0.3, "tokens_per_second": 4000.0}
        metrics.append({"step": step, "stage": "grpo", "round": 1, "loss": 0.0, "grad_norm": 0.1, **grpo})
    metrics += [{"step": step, "stage": "ofsd", "round": 1, "loss": 1 / step, "grad_norm": 0.2} for step in range(1, 6)]
    write_lines(folder / "metrics.jsonl", metrics)
    place, made = folder / "trajectories", rollouts(questions, siblings, texts)
    for name in STAGES[1:]:
        write_lines(place / f"{name}.rollouts.jsonl", [t.to_dict() for t in made])
    groups = [made[start : start + siblings] for start in range(0, watched * siblings, siblings)]
    write_lines(place / f"{STAGES[2]}.kl.jsonl", [line for group in groups for line in token_kl(group)])
    for stage, name in enumerate(STAGES):
        evaluated = [trajectory(n, 0, is_right(stage, n), 1 + n % 4, texts, "test") for n in range(asked)]
        write_lines(place / f"{name}.evaluation.jsonl", [t.to_dict() for t in evaluated])
    return folder


def write_sweep(
    folder: Path, name: str = "ablations", variant: str = "plain teacher", error: str = "out of memory"
) -> Path:
    """A sweep of a baseline and one variant over two seeds; the variant's second run has failed."""
    folder.mkdir(parents=True)
    variants = []
    for place, title in enumerate(["default", variant]):
        runs: list[dict[str, Any]] = []
        for seed in (0, 1):
            path = f"v{place}/seed {seed}"
            if (place, seed) == (1, 1):
                runs.append({"seed": seed, "folder": path, "state": "failed", "error": error})
                continue
            write_run(folder / path, questions=4, asked=8, watched=2)
            done = {"state": "done", "em": 0.79 - 0.1 * place + 0.01 * seed, "searches": 2.0, "error": None}
            runs.append({"seed": seed, "folder": path, **done, "seconds": 71.0, "updates": 13})
        figures = {"em_mean": 0.795, "em_ci95": [0.6, 0.85], "em_diff": 0.0, "p_value": None, "p_holm": None}
        if place:
            figures = {"em_mean": 0.695, "em_ci95": None, "em_diff": -0.1, "p_value": 0.031, "p_holm": 0.062}
            figures["p_test"] = "paired t-test over seeds"
        figures |= {"searches_mean": 2.0, "seconds": 71.0, "updates": 13}
        variants.append({"name": title, "title": f"{title}!", "seeds": [0, 1], **figures, "runs": runs})
    sweep = {"name": name, "baseline": "default", "seeds": [0, 1], "variants": variants}
    (folder / "sweep.json").write_text(json.dumps(sweep), encoding="utf-8")
    return folder
