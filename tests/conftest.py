"""Real parts, made small: a random Qwen2 policy in NF4 with LoRA, and a retriever over a handful of passages."""

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from searche1_lite.config import ModelConfig, ProtocolConfig
from searche1_lite.data.trajectory import Passage, Trajectory
from searche1_lite.policy.model import load_policy
from searche1_lite.rollout.protocol import Protocol

TAGS = [f"<{slash}{name}>" for name in ("think", "search", "information", "answer") for slash in ("", "/")]
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background; children would ignore Ctrl-C too
    signal.signal(signal.SIGINT, signal.default_int_handler)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; Qwen's chat markers are special tokens, the protocol's tags are added tokens that are not.

    `>` and a newline also exist as one token, as in real vocabularies: a tag can end inside a token.
    """
    characters = sorted(pre_tokenizers.ByteLevel.alphabet()) + [">\u010a"]
    vocabulary = {character: index for index, character in enumerate(characters)}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=(
            "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def tiny_config(tokenizer: PreTrainedTokenizerBase, initializer_range: float) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=initializer_range,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


@pytest.fixture(scope="session")
def tiny_policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model's folder: hidden 64, 2 layers, random but seeded, with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_policy")
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(0)
    # So wide a spread that a greedy choice is never a tie.
    Qwen2ForCausalLM(tiny_config(tokenizer, initializer_range=0.2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_policy(tiny_policy_folder: Path) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The tiny base in NF4 under a LoRA adapter whose weights are not zero. Shared: leave it as it was."""
    return fresh_policy(tiny_policy_folder)


NEXT_TOKEN = {
    "\n": {"<search>": 0.5, "<answer>": 0.4, "<|im_end|>": 0.05, "z": 0.05},
    "z": {"z": 1.0},
    **{letter: {follower: 1.0} for letter, follower in zip("LimPerOsl", "imaeruslo", strict=True)},
    "<search>": {"L": 1.0},
    "a": {"</search>": 0.9, "</answer>": 0.1},
    "<answer>": {"P": 0.5, "O": 0.5},
    "u": {"</answer>": 1.0},
    "o": {"</answer>": 1.0},
}
"""What the talking policy writes after each token: it searches for Lima, answers Peru or Oslo, or says neither."""


@pytest.fixture(scope="session")
def talking_policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model that speaks the protocol, by the table above: its head reads the last token, its layers add little.

    Each token of the table has a direction of its own in the embedding; all others share that of the newline.
    """
    folder = tmp_path_factory.mktemp("talking_policy")
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(tiny_config(tokenizer, initializer_range=0.02))
    directions = dict.fromkeys(range(len(tokenizer)), 0)
    scores = torch.full((len(tokenizer), 64), -12.0)
    for direction, (token, followers) in enumerate(NEXT_TOKEN.items()):
        directions[tokenizer.encode(token)[0]] = direction
        for follower, probability in followers.items():
            scores[tokenizer.encode(follower)[0], direction] = math.log(probability)
    with torch.no_grad():
        model.lm_head.weight.copy_(scores / 64**0.5)  # the final norm gives every direction this length
        model.model.embed_tokens.weight.copy_(6 * torch.eye(64)[list(directions.values())])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def fresh_policy(folder: Path, seed: int = 0) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """A tiny policy of one's own, to train or change."""
    model, tokenizer = load_policy(ModelConfig(name=str(folder), lora_rank=4, lora_alpha=8), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model, tokenizer


def adapter_weights(model: PeftModel, name: str = "default") -> dict[str, torch.Tensor]:
    """A copy of one adapter's weights; the adapter's own name is cut out of the keys."""
    return {
        key.replace(f".{name}.", "."): parameter.detach().clone()
        for key, parameter in model.named_parameters()
        if "lora_" in key and f".{name}." in key
    }


def fixed_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """A copy of everything that is no adapter: packed 4-bit weights, their scales, embeddings, norms, the head."""
    return {key: value.detach().clone() for key, value in model.state_dict().items() if "lora_" not in key}


def gradient_flags(model: PeftModel) -> dict[str, bool]:
    return {key: parameter.requires_grad for key, parameter in model.named_parameters()}


def all_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, dtypes included."""
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


@contextmanager
def recorded_gradients(model: PeftModel) -> Iterator[Callable[[Trajectory], torch.Tensor]]:
    """Watches the training passes made inside: what is the loss gradient of the hidden states that predict a token?

    Yields a function: trajectory with T completion tokens -> (T, H), row t for the hidden state whose logits predict
    completion token t. It raises LookupError for a trajectory that no pass with a gradient has seen.
    """
    rows: dict[tuple[int, ...], torch.Tensor] = {}

    def without_padding(ids: Sequence[int]) -> tuple[int, ...]:
        padding = model.get_base_model().config.pad_token_id  # the trainer sets it where it is missing
        end = next((end for end in range(len(ids), 0, -1) if ids[end - 1] != padding), 0)
        return tuple(ids[:end])

    def keep(ids: torch.Tensor, gradient: torch.Tensor) -> None:
        for row in range(len(ids)):
            rows[without_padding(ids[row].tolist())] = gradient[row]

    def watch(module: torch.nn.Module, args: tuple, kwargs: dict, output: BaseModelOutputWithPast) -> None:
        hidden = output.last_hidden_state
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: keep(kwargs["input_ids"], gradient))

    def of(trajectory: Trajectory) -> torch.Tensor:
        prompt = len(trajectory.prompt_ids)
        gradient = rows[without_padding([*trajectory.prompt_ids, *trajectory.completion_ids])]
        assert torch.all(gradient[prompt + len(trajectory.completion_ids) - 1 :] == 0.0), "none from padding"
        return gradient[prompt - 1 : prompt + len(trajectory.completion_ids) - 1]

    handle = model.get_base_model().base_model.register_forward_hook(watch, with_kwargs=True)
    try:
        yield of
    finally:
        handle.remove()


@dataclass
class ShelfRetriever:
    """A small real retriever: passages ranked by how many words they share with the query, then by place."""

    passages: list[Passage]
    name: str = "shelf"
    batches: list[list[str]] = field(default_factory=list)
    """The queries of every call, for tests that look at batching."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        self.batches.append(list(queries))
        return [sorted(self.passages, key=lambda passage: -self._shared(query, passage))[:k] for query in queries]

    @staticmethod
    def _shared(query: str, passage: Passage) -> int:
        return len(set(query.split()) & set(f"{passage.title} {passage.text}".split()))


@pytest.fixture
def shelf() -> ShelfRetriever:
    return ShelfRetriever(
        [
            Passage("1", "Lima", "Lima is the capital of Peru"),
            Passage("2", "Quito", "Quito is the capital of Ecuador"),
            Passage("3", "Peru", "Peru lies beside Ecuador"),
        ]
    )


@pytest.fixture
def tiny_protocol(tiny_policy: tuple[PeftModel, PreTrainedTokenizerBase]) -> Protocol:
    """Short templates and budgets, for one token a byte."""
    return Protocol(tiny_policy[1], tiny_protocol_config())


def tiny_protocol_config(**changes: object) -> ProtocolConfig:
    settings: dict[str, object] = {
        "plain_template": "Q: {question}",
        "privileged_template": "See {reference} Q: {question}",
        "information_template": "<information>{documents}</information>\n",
        "correction_message": "\nTag?\n",
        "no_more_searches_message": "\nAnswer now.\n",
        "max_turn_tokens": 24,
        "max_document_tokens": 40,
        "max_completion_tokens": 400,
        "max_prompt_tokens": 300,
    }
    return ProtocolConfig(**{**settings, **changes})


def dense_divergence(kind: str, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """(N,) divergences of two rows of logits (N, V), straight from the definitions."""
    p_student, p_teacher = (torch.softmax(logits / temperature, dim=-1) for logits in (student, teacher))

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p * (p.log() - q.log())).sum(dim=-1)

    if kind == "forward_kl":
        return kl(p_teacher, p_student)
    if kind == "reverse_kl":
        return kl(p_student, p_teacher)
    mixture = (p_student + p_teacher) / 2
    return (kl(p_teacher, mixture) + kl(p_student, mixture)) / 2
