"""What `wit verify` finds in a text by its own means is what trains: two implementations that share no code agree."""

import numpy as np
import pytest
from tokenizers_by_kind import KINDS

from wit_plugins.strategies import spans
from wit_plugins.tokens.text import TokenText
from wit_plugins.verify.characters import Text, span_factors
from wit_plugins.verify.documents import Document

TEXTS = [
    "the <think>a b</think> four . the <think> in",
    "a <tool_call> the four </tool_call> a\n```the\n a b ```\n the",
    "the 漢é the <think>é漢</think>漢 a the b <reasoning>a</reasoning> the",
    "the the four four . a ? ``` a ```` b ``` the",
]
OPTIONS = {
    "between": [{"between": ["<think>", "</think>"], "weight": 0.5}],
    "without delimiters": [{"between": ["<think>", "</think>"], "weight": 0.5, "delimiters": False}],
    "match": [{"match": "t.{0,3}e", "weight": 3.0}, {"match": "é|漢", "role": "prompt", "weight": 0.25}],
    "reasoning": [{"named": "reasoning", "role": "response", "weight": 2.0}],
    "tool calls": [{"named": "tool_calls", "weight": 2.0, "delimiters": False}],
    "code": [{"named": "code_blocks", "weight": 0.5}],
    "last turn": [{"named": "last_turn", "weight": 2.0, "others": 0.5}],
    "decay": [{"named": "last_turn", "weight": 2.0, "decay": 0.5}],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_both_find_the_same_tokens(name, kind):
    tokenizer = KINDS[kind]()
    for index, said in enumerate(TEXTS):
        ids = tokenizer(said, add_special_tokens=False)["input_ids"]
        response = [t > 0 and (t + index) % 7 > 2 for t in range(len(ids))]
        text, offsets = TokenText(tokenizer).decode(ids)
        roles = np.array([0, *(2 if r else 1 for r in response[1:])], dtype=np.uint8)
        trained = spans.static_weights(np.array(ids), roles, tokenizer, text, offsets, OPTIONS[name])
        labels = [i if r else -100 for i, r in zip(ids, response, strict=True)]
        document = Document(ids, labels)
        found = span_factors(Text(tokenizer, ids), document, OPTIONS[name])
        np.testing.assert_allclose(found[1:], trained[1:], rtol=1e-6, err_msg=f"{text!r} {offsets.tolist()}")
