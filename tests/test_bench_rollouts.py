"""The loops that `bench` compares do the same work, and what it makes of their times."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig

from examples.plot_bench import ratios, save_plot
from searche1_lite.bench import rollout as bench_rollout
from searche1_lite.bench import run_bench as bench
from searche1_lite.bench.baselines import ToolLoop, cut_turn, reprefill_rollouts, stop_ids
from searche1_lite.bench.limits import Demand, demand, step_limit
from searche1_lite.bench.rollout import (
    QuickEpisode,
    Workload,
    _scripted,
    grow,
    knee,
    measure_rollouts,
    report,
    same_tokens,
    scripted_policy,
    shares,
)
from searche1_lite.bench.round import round_shares
from searche1_lite.bench.search import percentile
from searche1_lite.cli.tables import bench_tables
from searche1_lite.config import Config, load_config
from searche1_lite.data.questions import load_questions
from searche1_lite.data.trajectory import Trajectory
from searche1_lite.policy.engine import SampledTurn
from searche1_lite.policy.model import load_policy
from searche1_lite.rollout.episode import Episode
from searche1_lite.rollout.protocol import Action, Protocol
from searche1_lite.rollout.scheduler import RolloutTimes
from searche1_lite.train import session as loaded_run

LOOPS = ("ours", "trl", "reprefill")


class ThreeTurns(Episode):
    """Two searches, for what the policy asks or else for the question, and a third turn that is the last."""

    def take_turn(self, sampled: SampledTurn) -> Action:
        action = super().take_turn(sampled)
        if len(self.trajectory.turns) == 3:
            return Action("answer", action.content)
        return Action("search", action.content or self.trajectory.question.question)


@pytest.fixture(scope="module")
def demo() -> Workload:
    config = load_config("demo")
    model, tokenizer = load_policy(config.model, seed=0)
    return Workload("demo", config, model, tokenizer, load_questions("demo:dev", "dev", 64), 1, True)


def play_all(work: Workload, episode: type[Episode], **limits: int) -> dict[str, list[Trajectory]]:
    """What each loop writes, greedily, under the demo's protocol with some limits changed."""
    config = load_config("demo", None, [f"protocol.{name}={value}" for name, value in limits.items()])
    model, tokenizer, questions, retriever = work.model, work.tokenizer, work.questions, work.retriever()
    protocol = Protocol(tokenizer, config.protocol)
    same = Workload("demo", config, model, tokenizer, questions, 1, True)
    return {
        "ours": same.rollout(retriever, questions, 1, episode, RolloutTimes()),
        "trl": ToolLoop(model, tokenizer, protocol, None).rollouts(retriever, questions, 1, k=3, episode=episode),
        "reprefill": reprefill_rollouts(
            model, tokenizer, retriever, protocol, questions, 1, k=3, temperature=None, episode=episode
        ),
    }


def test_64_questions_of_three_turns_have_the_tokens_that_generate_gives(demo: Workload) -> None:
    played = play_all(demo, ThreeTurns)
    assert len(played["ours"]) == 64 and {len(one.turns) for one in played["ours"]} == {3}
    for one, other, third in zip(*played.values(), strict=True):
        assert one.completion_ids == other.completion_ids == third.completion_ids
        assert one.loss_mask == other.loss_mask == third.loss_mask
        assert one == third and one == other, "turns, searches, answers and rewards are the same too"
    assert len({tuple(one.completion_ids) for one in played["ours"]}) == 64


@pytest.mark.parametrize(
    ("limits", "stopped"),
    [
        ({}, {"answer"}),
        ({"max_turn_tokens": 9}, {"turn_budget"}),
        ({"max_completion_tokens": 70}, {"token_budget"}),
        ({"max_searches": 0}, {"answer"}),
        ({"max_searches": 1}, {"answer"}),
    ],
    ids=str,
)
def test_all_loops_end_episodes_by_the_same_rules(demo: Workload, limits: dict[str, int], stopped: set[str]) -> None:
    played = play_all(demo, Episode, **limits)
    assert played["ours"] == played["reprefill"]
    assert played["ours"] == played["trl"]
    assert stopped <= {one.stopped for one in played["ours"]}


def test_trls_trainer_leaves_policy_and_tokenizer_as_they_were(demo: Workload) -> None:
    before = {name: value.clone() for name, value in demo.model.state_dict().items()}
    template, ends = demo.tokenizer.chat_template, demo.model.get_base_model().generation_config.eos_token_id
    ToolLoop(demo.model, demo.tokenizer, demo.protocol, None)
    after = demo.model.state_dict()
    assert after.keys() == before.keys()
    assert all(value.dtype == after[name].dtype and torch.equal(value, after[name]) for name, value in before.items())
    assert demo.tokenizer.chat_template == template and not demo.model.training
    assert demo.model.get_base_model().generation_config.eos_token_id == ends


@pytest.mark.parametrize(
    ("ids", "budget", "turn"),
    [
        ([5, 6, 8, 0, 0], 9, SampledTurn([5, 6, 8], [0.0] * 3, "tag")),
        ([5, 9, 8], 9, SampledTurn([5, 9], [0.0] * 2, "eos")),
        ([5, 6, 7, 8], 3, SampledTurn([5, 6, 7], [0.0] * 3, "budget")),
        ([5, 6, 8], 3, SampledTurn([5, 6, 8], [0.0] * 3, "tag")),
    ],
)
def test_a_turn_is_cut_at_its_first_end_or_its_budget(ids: list[int], budget: int, turn: SampledTurn) -> None:
    assert cut_turn(ids, budget, stops=[8, 9], ends=frozenset([9])) == turn


def test_a_tokenizer_that_splits_a_closing_tag_is_refused(demo: Workload) -> None:
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token="a")
    with pytest.raises(ValueError, match="one token for each"):
        stop_ids(demo.model, bare)


def byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE({letter: index for index, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


@pytest.fixture(scope="module")
def scripted() -> Iterator[Workload]:
    """Random weights of a small model with a vocabulary beyond the tokenizer's."""
    shape = LlamaConfig(
        vocab_size=2000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    with ExitStack() as stack:
        config, model, tokenizer = stack.enter_context(scripted_policy(shape, QuickEpisode))
        yield _scripted("small", config, model, tokenizer, 6, QuickEpisode, growth=(8, 16))


def test_random_weights_never_write_an_id_that_ends_a_turn(scripted: Workload) -> None:
    stops = stop_ids(scripted.model, scripted.tokenizer)
    assert len(stops) >= 3
    ids = torch.arange(2000).view(20, 100)
    allowed = ~torch.isin(ids, torch.tensor(stops)).all(dim=1)
    with torch.inference_mode():
        logits = scripted.model(input_ids=ids).logits[allowed]
    told = torch.isin(ids, torch.tensor(stops))[allowed]
    assert logits.softmax(dim=-1)[~told][:, stops].max() < 1e-9
    assert (logits.softmax(dim=-1)[~told].max(dim=-1).values < 0.5).all(), "what they do write is of many kinds"


def test_a_script_sets_the_number_of_tokens_whatever_the_loop(scripted: Workload) -> None:
    found = report(scripted, 1)
    assert found["trajectories"] == 6 and found["searches"] == 18 and found["same_tokens"] is None
    assert found["tokens"] == 6 * 4 * 6 and found["environment_tokens"] == 6 * 3 * 30
    assert {found[loop]["tokens"] for loop in LOOPS} == {found["tokens"]}
    growth = found["growth"]
    assert growth["trajectories"] == 16 and growth["seconds_per_trajectory"].keys() == {"8", "16"}
    assert growth["knee"] in (8, 16) and found["bandwidth_fraction"] is None


def without_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory.")


FUNCTIONS = {
    "ours": (Workload, "rollout"),
    "trl": (ToolLoop, "rollouts"),
    "reprefill": (bench_rollout, "reprefill_rollouts"),
}


@pytest.mark.parametrize("lost", [("reprefill",), ("ours",), ("trl", "reprefill")], ids="+".join)
def test_a_loop_that_runs_out_of_memory_has_no_figures_and_costs_no_other_its_own(
    scripted: Workload,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lost: tuple[str, ...],
) -> None:
    for loop in lost:
        monkeypatch.setattr(*FUNCTIONS[loop], without_memory)
    workload = replace(scripted, name="small")
    parts: list[str] = []
    found = report(workload, 2, parts.append)
    assert found is not None and {loop for loop in LOOPS if found[loop] is None} == set(lost)
    assert found["tokens"] == 6 * 4 * 6 and found["decoding"] == "sampled"
    for loop in ("trl", "reprefill"):
        assert (found[f"speedup_vs_{loop}"] is None) is (loop in lost or "ours" in lost)
    gone = "ours" in lost
    assert (found["shares"] is None) is (found["growth"]["knee"] is None) is gone
    told = [
        f"small: {loop}: out of memory, so there are no figures of it; all others are kept"
        for loop in LOOPS
        if loop in lost
    ]
    told += ["small: 8 side by side: out of memory, so there are no figures of it; all others are kept"] * gone
    assert capsys.readouterr().err.splitlines() == told
    assert sum(part.startswith(f"small: {min(lost)}, ") for part in parts) == 1, "it is not tried again"
    whole = {"machine": {"gpu": None, "threads": 1}, "rollout": {"small": found, "other": None}}
    assert json.loads(json.dumps(whole)) == whole
    console = Console(width=100)
    with console.capture() as shown:
        console.print(*bench_tables(whole))
    assert shown.get().count("out of memory") == len(lost) + 1 + 2 * gone


def test_workloads_that_do_not_fit_at_all_are_none(monkeypatch: pytest.MonkeyPatch, scripted: Workload) -> None:
    for owner, name in FUNCTIONS.values():
        monkeypatch.setattr(owner, name, without_memory)
    assert report(scripted, 1) is None
    monkeypatch.setattr(bench_rollout, "demo_workload", without_memory)
    monkeypatch.setattr(bench_rollout, "load_policy", without_memory)
    monkeypatch.setattr(bench_rollout, "save_random_base", lambda *_: None)
    assert measure_rollouts(quick=True) == {"demo": None, "135m_3_layers": None}
    monkeypatch.setattr(bench_rollout, "load_policy", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_rollouts(quick=True)


def test_rollouts_are_on_plain_weights_where_a_run_would_take_them(
    scripted: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What decides it on a GPU is the memory plan, asked for each number of episodes side by side."""
    asked: list[tuple[int, str]] = []

    def room(config: Config, model: Any) -> bool:
        asked.append((config.engine.batch_size, config.engine.shadow))
        return config.engine.batch_size <= 8

    monkeypatch.setattr(loaded_run, "_has_room_for_shadow", room)
    played: list[tuple[int, str]] = []

    def play(work: Workload, *_: Any) -> list[Trajectory]:
        played.append((work.config.engine.batch_size, work.config.engine.shadow))
        return [None] * 16  # type: ignore[list-item]

    monkeypatch.setattr(Workload, "rollout", play)
    sized = _scripted("small", scripted.config, scripted.model, scripted.tokenizer, 12, QuickEpisode, growth=(8, 16))
    assert sized.config.engine.shadow == "never"
    grow(sized)
    assert asked == [(12, "auto"), (8, "auto"), (16, "auto")] and played == [(8, "auto"), (16, "never")]


def test_a_step_moves_the_weights_and_the_cache_or_does_its_sums() -> None:
    one = Demand(weight_bytes=1_000, kv_bytes=10, flops=50)
    assert step_limit(one, rows=1, length=100, bandwidth=1_000, flops=1_000) == pytest.approx(2.0)
    assert step_limit(one, rows=4, length=100, bandwidth=1_000, flops=1_000) == pytest.approx(5.0)
    assert step_limit(one, rows=4, length=100, bandwidth=1e9, flops=100) == pytest.approx(2.0)


def test_what_a_step_asks_for_is_what_the_models_shape_says(scripted: Workload) -> None:
    """Counted on the small model, by hand: 2 layers, hidden 64, 2 key-value heads of 16, fp32."""
    linear = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    head = 2000 * 64
    plain, packed = demand(scripted.model, plain=True), demand(scripted.model, plain=False)
    assert plain == Demand(4 * (linear + head), 2 * 2 * 2 * 16 * 4, 2 * (linear + head))
    assert packed.weight_bytes == pytest.approx(linear * (0.5 + 1 / 64) + 4 * head, rel=1e-3)
    assert (packed.kv_bytes, packed.flops) == (plain.kv_bytes, plain.flops)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({8: 1.0, 16: 0.6, 32: 0.5, 64: 0.5}, 32),
        ({8: 1.0, 16: 0.54, 32: 0.5, 64: 0.6}, 16),
        ({8: 1.0, 16: None, 32: None}, 8),
        ({8: None}, None),
    ],
)
def test_the_knee_is_where_an_episode_takes_about_the_best_time(
    seconds: dict[int, float | None], expected: int | None
) -> None:
    assert knee(seconds) == expected


def test_shares_of_the_engines_time_add_up_to_one() -> None:
    times = RolloutTimes(total=10.0, prefill=2.0, decode=6.0, search_wait=0.5)
    assert shares(times) == {
        "search_wait_share": 0.05,
        "shares": {"prefill": 0.2, "decode": 0.6, "search_wait": 0.05, "other": 0.15},
    }


def test_shares_of_a_round_count_the_rollouts_of_grpo_once() -> None:
    tasks = {
        "base: evaluate": 9.0, "round1: GRPO": 5.0, "round1: roll out": 2.0, "round1: OFSD": 1.0,
        "round1.grpo: evaluate": 0.5, "round1.ofsd: evaluate": 0.5, "round1: teacher (plain)": 0.6,
        "round1: teacher (privileged)": 0.4,
    }  # fmt: skip
    found = round_shares(tasks, grpo_rollout=3.0)
    assert found["seconds"] == {
        "grpo_rollout": 3.0, "grpo_update": 2.0, "ofsd_rollout": 2.0, "ofsd_update": 1.0, "evaluation": 1.0,
        "diagnostics": 1.0,
    }  # fmt: skip
    assert found["shares"]["grpo_rollout"] == 0.3 and sum(found["shares"].values()) == pytest.approx(1.0)


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (50.0, 99.0, 100.0)
    assert percentile([3.0], 0.99) == 3.0


def test_one_other_token_makes_a_trajectory_count_as_unlike(demo: Workload) -> None:
    episodes = demo.rollout(demo.retriever(), demo.questions[:4], 1, Episode, RolloutTimes())
    again = demo.rollout(demo.retriever(), demo.questions[:4], 1, Episode, RolloutTimes())
    assert same_tokens(episodes, again) == 1.0
    again[2].completion_ids[-1] += 1
    assert same_tokens(episodes, again) == 0.75


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return bench(parts=("rollout", "search", "round"), quick=True)


@pytest.mark.slow
def test_bench_gives_every_figure_beside_its_baselines(found: dict[str, Any]) -> None:
    assert json.loads(json.dumps(found)) == found and found["quick"]
    assert found["rollout"].keys() == {"demo", "135m_3_layers"}
    for workload in found["rollout"].values():
        for loop in LOOPS:
            assert workload[loop]["seconds"] > 0 and workload[loop]["tokens"] == workload["tokens"]
        for loop in ("trl", "reprefill"):
            ratio = workload[loop]["seconds"] / workload["ours"]["seconds"]
            assert workload[f"speedup_vs_{loop}"] == pytest.approx(ratio, abs=1e-3)
        assert 0 <= workload["search_wait_share"] <= 1 and workload["bandwidth_fraction"] is None
        assert sum(workload["shares"].values()) == pytest.approx(1.0, abs=1e-3)
    assert found["rollout"]["demo"]["same_tokens"] == 1.0
    search = found["search"]
    assert search["same_results"] == 1.0 and search["remembered_qps"] > search["batch_64"]["ours"]["qps"]
    for size in (1, 64):
        part = search[f"batch_{size}"]
        ratio = part["ours"]["qps"] / part["pyserini"]["qps"]
        assert part["qps_vs_pyserini"] == pytest.approx(ratio, abs=1e-3) and part["queries"] % size == 0
    assert all(seconds >= 0 for seconds in found["round"]["seconds"].values())


@pytest.mark.slow
def test_the_tables_tell_the_speedups_and_the_knee(found: dict[str, Any]) -> None:
    console = Console(width=80)
    with console.capture() as shown:
        for table in bench_tables(found):
            console.print(table, soft_wrap=isinstance(table, str))
    text, demo = shown.get(), found["rollout"]["demo"]
    [row] = [line for line in text.splitlines() if "TRL's loop" in line][:1]
    assert f"{demo['speedup_vs_trl']:.2f}" in row and "…" not in text, "it fits 80 columns"
    assert f"knee at {demo['growth']['knee']}" in text and "100.0% alike in all three" in text
    assert f"{found['search']['batch_64']['qps_vs_pyserini']:.2f}" in text


@pytest.mark.slow
def test_the_plot_has_a_bar_for_each_ratio(found: dict[str, Any], tmp_path: Path) -> None:
    found = found | {"memory": {"grpo_vs_dense": 0.1, "ofsd_vs_dense": None}}
    bars = ratios(found)
    assert bars["GRPO step's memory: dense"] == pytest.approx(10.0)
    assert bars["rollouts, demo: TRL's loop"] == found["rollout"]["demo"]["speedup_vs_trl"]
    assert len(bars) == 1 + 2 * 2 + 2, "a stage that did not fit into memory has no ratio"
    save_plot(found, str(tmp_path / "bench.png"))
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
