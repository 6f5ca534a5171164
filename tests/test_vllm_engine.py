"""vLLM plays the same episodes as our engine. What needs vLLM itself is skipped where it is not installed.

`pip install` of a CPU build of vLLM beside this package is enough to run all of it; examples/README.md says how.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import byte_level_tokenizer, fresh_policy
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Qwen2Config

from searche1_lite.config import Config, EngineConfig, ModelConfig, ProtocolConfig, load_config
from searche1_lite.data.questions import load_questions
from searche1_lite.data.trajectory import Question, Trajectory
from searche1_lite.policy.adapter import save_adapter, use_adapter
from searche1_lite.policy.engine import Decoder, UniformStream, uses_shadow
from searche1_lite.policy.merge import save_merged
from searche1_lite.policy.model import load_policy
from searche1_lite.policy.stopping import end_ids, tag_automaton
from searche1_lite.policy.vllm_decoder import Row, sampling, take
from searche1_lite.policy.vllm_engine import (
    VllmEngine,
    cache_bytes,
    check_vocabulary,
    longest_text,
    lora_room,
    save_plain_base,
)
from searche1_lite.rollout.protocol import Protocol
from searche1_lite.rollout.scheduler import Agent, Hooks, Sampling, rollout
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.progress import SILENT
from searche1_lite.train.session import Session

INSTALLED = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed: pip install -e '.[vllm]'")

Policy = tuple[PeftModel, PreTrainedTokenizerBase]


# Without vLLM.


def test_the_engine_is_ours_unless_it_is_said() -> None:
    assert load_config("demo").engine.backend == "torch"
    assert load_config("demo", None, ["engine.backend=vllm"]).engine.backend == "vllm"
    with pytest.raises(UserError, match=r"^engine\.backend='sglang' is impossible: .*'torch' or 'vllm'$"):
        load_config("demo", None, ["engine.backend=sglang"])


@pytest.mark.skipif(INSTALLED, reason="vLLM is installed")
def test_a_missing_package_is_told_in_one_line_before_anything_is_loaded() -> None:
    config = load_config("demo", None, ["engine.backend=vllm", "model.name=no/such-model", "search.corpus=none.jsonl"])
    with pytest.raises(
        UserError, match=r"^engine\.backend=vllm needs vLLM.*pip install -e '\.\[vllm\]' in the .*$"
    ) as e:
        Session(config, SILENT)
    assert "\n" not in str(e.value)


def test_a_vocabulary_that_differs_in_one_token_is_refused_by_name() -> None:
    ours = byte_level_tokenizer().get_vocab()
    check_vocabulary(ours, dict(ours), 300, 300)
    swapped = ours | {"<search>": ours["</search>"], "</search>": ours["<search>"]}
    with pytest.raises(
        UserError, match=r"^vLLM's vocabulary is not the trainer's: '<search>' is \d+ there and \d+ here"
    ):
        check_vocabulary(ours, swapped, 300, 300)
    more = byte_level_tokenizer()
    more.add_tokens(["<more>"])
    for one, other in ((ours, more.get_vocab()), (more.get_vocab(), ours)):
        with pytest.raises(UserError, match=r"'<more>' is (None|\d+) there and (None|\d+) here \(1 tokens differ\)"):
            check_vocabulary(one, other, 300, 300)
    with pytest.raises(UserError, match=r"^vLLM's model has 320 tokens and the trainer's 300; "):
        check_vocabulary(ours, ours, 300, 320)


def test_a_request_samples_plainly_with_a_seed_of_its_own_and_decodes_nothing() -> None:
    ends = frozenset({7, 3})
    asked = sampling(12, ends, temperature=0.7, seed=5, logprobs=True)
    assert asked["temperature"] == 0.7 and asked["seed"] == 5 and asked["max_tokens"] == 12
    assert asked["stop_token_ids"] == [3, 7] and asked["logprobs"] == 0 and not asked["detokenize"]
    assert "stop" not in asked, "tags are found by our automaton"
    greedy = sampling(12, ends, temperature=0.7, seed=None, logprobs=False)
    assert greedy["temperature"] == 0.0 and greedy["seed"] is None and greedy["logprobs"] is None


@pytest.mark.parametrize("pieces", [1, 2, 100])
def test_a_turn_is_cut_where_the_tag_the_message_or_the_budget_ends_it(pieces: int) -> None:
    """However many tokens come at a time."""
    tokenizer = byte_level_tokenizer()
    automaton, ends = tag_automaton(tokenizer, len(tokenizer)), frozenset({tokenizer.eos_token_id})

    def written(text: str, budget: int = 50) -> tuple[str, str, int]:
        ids, row = tokenizer.encode(text), Row(0, budget=budget)
        logprobs = [-float(place) for place in range(len(ids))]
        for start in range(0, len(ids), pieces):
            if take(row, ids[start : start + pieces], logprobs[start : start + pieces], automaton, ends):
                break
        assert row.turn.logprobs == logprobs[: len(row.turn.ids)]
        return tokenizer.decode(row.turn.ids), row.turn.ended, len(row.turn.ids)

    assert written("<search>Lima</search>and more")[:2] == ("<search>Lima</search>", "tag")
    assert written("<answer>Peru</answer></answer>")[:2] == ("<answer>Peru</answer>", "tag")
    assert written("nothing<|im_end|>and more")[:2] == ("nothing<|im_end|>", "eos")
    assert written("abcdefgh", budget=5) == ("abcde", "budget", 5)
    assert written("<search>x</search", budget=99)[1] == "budget", "it ended without us: the default"


def test_room_is_set_aside_for_ranks_that_vllm_knows() -> None:
    assert [lora_room(rank) for rank in (1, 8, 9, 64, 512)] == [8, 8, 16, 64, 512]
    with pytest.raises(UserError, match=r"^model\.lora_rank=513 is more than vLLM takes; use 512"):
        lora_room(513)


def test_the_cache_holds_a_full_batch_and_the_longest_episode_there_can_be() -> None:
    shape = Qwen2Config(
        hidden_size=128, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, max_position_embeddings=4096
    )
    config = Config(
        engine=EngineConfig(batch_size=10),
        protocol=ProtocolConfig(max_prompt_tokens=100, max_completion_tokens=400, max_turn_tokens=50),
    )
    a_token = 2 * 3 * 2 * 32 * 4
    assert cache_bytes(config, shape, torch.float32) >= 10 * 500 * a_token
    assert cache_bytes(config, shape, torch.bfloat16) * 2 == cache_bytes(config, shape, torch.float32)
    alone = Config(engine=EngineConfig(batch_size=1), protocol=config.protocol)
    assert cache_bytes(alone, shape, torch.float32) >= longest_text(alone, shape) * a_token
    assert 500 + 400 < longest_text(config, shape) <= 4096
    shape.max_position_embeddings = 700
    assert longest_text(config, shape) == 700


def test_no_plain_copy_of_the_weights_is_made_for_vllm() -> None:
    for shadow in ("auto", "always", "never"):
        assert not uses_shadow(EngineConfig(backend="vllm", shadow=shadow), "cpu", 64)


@pytest.mark.parametrize("name", ["tiny", "demo"])
def test_the_plain_base_is_what_the_4_bits_stand_for_and_has_no_adapter_in_it(
    name: str, tiny_policy_folder: Path, tmp_path: Path
) -> None:
    model, _ = fresh_policy(tiny_policy_folder) if name == "tiny" else trained_demo()
    save_plain_base(model, tmp_path)
    plain, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert not hasattr(plain.config, "quantization_config")
    ids = torch.tensor([list(range(3, 60))])
    with torch.inference_mode():
        with use_adapter(model, None):
            torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-2), "the adapter does something"


# With vLLM.


def trained_demo(scale: float = 0.3, seed: int = 0) -> Policy:
    """The demo policy under an adapter that says other things than the base."""
    model, tokenizer = load_policy(ModelConfig(name="demo", lora_rank=8, lora_alpha=16), seed=seed)
    move(model, scale, seed)
    return model, tokenizer


def move(model: PeftModel, scale: float, seed: int) -> None:
    """An update: another adapter, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(scale * 0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def demo_config() -> Config:
    return load_config("demo", None, ["engine.backend=vllm", "engine.batch_size=32"])


@pytest.fixture(scope="module")
def demo(demo_config: Config) -> Iterator[tuple[PeftModel, PreTrainedTokenizerBase, VllmEngine]]:
    """One vLLM for all these tests; each sets the adapter that it wants."""
    model, tokenizer = trained_demo()
    yield model, tokenizer, VllmEngine(demo_config, model, tokenizer)


@pytest.fixture(scope="module")
def demo_retriever(demo_config: Config):
    from searche1_lite.search.catalog import open_retriever

    return open_retriever(demo_config.search, progress=SILENT)


@pytest.fixture(scope="module")
def demo_questions() -> list[Question]:
    return load_questions("demo", "test")[:48]


@pytest.fixture
def play(demo, demo_config, demo_retriever, demo_questions) -> Callable[..., list[Trajectory]]:
    model, tokenizer, engine = demo

    def played(vllm: bool, n: int = 1, **how: object) -> list[Trajectory]:
        agent = Agent(
            model,
            tokenizer,
            how.pop("retriever", demo_retriever),
            Protocol(tokenizer, demo_config.protocol),
            engine=EngineConfig(backend="vllm" if vllm else "torch", batch_size=how.pop("rows", 32)),
            k=3,
            decoder=engine.decoder if vllm else Decoder,
        )
        questions = how.pop("questions", demo_questions)
        sampling = Sampling(("test",), how.pop("greedy", False), how.pop("logprobs", False))
        return rollout(agent, questions, n, sampling, hooks=Hooks(**how))

    return played


def ids_of(trajectories: list[Trajectory]) -> list[list[int]]:
    return [trajectory.completion_ids for trajectory in trajectories]


@needs_vllm
def test_greedy_episodes_are_those_of_our_engine_token_by_token(demo, play) -> None:
    """Searches, documents, masks and ends too; with the adapter, after an update of it, and without any."""
    model = demo[0]
    seen = []
    for scale, seed in ((0.3, 0), (0.3, 1), (0.0, 0)):
        move(model, scale, seed)
        ours, theirs = play(False, greedy=True), play(True, greedy=True)
        assert theirs == ours
        assert sum(t.n_searches for t in theirs) > 0
        seen.append(ids_of(theirs))
    assert seen[0] != seen[1] != seen[2] != seen[0], "each adapter says something else"


@needs_vllm
def test_an_adapter_that_comes_back_and_one_that_is_off_are_not_taken_from_a_stale_cache(demo, play) -> None:
    model = demo[0]
    move(model, 0.3, 0)
    first = play(True, greedy=True)
    with use_adapter(model, None):
        bare = play(True, greedy=True)
        assert bare == play(False, greedy=True)
    again = play(True, greedy=True)
    move(model, 0.3, 1)
    other = play(True, greedy=True)
    move(model, 0.3, 0)
    assert first == again == play(True, greedy=True)
    assert len({str(ids_of(one)) for one in (first, bare, other)}) == 3


@needs_vllm
def test_an_adapter_is_loaded_once_an_update(demo, play) -> None:
    model, _, engine = demo
    move(model, 0.3, 3)
    play(True, greedy=True)
    one = engine._lora
    play(True)
    assert engine._lora is one
    move(model, 0.3, 4)
    play(True)
    assert engine._lora.lora_int_id == one.lora_int_id + 1 and engine._lora.lora_name != one.lora_name
    assert not Path(one.lora_path).exists() and Path(engine._lora.lora_path).exists()
    assert engine._engine.list_loras() == {engine._lora.lora_int_id}


@needs_vllm
def test_kept_logprobs_are_those_of_a_fresh_pass_of_the_trainer(demo, play) -> None:
    model = demo[0]
    move(model, 0.3, 0)
    worst = 0.0
    for t in play(True, n=2, logprobs=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([t.prompt_ids + t.completion_ids])).logits[0, len(t.prompt_ids) - 1 :]
        expected = logits[:-1].log_softmax(-1).gather(1, torch.tensor(t.completion_ids)[:, None])[:, 0]
        mask = torch.tensor(t.loss_mask, dtype=torch.bool)
        worst = max(worst, float((expected - torch.tensor(t.logprobs)).abs()[mask].max()))
        assert len(t.logprobs) == len(t.completion_ids) == len(t.loss_mask)
    assert worst < 1e-4


@needs_vllm
def test_samples_depend_on_their_own_seed_and_on_no_neighbour(demo, play, demo_questions) -> None:
    move(demo[0], 0.3, 0)
    together = play(True, n=4)
    assert len({str(t.completion_ids) for t in together[:4]}) > 1, "samples of a question differ"
    assert ids_of(play(True, n=4, rows=5)) == ids_of(together)
    assert ids_of(play(True, n=4, questions=demo_questions[2:3])) == ids_of(together)[8:12]


@needs_vllm
def test_samples_are_as_often_right_as_those_of_our_engine(demo, play) -> None:
    """The random numbers are others, the distribution is the same."""
    move(demo[0], 0.0, 0)
    ours, theirs = (sum(t.n_model_tokens for t in play(vllm, n=8)) / (48 * 8) for vllm in (False, True))
    assert abs(ours - theirs) < 3.0, (ours, theirs)


@needs_vllm
def test_tokens_are_told_as_they_are_written_and_a_rollout_that_breaks_off_leaves_nothing(demo, play) -> None:
    model, _, engine = demo
    move(model, 0.3, 0)
    told: dict[int, list[int]] = {}
    played = play(True, greedy=True, on_token=lambda episode, token: told.setdefault(id(episode), []).append(token))
    written = [[i for i, m in zip(t.completion_ids, t.loss_mask, strict=True) if m] for t in played]
    assert sorted(told.values()) == sorted(written)

    def breaking(episode: object, token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(True, greedy=True, on_token=breaking)
    assert not engine._engine.has_unfinished_requests()
    assert play(True, greedy=True) == played


def read_and_write(demo, text: list[int], turns: int = 1) -> tuple[list[list[int]], list[float], list[int]]:
    """A row that reads long texts and writes after each: ids, log-probs, and how many tokens were in the cache."""
    model, tokenizer, engine = demo
    decoder = engine.decoder(model, tokenizer, 1, 900, temperature=1.0, logprobs=True)
    cached: list[int] = []
    written: list[list[int]] = []
    logprobs: list[float] = []
    real = engine._engine.step

    def step() -> object:
        outputs = real()
        cached.extend(output.num_cached_tokens for output in outputs)
        return outputs

    engine._engine.step = step
    try:
        for turn in range(turns):
            decoder.prefill([0], [text if turn == 0 else written[-1][-1:] + [9] * 20])
            decoder.begin(0, 7, 4, UniformStream(turn))
            while decoder.writing.any():
                for _, sampled in decoder.step():
                    written.append(sampled.ids)
                    logprobs += sampled.logprobs
    finally:
        del engine._engine.step
        decoder.close()
    return written, logprobs, cached


LONG = [5 + index % 40 for index in range(600)]


@needs_vllm
def test_what_a_turn_read_before_is_not_computed_again(demo) -> None:
    """A later turn's prompt begins with all that went before, in blocks that are cached."""
    move(demo[0], 0.3, 11)
    cached = read_and_write(demo, LONG, turns=2)[2]
    assert cached[0] == 0 and cached[-1] >= 500


@needs_vllm
def test_no_cached_block_of_the_weights_before_an_update_is_read(demo) -> None:
    model = demo[0]
    for seed in (12, 13):
        move(model, 0.3, seed)
        written, logprobs, cached = read_and_write(demo, LONG)
        ids = LONG + [7] + written[0]
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)[len(LONG) : -1]
        expected = expected.gather(1, torch.tensor(written[0])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-4)
        assert cached[0] == 0


@needs_vllm
def test_an_engine_whose_vocabulary_is_not_the_trainers_is_refused(demo_config, demo) -> None:
    model, _, _ = demo
    other = load_policy(demo_config.model, seed=0)[1]
    other.add_tokens(["<more>"])
    with pytest.raises(UserError, match=r"^vLLM's vocabulary is not the trainer's: '<more>' is None there"):
        VllmEngine(demo_config, model, other)


@needs_vllm
def test_an_episode_longer_than_vllm_was_started_for_is_refused(demo) -> None:
    model, tokenizer, engine = demo
    with pytest.raises(UserError, match=r"^an episode of 5000 tokens is more than the \d+ that vLLM was started for"):
        engine.decoder(model, tokenizer, 1, 5000)


@needs_vllm
def test_a_merged_export_is_served_as_plain_transformers_has_it(demo, demo_questions, tmp_path: Path) -> None:
    from vllm import LLM, SamplingParams, TokensPrompt

    policy, tokenizer, _ = demo
    save_adapter(policy, tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    save_merged(ModelConfig(name="demo"), tmp_path / "adapter", tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    protocol = Protocol(tokenizer, ProtocolConfig())
    prompts = [protocol.prompt_ids(question.question) for question in demo_questions[:20]]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ends = sorted(end_ids(policy, tokenizer))
    with torch.inference_mode():
        wanted = [
            plain.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=16, eos_token_id=ends)[0, len(ids) :]
            for ids in prompts
        ]
    served = LLM(
        str(tmp_path / "merged"), dtype="float32", enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=2**26
    )
    settings = SamplingParams(temperature=0, max_tokens=16, stop_token_ids=ends)
    outputs = served.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], settings, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == [ids.tolist() for ids in wanted]
