"""Small tokenizers that treat text as those of other model families do: what they normalise, add and call a marker."""

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

TAGS = [f"<{slash}{name}>" for name in ("think", "search", "information", "answer") for slash in ("", "/")]
LETTERS = [chr(code) for code in range(33, 127)] + list("▁‹›é\n")


def _sentencepiece(extra: list[str], normalizer: list[normalizers.Normalizer]) -> Tokenizer:
    """BPE over characters with single bytes to fall back to, and blanks written as ▁."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS]
    merged = ["</", "La", "Lim", "Lima", "an", "ans", "in", "inf", "▁▁"]
    merges = [("i", "m"), ("<", "/"), ("L", "a"), ("L", "im"), ("Lim", "a"), ("a", "n"), ("an", "s"), ("i", "n")]
    merges += [("in", "f"), ("▁", "▁")]
    pieces += ["im", *merged, *extra]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([*normalizer, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]  # type: ignore[list-item]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")]
    )
    return tokenizer


def llama2_like() -> PreTrainedTokenizerFast:
    """Its chat markers `[INST]` and `<<SYS>>` are ordinary text; it puts a blank before every text, and does NFKC."""
    tokenizer = _sentencepiece([], [normalizers.NFKC(), normalizers.Prepend("▁")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=(
            "{% for m in messages %}{% if m.role == 'user' %}"
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n{{ m.content | trim }} [/INST]"
            "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
        ),
        clean_up_tokenization_spaces=False,
    )


def gemma_like() -> PreTrainedTokenizerFast:
    """Among its added tokens are runs of blanks and of line breaks, and HTML tags, which are not flagged special."""
    added = ["<start_of_turn>", "<end_of_turn>"]
    plain = ["\n\n", "▁▁", "<table>", "</table>", "<b>", "[@BOS@]", "[toxicity=0]"]
    tokenizer = _sentencepiece([*added, *plain], [])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in added])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=(
            "<s>{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
            "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
        ),
        clean_up_tokenization_spaces=False,
    )


def unflagged_like() -> PreTrainedTokenizerFast:
    """A fine-tune whose ChatML markers were added without the flag, beside other added tokens that overlap in text."""
    added = ["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "T]x", "ab", "bc", "<tool_call>", *TAGS]
    tokenizer = _sentencepiece([], [])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
        clean_up_tokenization_spaces=False,
    )


def accent_stripping() -> PreTrainedTokenizerFast:
    """It decomposes and takes accents away, so that it makes `<` of `≮`. Without a chat template."""
    tokenizer = _sentencepiece([], [normalizers.NFKD(), normalizers.StripAccents()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


OTHERS = {
    "llama2_like": llama2_like,
    "gemma_like": gemma_like,
    "unflagged": unflagged_like,
    "accent_stripping": accent_stripping,
}
