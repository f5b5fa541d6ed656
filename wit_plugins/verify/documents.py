"""Takes a batch apart into its documents: what a model was called with says where each begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch


@dataclass
class Document:
    """One conversation or example.

    Attributes:
        ids (`list[int]`): `[T]`, what the model reads.
        labels (`list[int]`): `[T]`, the framework's own: -100 where it does not train.
        row (`tuple[int, ...]`): which row of which micro-batch.
    """

    ids: list[int]
    labels: list[int]
    row: tuple[int, ...] = ()

    @property
    def is_response(self) -> list[bool]:
        """Which tokens have a label."""
        return [label != -100 for label in self.labels]

    @property
    def targets(self) -> list[int]:
        """What each token is predicted to be: its label, or itself."""
        return [i if label == -100 else label for i, label in zip(self.ids, self.labels, strict=True)]


@dataclass
class Reading:
    """Tokens that the model reads in one go.

    Attributes:
        documents (`list[Document]`): one, or several that attend to each other.
        positions (`list[int] | None`): of all their tokens, where they are not 0, 1, 2, ….
    """

    documents: list[Document]
    positions: list[int] | None = None


def readings(batch: Mapping[str, torch.Tensor], number: int = 0, pad: int | None = None) -> Iterator[Reading]:
    """The documents of a micro-batch.

    Padding is what the attention mask masks. It is also a document without a label that is nothing but padding tokens,
    which is how packed rows are filled up. A document begins where the position ids begin anew, or where a mask that
    numbers documents has the next number. Documents of a row attend to each other only if the row has an ordinary mask.

    Args:
        batch (`Mapping[str, torch.Tensor]`): what the model was called with: `input_ids` and `labels` `[B, L]`, and
            where it had them `position_ids` `[B, L]` and `attention_mask` `[B, L]` or `[B, 1, L, L]`.
        number (`int`): of the micro-batch.
        pad (`int`, *optional*): the id of the padding token.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    masks, positions = batch.get("attention_mask"), batch.get("position_ids")
    for row in range(len(ids)):
        length = ids.shape[1]
        real, fresh, alone = [True] * length, [False] * length, masks is None
        if masks is not None and masks.ndim == 2:
            mask = masks[row].tolist()
            real = [value != 0 for value in mask]
            fresh = [a != b for a, b in zip(mask, [None, *mask], strict=False)]
            alone = max(mask) > 1
        elif masks is not None:
            allowed = masks[row, 0] if masks.dtype == torch.bool else masks[row, 0] == 0
            real = allowed.diagonal().tolist()
            fresh = [not i or not bool(allowed[i, i - 1]) for i in range(length)]
            alone = True
        where = None
        if positions is not None:
            where = positions[row if len(positions) > 1 else 0].tolist()
            fresh = [f or not i or where[i] != where[i - 1] + 1 for i, f in enumerate(fresh)]
        found: list[list[int]] = []
        for i in range(length):
            if not real[i]:
                continue
            if not found or fresh[i] or not real[i - 1]:
                found.append([])
            found[-1].append(i)
        found = [part for part in found if not all(ids[row, i] == pad and labels[row, i] == -100 for i in part)]
        made = [
            Document([int(ids[row, i]) for i in part], [int(labels[row, i]) for i in part], (number, row))
            for part in found
        ]
        if alone or len(made) == 1:
            yield from (Reading([document]) for document in made)
        elif made:
            yield Reading(made, None if where is None else [where[i] for part in found for i in part])
