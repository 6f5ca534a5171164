"""Estimates a round of 170,000 questions with Qwen2.5-3B: hours by part and searches a second, by number of cards.

Rollouts are simulated (`simulation.py`): the real scheduler, on passes that take as long as a card
needs at best to read weights and cache, or for the arithmetic, divided by `--efficiency`. Training is arithmetic alone.
A step ends with its slowest card. One process writes all rollouts down (`writing down`).
**A plan, not a measurement**: the efficiency, the lengths of episodes and the time of a search are assumptions. On your
card, `searche1-lite bench` and the `summary.json` of a run give real values. The estimate leaves out evaluation, cards
that idle while groups without an advantage are skipped, and the memory that a round's rollouts need.

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=170_000, help="questions of a round")
    parser.add_argument("--efficiency", type=float, default=0.4, help="fraction of the card's peak that is reached")
    parser.add_argument("--bandwidth", type=float, default=1008, help="memory bandwidth of the card, GB/s")
    parser.add_argument("--tflops", type=float, default=165, help="peak of the card in bf16, TFLOP/s")
    parser.add_argument("--slots", type=int, default=80, help="episodes side by side on a card")
    parser.add_argument("--search-ms", type=float, default=50, help="milliseconds of one core per search")
    parser.add_argument("--search-threads", type=int, default=4, help="search threads per card")
    parser.add_argument("--record-ms", type=float, default=4, help="milliseconds to store a rollout and read it again")
    parser.add_argument("--pairs", type=float, default=0.4, help="fraction of questions that give a pair")
    parser.add_argument("--network", type=float, default=10, help="network bandwidth between machines, Gbit/s")
    args = parser.parse_args()
    card = Card(args.bandwidth * 1e9, args.tflops * 1e12, args.efficiency, args.search_ms / 1e3, args.search_threads)
    sample = scripts(100, seed=1000)
    written = sum(turn.tokens for s in sample for turn in s.turns) / len(sample)
    print(
        f"{2 * GROUP * args.questions:,} rollouts of {tokens_of(sample):,.0f} tokens, {written:.0f} of them written\n"
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
            args.questions,
            card,
            slots=args.slots,
            pairs=args.pairs,
            network=args.network * 1e9 / 8,
            record_seconds=args.record_ms / 1e3,
        )
        parts = (found.rollouts, found.training, found.exchange, found.records)
        cells = [f"{cards}", f"{per_step:,}", f"{args.questions // per_step:,}", *(f"{p / 3600:.1f} h" for p in parts)]
        cells += [f"{found.seconds / 3600:.1f}", f"{found.searches_per_second:,.0f}"]
        cells.append(f"{math.ceil(found.searches_per_second * args.search_ms / 1e3):,}")
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
