"""Tokenizers of every kind, built here: byte-level, with byte fallback, with word marks, word pieces, whole words."""

from __future__ import annotations

import functools

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]
ADDED = ["<think>", "</think>"]  # in the vocabulary, and not special
PAIRS = ["th", "in", "he", "an", " t", " a", "<t", "k>", "``", "\n\n", "é", "漢"]


def _made(backend: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", **special)
    made.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    return made


@functools.cache
def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE: pieces of characters, one of them two thirds of a Chinese one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    write = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pairs = [write.pre_tokenize_str(text)[0][0] for text in PAIRS]
    merges = [(pair[0], pair[1]) for pair in pairs]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *letters, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = write
    backend.decoder = decoders.ByteLevel()
    return _made(backend)


@functools.cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: `▁` for a space, one before the text, and bytes for what has no token."""
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789<>/`.?", "▁"]
    merges = [("t", "h"), ("▁", "a"), ("▁", "t"), ("i", "n"), ("▁", "▁")]
    byte = [f"<0x{value:02X}>" for value in range(256)]
    vocab = {t: i for i, t in enumerate([*SPECIAL, "<unk>", *byte, *letters, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return _made(backend, unk_token="<unk>")


@functools.cache
def metaspace() -> PreTrainedTokenizerFast:
    """Unigrams with `▁` before each word."""
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789<>/`.?\n", "▁the", "▁a", "in", "▁to"]
    vocab = [*((token, 0.0) for token in [*SPECIAL, "<unk>"]), *((p, -float(len(pieces) - len(p))) for p in pieces)]
    backend = Tokenizer(models.Unigram(vocab, unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return _made(backend, unk_token="<unk>")


@functools.cache
def word_piece() -> PreTrainedTokenizerFast:
    """Words and their continuations, and punctuation that the decoder puts behind a word."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    parts = [f"##{letter}" for letter in letters]
    words = ["the", "think", "##ing", "##s", *letters, *parts, *"<>/`.,?!'", "n't", "'s"]
    vocab = {token: i for i, token in enumerate([*SPECIAL, "<unk>", *words])}
    backend = Tokenizer(models.WordPiece(vocab=vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return _made(backend, unk_token="<unk>")


@functools.cache
def whole_words() -> PreTrainedTokenizerFast:
    """What stands between spaces; no decoder."""
    words = ["the", "think", "a", "b", "```", "four", ".", "?", "<tool_call>", "</tool_call>"]
    vocab = {token: i for i, token in enumerate([*SPECIAL, "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _made(backend, unk_token="<unk>")


@functools.cache
def word_ends() -> PreTrainedTokenizerFast:
    """BPE that marks the end of a word."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789<>/`.?"
    vocab = [*SPECIAL, "<unk>", *letters, *(f"{letter}</w>" for letter in letters), "th", "the</w>"]
    merges = [("t", "h"), ("th", "e</w>")]
    by_token = {token: i for i, token in enumerate(vocab)}
    backend = Tokenizer(models.BPE(by_token, merges, unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.BPEDecoder()
    return _made(backend, unk_token="<unk>")


KINDS = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
    "word_piece": word_piece,
    "whole_words": whole_words,
    "word_ends": word_ends,
}
