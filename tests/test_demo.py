"""The shipped demo policy is the one that the build makes, and as unfinished as it is meant to be."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from examples.demo_policy.build import (
    METADATA_FILE,
    POLICY_FOLDER,
    BuildConfig,
    EpisodeBatches,
    build_model,
    demo_protocol_config,
    pretrained_protocol,
    weighted_loss,
)
from examples.demo_policy.habits import choose_by_habit, choose_well, play, write_episode
from examples.demo_policy.tokenizer import build_tokenizer
from searche1_lite.config import load_config
from searche1_lite.data.demo_world import DEMO_WORLD_SEED, World
from searche1_lite.data.questions import load_questions
from searche1_lite.policy.model import load_policy
from searche1_lite.rollout.metrics import evaluate
from searche1_lite.rollout.protocol import Protocol, parse_turn
from searche1_lite.rollout.scheduler import Sampling
from searche1_lite.runtime.console import RichTasks
from searche1_lite.runtime.seeds import derive_seed
from searche1_lite.search.catalog import open_retriever
from searche1_lite.train.session import Session


@pytest.fixture(scope="module")
def metadata() -> dict:
    return json.loads((POLICY_FOLDER / METADATA_FILE).read_text())


def test_the_shipped_weights_were_made_by_this_build_configuration(metadata: dict) -> None:
    assert metadata["build"] == asdict(BuildConfig()), "rebuild it: python -m examples.demo_policy.build"
    assert metadata["protocol"] == pretrained_protocol(), "the demo preset's protocol changed: rebuild it"
    assert metadata["steps_done"] == BuildConfig().steps and metadata["seconds"] > 0


def test_the_shipped_folder_is_small_and_holds_safetensors_only(metadata: dict) -> None:
    files = list(POLICY_FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files) <= 12 * 2**20
    assert {file.suffix for file in files} == {".json", ".jinja", ".safetensors"}
    weights = load_file(POLICY_FOLDER / "model.safetensors")
    expected = build_model(BuildConfig(), len(build_tokenizer())).state_dict()
    assert {name: value.shape for name, value in weights.items()} == {
        name: value.shape for name, value in expected.items() if name != "lm_head.weight"  # tied to the embedding
    }  # fmt: skip
    assert sum(value.numel() for value in weights.values()) == metadata["parameters"]
    assert AutoConfig.from_pretrained(POLICY_FOLDER).architectures == ["Qwen2ForCausalLM"]


def test_the_shipped_tokenizer_is_the_built_one_and_keeps_any_text() -> None:
    config = load_config("demo")
    _, shipped = load_policy(config.model, seed=0)
    built = build_tokenizer()
    texts = [*(passage["contents"] for passage in World(5).passages()[:50]), "Zürich 東京 <answer>x</answer>\n\t  ‹›"]
    for text in texts:
        assert shipped.encode(text) == built.encode(text)
        assert shipped.decode(shipped.encode(text)) == text
    assert len(built.encode(" Port Lolo", add_special_tokens=False)) == 2


def test_the_build_never_trains_on_the_demos_world() -> None:
    build = BuildConfig()
    seeds = {derive_seed(build.seed, "world", number) for number in range(build.steps)}
    assert DEMO_WORLD_SEED not in seeds
    with pytest.raises(ValueError, match="must not be trained on"):
        batches = EpisodeBatches(build, demo_protocol_config())
        batches._episodes(Protocol(build_tokenizer(), demo_protocol_config()), DEMO_WORLD_SEED, 0.0)


def test_a_build_step_learns_from_model_written_tokens_of_seeded_batches() -> None:
    build = BuildConfig(episodes_per_world=40, tokens_per_batch=512)
    (ids, weights), (ids_again, _) = (
        next(iter(EpisodeBatches(build, demo_protocol_config()))) for _ in range(2)
    )  # fmt: skip
    assert torch.equal(ids, ids_again) and ids.numel() <= 512
    model = build_model(build, len(build_tokenizer()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = weighted_loss(model, ids, weights, 100.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    model.zero_grad()
    weighted_loss(model, ids, weights * 0 + (weights == 1.0), 100.0).backward()
    assert weights.max() == 1.0 and 0 < weights[weights > 0].min() < 0.2, "environment tokens weigh little"


def test_scripted_habits_waste_searches_and_miss_answers_where_good_play_does_not() -> None:
    import random

    config = load_config("demo")
    world, retriever = World(DEMO_WORLD_SEED), open_retriever(config.search)
    protocol = Protocol(build_tokenizer(), config.protocol)
    rng = random.Random(0)
    chains = [world.draw_chain(rng, hops) for hops in (1, 2, 3) for _ in range(30)]
    good, bad = (
        play([write_episode(world, c, protocol, rng, decide) for c in chains], retriever, config.search.k)
        for decide in (choose_well, choose_by_habit(rng))
    )
    assert all(e.answer == c.answer and e.n_searches == len(c.relations) for e, c in zip(good, chains, strict=True))
    right = [e.answer == c.answer for e, c in zip(bad, chains, strict=True)]
    assert 0.3 < sum(right) / len(right) < 0.7
    assert sum(e.n_searches for e in bad) / sum(right) > 2.5
    assert max(e.n_searches for e in bad) <= config.protocol.max_searches
    turn = protocol.tokenizer.decode(good[0].ids).partition("<information>")[0]
    assert parse_turn(turn).content == f"{chains[0].start} {chains[0].relations[0]}"


def test_the_untrained_demo_is_right_on_a_quarter_to_a_half_and_wastes_searches() -> None:
    config = load_config("demo")
    work = Session(config, RichTasks(quiet=True))
    questions = load_questions("demo", "test")
    for greedy in (True, False):
        metrics = evaluate(work.rollout_task("base", questions, 1, Sampling((0, "evaluate"), greedy)), seed=0)
        assert 0.25 <= metrics["em"] <= 0.5, metrics
        assert metrics["searches_per_correct"] > 2.5, "2.0 is what good play needs"
        if not greedy:
            assert 0.02 < metrics["no_search_rate"] < 0.4, "it sometimes guesses"
