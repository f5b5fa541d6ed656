"""Prepared labels: they carry the weights that stand in the data from tokenisation to the collator.

The weight of a message or a sample is known only while the framework tokenises it; afterwards its columns are gone. So
the token weights are written into `labels`, the one column that every later stage keeps (packing, truncation, caches).
A label of 2^53 or more is neither a token id nor -100. It is a prepared label:

    bit 61      set if the weight is below 0
    bits 55-60  the sample's group, from 1, if samples have groups
    bit 54      set in the first token of a document: bits 21-51 are then the fingerprint of the settings
    bit 53      always set
    bit 52      whether the token has a label
    bits 21-51  weight: the 31 bits of a float32 without its sign
    bits 0-20   the label, if the token has one

A label with weight 1 in a sample without a group is not changed. Nothing predicts the first token of a document, so it
has no weight and can carry the fingerprint of the settings instead: data that was prepared with other settings is
recognised wherever it comes from. Prepared labels are outside of every vocabulary, so a run without weights fails on
them. Where a framework's loss would not fail, its adapter stops the run.
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
_NEGATIVE = 1 << 61
_FIELD = (1 << WEIGHT_BITS) - 1


class Prepared(NamedTuple):
    """Prepared labels, decoded.

    Attributes:
        labels (`np.ndarray`): int64 `[T]`, the framework's own.
        weights (`np.ndarray`): float32 `[T]`, the weights in the data; 1 where there is none.
        fingerprints (`np.ndarray`): int64, one for each document that carries the fingerprint of its settings.
        groups (`np.ndarray`): uint8 `[T]`, the number of each token's group; 0 without a group.
    """

    labels: np.ndarray
    weights: np.ndarray
    fingerprints: np.ndarray
    groups: np.ndarray


def prepare(labels: np.ndarray, weights: np.ndarray, fingerprint: int, group: int = 0) -> np.ndarray:
    """Labels `[T]` of one document that carry its tokens' weights.

    Args:
        labels (`np.ndarray`): int64 `[T]`, the framework's own: a token id, or -100.
        weights (`np.ndarray`): float32 `[T]`, finite.
        fingerprint (`int`): the fingerprint of the settings that the weights were read with, below 2^31.
        group (`int`): the number of the document's group, up to 62; 0 if there are none. Every label carries it,
            because a document may lose its beginning.

    Raises:
        ValueError: if a label or a weight does not fit.
    """
    labelled = labels != IGNORE_INDEX
    if ((labels < 0) | (labels >= MAX_VOCAB_SIZE))[labelled].any():
        raise ValueError(f"labels have ids outside [0, {MAX_VOCAB_SIZE}); tokenise with the model's own tokenizer")
    if weights.shape != labels.shape or not np.isfinite(weights).all():
        raise ValueError("weights must be finite numbers, one for each label")
    fields = np.abs(weights.astype(np.float32)).view(np.uint32).astype(np.int64)
    weighted = np.where(labelled, _ROLE | labels, 0) | fields << TARGET_BITS | _PREPARED
    weighted |= np.where(weights < 0, _NEGATIVE, 0)
    prepared = np.where((weights == 1) & (group == 0), labels, weighted)
    if len(labels):
        prepared[0] = _FIRST | _PREPARED | fingerprint << TARGET_BITS | (_ROLE | labels[0] if labelled[0] else 0)
    return prepared | group << _GROUP_SHIFT if group else prepared


def is_prepared(labels: np.ndarray) -> bool:
    """Whether any of these labels, int64 of any shape, is a prepared one."""
    return bool((labels >= _PREPARED).any())


def read_prepared(labels: np.ndarray) -> Prepared | None:
    """Decode labels `[T]`, int64; `None` if none of them is a prepared label."""
    if not is_prepared(labels):
        return None
    prepared = labels >= _PREPARED
    field = labels >> TARGET_BITS & _FIELD
    first = prepared & (labels & _FIRST != 0)
    original = np.where(labels & _ROLE != 0, labels & (MAX_VOCAB_SIZE - 1), IGNORE_INDEX)
    weights = np.where(prepared & ~first, field, 0).astype(np.uint32).view(np.float32)
    weights = np.where(labels & _NEGATIVE != 0, -weights, weights) if (labels >= _NEGATIVE).any() else weights
    return Prepared(
        labels=np.where(prepared, original, labels),
        weights=np.where(prepared & ~first, weights, np.float32(1)),
        fingerprints=field[first],
        groups=np.where(prepared, labels >> _GROUP_SHIFT & _GROUP_MASK, 0).astype(np.uint8),
    )
