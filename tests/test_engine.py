"""The kept cache gives what a fresh prefill gives, and sampling depends on the trajectory's own seed alone."""

import pytest
import torch

from searche1_lite import engine
from searche1_lite.engine import Decoder, UniformStream, pick_tokens
from searche1_lite.seeding import derive_seed


def fresh_logits(model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize(("prefill_tokens", "holes"), [(4096, 64), (9, 64), (1, 64), (4096, 0), (9, 5)])
@torch.inference_mode()
def test_kept_kv_equals_a_fresh_prefill_over_three_uneven_turns(
    tiny_policy, monkeypatch, prefill_tokens: int, holes: int
) -> None:
    monkeypatch.setattr(engine, "PREFILL_TOKENS", prefill_tokens)
    monkeypatch.setattr(engine, "HOLES", holes)
    model, tokenizer = tiny_policy
    rows = [list(b"What?"), list(b"A much longer prompt than the others"), list(b"Mid one")]
    decoder = Decoder(model, tokenizer, rows)
    for turn in range(3):
        for row, turns in enumerate(decoder.sample_turn([3 + turn, 5, 2], 1.0, None)):
            rows[row] = rows[row] + turns.ids
        texts = [list(b" docs" * (turn + 1)), [], list(b"x")]
        decoder.append(texts)
        rows = [row + text for row, text in zip(rows, texts, strict=True)]
        for row, ids in enumerate(rows):
            torch.testing.assert_close(decoder.logits[row], fresh_logits(model, ids), atol=1e-5, rtol=1e-5)
        if turn == 1:
            decoder.keep([2, 0])
            rows = [rows[2], rows[0]]
            break


@torch.inference_mode()
def test_rows_that_are_dropped_leave_the_others_as_they_were(tiny_policy) -> None:
    model, tokenizer = tiny_policy
    decoder = Decoder(model, tokenizer, [list(b"one"), list(b"second row"), list(b"3")])
    decoder.keep([2, 0])
    decoder.append([list(b" more"), list(b"!")])
    torch.testing.assert_close(decoder.logits[0], fresh_logits(model, list(b"3 more")), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decoder.logits[1], fresh_logits(model, list(b"one!")), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_the_cache_stays_about_as_long_as_its_longest_row(tiny_policy, monkeypatch) -> None:
    """Rows that write and read in turns would else leave a hole in all the others each time."""
    monkeypatch.setattr(engine, "HOLES", 8)
    model, tokenizer = tiny_policy
    decoder = Decoder(model, tokenizer, [list(b"one"), list(b"two"), list(b"three")])
    rows = [list(b"one"), list(b"two"), list(b"three")]
    for turn in range(9):
        texts = [list(b"a longer text " * (turn % 3 == row)) for row in range(3)]
        decoder.append(texts)
        rows = [row + text for row, text in zip(rows, texts, strict=True)]
    assert decoder._mask.shape[1] <= max(map(len, rows)) + 8 + 14 < 9 * 14
    assert decoder._cache.layers[0].keys.shape[2] == decoder._mask.shape[1]
    for row, ids in enumerate(rows):
        torch.testing.assert_close(decoder.logits[row], fresh_logits(model, ids), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_greedy_tokens_equal_generate(tiny_policy) -> None:
    model, tokenizer = tiny_policy
    prompt = list(b"Where is Lima")
    turn = Decoder(model, tokenizer, [prompt]).sample_turn([12], 1.0, None)[0]
    generated = model.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=len(turn.ids), do_sample=False, pad_token_id=0
    )[0, len(prompt) :].tolist()
    assert turn.ids == generated


@torch.inference_mode()
def test_a_sampled_row_does_not_depend_on_its_neighbours(tiny_policy) -> None:
    model, tokenizer = tiny_policy
    prompt = list(b"Q: Lima")

    def sample(neighbours: int) -> list[int]:
        prompts = [list(b"other prompt %d" % index) for index in range(neighbours)] + [prompt]
        streams = [UniformStream(derive_seed(index)) for index in range(neighbours)] + [
            UniformStream(derive_seed("own"))
        ]
        return Decoder(model, tokenizer, prompts).sample_turn([20] * len(prompts), 1.0, streams)[-1].ids

    alone = sample(0)
    assert sample(2) == alone and sample(7) == alone


@torch.inference_mode()
def test_sampled_logprobs_equal_recomputed_ones(tiny_policy) -> None:
    model, tokenizer = tiny_policy
    prompt = list(b"Q: Quito")
    turn = Decoder(model, tokenizer, [prompt]).sample_turn([16], 0.7, [UniformStream(3)])[0]
    logits = model(input_ids=torch.tensor([prompt + turn.ids])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits / 0.7, dim=-1).gather(1, torch.tensor(turn.ids).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.tensor(turn.logprobs), expected, atol=1e-4, rtol=1e-4)


def test_inverse_cdf_sampling_follows_the_probabilities() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(3000, 3)
    uniforms = (torch.arange(3000, dtype=torch.float64) + 0.5) / 3000
    tokens, _ = pick_tokens(logits, 1.0, uniforms)
    assert (torch.bincount(tokens, minlength=3) / 3000 - torch.tensor([0.5, 0.3, 0.2])).abs().max() < 1e-3
