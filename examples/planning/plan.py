"""A round of 170,000 questions with Qwen2.5-3B, on paper: hours by part and searches a second, by number of cards.

Rollouts are simulated (`simulation.py`): the real scheduler, on passes that take as long as a card
needs at best to read weights and cache, or for the arithmetic, divided by `--efficiency`. Training is arithmetic alone.
A step ends with its slowest card. What one process does for all, in the meantime, is the writing down of rollouts.
**A plan, not a measurement**: the efficiency, the lengths of episodes and what a search takes are assumptions. On your
card, `searche1-lite bench` and the `summary.json` of a run tell what to put in their place. It leaves out that groups
which teach nothing leave cards idle in training, evaluation, and what it takes to hold the rollouts of a round.

python examples/planning/plan.py --efficiency 0.4
"""

import argparse
import math
import random
from dataclasses import dataclass

import searche1_lite as s1

s1.quieten()

from simulation import Script, Written, simulate

from searche1_lite.bench.limits import Demand, step_limit
from searche1_lite.train.run import EPISODES_AT_ONCE

LAYERS, HEAD = 2.77e9, 0.31e9
"""Parameters of Qwen2.5-3B; the output embeddings are only used where the policy writes."""
WRITING = Demand(weight_bytes=6_170_000_000, kv_bytes=36 * 1024, flops=int(2 * (LAYERS + HEAD)))
"""What a token asks for: bf16 weights, 36 layers with 2 KV heads of 128."""
READING = Demand(weight_bytes=5_540_000_000, kv_bytes=36 * 1024, flops=int(2 * LAYERS))
ADAPTER_BYTES = 4 * 36 * 32 * 51_968
"""Gradients of a LoRA of rank 32 on all linear layers, in fp32: 240 MB."""
TRAINED, SCORED = 6 * LAYERS, 2 * LAYERS
"""Operations a token: forward, recomputed forward (checkpointing) and backward to the inputs; forward alone."""
GROUP = 5


@dataclass(frozen=True)
class Card:
    """What the arithmetic needs of it. Bytes, operations, seconds."""

    bandwidth: float
    flops: float
    efficiency: float
    search_seconds: float
    search_threads: int

    def start(self) -> float:
        return 3 * WRITING.weight_bytes / self.bandwidth / self.efficiency  # the bf16 copy of the base, made anew

    def step(self, rows: int, columns: int) -> float:
        return step_limit(WRITING, rows, columns / rows, self.bandwidth, self.flops) / self.efficiency

    def prefill(self, tokens: int, columns: int) -> float:
        return step_limit(READING, tokens, 0, self.bandwidth, self.flops) / self.efficiency

    def copy(self, tokens: int) -> float:
        return 2 * tokens * WRITING.kv_bytes / self.bandwidth

    def turn(self) -> float:
        return 20e-6

    def search(self, queries: int) -> float:
        return self.search_seconds * queries / min(queries, self.search_threads) if queries else 0.0


def scripts(questions: int, seed: int) -> list[Script]:
    """Episodes as one may expect them, `GROUP` of each question: one to three searches, turns of 80 tokens on average,
    500 tokens of documents a search, a prompt of 140."""
    chance, made = random.Random(seed), []
    for group in range(questions):
        for sample in range(GROUP):
            searches = chance.choice((1, 2, 3))
            turns = [
                Written(min(500, 1 + round(chance.gammavariate(3, 80 / 3))), 500 if turn < searches else 0,
                        f"{group} {sample} {turn}" if turn < searches else None)
                for turn in range(searches + 1)
            ]  # fmt: skip
            made.append(Script(group, 140, tuple(turns)))
    return made


def tokens_of(played: list[Script]) -> float:
    """A trajectory's, prompt and documents included, on average."""
    return sum(s.prompt + sum(turn.tokens + turn.reply for turn in s.turns) for s in played) / len(played)


@dataclass
class Plan:
    """Seconds of one round, by part, and the searches of all cards in a second of GRPO's rollouts."""

    rollouts: float
    training: float
    exchange: float
    records: float
    searches_per_second: float

    @property
    def seconds(self) -> float:
        return self.rollouts + self.training + self.exchange + self.records


def slowest(seconds: list[float], cards: int) -> float:
    """The longest of so many draws, as those that were drawn make one expect it."""
    ordered, count = sorted(seconds), len(seconds)
    return sum(value * (((at + 1) / count) ** cards - (at / count) ** cards) for at, value in enumerate(ordered))


def plan(
    cards: int,
    per_step: int,
    questions: int,
    card: Card,
    *,
    slots: int,
    pairs: float,
    network: float,
    record_seconds: float,
) -> Plan:
    """One round: GRPO over all questions, fresh rollouts of all, OFSD over the pairs.

    Args:
        per_step: questions of a GRPO step, on all cards together.
        slots: episodes side by side on one card.
        pairs: the share of questions that give one.
        network: bytes a second between machines of eight cards.
        record_seconds: that one rollout takes the first process to write down.
    """
    own = per_step // cards
    played = [scripts(own, seed) for seed in range(max(8, 320 // (own * GROUP)))]
    steps = [simulate(one, slots, card, in_step=False) for one in played]
    many = scripts(EPISODES_AT_ONCE * slots // GROUP, seed=1000)
    fresh = simulate(many, slots, card, in_step=False)
    updates = questions / per_step
    length, arithmetic = tokens_of(many), card.flops * card.efficiency * cards
    trained = questions * GROUP * (TRAINED + SCORED) + pairs * questions * (TRAINED + 2 * SCORED)
    exchange = 0.0 if cards == 1 else 2 * ADAPTER_BYTES / (12e9 if cards <= 8 else network)
    mean = sum(step.seconds for step in steps) / len(steps)
    return Plan(
        rollouts=updates * slowest([step.seconds for step in steps], cards)
        + questions * GROUP / len(many) * fresh.seconds / cards,
        training=trained * length / arithmetic,
        exchange=(1 + pairs) * updates * exchange,
        records=2 * questions * GROUP * record_seconds,
        searches_per_second=cards * sum(step.searches for step in steps) / len(steps) / mean,
    )


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--questions", type=int, default=170_000, help="of a round")
    asked.add_argument("--efficiency", type=float, default=0.4, help="of what the card could do at best")
    asked.add_argument("--bandwidth", type=float, default=1008, help="of the card's memory, GB/s")
    asked.add_argument("--tflops", type=float, default=165, help="of the card, in bf16")
    asked.add_argument("--slots", type=int, default=80, help="episodes side by side on a card")
    asked.add_argument("--search-ms", type=float, default=50, help="that a search takes one core")
    asked.add_argument("--search-threads", type=int, default=4, help="that search for one card")
    asked.add_argument("--record-ms", type=float, default=4, help="that a rollout takes to be written down")
    asked.add_argument("--pairs", type=float, default=0.4, help="share of questions that give a pair")
    asked.add_argument("--network", type=float, default=10, help="between machines, Gbit/s")
    told = asked.parse_args()
    card = Card(told.bandwidth * 1e9, told.tflops * 1e12, told.efficiency, told.search_ms / 1e3, told.search_threads)
    sample = scripts(100, seed=1000)
    written = sum(turn.tokens for s in sample for turn in s.turns) / len(sample)
    print(
        f"{2 * GROUP * told.questions:,} rollouts of {tokens_of(sample):,.0f} tokens, {written:.0f} of them written\n"
    )
    heads = (
        *("cards", "questions a step", "updates of GRPO", "rollouts", "training", "exchange", "writing down", "hours"),
        *("searches/s", "cores for them"),
    )
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    for cards, per_step in ((1, 16), (8, 16), (8, 128), (64, 64), (64, 1024)):
        found = plan(
            cards,
            per_step,
            told.questions,
            card,
            slots=told.slots,
            pairs=told.pairs,
            network=told.network * 1e9 / 8,
            record_seconds=told.record_ms / 1e3,
        )
        parts = (found.rollouts, found.training, found.exchange, found.records)
        cells = [f"{cards}", f"{per_step:,}", f"{told.questions // per_step:,}", *(f"{p / 3600:.1f} h" for p in parts)]
        cells += [f"{found.seconds / 3600:.1f}", f"{found.searches_per_second:,.0f}"]
        cells.append(f"{math.ceil(found.searches_per_second * told.search_ms / 1e3):,}")
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
