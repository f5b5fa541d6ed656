"""Codes: one integer a token carries weight, target and role through any collator, in the place of the label.

The frameworks' collators drop extra columns, but all of them keep `labels`. So each token's weight, target and role are
written into one integer, the *code*, which replaces the label before the collator runs. The code is read on the device,
after every cast that could have rounded a float:

    bit 52      role: 0 prompt, 1 response
    bits 21-51  weight: the 31 bits of a non-negative float32
    bits 0-20   target: a token id below 2^21

A token with a weight below 0 has the negative of the code that it would have with the absolute weight. A code has 53
bits, because one framework's collator converts labels to float64 and back. -100 stays -100, so a collator's own padding
cannot be mistaken for prompt. No token can have the weight infinity, so infinity marks three kinds of tokens that are
neither prompt nor response:

    -100                        padding, or a document's first token without a label
    infinity, role bit 1        a document's first token with a label, which is kept as the target; nothing predicts it
    infinity, role bit 0        a token inside a document that weighs 0 in the data, target 0; or one that stands for
                                pixels or sound, see `wit_plugins.tokens.placeholders`, whose target is its kind
"""

from __future__ import annotations

import numpy as np
import torch

from wit_plugins.tokens.roles import IGNORE_INDEX, NEITHER, PROMPT, RESPONSE

TARGET_BITS = 21
WEIGHT_BITS = 31
MAX_VOCAB_SIZE = 1 << TARGET_BITS
_ROLE_SHIFT = TARGET_BITS + WEIGHT_BITS
_TARGET_MASK = (1 << TARGET_BITS) - 1
_WEIGHT_MASK = (1 << WEIGHT_BITS) - 1
_LABEL_ONLY = 0x7F800000  # float32 infinity


def encode(
    targets: np.ndarray,
    roles: np.ndarray,
    weights: np.ndarray,
    labelled: np.ndarray | None = None,
    left_out: np.ndarray | None = None,
    placeholders: np.ndarray | None = None,
) -> np.ndarray:
    """Write targets, roles and weights into codes.

    Args:
        targets (`np.ndarray`): int64 `[T]`, ids in `[0, 2^21)` wherever the role is not `NEITHER`.
        roles (`np.ndarray`): uint8 `[T]`.
        weights (`np.ndarray`): float32 `[T]`, finite.
        labelled (`np.ndarray`, *optional*): bool `[T]`: which tokens have a label. By default those with a role.
        left_out (`np.ndarray`, *optional*): bool `[T]`: tokens inside a document that have neither role nor label.
        placeholders (`np.ndarray`, *optional*): uint8 `[T]`: of such tokens, the kind of those that stand for pixels or
            sound, else 0.

    Returns:
        int64 `[T]`: codes in `(-2^53, 2^53)`, -100 where the role is `NEITHER` and there is no label to keep.

    Raises:
        ValueError: if a target or a weight does not fit.
    """
    label_only = np.zeros_like(roles, dtype=bool) if labelled is None else labelled & (roles == NEITHER)
    real = (roles != NEITHER) | label_only
    if ((targets < 0) | (targets >= MAX_VOCAB_SIZE))[real].any():
        worst = targets[real][(targets[real] < 0) | (targets[real] >= MAX_VOCAB_SIZE)][0]
        raise ValueError(
            f"token id {worst} is outside [0, {MAX_VOCAB_SIZE}), the range that can be transported; tokenise with the "
            "model's own tokenizer"
        )
    if weights.dtype != np.float32 or not np.isfinite(weights).all():
        raise ValueError("weights must be finite float32 numbers")
    bits = np.abs(weights).view(np.uint32).astype(np.int64)
    bits[label_only] = _LABEL_ONLY
    is_response = (roles == RESPONSE) | label_only
    codes = is_response.astype(np.int64) << _ROLE_SHIFT | bits << TARGET_BITS | (targets & _TARGET_MASK)
    codes = np.where(real, np.where(weights < 0, -codes, codes), IGNORE_INDEX)
    if placeholders is not None:
        codes = np.where(placeholders != 0, _LABEL_ONLY << TARGET_BITS | placeholders.astype(np.int64), codes)
    return codes if left_out is None else np.where(left_out, _LABEL_ONLY << TARGET_BITS, codes)


def restore_codes(codes: torch.Tensor) -> torch.Tensor:
    """Codes as a collator returned them, as int64 again.

    Raises:
        ValueError: if the collator used a type that cannot hold 53 bits.
    """
    if codes.dtype in (torch.int64, torch.uint64, torch.float64):
        return codes.to(torch.int64)
    raise ValueError(
        f"the collator turned labels into {codes.dtype}, which cannot hold the weights; it must keep them int64"
    )


def decode(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read targets, roles and weights back. Runs on any device and does not synchronise.

    Args:
        codes (`torch.Tensor`): int64, any shape.

    Returns:
        `targets` int64 (-100 where neither), `roles` uint8, `weights` float32 (0 where neither), each shaped alike.
    """
    negative = codes < IGNORE_INDEX
    codes = torch.where(negative, -codes, codes)
    bits = codes >> TARGET_BITS & _WEIGHT_MASK
    real = (codes != IGNORE_INDEX) & (bits != _LABEL_ONLY)
    targets = torch.where(real, codes & _TARGET_MASK, IGNORE_INDEX)
    roles = torch.where(real, torch.where((codes >> _ROLE_SHIFT) != 0, RESPONSE, PROMPT), NEITHER).to(torch.uint8)
    weights = torch.where(real, bits, 0).to(torch.int32).view(torch.float32)
    return targets, roles, torch.where(negative, -weights, weights)


def is_left_out(codes: torch.Tensor) -> torch.Tensor:
    """Which tokens inside documents are left out because they weigh 0 in the data: bool, shaped like the codes."""
    return codes == _LABEL_ONLY << TARGET_BITS


def placeholder_kinds(codes: torch.Tensor) -> torch.Tensor:
    """What tokens stand for: int64, shaped like the codes: 0 for text, else a place in `placeholders.KINDS`, from 1."""
    return torch.where(codes >> TARGET_BITS == _LABEL_ONLY, codes & _TARGET_MASK, 0)


def locate(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's document and its position in the document. Runs on any device and does not synchronise.

    A document's first token has no role, because nothing predicts it. All other tokens of a document have a role, are
    left out, or stand for pixels or sound. So documents can be told apart however a collator has arranged them: one a
    row, packed, padded on either side.

    Args:
        codes (`torch.Tensor`): int64 `[B, L]`.

    Returns:
        `documents` and `positions`, int64 `[B, L]`. Documents are numbered from 0 in the order of the batch. The first
        token of a document has position 0. Values of tokens without a role have no meaning.
    """
    real = (decode(codes)[1] != NEITHER) | (codes >> TARGET_BITS == _LABEL_ONLY)
    first = real.clone()  # the first token with a role is the second token of its document
    first[:, 1:] &= ~real[:, :-1]
    documents = first.flatten().cumsum(0).reshape(codes.shape) - 1
    columns = torch.arange(codes.shape[1], device=codes.device).expand_as(codes)
    starts = torch.where(first, columns - 1, -1).cummax(dim=1).values
    return documents, columns - starts


def framework_labels(codes: torch.Tensor) -> torch.Tensor:
    """The labels that the framework itself would have, int64: -100 on the prompt and on padding."""
    codes = torch.where(codes < IGNORE_INDEX, -codes, codes)
    labelled = (codes != IGNORE_INDEX) & ((codes >> _ROLE_SHIFT) != 0)
    return torch.where(labelled, codes & _TARGET_MASK, IGNORE_INDEX)


def weighing(codes: np.ndarray) -> np.ndarray:
    """The codes that carry a role and a weight, int64 `[N]`. All of these must reach the loss."""
    return codes[is_weighing(codes)]


def is_weighing(codes: np.ndarray) -> np.ndarray:
    """Which of the codes carry a role and a weight, bool, shaped like `codes`."""
    return (codes != IGNORE_INDEX) & (np.abs(codes) >> TARGET_BITS & _WEIGHT_MASK != _LABEL_ONLY)
