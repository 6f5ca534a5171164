"""Slots give what a fresh prefill gives, and sampling depends on the trajectory's own seed alone."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import byte_level_tokenizer, fresh_policy, tiny_config
from transformers import MistralConfig, MistralForCausalLM, Qwen2ForCausalLM

from searche1_lite.config import EngineConfig, ModelConfig
from searche1_lite.policy import engine
from searche1_lite.policy import model as model_module
from searche1_lite.policy.engine import CAPTURE_AFTER, Decoder, UniformStream, _Graphs, pick_tokens
from searche1_lite.policy.model import load_policy, shadow_weights
from searche1_lite.policy.onednn import OneDnnLinear
from searche1_lite.runtime.seeds import derive_seed


def fresh_logits(model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0, -1]


@contextmanager
def seen_logits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """The logits of every step, (rows, V) each."""
    seen: list[torch.Tensor] = []
    real = engine.pick_tokens
    with monkeypatch.context() as patch:
        patch.setattr(engine, "pick_tokens", lambda logits, *rest: (seen.append(logits), real(logits, *rest))[1])
        yield seen


def turn(decoder: Decoder, slots: dict[int, list[int]], budget: int = 4) -> dict[int, list[int]]:
    """Has each slot read its text and write one turn; what each wrote."""
    decoder.prefill(list(slots), [ids[:-1] for ids in slots.values()])
    for slot, ids in slots.items():
        decoder.begin(slot, ids[-1], budget, UniformStream(slot))
    written = {}
    while decoder.writing.any():
        written |= {slot: sampled.ids for slot, sampled in decoder.step()}
    return written


@pytest.fixture(params=["4-bit", "plain", "oneDNN"])
def weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """How `shadow_weights` is called, so that the model computes with these."""
    monkeypatch.setattr(model_module, "WORTHWHILE", 0)
    return {"wanted": request.param != "4-bit", "onednn": request.param == "oneDNN"}


@pytest.mark.parametrize("prefill_tokens", [4096, 30, 1])
@torch.inference_mode()
def test_kept_kv_equals_a_fresh_prefill_over_three_uneven_turns(
    tiny_policy, monkeypatch, prefill_tokens: int, weights: dict[str, bool]
) -> None:
    monkeypatch.setattr(engine, "PREFILL_TOKENS", prefill_tokens)
    model, tokenizer = tiny_policy
    rows = {0: list(b"What?"), 2: list(b"A much longer prompt than the others"), 3: list(b"Mid one")}
    with shadow_weights(model, **weights), seen_logits(monkeypatch) as seen:
        decoder = Decoder(model, tokenizer, 5, 300, greedy=True)
        texts = dict(rows)
        for index in range(3):
            seen.clear()
            written = turn(decoder, texts, budget=index + 2)
            for slot, ids in rows.items():
                torch.testing.assert_close(seen[0][slot], fresh_logits(model, ids), atol=1e-5, rtol=1e-5)
                rows[slot] = ids + written[slot]
            texts = {slot: [rows[slot][-1], *b" docs" * (1 + (slot + index) % 3)] for slot in rows}
            rows = {slot: ids + texts[slot][1:] for slot, ids in rows.items()}
    assert len(rows[2]) > 45


@pytest.mark.parametrize("large", [True, False])
@torch.inference_mode()
def test_rollouts_in_fp32_on_a_cpu_leave_large_layers_to_onednn(tiny_policy, monkeypatch, large: bool) -> None:
    model, tokenizer = tiny_policy
    head = model.get_output_embeddings()
    monkeypatch.setattr(model_module, "WORTHWHILE", head.weight.numel() + (not large))
    for shadow, there in (("never", True), ("auto", True), ("auto", False)):
        monkeypatch.setattr(engine, "has_onednn", lambda there=there: there)
        with engine.rollout_context(model, EngineConfig(shadow=shadow), 4):
            assert isinstance(model.get_output_embeddings(), OneDnnLinear) is (large and there and shadow == "auto")
            assert turn(Decoder(model, tokenizer, 1, 100, greedy=True), {0: list(b"What?")})[0]
        assert model.get_output_embeddings() is head


@torch.inference_mode()
def test_rows_that_are_shared_moved_and_given_back_leave_the_others_as_they_were(tiny_policy, monkeypatch) -> None:
    model, tokenizer = tiny_policy
    prompts = [list(b"one"), list(b"second row"), list(b"3")]
    decoder = Decoder(model, tokenizer, 4, 100, greedy=True)
    decoder.prefill([0, 1, 2], [ids[:-1] for ids in prompts])
    decoder.share(1, 3, len(prompts[1]) - 1)  # a sibling
    decoder.release(0)
    decoder.move(2, 0)
    decoder.prefill([2], [list(b"another, longer than what was here before")])
    for slot, token in ((0, prompts[2][-1]), (1, prompts[1][-1]), (2, ord("!")), (3, prompts[1][-1])):
        decoder.begin(slot, token, 2, None)
    with seen_logits(monkeypatch) as seen:
        decoder.step()
    texts = [prompts[2], prompts[1], list(b"another, longer than what was here before!"), prompts[1]]
    for slot, ids in enumerate(texts):
        torch.testing.assert_close(seen[0][slot], fresh_logits(model, ids), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_row_is_moved_in_the_middle_of_a_turn_and_writes_on(tiny_policy) -> None:
    model, tokenizer = tiny_policy

    def sample(move: bool) -> list[int]:
        decoder = Decoder(model, tokenizer, 3, 100)
        decoder.prefill([2], [list(b"Where is Lim")])
        decoder.begin(2, ord("a"), 12, UniformStream(7))
        ended = [decoder.step() for _ in range(5)]
        if move:
            decoder.move(2, 0)
        while decoder.writing.any():
            ended.append(decoder.step())
        return ended[-1][0][1].ids

    assert sample(True) == sample(False) and len(sample(True)) > 6


@torch.inference_mode()
def test_greedy_tokens_equal_generates_on_64_questions_with_three_turns_each(
    tiny_policy, weights: dict[str, bool]
) -> None:
    """`generate` prefills every row by itself, from its beginning, in every turn."""
    model, tokenizer = tiny_policy
    rng = Random(0)
    rows = {slot: [*b"Q: ", *rng.choices(range(97, 123), k=rng.randrange(1, 30))] for slot in range(64)}
    with shadow_weights(model, **weights):
        decoder = Decoder(model, tokenizer, 64, 300, greedy=True)
        texts, turns = dict(rows), []
        for _ in range(3):
            written = turn(decoder, texts, budget=6)
            turns.append([(rows[slot], written[slot]) for slot in rows])
            replies = {slot: rng.choices(range(97, 123), k=rng.randrange(0, 40)) for slot in rows}
            texts = {slot: [written[slot][-1], *replies[slot]] for slot in rows}
            rows = {slot: ids + written[slot] + replies[slot] for slot, ids in rows.items()}
    for before, ids in (pair for pairs in turns for pair in pairs):
        generated = model.generate(
            input_ids=torch.tensor([before]),
            attention_mask=torch.ones((1, len(before)), dtype=torch.long),
            max_new_tokens=len(ids),
            do_sample=False,
            pad_token_id=0,
        )
        assert generated[0, len(before) :].tolist() == ids


@torch.inference_mode()
def test_a_sampled_row_does_not_depend_on_its_neighbours(tiny_policy) -> None:
    model, tokenizer = tiny_policy

    def sample(neighbours: int) -> list[int]:
        decoder = Decoder(model, tokenizer, neighbours + 1, 100)
        prompts = [list(b"other prompt %d" % index) for index in range(neighbours)] + [list(b"Q: Lima")]
        decoder.prefill(range(neighbours + 1), [ids[:-1] for ids in prompts])
        for slot, ids in enumerate(prompts):
            decoder.begin(slot, ids[-1], 20, UniformStream(derive_seed("own" if slot == neighbours else slot)))
        while decoder.writing[neighbours]:
            ended = dict(decoder.step())
        return ended[neighbours].ids

    alone = sample(0)
    assert len(alone) > 5 and sample(2) == alone and sample(7) == alone and sample(63) == alone


@torch.inference_mode()
def test_sampled_logprobs_equal_recomputed_ones(tiny_policy) -> None:
    model, tokenizer = tiny_policy
    prompt = list(b"Q: Quito")
    decoder = Decoder(model, tokenizer, 1, 100, temperature=0.7, logprobs=True)
    decoder.prefill([0], [prompt[:-1]])
    decoder.begin(0, prompt[-1], 16, UniformStream(3))
    while decoder.writing.any():
        ended = decoder.step()
    sampled = ended[0][1]
    logits = model(input_ids=torch.tensor([prompt + sampled.ids])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits / 0.7, dim=-1).gather(1, torch.tensor(sampled.ids).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.tensor(sampled.logprobs), expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_logprobs_are_kept_only_on_request(tiny_policy) -> None:
    model, tokenizer = tiny_policy
    decoder = Decoder(model, tokenizer, 1, 100)
    decoder.begin(0, 65, 3, UniformStream(3))
    while decoder.writing.any():
        ended = decoder.step()
    assert len(ended[0][1].ids) == 3 and ended[0][1].logprobs == []


def test_inverse_cdf_sampling_follows_the_probabilities() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(3000, 3)
    uniforms = (torch.arange(3000, dtype=torch.float64) + 0.5) / 3000
    tokens, logprobs = pick_tokens(logits, 1.0, uniforms)
    assert (torch.bincount(tokens, minlength=3) / 3000 - torch.tensor([0.5, 0.3, 0.2])).abs().max() < 1e-3
    torch.testing.assert_close(logprobs, logits[0][tokens])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_logits_that_are_no_numbers_give_no_token_and_spoil_no_other_row(sampled: bool, bad: float) -> None:
    logits = torch.zeros(4, 7)
    logits[1, 5], logits[2] = bad, math.nan
    logits[3, 0] = -math.inf  # a token that is impossible is no fault
    uniforms = torch.full((4,), 0.5, dtype=torch.float64) if sampled else None
    tokens, none = pick_tokens(logits, 1.0, uniforms, with_logprobs=False)
    assert none is None and (tokens < 0).tolist() == [False, True, True, False]
    expected, logprobs = pick_tokens(logits, 1.0, uniforms)
    assert logprobs is not None and logprobs.isfinite().tolist() == [True, False, False, True]
    assert tokens[[0, 3]].tolist() == expected[[0, 3]].tolist()


def test_the_models_own_attention_is_back_after_a_pass(tiny_policy) -> None:
    model, tokenizer = tiny_policy
    config = model.get_base_model().config
    decoder = Decoder(model, tokenizer, 1, 20, greedy=True)
    with torch.inference_mode():
        decoder.prefill([0], [[65, 66]])
    assert config._attn_implementation == "sdpa"


def test_a_model_with_sliding_windows_writes_what_generate_writes(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    shape = tiny_config(tokenizer, 0.2).to_dict()
    keys = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "initializer_range", "tie_word_embeddings", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**{key: shape[key] for key in keys}, sliding_window=7))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_policy(ModelConfig(name=str(tmp_path), lora_rank=4, lora_alpha=8), seed=0)
    prompt = list(b"A prompt that is longer than the window")
    with torch.inference_mode():
        ids = turn(Decoder(model, tokenizer, 1, 100, greedy=True), {0: prompt}, budget=15)[0]
        generated = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=len(ids), do_sample=False, pad_token_id=0
        )
    assert generated[0, len(prompt) :].tolist() == ids and len(ids) == 15


def test_a_row_that_reads_nothing_may_write_from_its_first_token(tiny_policy) -> None:
    model, tokenizer = tiny_policy
    with torch.inference_mode():
        ids = turn(Decoder(model, tokenizer, 1, 20, greedy=True), {0: [65]}, budget=1)[0]
        assert ids == [int(fresh_logits(model, [65]).argmax())]


def test_ends_are_told_apart(tiny_policy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = fresh_policy(tiny_policy_folder)
    answer, search = tokenizer.encode("</answer>"), tokenizer.encode("</sear") + tokenizer.encode("ch>")
    cut = tokenizer.encode("</ans") + tokenizer.encode("wer>")
    rows = [answer, search, [tokenizer.eos_token_id], tokenizer.encode("abcdefgh"), cut]
    width = max(map(len, rows))
    columns = iter(torch.tensor([row + [0] * (width - len(row)) for row in rows]).T)
    monkeypatch.setattr(engine, "pick_tokens", lambda *_: (next(columns), None))
    decoder = Decoder(model, tokenizer, len(rows), 40, greedy=True)
    for slot in range(len(rows)):
        decoder.begin(slot, 65, 8 if slot == 3 else 12, None)
    ended = {}
    while decoder.writing.any():
        ended |= dict(decoder.step())
    assert [ended[slot].ended for slot in range(5)] == ["tag", "tag", "eos", "budget", "tag"]
    assert [ended[slot].ids for slot in range(5)] == rows


def test_what_lies_in_memory_before_the_cache_does_not_reach_the_result(tiny_policy, monkeypatch) -> None:
    """Masked columns are multiplied by 0: were they NaN, all would be."""
    model, tokenizer = tiny_policy
    real = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *args, **kw: real(self, *args, **kw).fill_(torch.nan))
    with torch.inference_mode(), seen_logits(monkeypatch) as seen:
        turn(Decoder(model, tokenizer, 2, 90, greedy=True), {0: list(b"short"), 1: list(b"far longer " * 6)})
    assert all(logits.isfinite().all() for logits in seen)


def test_a_random_qwen_without_an_adapter_is_served_as_it_is(tmp_path: Path) -> None:
    """Unquantised, and with plain weights for the shadow."""
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(1)
    Qwen2ForCausalLM(tiny_config(tokenizer, 0.2)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_policy(ModelConfig(name=str(tmp_path), quantization="none"), seed=0)
    with torch.inference_mode():
        plain = turn(Decoder(model, tokenizer, 1, 60, greedy=True), {0: list(b"Hello")}, budget=12)
        with shadow_weights(model):
            assert turn(Decoder(model, tokenizer, 1, 60, greedy=True), {0: list(b"Hello")}, budget=12) == plain


class Capture:
    """In the place of a capture by CUDA, and of the graph: what is done in it is done."""

    within = False

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> None:
        Capture.within = True

    def __exit__(self, *error: object) -> None:
        Capture.within = False
        if error[0] is not None and not isinstance(error[1], torch.OutOfMemoryError):
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        pass


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> _Graphs:
    """Graphs on a CPU: all is real but the capture itself."""
    for name in ("graph", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(_Graphs, "_impossible", False)
    return _Graphs(torch.device("cpu"))


def steps(graphs: _Graphs, shape: tuple[int, int], failure: Exception | None, count: int) -> str:
    """Runs a step so many times, which fails in a capture if there is a `failure`: a letter for each time it was
    computed, plainly or for a graph, and `r` for a replay."""
    log = ""

    def step(shape: tuple[int, int], given: torch.Tensor) -> torch.Tensor:
        nonlocal log
        log += "c" if Capture.within else "p"
        if Capture.within and failure is not None:
            raise failure
        return given + 1

    for _ in range(count):
        before = len(log)
        graphs.run(shape, step, [np.zeros(shape[0])])
        log += "r" if len(log) == before else ""
    return log


PLAIN = "p" * (CAPTURE_AFTER - 1)


def test_a_step_whose_shape_lasts_is_captured_and_then_replayed(graphs: _Graphs) -> None:
    assert steps(graphs, (4, 256), None, CAPTURE_AFTER + 3) == PLAIN + "cp" + "rrr"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_capture_without_memory_leaves_that_shape_alone_without_a_graph(
    graphs: _Graphs, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    assert steps(graphs, (4, 256), error, CAPTURE_AFTER + 3) == PLAIN + "cp" + "ppp"
    assert steps(graphs, (2, 256), None, CAPTURE_AFTER + 1) == PLAIN + "cp" + "r" and not caplog.records


def test_a_step_that_cannot_be_captured_is_told_once_and_none_is_tried_again(
    graphs: _Graphs, caplog: pytest.LogCaptureFixture
) -> None:
    error = RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore of it")
    assert steps(graphs, (4, 256), error, CAPTURE_AFTER + 3) == PLAIN + "cp" + "ppp"
    assert steps(_Graphs(torch.device("cpu")), (2, 256), None, CAPTURE_AFTER + 1) == PLAIN + "pp"
    (told,) = caplog.messages
    assert (
        "(CUDA error: operation not permitted when stream is capturing)" in told and torch.is_autocast_cache_enabled()
    )


def test_a_step_without_memory_is_the_rollouts_to_mend(graphs: _Graphs) -> None:
    def step(shape: tuple[int, int], given: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for _ in range(CAPTURE_AFTER + 1):
        with pytest.raises(torch.OutOfMemoryError):
            graphs.run((4, 256), step, [np.zeros(4)])
    assert not _Graphs._impossible
