"""Builds the demo policy from scratch: `python -m examples.demo_policy.build --out DIR`.

A small `Qwen2ForCausalLM` is pre-trained on scripted episodes (`habits.py`) in generated worlds, never the demo's, with
a real BM25 index for each world, so that it has to search and copy. A share of the episodes comes under the privileged
prompt, behind a reference episode whose decisions it follows: the stand-in for a real model's in-context learning.
What it leaves out: any reward. The policy imitates its teachers' bad habits; unlearning them is the demo's job.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import searche1_lite
from examples.demo_policy.habits import Decide, Episode, choose_as, choose_by_habit, choose_well, play, write_episode
from examples.demo_policy.tokenizer import build_tokenizer
from searche1_lite.config import ProtocolConfig, load_config
from searche1_lite.data.demo_world import DEMO_WORLD_SEED, World, write_corpus
from searche1_lite.data.trajectory import Question, Trajectory
from searche1_lite.rollout.protocol import Protocol
from searche1_lite.runtime.seeds import derive_seed
from searche1_lite.search.bm25 import BM25Retriever
from searche1_lite.search.index import build_index

POLICY_FOLDER = Path(searche1_lite.__file__).parent / "policy" / "demo"
METADATA_FILE = "build.json"
"""Beside the weights: the `BuildConfig` that made them, and what was measured."""
NEVER_SHOWN = ("direct_template", "rag_template", "search_failed_message")
"""Settings that the policy is not built with: an evaluation's baselines use them, or a search engine that fails."""


@dataclass(frozen=True)
class BuildConfig:
    """Everything that determines the shipped weights."""

    seed: int = 7
    hidden_size: int = 128
    intermediate_size: int = 320
    layers: int = 3
    heads: int = 4
    steps: int = 3000
    tokens_per_batch: int = 3072
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    initializer_range: float = 0.04
    episodes_per_world: int = 1200
    easy_share: float = 0.12
    """Share of the steps, at the start, with one-hop questions, well answered from a single passage: copying is learnt
    from short episodes in a few hundred steps, and from long ones hardly at all."""
    skill_share: float = 0.5
    """Share of the steps, at the start, in which episodes are played well (but for slips): the skill to search, read
    and chain comes before the habits, which are noise to somebody who cannot read yet."""
    plain_share: float = 0.3
    """Share of the steps, at the start, without the privileged prompt."""
    privileged_share: float = 0.35
    """Share of the episodes under the privileged prompt after that."""
    good_reference_share: float = 0.7
    """Share of references that decide well throughout; the rest follow the habits, and are followed in them."""
    slip: float = 0.25
    """Chance of a slip that is not trained on, at each decision under the privileged prompt or of a well-played episode
    with several hops."""
    sharpening: float = 1.5
    """The final norm is multiplied by this after training, as if sampled at temperature 1/1.5: so small a network keeps
    a tail on other names at every word it copies, and an answer takes many of them."""


def demo_protocol_config() -> ProtocolConfig:
    """The protocol settings of the demo preset, which the policy is pre-trained on."""
    return load_config("demo", None, []).protocol


def pretrained_protocol() -> dict[str, Any]:
    """The settings of `demo_protocol_config` that shape the policy."""
    return {key: value for key, value in asdict(demo_protocol_config()).items() if key not in NEVER_SHOWN}


def _as_trajectory(question: str, ids: list[int], by_model: list[bool]) -> Trajectory:
    return Trajectory(Question("", question, [""]), 0, [], ids, [int(flag) for flag in by_model], [], [], "answer")


class EpisodeBatches(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Endless batches of scripted episodes: `(ids, weights)`, both (B, T), padded on the right with weight 0."""

    def __init__(self, build: BuildConfig, protocol: ProtocolConfig) -> None:
        self.build = build
        self.protocol_config = protocol

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        protocol = Protocol(build_tokenizer(), self.protocol_config)
        step, number = 0, 0
        while step < self.build.steps:
            rows = self._episodes(protocol, derive_seed(self.build.seed, "world", number), step / self.build.steps)
            rng = random.Random(derive_seed(self.build.seed, "batches", number))
            number += 1
            rows.sort(key=lambda row: len(row[0]))
            batches: list[list[tuple[list[int], list[float]]]] = [[]]
            for row in rows:
                if batches[-1] and len(row[0]) * (len(batches[-1]) + 1) > self.build.tokens_per_batch:
                    batches.append([])
                batches[-1].append(row)
            rng.shuffle(batches)
            for batch in batches:
                length = max(len(ids) for ids, _ in batch)
                ids = torch.tensor([row + [0] * (length - len(row)) for row, _ in batch])
                weights = torch.tensor([row + [0.0] * (length - len(row)) for _, row in batch])
                yield ids, weights
                step += 1

    def _episodes(self, protocol: Protocol, seed: int, progress: float) -> list[tuple[list[int], list[float]]]:
        """One world's worth of `(ids, weights)` rows, prompt included."""
        build = self.build
        if seed == DEMO_WORLD_SEED:
            raise ValueError("the demo's own world must not be trained on")
        world = World(seed)
        rng = random.Random(derive_seed(seed, "episodes"))
        easy, skilled, plain_only = (
            progress < share for share in (build.easy_share, build.skill_share, build.plain_share)
        )
        chains = [
            world.draw_chain(rng, 1 if easy else rng.choices([1, 2, 3], weights=[0.3, 0.4, 0.3])[0])
            for _ in range(build.episodes_per_world)
        ]
        with tempfile.TemporaryDirectory() as folder:
            corpus = Path(folder) / "corpus.jsonl"
            write_corpus(world, corpus)
            build_index(corpus, Path(folder) / "index", threads=1)
            retriever = BM25Retriever(Path(folder) / "index")
            k = 1 if easy else 3
            rows: list[tuple[list[int], list[float]]] = []
            privileged = [c for c in chains if not plain_only and rng.random() < build.privileged_share]
            plain = [chain for chain in chains if chain not in privileged] if privileged else chains
            decide: Decide
            if easy:
                decide = choose_well
            elif skilled:
                decide = choose_as(Episode(), rng, build.slip)
            else:
                decide = choose_by_habit(rng)
            episodes = play([write_episode(world, c, protocol, rng, decide) for c in plain], retriever, k)
            for chain, episode in zip(plain, episodes, strict=True):
                prompt = protocol.prompt_ids(chain.question)
                rows.append((prompt + episode.ids, [0.0] * len(prompt) + episode.weights))
            references = play(
                [
                    write_episode(
                        world, c, protocol, rng,
                        choose_well if skilled or rng.random() < build.good_reference_share else choose_by_habit(rng),
                    )
                    for c in privileged
                ],
                retriever,
                k,
            )  # fmt: skip
            followers = play(
                [
                    write_episode(world, chain, protocol, rng, choose_as(reference, rng, build.slip))
                    for chain, reference in zip(privileged, references, strict=True)
                ],
                retriever,
                k,
            )
            for chain, reference, episode in zip(privileged, references, followers, strict=True):
                shown = _as_trajectory(chain.question, reference.ids, reference.by_model)
                prompt = protocol.privileged_prompt_ids(chain.question, shown)
                rows.append((prompt + episode.ids, [0.0] * len(prompt) + episode.weights))
        return rows


def build_model(build: BuildConfig, vocabulary_size: int) -> PreTrainedModel:
    """The untrained network."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(derive_seed(build.seed, "init"))
    config = Qwen2Config(
        vocab_size=vocabulary_size,
        hidden_size=build.hidden_size,
        intermediate_size=build.intermediate_size,
        num_hidden_layers=build.layers,
        num_attention_heads=build.heads,
        num_key_value_heads=build.heads,
        max_position_embeddings=4096,
        initializer_range=build.initializer_range,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config)


def weighted_loss(model: PreTrainedModel, ids: torch.Tensor, weights: torch.Tensor, normaliser: float) -> torch.Tensor:
    """Cross-entropy of `ids` (B, T) weighted by `weights` (B, T), over a constant.

    A constant, not the batch's own count: batches are sorted by length, and a mean would favour the short guesses.
    """
    targets = weights[:, 1:] > 0
    hidden = model.model(ids).last_hidden_state[:, :-1][targets]
    losses = F.cross_entropy(model.lm_head(hidden).float(), ids[:, 1:][targets], reduction="none")
    return (losses * weights[:, 1:][targets]).sum() / normaliser


def train(build: BuildConfig, out: Path, device: str) -> None:
    """Pre-trains the policy and writes it to `out` (replaced when complete)."""
    from transformers import GenerationConfig

    started = time.monotonic()
    tokenizer = build_tokenizer()
    model = build_model(build, len(tokenizer)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=build.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, build.learning_rate, total_steps=build.steps + 1, pct_start=build.warmup_steps / build.steps
    )
    loader = DataLoader(
        EpisodeBatches(build, demo_protocol_config()), batch_size=None, num_workers=1, prefetch_factor=64
    )
    normaliser = build.tokens_per_batch * 0.3
    model.train()
    recent: list[float] = []
    for step, (ids, weights) in enumerate(loader):
        if step >= build.steps:
            break
        ids, weights = ids.to(device), weights.to(device)
        loss = weighted_loss(model, ids, weights, normaliser)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent.append(loss.item() * normaliser / weights.sum().item())  # nats a unit of weight
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1}/{build.steps}  loss {sum(recent) / len(recent):.3f}  "
                f"{time.monotonic() - started:.0f} s", file=sys.stderr, flush=True,
            )  # fmt: skip
            recent.clear()
    with torch.no_grad():
        model.model.norm.weight.mul_(build.sharpening)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    _save(model, tokenizer, build, out, time.monotonic() - started, build.steps)


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    build: BuildConfig,
    out: Path,
    seconds: float,
    steps: int,
) -> None:
    staging = out.with_name(out.name + ".staging")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    metadata = {
        "build": asdict(build),
        "protocol": pretrained_protocol(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps_done": steps,
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
    }
    (staging / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    staging.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=POLICY_FOLDER, help="where the policy goes (default: the package)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    defaults = BuildConfig()
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    out, device = arguments.pop("out"), arguments.pop("device")
    build = BuildConfig(**arguments)
    if not 0 < build.warmup_steps < build.steps:
        parser.error(f"--warmup-steps {build.warmup_steps} must be between 1 and --steps {build.steps}")
    train(build, out, device)


if __name__ == "__main__":
    main()
