"""The logged spans of each token: one bit a span, in a tensor beside the codes, which have no bits left.

The wrapped collator does not see this tensor. The places of the codes in its batch tell where each token went.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from wit_plugins.tokens.codes import is_weighing

SPANS_KEY = "weighted_spans"


def to_bits(found: Mapping[str, np.ndarray], names: Iterable[str], size: int) -> np.ndarray:
    """The spans of a document's tokens as bits, int64 `[T]`: bit i is set where the token is in the i-th of `names`.

    Args:
        found (`Mapping[str, np.ndarray]`): bool `[T]` by name. A name that is missing was not found.
        names (`Iterable[str]`): at most as many as an int64 has bits.
        size (`int`): the number of tokens, `T`.
    """
    bits = np.zeros(size, dtype=np.int64)
    for index, name in enumerate(names):
        if name in found:
            bits |= np.asarray(found[name], dtype=np.int64) << index
    return bits


def inside(bits: torch.Tensor, index: int) -> torch.Tensor:
    """Which tokens are in the span of this number, bool, shaped like `bits`. Does not synchronise."""
    return (bits >> index & 1) != 0


def bits_in_batch(codes: np.ndarray, sent: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray | None:
    """Put the examples' bits where a collator has put their codes.

    Collators pad, concatenate and flatten, and keep the order of examples and tokens. So the batch's codes with a
    weight are the examples' codes one after the other. This is checked code by code before the bits are placed.

    Args:
        codes (`np.ndarray`): int64 `[B, L]`, the batch's codes.
        sent: codes and bits of each example that the collator was given, int64 `[T]` each.

    Returns:
        int64 `[B, L]`, 0 where there is no code with a weight; `None` if the order has changed.
    """
    kept = [(own[carries], bits[carries]) for own, bits in sent if (carries := is_weighing(own)).any()]
    there = is_weighing(codes)
    placed = np.zeros(codes.shape, dtype=np.int64)
    if not kept:
        return placed if not there.any() else None
    if not np.array_equal(codes[there], np.concatenate([of_example for of_example, _ in kept])):
        return None
    placed[there] = np.concatenate([bits for _, bits in kept])
    return placed
