"""How one trainer's examples are read: the framework's own view of a row, and what no row may hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from wit_plugins.errors import BadExampleError
from wit_plugins.tokens.roles import IGNORE_INDEX, example_roles, token_array
from wit_plugins.tokens.transport import MAX_VOCAB_SIZE

_PADDING_RUN = 2  # one masked pad id may be an end of text; a run of them is padding


@dataclass(frozen=True)
class ExampleReader:
    """Reads examples as a trainer trains on them, and refuses rows that no model can be trained on.

    Picklable, since data-loader workers read too.

    Args:
        vocab_size (`int`): how many ids the model has; other ids are refused.
        pad_token_id (`int`, *optional*): what padding looks like in rows that have no `attention_mask`.
        cuts_documents (`bool`): rows begin and end anywhere in a document, so that padding may be in their middle.
        own_view (`Callable`, *optional*): turns an example into what the framework makes of it, see
            [`TrainerAdapter.read_example`].
    """

    vocab_size: int = MAX_VOCAB_SIZE
    pad_token_id: int | None = None
    cuts_documents: bool = False
    own_view: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None

    def __call__(self, example: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Targets, roles and document starts of one example, see [`example_roles`].

        Raises:
            BadExampleError: if its columns do not fit each other, hold ids that the model does not have, or hold
                padding that nothing tells from prompt.
        """
        if self.own_view is not None:
            example = self.own_view(example)
        input_ids, labels = token_array(example["input_ids"]), token_array(example["labels"])
        targets, roles, starts = example_roles({**example, "input_ids": input_ids, "labels": labels})
        self._check_ids("input_ids", input_ids)
        self._check_ids("labels", labels)
        if self.pad_token_id is not None and example.get("attention_mask") is None:
            self._check_padding((input_ids == self.pad_token_id) & (labels == IGNORE_INDEX), starts)
        return targets, roles, starts

    def _check_ids(self, column: str, ids: np.ndarray) -> None:
        wrong = (ids < 0) | (ids >= self.vocab_size)
        if column == "labels":
            wrong &= ids != IGNORE_INDEX
        if not wrong.any():
            return
        at = int(np.argmax(wrong))
        masked = f", or {IGNORE_INDEX} where a token is masked" if column == "labels" else ""
        raise BadExampleError(
            f"{column} has {int(ids[at])} at position {at}; the model knows 0 to {self.vocab_size - 1:,}{masked}; "
            "tokenise with the model's own tokenizer, or resize the model's embeddings to the tokenizer's"
        )

    def _check_padding(self, padding: np.ndarray, starts: np.ndarray) -> None:
        """`padding` is true where a pad id is masked, bool `[T]`."""
        if not padding.any():
            return
        ends = [*starts[1:], len(padding)]
        if self.cuts_documents:
            runs = [_longest_run(padding)]
        else:
            documents = [padding[start:end] for start, end in zip(starts, ends, strict=True)]
            runs = [max(_leading(document), _leading(document[::-1])) for document in documents]
        if max(runs) < _PADDING_RUN:
            return
        raise BadExampleError(
            f"input_ids has {max(runs)} masked pad tokens ({self.pad_token_id}) in a row and no attention_mask that "
            "tells them from prompt, so that they would be trained on; take the padding off (the trainer pads by "
            "itself), or give unpacked examples an attention_mask"
        )


def _leading(flags: np.ndarray) -> int:
    """How many are true before the first that is not."""
    return int(np.argmin(flags)) if not flags.all() else len(flags)


def _longest_run(flags: np.ndarray) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    return int((edges[1::2] - edges[::2]).max())
