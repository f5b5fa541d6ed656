"""A tokenizer of words, built here, and the same documents as text, for whatever a framework reads."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
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
    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2, "<u>": 3, "<a>": 4, "<end>": 5}
    vocab |= {word: 6 + i for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", chat_template=CHAT_TEMPLATE
    )
    made.add_special_tokens({"additional_special_tokens": ["<u>", "<a>", "<end>"]})
    return made


def text(ids: list[int]) -> str:
    """Words for token ids, one a word."""
    return " ".join(WORDS[i % len(WORDS)] for i in ids)
