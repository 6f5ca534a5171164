"""The demo policy's tokenizer: byte-level BPE as Qwen's, with a vocabulary made for the fictional wiki.

The words that names and passages are made of are one token each, and everything else falls back to bytes, so any text
survives a round trip. The protocol's tags are added tokens that are not flagged special, as some of Qwen's are: text
that came from a document must never become one of them.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from searche1_lite.data.demo_world import CITY_PREFIXES, RELATIONS, WORDS

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = [f"<{slash}{name}>" for name in ("think", "search", "information", "answer") for slash in ("", "/")]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SPACED_WORDS = ["is", "the", "of", "find", "guess", "check", "again", "left", "or", "it", *CITY_PREFIXES] + [
    relation for relations in RELATIONS.values() for relation in relations
]
_BARE_WORDS = [
    "What",
    "Doc",
    "Example",
    "Search",
    "Answer",
    "No",
    "user",
    "assistant",
    "Question",
    "results",
    "searches",
]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer; deterministic, 828 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    space = "Ġ"
    words = [space + word for word in WORDS + _SPACED_WORDS] + _BARE_WORDS + [space + str(digit) for digit in range(10)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(alphabet + words))}
    tokenizer = Tokenizer(BPE(vocabulary, [], ignore_merges=True, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
