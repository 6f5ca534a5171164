"""A closing tag is found token by token exactly where the decoded text has it."""

from random import Random

import numpy as np
import pytest
from conftest import byte_level_tokenizer
from transformers import AutoTokenizer

from searche1_lite.policy.model import resolve_model
from searche1_lite.policy.stopping import STOP_TAGS, TagAutomaton


@pytest.mark.parametrize("name", ["bytes", "demo"])
def test_the_automaton_finds_a_tag_exactly_where_the_decoded_text_has_one(name: str) -> None:
    tokenizer = byte_level_tokenizer() if name == "bytes" else AutoTokenizer.from_pretrained(resolve_model("demo"))
    size = len(tokenizer) + 5  # a model may have more rows than its tokenizer has tokens
    automaton = TagAutomaton(tokenizer, size)
    rng, found = Random(1), 0
    near = {token for tag in STOP_TAGS for token in tokenizer.encode("".join(tag) + ">\n< ") + tokenizer.encode(tag)}
    near |= {token for token in range(len(tokenizer)) if tokenizer.decode([token]) in set("</>searchanw")}
    for _ in range(3000):
        # Bits of tags are likely enough that whole ones come about in many ways.
        tag = rng.choice(STOP_TAGS)
        ids = [token for letter in tag for token in tokenizer.encode(letter)]
        for _ in range(rng.randrange(4)):
            ids[rng.randrange(len(ids))] = rng.choice([*near, rng.randrange(size)])
        if rng.random() < 0.3:  # an id that has no token
            ids.insert(rng.randrange(len(ids)), rng.randrange(len(tokenizer), size))
        state, closed = np.zeros(1, dtype=np.uint8), None
        for count, token in enumerate(ids, start=1):
            state = automaton.advance(state, np.array([token]))
            if state[0] == automaton.done:
                closed = count
                break
        text = [tokenizer.decode(ids[:count]) for count in range(1, len(ids) + 1)]
        expected = next((n for n, one in enumerate(text, start=1) if any(tag in one for tag in STOP_TAGS)), None)
        assert closed == expected, [tokenizer.decode([token]) for token in ids]
        found += closed is not None
    assert 300 < found < 2700
