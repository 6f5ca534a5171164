"""Real parts, made small: a random Qwen2 policy in NF4 with LoRA, and a retriever over a handful of passages."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from searche1_lite.config import ModelConfig, ProtocolConfig
from searche1_lite.model import load_policy
from searche1_lite.protocol import Protocol
from searche1_lite.search.base import Passage

TAGS = [f"<{slash}{name}>" for name in ("think", "search", "information", "answer") for slash in ("", "/")]
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

torch.set_num_threads(1)


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


@pytest.fixture(scope="session")
def tiny_policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model's folder: hidden 64, 2 layers, random but seeded, with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_policy")
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,  # logits far enough apart that a greedy choice is never a tie
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_policy(tiny_policy_folder: Path) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The tiny base in NF4 under a LoRA adapter whose weights are not zero. Shared: leave it as it was."""
    return fresh_policy(tiny_policy_folder)


def fresh_policy(folder: Path, seed: int = 0) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """A tiny policy of one's own, to train or change."""
    model, tokenizer = load_policy(ModelConfig(name=str(folder), lora_rank=4, lora_alpha=8), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model, tokenizer


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
