"""Where a turn ends: at a closing tag, found token by token, or with the message."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

STOP_TAGS = ("</search>", "</answer>")
"""A model turn ends as soon as one of these stands in what it wrote."""


class TagAutomaton:
    """Finds where a closing tag is complete, token by token, without decoding text.

    A state is how much of a tag the text so far ends with; state 0 is nothing of it.

    Args:
        tokenizer: its tokens' texts are what the automaton reads.
        size: the model's vocabulary; ids that have no token read as nothing.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", size: int) -> None:
        import numpy as np  # the command line checks prompts without it

        prefixes = sorted({tag[:length] for tag in STOP_TAGS for length in range(len(tag))}, key=len)
        numbers = {prefix: number for number, prefix in enumerate(prefixes)}
        self.done = len(prefixes)
        """The state in which a tag is complete."""
        self.table = np.zeros((len(prefixes), size), dtype=np.uint8)
        """(states, V): the state after a token."""
        names = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
        nothing = [token for token in range(size) if token >= len(names) or names[token] is None]
        self.table[:, nothing] = np.arange(len(prefixes), dtype=np.uint8)[:, None]
        for token, text in _tag_like(tokenizer, names):
            for prefix, number in numbers.items():
                end = _advance(prefix, text)
                self.table[number, token] = self.done if end is None else numbers[end]

    def advance(self, states: "np.ndarray", tokens: "np.ndarray") -> "np.ndarray":
        """(B,) the states after these tokens, from states that are not `done`."""
        return self.table[states, tokens]


@lru_cache(maxsize=4)
def tag_automaton(tokenizer: "PreTrainedTokenizerBase", size: int) -> TagAutomaton:
    """The automaton, made once for a tokenizer."""
    return TagAutomaton(tokenizer, size)


def _advance(seen: str, text: str) -> str | None:
    """The part of a tag that `seen + text` ends with; None if a tag is complete in it."""
    for character in text:
        seen += character
        if seen in STOP_TAGS:
            return None
        while not any(tag.startswith(seen) for tag in STOP_TAGS):
            seen = seen[1:]
    return seen


def _tag_like(tokenizer: "PreTrainedTokenizerBase", names: Sequence[str | None]) -> Iterator[tuple[int, str]]:
    """The tokens that can begin, continue or complete a closing tag, with their texts."""
    inner = {tag[start:end] for tag in STOP_TAGS for end in range(len(tag) + 1) for start in range(end)}
    # Behind another token, as some tokenizers drop the space before the first one.
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    before = tokenizer.decode(anchor, skip_special_tokens=False)
    for token, name in enumerate(names):
        if name is not None and (name in inner or "<" in name or ">" in name):
            text = tokenizer.decode([*anchor, token], skip_special_tokens=False)
            yield token, text.removeprefix(before)


def end_ids(model: "PeftModel", tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Ids that end a message: the tokenizer's, the model's, and the chat template's `<|im_end|>`."""
    ids = {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|im_end|>")}
    config = model.get_base_model().generation_config
    eos = config.eos_token_id if config is not None else None
    ids |= set(eos) if isinstance(eos, list) else {eos}
    return frozenset(index for index in ids if index is not None)
