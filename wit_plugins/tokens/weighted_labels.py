"""Prepared labels: weights that stand in the data, on their way from tokenisation to the collator.

What a message or a sample weighs is only known while the framework tokenises it; afterwards its columns are gone. So
the token weights are written into `labels`, the one column that every later stage keeps (packing, truncation, caches).
A label of 2^53 or more is no token id and no -100; it is a prepared one, and says:

    bits 55-60  the sample's group, from 1, if samples have groups
    bit 54      the first token of a document: bits 21-51 are the fingerprint of the settings, 31 bits
    bit 53      set
    bit 52      whether the token has a label
    bits 21-51  weight: the 31 bits of a non-negative float32
    bits 0-20   the label, if it has one

A label whose weight is 1, and whose sample has no group, stays as it is. The first token of a document is predicted by
nothing and has no weight, so that it can say what the document was prepared with: a dataset or cache that was prepared
with other settings is recognised wherever it comes from. Prepared labels are outside of every vocabulary, so that a run
without weights stops at them, unless its loss does not look: for such frameworks adapters see to it that it stops.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from wit_plugins.tokens.codes import MAX_VOCAB_SIZE, TARGET_BITS, WEIGHT_BITS
from wit_plugins.tokens.roles import IGNORE_INDEX

FINGERPRINT_BITS = WEIGHT_BITS
_ROLE = 1 << (TARGET_BITS + WEIGHT_BITS)
_PREPARED = 1 << 53
_FIRST = 1 << 54
_GROUP_SHIFT, _GROUP_MASK = 55, 63
_FIELD = (1 << WEIGHT_BITS) - 1


class Prepared(NamedTuple):
    """What prepared labels say.

    Attributes:
        labels (`np.ndarray`): int64 `[T]`, the framework's own.
        weights (`np.ndarray`): float32 `[T]`, those that stand in the data; 1 where nothing does.
        fingerprints (`np.ndarray`): int64, of the settings of each document that says so.
        groups (`np.ndarray`): uint8 `[T]`, the number of each token's group; 0 where none is said.
    """

    labels: np.ndarray
    weights: np.ndarray
    fingerprints: np.ndarray
    groups: np.ndarray


def prepare(labels: np.ndarray, weights: np.ndarray, fingerprint: int, group: int = 0) -> np.ndarray:
    """Labels `[T]` of one document that carry its tokens' weights.

    Args:
        labels (`np.ndarray`): int64 `[T]`, the framework's own: a token id, or -100.
        weights (`np.ndarray`): float32 `[T]`, finite and ≥ 0.
        fingerprint (`int`): of the settings that the weights were read with, below 2^31.
        group (`int`): the number of the document's group, up to 62; 0 if there are none. All of its labels say so,
            since a document may lose its beginning.

    Raises:
        ValueError: if a label or a weight does not fit.
    """
    labelled = labels != IGNORE_INDEX
    if ((labels < 0) | (labels >= MAX_VOCAB_SIZE))[labelled].any():
        raise ValueError(f"labels have ids outside [0, {MAX_VOCAB_SIZE}); tokenise with the model's own tokenizer")
    if weights.shape != labels.shape or not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("weights must be finite numbers >= 0, one for each label")
    fields = (weights.astype(np.float32) + np.float32(0)).view(np.uint32).astype(np.int64)
    said = np.where(labelled, _ROLE | labels, 0) | fields << TARGET_BITS | _PREPARED
    prepared = np.where((weights == 1) & (group == 0), labels, said)
    if len(labels):
        prepared[0] = _FIRST | _PREPARED | fingerprint << TARGET_BITS | (_ROLE | labels[0] if labelled[0] else 0)
    return prepared | group << _GROUP_SHIFT if group else prepared


def is_prepared(labels: np.ndarray) -> bool:
    """Whether any of these labels, int64 of any shape, is a prepared one."""
    return bool((labels >= _PREPARED).any())


def read_prepared(labels: np.ndarray) -> Prepared | None:
    """What labels `[T]`, int64, say beside the framework's own; `None` if none of them is a prepared one."""
    if not is_prepared(labels):
        return None
    said = labels >= _PREPARED
    field = labels >> TARGET_BITS & _FIELD
    first = said & (labels & _FIRST != 0)
    own = np.where(labels & _ROLE != 0, labels & (MAX_VOCAB_SIZE - 1), IGNORE_INDEX)
    weights = np.where(said & ~first, field, 0).astype(np.uint32).view(np.float32)
    groups = np.where(said, labels >> _GROUP_SHIFT & _GROUP_MASK, 0).astype(np.uint8)
    return Prepared(np.where(said, own, labels), np.where(said & ~first, weights, np.float32(1)), field[first], groups)
