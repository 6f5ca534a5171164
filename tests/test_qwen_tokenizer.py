"""Qwen2.5's tokenizer, rebuilt from its published vocabulary: tags, control ids and padded rows as real policies have.

The vocabulary is the file `qwen.tiktoken` that the package `dashscope` carries. A tiny random Qwen2 of that vocabulary,
with more embedding rows than the tokenizer has ids (as the real model), stands for the policy.
"""

import base64
import importlib.util
import itertools
import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import tiktoken
import torch
from conftest import ShelfRetriever, fresh_policy, recorded_gradients, tiny_protocol_config
from peft import PeftModel
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import searche1_lite.policy.engine
from searche1_lite.config import Config, EngineConfig, GRPOStageConfig, ModelConfig, OFSDStageConfig
from searche1_lite.data.trajectory import Passage, Question, Trajectory
from searche1_lite.policy.engine import Decoder, SampledTurn
from searche1_lite.policy.model import load_policy
from searche1_lite.policy.stopping import end_ids
from searche1_lite.rollout.protocol import Protocol, parse_turn
from searche1_lite.rollout.scheduler import Agent, Sampling, rollout
from searche1_lite.train.grpo import train_grpo
from searche1_lite.train.ofsd import train_ofsd, training_rows
from searche1_lite.train.pairs import Pair, select_pairs
from searche1_lite.train.stage_trainer import StageTraining

Policy = tuple[PeftModel, PreTrainedTokenizerBase]

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
"""Ids 151643 to 151656, flagged special."""
NOT_SPECIAL = [
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>",
]  # fmt: skip
"""Ids 151657 to 151664, one id each all the same."""
ADDED = SPECIAL + NOT_SPECIAL
ROWS = 151_936
"""Embedding rows of the smaller Qwen2.5 models; those from 151,665 on belong to no token."""

CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) or message.role == 'assistant' %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""What Qwen2.5's own template says where there are no tools."""


def published_ranks() -> dict[bytes, int]:
    """Each ordinary token's bytes and its id, from the file in the wheel; the package is not imported."""
    spec = importlib.util.find_spec("dashscope")
    assert spec is not None and spec.origin is not None
    lines = (Path(spec.origin).parent / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge that makes each token: the two parts left when its bytes are merged by all earlier merges."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        cuts = [(token[:end], token[end:]) for end in range(1, len(token))]
        possible = [cut for cut in cuts if max(ranks.get(part, rank) for part in cut) < rank]
        if len(possible) > 1:
            parts = [bytes([byte]) for byte in token]
            while len(parts) > 2:
                scores = [ranks.get(one + other, rank) for one, other in zip(parts, parts[1:], strict=False)]
                first = min(range(len(scores)), key=scores.__getitem__)
                parts[first : first + 2] = [parts[first] + parts[first + 1]]
            possible = [(parts[0], parts[1])]
        merges += possible
    return merges


def byte_characters() -> dict[int, str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}


@pytest.fixture(scope="session")
def ranks() -> dict[bytes, int]:
    return published_ranks()


@pytest.fixture(scope="session")
def tokenizer_folder(ranks: dict[bytes, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model's tokenizer as its files are: end of text ends a message, for padding too."""
    characters = byte_characters()

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    tokenizer = Qwen2Tokenizer(
        vocab={written(token): rank for token, rank in ranks.items()},
        merges=[(written(one), written(other)) for one, other in merges_of(ranks)],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=token in SPECIAL) for token in ADDED])
    folder = tmp_path_factory.mktemp("qwen_tokenizer")
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["additional_special_tokens"] = SPECIAL[1:]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


NEXT_TOKEN: dict[str, dict[str | int, float]] = {
    "\n": {"<": 0.9, "<|im_end|>": 0.05, "<|endoftext|>": 0.05},
    "<": {"search": 0.5, "answer": 0.5},
    "search": {">": 1.0},
    "answer": {">": 0.8, ">\n": 0.2},
    ">": {"L": 0.5, 151_700: 0.3, "<tool_call>": 0.2},
    "L": {"ima": 1.0},
    "ima": {"</": 0.8, 151_935: 0.1, "<|im_start|>": 0.1},
    "</": {"search": 0.5, "answer": 0.5},
    "<tool_call>": {"L": 1.0},
    "<|im_start|>": {"</": 1.0},
}
"""What the tiny policy writes after each token; 151,700 and 151,935 have no token. The others go on as `\n` does."""


@pytest.fixture(scope="session")
def policy_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 of 151,936 rows that speaks the protocol by the table above (as conftest's talking policy)."""
    folder, hidden = tmp_path_factory.mktemp("qwen_policy"), 64
    tokenizer = Qwen2Tokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=ROWS,
            hidden_size=hidden,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=2048,
            initializer_range=0.02,
            tie_word_embeddings=False,
            bos_token_id=151_643,
            eos_token_id=151_643,
            pad_token_id=None,
        )
    )

    def one_id(token: str | int) -> int:
        ids = [token] if isinstance(token, int) else tokenizer.encode(token)
        assert len(ids) == 1, f"{token!r} is one token of Qwen's"
        return ids[0]

    directions, scores = torch.zeros(ROWS, dtype=torch.long), torch.full((ROWS, hidden), -30.0)
    for direction, (token, followers) in enumerate(NEXT_TOKEN.items()):
        directions[one_id(token)] = direction
        for follower, probability in followers.items():
            scores[one_id(follower), direction] = math.log(probability)
    for index in (151_700, 151_935):
        directions[index] = list(NEXT_TOKEN).index("<tool_call>" if index == 151_700 else "ima")
    with torch.no_grad():
        model.lm_head.weight.copy_(scores / hidden**0.5)  # the final norm gives every direction this length
        model.model.embed_tokens.weight.copy_(6 * torch.eye(hidden)[directions])
    model.save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def policy(policy_folder: Path) -> Policy:
    """Loaded as a run loads it. Shared: leave it as it was."""
    return fresh_policy(policy_folder)


@pytest.fixture(scope="module")
def tokenizer(policy: Policy) -> PreTrainedTokenizerBase:
    return policy[1]


@pytest.fixture
def protocol(tokenizer: PreTrainedTokenizerBase) -> Protocol:
    return Protocol(tokenizer, tiny_protocol_config(max_document_tokens=400))


TEXTS = [
    "Hello, world!",
    "  spaces   and\ttabs\n\n\nand 1234567890 numbers",
    "Ünïcödé, naïve façade; Ђ ћ Ω ≈ ç √ ∫",
    "中文的分词器，日本語のテキスト、한국어 문장",
    "नमस्ते दुनिया، مرحبا بالعالم، שלום עולם",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 and a zero\u200bwidth",
    "<search> x </search>\n\n<information>Doc 1</information>",
    "I'LL say: they'Re won't",
]


def test_the_rebuilt_tokenizer_is_qwens(tokenizer: PreTrainedTokenizerBase, ranks: dict[bytes, int]) -> None:
    assert len(ranks) == 151_643 and len(tokenizer) == 151_665 < ROWS
    assert [tokenizer.convert_tokens_to_ids(token) for token in ADDED] == list(range(151_643, 151_665))
    assert tokenizer.encode("Hello, world!") == [9707, 11, 1879, 0]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    assert rendered["input_ids"] == [
        151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198,
        151644, 872, 198, 9707, 151645, 198, 151644, 77091, 198,
    ]  # fmt: skip
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == ("<|endoftext|>",) * 2 + ("left",)


@pytest.mark.parametrize("text", TEXTS)
def test_it_encodes_as_tiktoken_does_and_gives_the_text_back(
    tokenizer: PreTrainedTokenizerBase, ranks: dict[bytes, int], text: str
) -> None:
    rival = tiktoken.Encoding("qwen", pat_str=PRETOKENIZE_REGEX, mergeable_ranks=ranks, special_tokens={})
    ids = tokenizer.encode(text)
    assert ids == rival.encode(text)
    assert tokenizer.decode(ids) == text


def disguises(token: str) -> list[str]:
    """A control token whole, in pieces that a careless join would put together, and in other letters."""
    half = len(token) // 2
    return [
        token,
        f"x{token}{token}y",
        f"{token[:half]}{token}{token[half:]}",
        f"{token[:half]}\u200b{token[half:]}",
        f"{token[:half]} {token[half:]}",
        token.upper(),
        token.replace("<", "＜").replace(">", "＞").replace("|", "｜"),
        token.replace("<", "&lt;").replace(">", "&gt;"),
    ]


@pytest.mark.parametrize("token", ADDED)
def test_no_added_token_comes_from_a_document_a_title_or_a_question(protocol: Protocol, token: str) -> None:
    plain_prompt = protocol.prompt_ids("Who?")
    reference = Trajectory(Question("q", "Who?", ["x"]), 0, plain_prompt, [5, 6], [1, 1], [], [], "answer")
    plain_privileged = protocol.privileged_prompt_ids("Who?", reference)

    def control(ids: Sequence[int]) -> list[int]:
        return [index for index in ids if index >= 151_643]

    for text in disguises(token):
        shown = protocol.information_ids([Passage("1", text, f"{text} {text}"), Passage("2", "Peru", text)])
        decoded = protocol.tokenizer.decode(shown)
        assert control(shown) == [] and token not in decoded
        assert decoded.count("<") == decoded.count(">") == 2, "the brackets of the block itself"
        assert ("‹" in decoded) == ("<" in text or "＜" in text)
        prompt = protocol.prompt_ids(text)
        assert control(prompt) == control(plain_prompt)
        assert control(protocol.privileged_prompt_ids(text, reference)) == control(plain_privileged)
        assert protocol.tokenizer.decode(prompt).count(token) == protocol.tokenizer.decode(plain_prompt).count(token)


def test_no_character_of_unicode_turns_into_an_angle_bracket_or_a_control_id(protocol: Protocol) -> None:
    """Qwen's normaliser composes characters; none that is let through may come out as part of a tag."""
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
    for first in range(0, len(characters), 20_000):
        ids = protocol.encode_data(" ".join(characters[first : first + 20_000]))
        assert max(ids) < 151_643
        assert not {"<", ">"} & set(protocol.tokenizer.decode(ids))


def test_a_query_reaches_the_retriever_as_the_text_the_policy_wrote(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode("<search> <tool_call>Lima<|fim_pad|> </search>")
    assert [index for index in ids if index >= 151_643] == [151_657, 151_662], "the policy may write them as one id"
    action = parse_turn(tokenizer.decode(ids, skip_special_tokens=False))
    assert (action.kind, action.content) == ("search", "<tool_call>Lima<|fim_pad|>")


def segmentations(text: bytes, ranks: dict[bytes, int]) -> Iterator[list[int]]:
    """Every way to write `text` in tokens."""
    if not text:
        yield []
    for length in range(1, len(text) + 1):
        if (first := ranks.get(text[:length])) is not None:
            yield from ([first, *rest] for rest in segmentations(text[length:], ranks))


@torch.inference_mode()
def written(policy: Policy, monkeypatch: pytest.MonkeyPatch, rows: Sequence[Sequence[int]]) -> list[tuple[int, str]]:
    """How many of the ids of each row the engine takes, and why it stops, if the policy samples these very ids."""
    model, tokenizer = policy
    width = max(map(len, rows))
    columns = iter(torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]).T)
    monkeypatch.setattr(
        searche1_lite.policy.engine, "pick_tokens", lambda logits, *_: (next(columns)[: len(logits)], None)
    )
    decoder = Decoder(model, tokenizer, len(rows), width + 1, greedy=True)
    for slot, row in enumerate(rows):
        decoder.begin(slot, tokenizer.encode("Q")[0], len(row), None)
    ended: dict[int, SampledTurn] = {}
    while decoder.writing.any():
        ended |= dict(decoder.step())
    turns = [ended[slot] for slot in range(len(rows))]
    for turn, row in zip(turns, rows, strict=True):
        assert turn.ids == list(row)[: len(turn.ids)]
    return [(len(turn.ids), turn.ended) for turn in turns]


@pytest.mark.parametrize("tag", ["search", "answer"])
def test_a_closing_tag_is_seen_however_it_is_cut_into_tokens(
    policy: Policy, ranks: dict[bytes, int], monkeypatch: pytest.MonkeyPatch, tag: str
) -> None:
    tokenizer = policy[1]
    opening = tokenizer.encode(f"<{tag}>Lima")
    ways = list(segmentations(f"</{tag}>".encode(), ranks))
    assert len(ways) > 30 and tokenizer.encode(f"</{tag}>") in ways and max(map(len, ways)) == 9
    # A look-alike that closes nothing stands last: it must run out of its budget.
    rows = [opening + way for way in ways] + [tokenizer.encode(f"<{tag}>Lima</ {tag}> </{tag} >< /{tag}>")]
    taken = written(policy, monkeypatch, rows)
    assert taken == [(len(row), "tag") for row in rows[:-1]] + [(len(rows[-1]), "budget")]
    for row in rows[:-1]:
        action = parse_turn(tokenizer.decode(row, skip_special_tokens=False))
        assert (action.kind, action.content) == (tag, "Lima")


BEFORE = ["Lima", "Lima.", "Lima\n", "Lima\n\n", "5", "利马", "é", " ", "Lima>", "</think>", "👩‍👩‍👧"]
AFTER = ["\n", "\n\n", "<", "</", "><", ">\n", ".", ")", ";", " ", "\r\n", '"', "é", "字"]


@pytest.mark.parametrize("tag", ["search", "answer"])
def test_a_tag_that_shares_tokens_with_its_neighbours_still_ends_the_turn_at_once(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, tag: str
) -> None:
    tokenizer = policy[1]
    texts = {f"<{tag}>{before}</{tag}>{after}": before.strip() for before in BEFORE for after in AFTER}
    rows = [tokenizer.encode(text) for text in texts]
    names = {name for row in rows for name in tokenizer.convert_ids_to_tokens(row)}
    assert {".</", "><", ">\u010a", "></"} <= names, "tags do share tokens with what stands beside them"
    for (text, content), row, (taken, ended) in zip(
        texts.items(), rows, written(policy, monkeypatch, rows), strict=True
    ):
        until = [tokenizer.decode(row[:end], skip_special_tokens=False) for end in range(len(row) + 1)]
        assert until[-1] == text
        assert ended == "tag" and f"</{tag}>" in until[taken] and f"</{tag}>" not in until[taken - 1]
        action = parse_turn(until[taken])
        expected = ("invalid", "") if tag == "search" and not content else (tag, content)
        assert (action.kind, action.content) == expected


def test_text_in_random_tokens_is_taken_up_to_its_first_closing_tag(
    policy: Policy, ranks: dict[bytes, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as the tokenizer would cut it: as a sampler may, with ids between that have no token."""
    rng, tokenizer = random.Random(0), policy[1]

    def cut(text: bytes) -> list[int]:
        ids = []
        while text:
            length = rng.choice([size for size in range(1, min(len(text), 6) + 1) if text[:size] in ranks])
            ids += [ranks[text[:length]], *([rng.randrange(151_665, ROWS)] if rng.random() < 0.2 else [])]
            text = text[length:]
        return ids

    texts = [
        "Im <b>fett</b> <search>Größe</search>",
        "a > b </answers> <answer>日本</answer>",
        "<search>q</ search>x>y",
    ]
    rows = [cut(f"{rng.choice(texts)} >tail".encode()) for _ in range(48)]
    for row, (taken, ended) in zip(rows, written(policy, monkeypatch, rows), strict=True):
        until = [tokenizer.decode(row[:end], skip_special_tokens=False) for end in (taken - 1, taken)]
        closed = ["</search>" in text or "</answer>" in text for text in until]
        assert closed == [False, ended == "tag"] and (ended == "tag" or taken == len(row))
        assert parse_turn(until[1]).kind != "invalid" if ended == "tag" else True


QUESTIONS = [Question(name, f"What about {name}?", ["Lima"]) for name in ("rivers", "a sea", "hills", "<|im_end|>")]


def play(policy: Policy, shelf: ShelfRetriever, n: int = 16, seed: int = 0) -> list[Trajectory]:
    model, tokenizer = policy
    return rollout(
        Agent(
            model,
            tokenizer,
            shelf,
            Protocol(tokenizer, tiny_protocol_config()),
            engine=EngineConfig(batch_size=64),
            k=2,
        ),
        QUESTIONS,
        n,
        Sampling(("qwen", seed)),
    )


def test_stored_ids_are_the_sampled_and_inserted_ones_and_ids_without_a_token_harm_nothing(
    policy: Policy, shelf: ShelfRetriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[list[int]] = []
    pick = searche1_lite.policy.engine.pick_tokens

    def spy(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, logprobs = pick(*args)
        sampled.append(tokens.tolist())
        return tokens, logprobs

    monkeypatch.setattr(searche1_lite.policy.engine, "pick_tokens", spy)
    model, tokenizer = policy
    protocol = Protocol(tokenizer, tiny_protocol_config())
    replied: set[str] = set()
    for question in QUESTIONS:
        for seed in range(3):  # alone in its batch, so that what was picked is what this episode sampled
            sampled.clear()
            (t,) = rollout(
                Agent(model, tokenizer, shelf, protocol, engine=EngineConfig(), k=2), [question], 1, Sampling((seed,))
            )
            expected: list[int] = []
            mask: list[int] = []
            picked, searches = iter([row[0] for row in sampled]), iter(t.searches)
            for turn in t.turns:
                expected += itertools.islice(picked, turn.end - turn.start)
                mask += [1] * (turn.end - turn.start)
                if turn is t.turns[-1]:
                    break
                shown = protocol.correction_ids()
                if turn.kind == "search":
                    shown = protocol.information_ids(next(searches).passages)
                    made = sum(earlier.kind == "search" for earlier in t.turns[: t.turns.index(turn) + 1])
                    shown += protocol.no_more_searches_ids() if made == protocol.config.max_searches else []
                replied.add(turn.kind)
                expected += shown
                mask += [0] * len(shown)
            assert (t.completion_ids, t.loss_mask) == (expected, mask) and next(picked, None) is None
    assert replied == {"search", "invalid"}
    everything = play(policy, shelf)
    seen = {index for t in everything for index in t.completion_ids}
    assert {151_700, 151_935, 151_645, 151_643, 151_644, 151_657} <= seen, "the rare ids were sampled"
    for t in everything:
        assert Trajectory.from_dict(json.loads(json.dumps(t.to_dict()))) == t
        assert all(math.isfinite(value) for value in t.logprobs or [])
        for turn in t.turns:
            ids = t.completion_ids[turn.start : turn.end]
            text = ids[:-1] if ids[-1] in (151_643, 151_645) else ids
            assert turn.text == policy[1].decode(text, skip_special_tokens=False)
    assert any(t.correct and 151_935 in t.completion_ids for t in everything), "ids without a token have no text"
    assert any("<tool_call>" in search.query for t in everything for search in t.searches)


def run_config(**changes: object) -> Config:
    return Config(
        grpo=GRPOStageConfig(steps=1, questions_per_step=4, group_size=4, micro_batch_tokens=1000, warmup_ratio=0.0),
        ofsd=OFSDStageConfig(batch_size=4, micro_batch_tokens=1000, warmup_ratio=0.0),
        protocol=tiny_protocol_config(),
        **changes,
    )


def test_grpo_trains_on_the_very_ids(policy_folder: Path, shelf: ShelfRetriever, tmp_path: Path) -> None:
    model, tokenizer = fresh_policy(policy_folder)
    played: list[Trajectory] = []

    def answer(questions: Sequence[Question], n: int, seed_parts: Sequence[int | str]) -> list[Trajectory]:
        played.extend(play((model, tokenizer), shelf, n)[: len(questions) * n])
        return played

    records: list[dict] = []
    with recorded_gradients(model) as gradient_of:
        train_grpo(
            model,
            tokenizer,
            answer,
            QUESTIONS,
            StageTraining(run_config(), round_index=1, output_dir=tmp_path, on_step=records.append),
        )
        assert math.isfinite(records[0]["loss"]) and records[0]["grad_norm"] > 0
        groups = [played[first : first + 4] for first in range(0, len(played), 4)]
        trained = [t for group in groups if len({t.reward for t in group}) > 1 for t in group]
        for t in trained:
            gradient_of(t)  # LookupError unless prompt and completion went through the model id by id
    assert {index for t in trained for index in t.completion_ids} & set(range(151_665, ROWS))


def test_distillation_trains_on_the_very_ids(policy_folder: Path, shelf: ShelfRetriever, tmp_path: Path) -> None:
    model, tokenizer = fresh_policy(policy_folder)
    protocol = Protocol(tokenizer, tiny_protocol_config())
    rare = [t for t in play((model, tokenizer), shelf) if {151_700, 151_935} & set(t.completion_ids)]
    wrong, right = next(t for t in rare if not t.correct), next(t for t in rare if t.correct)
    pairs = [*select_pairs(play((model, tokenizer), shelf, n=8)).chosen[:3], Pair(reference=right, student=wrong)]
    rows = training_rows(protocol, pairs, run_config())
    for row, pair in zip(rows, pairs, strict=True):
        assert row["completion"] is pair.student.completion_ids and row["mask"] is pair.student.loss_mask
        assert row["prompt"] is pair.student.prompt_ids
        reference = [i for i in pair.reference.completion_ids if i not in set(range(151_643, 151_657))]
        shown = row["teacher_prompt"]
        assert any(shown[start : start + len(reference)] == reference for start in range(len(shown)))
    records: list[dict] = []
    with recorded_gradients(model) as gradient_of:
        train_ofsd(
            model,
            tokenizer,
            protocol,
            pairs,
            StageTraining(run_config(), round_index=1, output_dir=tmp_path, on_step=records.append),
        )
        for pair in pairs:
            gradient_of(pair.student)
    assert all(math.isfinite(record["loss"]) for record in records) and len(records) == -(-len(pairs) // 4)


def test_a_reference_that_ended_its_message_closes_no_message_in_the_teachers_prompt(protocol: Protocol) -> None:
    """The base model's end of sequence is not the chat's: neither may come along, nor any other marker of the chat."""
    ids = [9707, 151_645, 198, 9707, 151_643, 151_644, 9707, 151_656]
    question = Question("q", "Who?", ["x"])
    reference = Trajectory(question, 0, [], ids, [1] * len(ids), [], [], "answer")
    assert protocol.reference_ids(reference) == [9707, 198, 9707, 9707]


def test_the_default_system_message_stands_before_ours_and_the_prompt_opens_the_policys_message(
    protocol: Protocol,
) -> None:
    ids = protocol.prompt_ids("Who?")
    assert protocol.tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nQ: Who?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert [index for index in ids if index >= 151_643] == [151_644, 151_645, 151_644, 151_645, 151_644]


def test_the_base_model_ends_a_turn_by_the_chats_marker_as_well_as_by_its_own(policy: Policy) -> None:
    model, tokenizer = policy
    assert model.get_base_model().generation_config.eos_token_id == tokenizer.eos_token_id == 151_643
    assert end_ids(model, tokenizer) == {151_643, 151_645}


@torch.inference_mode()
@pytest.mark.parametrize("end", [151_643, 151_645])
def test_either_end_id_ends_the_message(policy: Policy, monkeypatch: pytest.MonkeyPatch, end: int) -> None:
    assert written(policy, monkeypatch, [[9707, end, 9707], [9707, 151_644, 9707]]) == [(2, "eos"), (3, "budget")]


def test_an_instruct_models_files_give_the_same_end_ids(policy_folder: Path, tmp_path: Path) -> None:
    for file in policy_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name, changes in {
        "tokenizer_config.json": {"eos_token": "<|im_end|>"},
        "generation_config.json": {"eos_token_id": [151_645, 151_643], "pad_token_id": 151_643},
    }.items():
        content = json.loads((tmp_path / name).read_text()) | changes
        (tmp_path / name).write_text(json.dumps(content))
    model, tokenizer = load_policy(ModelConfig(name=str(tmp_path), lora_rank=4, lora_alpha=8), seed=0)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (151_645, 151_643)
    assert end_ids(model, tokenizer) == {151_643, 151_645}


def test_an_id_without_a_token_has_no_text_and_takes_none_away(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode([151_935]) == "" and tokenizer.decode([27, 151_935, 29, 151_665]) == "<>"
    ids = tokenizer.encode("<search>Lima</search>")
    holed = [index for pair in zip(ids, [151_700] * len(ids), strict=True) for index in pair]
    assert parse_turn(tokenizer.decode(holed)) == parse_turn("<search>Lima</search>")
    assert parse_turn(tokenizer.decode([151_700])).kind == "invalid"
