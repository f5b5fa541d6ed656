"""The text of a document from its ids, and the characters of each token, against the tokenizer's own decoding."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from tokenizers_by_kind import KINDS, SPECIAL, byte_fallback, byte_level, metaspace, whole_words, word_ends, word_piece
from transformers import PreTrainedTokenizerFast

from wit_plugins.tokens.text import TokenText

TEXTS = [TokenText(make()) for make in KINDS.values()]


def own(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def check(text, ids):
    """Against decodings of the whole and of its beginnings."""
    said, offsets = text.decode(ids)
    whole = own(text.tokenizer, ids)
    assert said == whole
    assert offsets.shape == (len(ids), 2)
    assert offsets.dtype == np.int64
    assert (np.diff(offsets, axis=0) >= 0).all()
    assert (offsets[:, 0] <= offsets[:, 1]).all()
    assert ((offsets >= 0) & (offsets <= len(whole))).all()
    for end in range(1, len(ids) + 1):
        begun = own(text.tokenizer, ids[:end])
        if begun and whole.startswith(begun) and not begun.endswith("\ufffd"):  # it ends between two characters
            # Where tokens mark the ends of words, the space behind a word is the word's, but at the end of the text.
            space = text.tokenizer is word_ends() and whole[len(begun) :].startswith(" ")
            assert offsets[end - 1, 1] - len(begun) in ((0, 1) if space else (0,))
    return said, offsets


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(TEXTS), st.data())
def test_any_ids(text, data):
    """Ids in any order: halves of characters, special tokens in the middle, spaces at both ends."""
    ids = data.draw(st.lists(st.integers(0, len(text.tokenizer) - 1), max_size=30))
    check(text, ids)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([text for text in TEXTS if text.tokenizer in (byte_level(), byte_fallback())]), st.text())
def test_any_text(text, said):
    """What these tokenizers write comes out again, and every character belongs to some token."""
    try:
        ids = text.tokenizer(said.encode(errors="replace").decode(), add_special_tokens=False)["input_ids"]
    except TypeError:  # half a surrogate pair, which no tokenizer takes
        return
    _, offsets = check(text, ids)
    covered = np.zeros(len(text.decode(ids)[0]), dtype=bool)
    for start, end in offsets:
        covered[start:end] = True
    assert covered.all()


def test_pieces_of_a_character_share_it():
    text = TokenText(byte_level())
    ids = text.tokenizer("a漢é<think>")["input_ids"]
    said, offsets = check(text, ids)
    assert said == "a漢é<think>"
    assert offsets.tolist() == [[0, 1], [1, 2], [1, 2], [2, 3], [3, 10]]


def test_a_space_in_a_broken_run_of_bytes():
    """It is no space any more when the spaces at the beginning are taken off."""
    text = TokenText(byte_fallback())
    check(text, text.tokenizer.convert_tokens_to_ids(["<0x20>", "<0x80>"]))


def test_half_a_character():
    """Cut off by truncation at either end: one `�`, as the tokenizer writes it."""
    text = TokenText(byte_level())
    ids = text.tokenizer("漢b漢")["input_ids"]
    assert check(text, ids[1:-1])[0] == "\ufffdb\ufffd"


@pytest.mark.parametrize(
    ("make", "pieces", "expected", "offsets"),
    [
        (byte_fallback, ["▁a", "<0xC3>", "<0xA9>", "▁t"], "aé t", [[0, 1], [1, 2], [1, 2], [2, 4]]),
        (byte_fallback, ["▁a", "<0xC3>", "b", "<0x0A>"], "a\ufffdb\n", [[0, 1], [1, 2], [2, 3], [3, 4]]),
        (byte_fallback, ["a", "<0xE6>", "<0xBC>", "<0xE6>"], "a" + "\ufffd" * 3, [[0, 1], [1, 2], [2, 3], [3, 4]]),
        (byte_fallback, ["▁", "<|im_start|>", "▁a"], "<|im_start|> a", [[0, 0], [0, 12], [12, 14]]),
        (metaspace, ["▁the", "in", "▁to"], "thein to", [[0, 3], [3, 5], [5, 8]]),
        (word_piece, ["think", "##ing", ".", "the"], "thinking. the", [[0, 5], [5, 8], [8, 9], [10, 13]]),
        (whole_words, ["the", "<think>", "a", "."], "the <think> a .", [[0, 3], [4, 11], [12, 13], [14, 15]]),
    ],
)
def test_by_hand(make, pieces, expected, offsets):
    text = TokenText(make())
    said, found = check(text, make().convert_tokens_to_ids(pieces))
    assert said == expected
    assert found.tolist() == offsets


def test_an_added_token_outside_of_ascii_keeps_its_letters():
    """The tokenizer's own decoding takes the letters of an added token for bytes."""
    backend = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_tokens(["<é>", "<｜fin▁de｜>"])
    assert own(tokenizer, [1]) == "<\ufffd>"
    assert TokenText(tokenizer).decode([0, 1, 2, 0])[0] == "a<é><｜fin▁de｜>a"


def test_ids_that_nobody_knows_and_none_at_all():
    for text in TEXTS:
        said, offsets = text.decode([])
        assert (said, offsets.shape) == ("", (0, 2))
        known = text.tokenizer.convert_tokens_to_ids("a") or 5
        check(text, [known, len(text.tokenizer) + 7, known])


def test_a_long_text_of_nothing_but_broken_bytes():
    text = TokenText(byte_level())
    ids = [text.tokenizer.convert_tokens_to_ids("ÿ")] * 20_000  # byte 0xFF
    said, offsets = text.decode(ids)
    assert said == "\ufffd" * 20_000
    assert (offsets[:, 1] - offsets[:, 0] == 1).all()


def test_pickled():
    text = TokenText(byte_level())
    ids = text.tokenizer("the 漢 <|im_end|>")["input_ids"]
    expected = text.decode(ids)
    copy = pickle.loads(pickle.dumps(text))
    assert copy.decode(ids)[0] == expected[0]
    assert np.array_equal(copy.decode(ids)[1], expected[1])
    assert copy.special == set(text.tokenizer.convert_tokens_to_ids(SPECIAL))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_the_tokenizer_does_not_know_begin_nothing(kind):
    """The text begins with the first token that is one."""
    text = TokenText(KINDS[kind]())
    unknown = len(text.tokenizer) + 100
    check(text, [unknown, 0, 5, unknown, 6])
    check(text, [unknown])
