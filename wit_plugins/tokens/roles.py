"""Roles: which tokens are prompt, which are response, which are neither.

The framework's own label mask is the only source of truth. A label other than -100 is response; any other *real*
token is prompt. Padding and the first token of a document (which is never predicted) are neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from wit_plugins.errors import BadExampleError

IGNORE_INDEX = -100
NEITHER, PROMPT, RESPONSE = 0, 1, 2


def token_array(values: Any) -> np.ndarray:
    """A list, tensor or array of integers as an int64 array `[T]`.

    Raises:
        BadExampleError: if they are no integers.
    """
    if hasattr(values, "detach"):  # a torch tensor
        values = values.detach().cpu().numpy()
    try:
        found = np.asarray(values)
    except ValueError as error:  # lists of several lengths
        raise BadExampleError(f"token ids must be one list of integers ({error})") from None
    tokens = found.astype(np.int64) if found.dtype.kind in "iubf" else None
    if tokens is None or (found.dtype.kind == "f" and not np.array_equal(tokens, found)):
        raise BadExampleError(f"token ids must be integers, not {_first_of(found)!r}")
    return tokens.reshape(-1)


def _first_of(values: np.ndarray) -> Any:
    """The first value that is no integer."""
    for value in values.reshape(-1).tolist():
        if not isinstance(value, (int, float)) or value % 1:
            return value
    return values.dtype.name


def document_starts(example: Mapping[str, Any], num_tokens: int) -> np.ndarray:
    """Indices of the first token of each document in an example, ascending int64, the first one 0.

    Packed rows say where their documents are by `seq_lengths` (TRL) or by `position_ids` that restart at 0
    (LLaMA-Factory, Axolotl); an example with neither is one document.

    Raises:
        BadExampleError: if `seq_lengths` or `position_ids` do not fit the number of tokens.
    """
    if example.get("seq_lengths") is not None:
        lengths = token_array(example["seq_lengths"])
        if lengths.sum() != num_tokens or (lengths <= 0).any():
            raise BadExampleError(
                f"seq_lengths {lengths.tolist()} do not add up to the example's {num_tokens} tokens; pack it anew"
            )
        return np.concatenate(([0], np.cumsum(lengths)[:-1])).astype(np.int64)
    if example.get("position_ids") is not None:
        positions = token_array(example["position_ids"])
        if len(positions) != num_tokens:
            raise BadExampleError(
                f"position_ids have {len(positions)} entries for {num_tokens} input_ids; make them as long, or leave "
                "them out"
            )
        return np.union1d([0], np.flatnonzero(positions == 0)).astype(np.int64)
    return np.zeros(1, dtype=np.int64)


def example_roles(example: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets, roles and document starts of one example.

    Args:
        example (`Mapping`): with `input_ids` and `labels` `[T]`, and optionally `attention_mask` `[T]`,
            `seq_lengths`, `position_ids` `[T]`.

    Returns:
        `targets` int64 `[T]` (the label of a response token, the id of a prompt token), `roles` uint8 `[T]`
        (`NEITHER`, `PROMPT`, `RESPONSE`), and the documents' starts (see [`document_starts`]).

    Raises:
        BadExampleError: if `labels`, `attention_mask` and `input_ids` differ in length, or hold no integers.
    """
    input_ids, labels = token_array(example["input_ids"]), token_array(example["labels"])
    if len(input_ids) != len(labels):
        raise BadExampleError(f"labels has {len(labels)} entries for {len(input_ids)} input_ids; make them as long")
    is_response = labels != IGNORE_INDEX
    roles = np.where(is_response, RESPONSE, PROMPT).astype(np.uint8)
    starts = document_starts(example, len(input_ids)) if len(input_ids) else np.zeros(0, dtype=np.int64)
    roles[starts] = NEITHER
    mask = example.get("attention_mask")
    # A 2-D or 4-D mask of a packed row says nothing about single tokens.
    if mask is not None and _is_flat(mask):
        mask = token_array(mask)
        if len(mask) != len(input_ids):
            raise BadExampleError(
                f"attention_mask has {len(mask)} entries for {len(input_ids)} input_ids; make it as long"
            )
        roles[(mask == 0) & ~is_response] = NEITHER  # what has a label is trained on, as the framework would
        if not mask[starts].all():  # the first real token behind padding is predicted by nothing either
            for start, end in zip(starts, [*starts[1:], len(mask)], strict=True):
                roles[start + np.flatnonzero(mask[start:end])[:1]] = NEITHER
    return np.where(is_response, labels, input_ids), roles, starts


def _is_flat(values: Any) -> bool:
    """Whether this is one dimension of numbers, and not several."""
    ndim = getattr(values, "ndim", None)
    return ndim == 1 if ndim is not None else not (len(values) and isinstance(values[0], (list, tuple, np.ndarray)))
