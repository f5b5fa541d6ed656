"""A tokenizer of words, built here, and the same documents as text, for whatever a framework reads."""

from __future__ import annotations

from support import word_tokenizer
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i:02d}" for i in range(52)]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<a> {% generation %}{{ message['content'] }} <end>{% endgeneration %}"
    "{% else %}<u> {{ message['content'] }} <end>{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}<a> {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One id a word; ids 3 and up, so that padding (0) never looks like text."""
    vocab = {"<u>": 3, "<a>": 4, "<end>": 5, **{word: 6 + i for i, word in enumerate(WORDS)}}
    made = word_tokenizer(vocab, special=["<u>", "<a>", "<end>"])
    made.chat_template = CHAT_TEMPLATE
    return made


def text(ids: list[int]) -> str:
    """Words for token ids, one a word."""
    return " ".join(WORDS[i % len(WORDS)] for i in ids)
