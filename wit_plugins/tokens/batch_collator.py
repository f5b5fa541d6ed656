"""Codes from the batch: for frameworks that tokenise in the collator, as they do where pictures are read there.

Such examples have no ids and no labels before the collator, so nothing can travel through it. Its batch has both, row
by row, and each row is read as an example is otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from wit_plugins.errors import BadExampleError, WeightsNotAppliedError
from wit_plugins.tokens.collator import CODES_KEY, WeightedCollator
from wit_plugins.tokens.roles import IGNORE_INDEX
from wit_plugins.tokens.span_bits import SPANS_KEY

# What is said of single tokens. A row is one document, unless its positions begin anew.
_COLUMNS = ("input_ids", "labels", "attention_mask", "mm_token_type_ids", "position_ids")


class BatchCollator(WeightedCollator):
    """Wraps a collator that tokenises, so that its batches carry every token's weight, target and role.

    The batch keeps what the wrapped collator made of it, `labels` included, and gains `weighted_labels` and, if there
    are spans to log, `weighted_spans`: see [`WeightedCollator`].

    Args:
        collator, strategies, reader, tokenizer: those of [`WeightedCollator`].
        look (`Callable`, *optional*): is given each example as it is, to refuse what nobody reads behind the collator.
    """

    def __init__(self, *args: Any, look: Callable[[Mapping[str, Any]], None] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.look = look

    def __call__(self, features: list[Any], *args: Any, **kwargs: Any) -> Any:
        """Collate examples into a batch.

        Raises:
            WeightsNotAppliedError: if the batch has no two-dimensional `input_ids` and `labels` of the same shape, or
                a label is not its token's own id.
            BadExampleError: if a row cannot be trained on; it is named by its place in the batch.
        """
        for example in features if self.look is not None else ():
            self.look(example)  # type: ignore[misc]
        batch = self.collator(features, *args, **kwargs)
        if batch.get("labels") is None:
            return batch  # e.g. prediction; a training step without codes stops
        codes, bits = [], []
        for index, row in enumerate(rows_of(batch, type(self.collator).__name__)):
            try:
                own, spans = self._read(row)
            except BadExampleError as error:
                raise BadExampleError(f"row {index} of a batch of {len(batch['labels'])}: {error}") from None
            codes.append(own)
            bits.append(spans)
        batch[CODES_KEY] = torch.from_numpy(np.stack(codes))
        if self.strategies.logged_spans:
            batch[SPANS_KEY] = torch.from_numpy(np.stack(bits))
        return batch


def rows_of(batch: Mapping[str, Any], made_by: str) -> list[dict[str, np.ndarray]]:
    """What a batch says of its tokens, a mapping for each row, as the examples of a tokenised dataset are.

    Args:
        batch (`Mapping`): with `input_ids` and `labels`, int `[B, L]`, and optionally more of the same shape.
        made_by (`str`): the collator's name, for messages.

    Raises:
        WeightsNotAppliedError: if there are none of these, or `shift_labels`, or a label is not its token's own id.
    """
    ids: Any = batch.get("input_ids")
    labels: Any = batch.get("labels")
    shapes = [tuple(each.shape) if isinstance(each, torch.Tensor) else None for each in (ids, labels)]
    if None in shapes or shapes[0] != shapes[1] or len(shapes[0] or ()) != 2 or "shift_labels" in batch:
        raise WeightsNotAppliedError(
            f"{made_by} returns input_ids of shape {shapes[0]} and labels of shape {shapes[1]}, where weights need two "
            "tensors of the same shape, a row an example, and no shift_labels"
        )
    if bool(((labels != IGNORE_INDEX) & (labels != ids)).any()):
        raise WeightsNotAppliedError(
            f"{made_by} makes labels that are not the ids of their tokens (shifted ones, say), so it cannot be told "
            "what is prompt; use a collator whose labels are input_ids, or -100 where a token is masked"
        )
    found = {}
    for name in _COLUMNS:
        value = batch.get(name)
        if isinstance(value, torch.Tensor) and tuple(value.shape) == shapes[0]:
            found[name] = value.cpu().numpy()
    return [{name: values[index] for name, values in found.items()} for index in range(len(found["labels"]))]


class CollatedStream:
    """Examples that are tokenised by a collator, seen as tokenised ones, one by one.

    Args:
        dataset: the framework's examples.
        collator (`Callable`): the framework's own.
    """

    def __init__(self, dataset: Any, collator: Callable[..., Any]) -> None:
        self.dataset, self.collator = dataset, collator

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self._tokenised(example) for example in self.dataset)

    def _tokenised(self, example: Mapping[str, Any]) -> dict[str, Any]:
        batch = self.collator([dict(example)])  # a collator may change the example that it is given
        if batch.get("labels") is None:
            return {"input_ids": batch.get("input_ids")}
        return dict(rows_of(batch, type(self.collator).__name__)[0])


class CollatedExamples(CollatedStream):
    """The same for a dataset with a length and an order."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._tokenised(self.dataset[index])
