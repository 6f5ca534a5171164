"""Rollouts of the engine beside TRL's tool loop and a loop that prefills again every turn: same model, same work.

Two kinds of workload. In `demo` the shipped policy answers its own training questions, greedily: all three loops write
the very same tokens, and it is counted whether they do. In the others the weights are random, tokens are sampled, and a
script sets how long turns and documents are: the number of tokens is the same by construction.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from searche1_lite.bench.baselines import ToolLoop, reprefill_rollouts, stop_ids
from searche1_lite.bench.limits import demand, measure_gpu, step_limit
from searche1_lite.bench.measure import save_random_base
from searche1_lite.config import Config, load_config
from searche1_lite.data.questions import load_questions
from searche1_lite.data.trajectory import Passage, Question, Search, Trajectory
from searche1_lite.policy.engine import Decoder, SampledTurn, uses_shadow
from searche1_lite.policy.model import load_policy
from searche1_lite.policy.shrinking import give_memory_back, is_out_of_memory
from searche1_lite.rollout.episode import Episode
from searche1_lite.rollout.protocol import Action, Protocol
from searche1_lite.rollout.scheduler import Agent, Hooks, RolloutTimes, Sampling, rollout
from searche1_lite.runtime.progress import say_on_stderr
from searche1_lite.search.base import Retriever
from searche1_lite.search.catalog import open_retriever
from searche1_lite.search.index import cache_folder
from searche1_lite.train.session import fitting_engine

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OnPart = Callable[[str], None]
Result = TypeVar("Result")

PROMPT_TOKENS = 136
"""Of the scripted workloads, to within the length of a question."""

NEAR_BEST = 1.1
"""At the knee, an episode takes at most this many times the best time."""


class ScriptedEpisode(Episode):
    """Searches so many times and answers, whatever the policy writes; turns and documents have set lengths."""

    searches, turn_tokens, document_tokens = 3, 32, 3 * 130

    @property
    def budget(self) -> int:
        return self.turn_tokens

    def take_turn(self, sampled: SampledTurn) -> Action:
        super().take_turn(sampled)
        turn = len(self.trajectory.turns)
        self.trajectory.turns[-1].kind = "search" if turn <= self.searches else "answer"
        if turn > self.searches:
            return Action("answer")
        return Action("search", f"{self.trajectory.question.question} {self.trajectory.sample} {turn}")

    def react(self, action: Action, sampled: SampledTurn, passages: list[Passage] | None) -> list[int]:
        if action.kind == "answer":
            return self._end("answer")
        assert passages is not None
        self.trajectory.searches.append(Search(action.content, passages))
        ids = self.protocol.information_ids(passages)
        return self._reply((ids * (self.document_tokens // len(ids) + 1))[: self.document_tokens])


class QuickEpisode(ScriptedEpisode):
    turn_tokens, document_tokens = 6, 30


class OneTurn(ScriptedEpisode):
    searches = 0


@dataclass
class Workload:
    """What is played: `n` episodes of each question, `config.engine.batch_size` of them side by side."""

    name: str
    config: Config
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    questions: list[Question]
    n: int
    greedy: bool
    episode: type[Episode] = Episode
    warm_up: type[Episode] | None = None
    """What warms up a CPU, with one question; None: all that is timed, since Java compiles its search late."""
    growth: tuple[int, ...] = ()
    """Numbers of episodes side by side at which the engine is timed alone."""

    @property
    def protocol(self) -> Protocol:
        return Protocol(self.tokenizer, self.config.protocol)

    def retriever(self) -> Retriever:
        """A new one, which remembers no queries."""
        return open_retriever(self.config.search)

    def rollout(
        self,
        retriever: Retriever,
        questions: Sequence[Question],
        n: int,
        episode: type[Episode],
        times: RolloutTimes,
        decoder: Callable[..., Decoder] = Decoder,
    ) -> list[Trajectory]:
        """The engine's rollouts."""
        return rollout(
            Agent(
                self.model,
                self.tokenizer,
                retriever,
                self.protocol,
                engine=self.config.engine,
                k=self.config.search.k,
                decoder=decoder,
            ),
            questions,
            n,
            Sampling((0, "bench"), greedy=self.greedy),
            hooks=Hooks(episode=episode, times=times),
        )


def demo_workload(quick: bool = False) -> Workload:
    """One GRPO step's rollouts of the demo: 16 questions, 5 times each."""
    config = load_config("demo")
    model, tokenizer = load_policy(config.model, seed=0)
    config = _sized(config, model, 80)
    questions = load_questions("demo:train", "train", 4 if quick else 16)
    growth = (8, 16) if quick else (8, 16, 32, 64, 128, 256)
    return Workload("demo", config, model, tokenizer, questions, 5, True, growth=growth)


def small_shape(layers: int = 30) -> "PretrainedConfig":
    """SmolLM2-135M's shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


@contextmanager
def scripted_policy(
    shape: "PretrainedConfig", episode: type[ScriptedEpisode]
) -> Iterator[tuple[Config, PeftModel, PreTrainedTokenizerBase]]:
    """Random 4-bit weights of this shape under an adapter that is not zero, and settings that fit the script."""
    config = load_config("demo", None, ["model.lora_rank=16", "model.lora_alpha=32", "protocol.max_prompt_tokens=256"])
    # As long as the default prompt for real models is: 136 tokens with SmolLM2's tokenizer.
    config.protocol.plain_template = "\n" * (PROMPT_TOKENS - 60) + "{question}"
    config.protocol.max_turn_tokens = episode.turn_tokens
    turns = episode.searches + 1
    config.protocol.max_completion_tokens = turns * episode.turn_tokens + episode.searches * episode.document_tokens
    cache_folder().mkdir(parents=True, exist_ok=True)  # /tmp may lie in memory
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        config.model.name = str(Path(scratch) / "base")
        save_random_base(shape, Path(config.model.name))
        model, tokenizer = load_policy(config.model, seed=0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
        forbid(model, stop_ids(model, tokenizer))
        yield config, model, tokenizer


@torch.no_grad()
def forbid(model: PeftModel, ids: Sequence[int]) -> None:
    """Keeps random weights from ever writing these ids, so that no turn ends before its budget.

    One hidden dimension is made large for every token, and the output embedding of these ids to point against it.
    """
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        weight[:, 0] = 8.0
    model.get_output_embeddings().weight[list(ids), 0] = -8.0


def measure_rollouts(quick: bool = False, on_part: OnPart = lambda name: None) -> dict[str, Any]:
    """The report of every workload that this machine can play, by name; `bench` describes it.

    None stands for a workload that the GPU's memory did not suffice for.
    """
    gpu = torch.cuda.is_available()
    found: dict[str, Any] = {}
    script = QuickEpisode if quick else ScriptedEpisode

    def play_scripted(shape: "PretrainedConfig", rows_by_name: dict[str, int], repeats: int) -> None:
        with scripted_policy(shape, script) as (config, model, tokenizer):
            for name, rows in rows_by_name.items():
                growth = (8, 16, 32, 64, 128, 256) if rows == 64 else ()
                workload = _scripted(name, config, model, tokenizer, rows, script, growth)
                found[name] = report(workload, repeats, on_part)

    found["demo"] = if_it_fits("demo", lambda: report(demo_workload(quick), 1 if quick else 3, on_part))
    small = {"135m_3_layers" if quick else "135m": 40 if gpu else 5}  # on two slow cores, a group takes TRL 100 s
    kinds = [(small_shape(3 if quick else 30), small, 1 if quick else 2)]
    if gpu and not quick:
        from searche1_lite.policy.capacity import model_shape

        kinds.append((model_shape(load_config()), {f"3b_batch_{rows}": rows for rows in (1, 8, 32, 64)}, 2))
    for kind in kinds:
        found |= dict.fromkeys(kind[1])
        if_it_fits(", ".join(kind[1]), partial(play_scripted, *kind))
    return found


def if_it_fits(what: str, work: Callable[[], Result]) -> Result | None:
    """What `work` gives; None, with a notice, where the GPU's memory does not suffice."""
    try:
        return work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    give_memory_back()  # not before: until its handler ends, the exception holds what its frames held
    say_on_stderr(f"{what}: out of memory, so there are no figures of it; all others are kept")
    return None


def _sized(config: Config, model: PeftModel, rows: int) -> Config:
    """The settings with so many episodes side by side, on plain weights where a run would take them."""
    config = replace(config, engine=replace(config.engine, batch_size=rows, shadow="auto"))
    return replace(config, engine=fitting_engine(config, model))


def _scripted(
    name: str,
    config: Config,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    script: type[ScriptedEpisode],
    growth: tuple[int, ...] = (),
) -> Workload:
    n = next(size for size in (5, 4, 2, 1) if rows % size == 0)
    config = _sized(config, model, rows)
    questions = load_questions("demo:train", "train", rows // n)
    return Workload(name, config, model, tokenizer, questions, n, False, script, OneTurn, growth)


def report(workload: Workload, repeats: int, on_part: OnPart = lambda name: None) -> dict[str, Any] | None:
    """Times the three loops in turn, `repeats` times each, after a warm-up; `bench` describes what it returns.

    None stands for a loop that the GPU's memory did not suffice for, and for the whole if that is so of all three.
    """
    times, gpu = RolloutTimes(), torch.cuda.is_available()
    loops = _loops(workload)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    played: dict[str, list[Trajectory]] = {}

    def play(name: str, part: str, *given: Any) -> tuple[float, list[Trajectory]] | None:
        """Seconds and trajectories of a loop; one without the memory for it is not played again."""
        on_part(f"{workload.name}: {name}, {part}")
        timed = if_it_fits(f"{workload.name}: {name}", lambda: _timed(loops[name], workload.retriever(), *given))
        if timed is None:
            del loops[name]
            played.pop(name, None)
        return timed

    for name in list(loops):
        if gpu or workload.warm_up is None:  # on a GPU, the first call of a shape chooses kernels
            play(name, "warm-up", workload.questions, workload.n, workload.episode, RolloutTimes())
        else:
            play(name, "warm-up", workload.questions[:1], 1, workload.warm_up, RolloutTimes())
    for repeat in range(repeats):
        for name in list(loops):
            given = (workload.questions, workload.n, workload.episode, times)
            if timed := play(name, f"{repeat + 1} of {repeats}", *given):
                seconds[name].append(timed[0])
                played[name] = timed[1]
    if not played:
        return None
    any_, ours = next(iter(played.values())), played.get("ours")
    found: dict[str, Any] = {
        "trajectories": len(any_),
        "tokens": sum(one.n_model_tokens for one in any_),
        "environment_tokens": sum(len(one.loss_mask) - one.n_model_tokens for one in any_),
        "searches": sum(one.n_searches for one in any_),
        "decoding": "greedy" if workload.greedy else "sampled",
    }
    found |= {name: _speed(taken, played[name]) if name in played else None for name, taken in seconds.items()}
    for name in ("trl", "reprefill"):
        both = found[name] and found["ours"]
        found[f"speedup_vs_{name}"] = round(found[name]["seconds"] / both["seconds"], 3) if both else None
    alike = workload.greedy and len(played) == len(seconds)
    found["same_tokens"] = round(same_tokens(*played.values()), 4) if alike else None
    found |= shares(times if ours else RolloutTimes())
    found["bandwidth_fraction"] = None
    if ours:
        limit = f"{workload.name}: bandwidth and arithmetic"
        found["bandwidth_fraction"] = if_it_fits(limit, lambda: bandwidth_fraction(workload, ours, times, repeats))
    if workload.growth:
        found["growth"] = grow(workload, on_part)
    return found


Loop = Callable[[Retriever, Sequence[Question], int, type[Episode], RolloutTimes], list[Trajectory]]


def _loops(workload: Workload) -> dict[str, Loop]:
    """The engine and the baselines, which keep no times by part."""
    model, tokenizer, protocol, k = workload.model, workload.tokenizer, workload.protocol, workload.config.search.k
    temperature = None if workload.greedy else workload.config.engine.temperature
    tool_loop = ToolLoop(model, tokenizer, protocol, temperature)

    def trl(
        retriever: Retriever, questions: Sequence[Question], n: int, episode: type[Episode], times: RolloutTimes
    ) -> list[Trajectory]:
        return tool_loop.rollouts(retriever, questions, n, k=k, episode=episode)

    def reprefill(
        retriever: Retriever, questions: Sequence[Question], n: int, episode: type[Episode], times: RolloutTimes
    ) -> list[Trajectory]:
        return reprefill_rollouts(
            model, tokenizer, retriever, protocol, questions, n, k=k, temperature=temperature, episode=episode
        )

    return {"ours": workload.rollout, "trl": trl, "reprefill": reprefill}


def _timed(play: Loop, *given: Any) -> tuple[float, list[Trajectory]]:
    _finish()
    began = time.perf_counter()
    played = play(*given)
    _finish()
    return time.perf_counter() - began, played


def _finish() -> None:
    """Waits for what the GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _speed(seconds: Sequence[float], played: Sequence[Trajectory]) -> dict[str, Any]:
    median, tokens = statistics.median(seconds), sum(one.n_model_tokens for one in played)
    return {
        "seconds": round(median, 4),
        "seconds_spread": [round(min(seconds), 4), round(max(seconds), 4)],
        "tokens": tokens,
        "trajectories_per_second": round(len(played) / median, 3),
        "tokens_per_second": round(tokens / median, 2),
    }


def same_tokens(*loops: Sequence[Trajectory]) -> float:
    """The share of trajectories that all loops wrote alike, token by token, the environment's included."""
    same = [
        len({(*one.prompt_ids, -1, *one.completion_ids, -1, *one.loss_mask) for one in alike}) == 1
        for alike in zip(*loops, strict=True)
    ]
    return sum(same) / len(same)


def shares(times: RolloutTimes) -> dict[str, Any]:
    """`search_wait_share`, and `shares` of the engine's time by part; None for an engine that keeps no times."""
    if not times.total:
        return {"search_wait_share": None, "shares": None}
    parts = {part: getattr(times, part) / times.total for part in ("prefill", "decode", "search_wait")}
    parts["other"] = max(0.0, 1 - sum(parts.values()))
    rounded = {part: round(share, 4) for part, share in parts.items()}
    return {"search_wait_share": rounded["search_wait"], "shares": rounded}


def bandwidth_fraction(
    workload: Workload, played: Sequence[Trajectory], times: RolloutTimes, repeats: int
) -> float | None:
    """The least seconds that a decoding step needs on this GPU / the seconds it took; None on a CPU.

    The GPU's bandwidth and arithmetic are measured here, on a large copy and a large product of matrices.
    """
    if not torch.cuda.is_available() or not times.decode_steps:
        return None
    rows = repeats * sum(one.n_model_tokens for one in played) / times.decode_steps
    before = [len(one.prompt_ids) + at for one in played for at, own in enumerate(one.loss_mask) if own]
    engine = workload.config.engine
    plain = uses_shadow(engine, "cuda", min(engine.batch_size, len(played)))
    speeds = measure_gpu(workload.model.get_input_embeddings().weight.dtype)
    limit = step_limit(demand(workload.model, plain), rows, sum(before) / len(before), *speeds)
    return round(limit / (times.decode / times.decode_steps), 4)


def grow(workload: Workload, on_part: OnPart = lambda name: None) -> dict[str, Any]:
    """The engine alone, with ever more episodes side by side, the same work every time.

    Returns:
        `trajectories`; `seconds_per_trajectory` by the number side by side, None from where the memory did not suffice;
        and `knee`.
    """
    most = max(workload.growth)
    questions = load_questions("demo:train", "train", most // 8)
    found: dict[int, float | None] = dict.fromkeys(workload.growth)
    for rows in workload.growth:
        on_part(f"{workload.name}: {rows} side by side")
        sized = replace(workload, config=_sized(workload.config, workload.model, rows))
        given = (sized.retriever(), questions, 8, sized.episode, RolloutTimes())
        timed = if_it_fits(f"{workload.name}: {rows} side by side", partial(_timed, sized.rollout, *given))
        if timed is None:
            break
        taken, played = timed
        found[rows] = round(taken / len(played), 5)
    by_rows = {str(rows): taken for rows, taken in found.items()}  # as JSON has its keys
    return {"trajectories": most, "seconds_per_trajectory": by_rows, "knee": knee(found)}


def knee(seconds: dict[int, float | None]) -> int | None:
    """The fewest episodes side by side at which one takes at most `NEAR_BEST` times the best time; None if none ran."""
    ran = {rows: taken for rows, taken in seconds.items() if taken is not None}
    return min((rows for rows, taken in ran.items() if taken <= NEAR_BEST * min(ran.values())), default=None)
