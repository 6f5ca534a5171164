"""A table of a few trajectories, shown during training."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from searche1_lite.data.trajectory import Trajectory
from searche1_lite.runtime.terminal import one_line


def is_due(step: int, steps: int, every: int) -> bool:
    """Whether this step shows a table: the last one always, and every `every`-th (0: no other)."""
    return step == steps or (every > 0 and step % every == 0)


def sample_table(title: str, trajectories: Sequence[Trajectory], count: int) -> Table:
    """A row per trajectory: question, queries, answer, gold answer and reward. Its text cannot control the terminal."""
    table = Table(title=Text(one_line(title, 80)))
    for heading, ratio in (("question", 6), ("searches", 6), ("answer", 3), ("gold", 3)):
        table.add_column(heading, ratio=ratio, overflow="fold")
    table.add_column("reward", justify="right", no_wrap=True)
    asked = None
    for trajectory in choose_samples(trajectories, count):
        question = trajectory.question
        if question.id != asked and asked is not None:
            table.add_section()
        golds = question.golden_answers
        answer = f"({trajectory.stopped})" if trajectory.answer is None else one_line(trajectory.answer, 40)
        table.add_row(
            Text(one_line(question.question, 120) if question.id != asked else ""),
            Text(_queries(trajectory)),
            Text(answer, style="" if trajectory.answer is not None else "dim"),
            Text(one_line(golds[0], 40) + (f" (+{len(golds) - 1})" if len(golds) > 1 else "")),
            Text(f"{trajectory.reward:g}", style="green" if trajectory.correct else "red"),
        )
        asked = question.id
    return table


def choose_samples(trajectories: Sequence[Trajectory], count: int) -> list[Trajectory]:
    """At most `count` informative trajectories, deterministically.

    First the most efficient correct one and the first wrong one of each group that has both, then the first of each
    other group, in the order of the questions.
    """
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.question.id, []).append(trajectory)
    mixed: list[Trajectory] = []
    alike: list[Trajectory] = []
    for group in groups.values():
        right = sorted((t for t in group if t.correct), key=lambda t: (t.n_searches, t.n_model_tokens, t.sample))
        wrong = [t for t in group if not t.correct]
        if right and wrong:
            mixed += [right[0], wrong[0]]
        else:
            alike.append(group[0])
    return (mixed + alike)[:count]


def _queries(trajectory: Trajectory) -> str:
    queries = [one_line(search.query, 60) for search in trajectory.searches]
    return "\n".join(f"{number}. {query}" for number, query in enumerate(queries, 1)) or "(none)"
