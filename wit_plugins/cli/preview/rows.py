"""Rows of a prepared dataset, read in blocks: documents with their roles, their weights and where these come from.

Roles and weights come from `WeightedCollator.explain`, which is what training calls; nothing here decides them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from wit_plugins.errors import WITConfigError
from wit_plugins.tokens.codes import decode, placeholder_kinds
from wit_plugins.tokens.collator import WeightedCollator
from wit_plugins.tokens.roles import IGNORE_INDEX, document_starts, token_array

BLOCK = 512
_BEGIN = 8  # how many ids a message quotes, so that the row can be found
# Columns that only this package reads; they are handed over as arrays, which spares millions of Python integers.
_ARRAY_COLUMNS = {"input_ids", "labels", "attention_mask", "position_ids", "seq_lengths"}


@dataclass
class Tokens:
    """The tokens of some rows, one after another.

    Attributes:
        input_ids (`np.ndarray`): int64 `[N]`.
        roles (`np.ndarray`): uint8 `[N]`: `PROMPT`, `RESPONSE` or `NEITHER`.
        weights (`np.ndarray`): float32 `[N]`.
        document_starts (`np.ndarray`): int64, indices of each document's first token, ascending.
        row_starts (`np.ndarray`): int64, indices of each row's first token, ascending.
        padding (`np.ndarray`): bool `[N]`: padding that the framework put into the row itself.
        kinds (`np.ndarray`): int64 `[N]`: what tokens stand for, see `wit_plugins.tokens.placeholders`; 0 for text.
        spans (`dict[str, np.ndarray]`): bool `[N]` by name: what strategies look for.
        sources (`dict[str, np.ndarray]`): float32 `[N]` by name: what each strategy multiplies the weights by. Empty if
            there is WIT alone.
    """

    input_ids: np.ndarray
    roles: np.ndarray
    weights: np.ndarray
    document_starts: np.ndarray
    row_starts: np.ndarray
    padding: np.ndarray
    kinds: np.ndarray
    spans: dict[str, np.ndarray] = field(default_factory=dict)
    sources: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.input_ids)


def read(
    rows: list[Any],
    collator: WeightedCollator,
    pad_id: int | None,
    dataset: str = "train",
    first: int = 0,
) -> Tokens:
    """The tokens of some rows.

    Args:
        rows (`list`): examples, or lists of examples that are packed into one row.
        collator ([`WeightedCollator`]): gives roles and weights.
        pad_id (`int | None`): the padding token's id.
        dataset (`str`): the name of the rows' dataset, for messages.
        first (`int`): the number of the first row in that dataset.

    Raises:
        WITConfigError: if a row cannot be trained on: its number, the value and the way out.
    """
    ids, explained, documents, row_starts, padding = [], [], [], [], []
    position = 0
    for number, row in enumerate(rows, first):
        row_starts.append(position)
        for index, example in enumerate(row if isinstance(row, list) else [row]):
            within = f", example {index} of those packed into it" if isinstance(row, list) and len(row) > 1 else ""
            with row_errors(f"dataset {dataset}, row {number} (from 0){within}", example):
                own_ids, explanation = token_array(example["input_ids"]), collator.explain(example)
                starts = document_starts(example, len(own_ids)) if len(own_ids) else np.zeros(0, dtype=np.int64)
            pad = _trailing_padding(own_ids, explanation.codes, pad_id)
            ids.append(own_ids)
            explained.append(explanation)
            documents.append(position + starts[starts < len(own_ids) - pad])
            padding.append(np.arange(len(own_ids)) >= len(own_ids) - pad)
            position += len(own_ids)
    if not ids:
        empty = np.zeros(0, dtype=np.int64)
        return Tokens(empty, empty.astype(np.uint8), empty.astype(np.float32), empty, empty, empty.astype(bool), empty)
    codes = torch.from_numpy(np.concatenate([explanation.codes for explanation in explained]))
    _, roles, weights = decode(codes)
    return Tokens(
        np.concatenate(ids),
        roles.numpy(),
        weights.numpy(),
        np.concatenate(documents).astype(np.int64),
        np.array(row_starts, dtype=np.int64),
        np.concatenate(padding),
        placeholder_kinds(codes).numpy(),
        _joined([(explanation.spans, len(explanation.codes)) for explanation in explained], np.zeros(1, dtype=bool)),
        _joined(
            [(explanation.sources, len(explanation.codes)) for explanation in explained], np.ones(1, dtype=np.float32)
        ),
    )


def _joined(parts: list[tuple[dict[str, np.ndarray], int]], without: np.ndarray) -> dict[str, np.ndarray]:
    """Concatenate each named array over the examples. Tokens of an example without that name get `without`."""
    names = dict.fromkeys(name for explanation, _ in parts for name in explanation)
    return {
        name: np.concatenate([explanation.get(name, np.broadcast_to(without, size)) for explanation, size in parts])
        for name in names
    }


@contextlib.contextmanager
def row_errors(where: str, example: Mapping[str, Any]) -> Iterator[None]:
    """What is wrong with an example becomes an error that says which.

    Args:
        where (`str`): its dataset and row, as training gets them.
        example (`Mapping`): its beginning is named as well, since frameworks shuffle.

    Raises:
        WITConfigError: for a `ValueError`, or what numpy raises for values that are no numbers.
    """
    try:
        yield
    except (ValueError, TypeError, OverflowError, KeyError) as error:
        reason = f"there is no column {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        begin = ", ".join(str(token) for token in list(example.get("input_ids", ()))[:_BEGIN])
        raise WITConfigError(
            f"{where}: {reason}; mend it, or take it out of the data (its input_ids begin {begin})"
        ) from None


def _trailing_padding(input_ids: np.ndarray, codes: np.ndarray, pad_id: int | None) -> int:
    """How many tokens at the end are padding: neither prompt nor response, and the padding token."""
    if not len(codes) or codes[-1] != IGNORE_INDEX or pad_id is None:
        return 0
    kept = np.flatnonzero((codes != IGNORE_INDEX) | (input_ids != pad_id))
    return len(codes) - (int(kept[-1]) + 1 if len(kept) else 0)


def blocks(rows: Iterable[Any], limit: int | None = None, as_arrays: bool = True) -> Iterator[list[Any]]:
    """Rows in lists of up to 512, never more in memory.

    Args:
        rows (`Iterable`): see `Split.rows`.
        limit (`int | None`): how many rows to read at most.
        as_arrays (`bool`): whether token columns of a `datasets.Dataset` may be arrays instead of lists, which is
            several times as fast. Not when a strategy looks at an example's columns itself.
    """
    source = _arrow_rows(rows) if as_arrays and hasattr(rows, "with_format") and hasattr(rows, "data") else iter(rows)
    source = itertools.islice(source, limit)
    while block := list(itertools.islice(source, BLOCK)):
        yield block


def _arrow_rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """The rows of a `datasets.Dataset`, its integer lists as views of Arrow's memory."""
    for table in dataset.with_format("arrow").iter(batch_size=BLOCK):
        columns = {name: _column(name, table[name].combine_chunks()) for name in table.column_names}
        for index in range(table.num_rows):
            yield {name: column[index] for name, column in columns.items()}


def _column(name: str, column: Any) -> list[Any]:
    import pyarrow as pa

    if hasattr(column, "chunks"):  # an empty chunked array stays one
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if name not in _ARRAY_COLUMNS or not is_list or column.null_count or column.values.null_count:
        return column.to_pylist()
    offsets, values = column.offsets.to_numpy(), column.values.to_numpy(zero_copy_only=False)
    return [values[start:end] for start, end in itertools.pairwise(offsets.tolist())]


def first_rows(rows: Any, wanted: list[int]) -> dict[int, Any]:
    """The rows with these numbers, counted from 0, by number. Numbers beyond the end are left out."""
    if hasattr(rows, "__getitem__") and hasattr(rows, "__len__"):
        return {index: rows[index] for index in wanted if index < len(rows)}
    last = max(wanted, default=-1)
    by_number = {index: row for index, row in enumerate(itertools.islice(rows, last + 1)) if index in set(wanted)}
    return {index: by_number[index] for index in wanted if index in by_number}
