"""Axolotl's tokenisation of one dataset, with the weights of its rows written into the labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from axolotl.prompt_strategies.chat_template import ChatTemplateStrategy

from wit_axolotl.row_weights import Conversation, read_conversation, without_weights
from wit_plugins.data_weights.columns import NOT_MESSAGES, messages_of
from wit_plugins.data_weights.reader import DataWeights
from wit_plugins.errors import BadExampleError, WITConfigError
from wit_plugins.foreign import Delegate

_FULLY = 1000  # rows that are tokenised again to find the one that was refused


class _RowWeights(NamedTuple):
    """The weights in a row: the weight of the whole row, and the weights of its messages."""

    sample: float
    conversation: Conversation | None


class WeighingStrategy(Delegate):
    """Wraps one of Axolotl's tokenising strategies. The labels of a row with weights carry the weights.

    Everything but `tokenize_prompt` is the wrapped strategy's. It can be pickled, for processes that tokenise.

    Args:
        strategy (`PromptTokenizingStrategy`): Axolotl's.
        weights ([`DataWeights`]): how weights are read.
        refusal (`str`, *optional*): why rows with weights cannot be trained on here.
    """

    _holder = "strategy"

    def __init__(self, strategy: Any, weights: DataWeights, refusal: str | None = None) -> None:
        self.strategy, self.weights, self.refusal = strategy, weights, refusal

    def tokenize_prompt(self, prompt: Mapping[str, Any]) -> Any:
        """Tokenise a row, or a batch of them where the strategy takes batches.

        Raises:
            BadExampleError: if a value in the row is no weight, or its tokens cannot be found.
        """
        if not self.strategy.supports_batched:
            row_weights = self.read(prompt)
            made = self.strategy.tokenize_prompt(prompt)
            if row_weights is not None:
                made["labels"] = self._labels(row_weights, prompt, made.get("input_ids"), made.get("labels"))
            return made
        rows = _rows(prompt)
        read = [self.read(row) for row in rows]
        if isinstance(self.strategy, ChatTemplateStrategy):
            column = self.strategy.prompter.field_messages
            plain = [without_weights(self.strategy, self.weights, row) for row in rows]
            prompt = {**prompt, column: [row[column] for row in plain]} if column in prompt else prompt
        made = self.strategy.tokenize_prompt(prompt)
        if not any(row_weights is not None for row_weights in read):
            return made
        origin = self._origin(rows, made)
        made["labels"] = [
            labels if read[row] is None else self._labels(read[row], rows[row], ids, labels)
            for row, ids, labels in zip(origin, made["input_ids"], made["labels"], strict=True)
        ]
        return made

    def read(self, row: Mapping[str, Any]) -> _RowWeights | None:
        """The weights in a row; `None` if there are none.

        Raises:
            BadExampleError: if a value is no weight, or weights are not read in this type of dataset.
        """
        sample = self.weights.sample_weight(row)
        conversation = None
        if isinstance(self.strategy, ChatTemplateStrategy):
            conversation = read_conversation(self.strategy, self.weights, row)
        else:
            for name, value in row.items():
                self._refuse_messages(name, value)
        if sample == 1 and conversation is None and not self.weights.reads_all:
            return None
        if self.refusal is not None:
            raise BadExampleError(self.refusal)
        return _RowWeights(sample, conversation)

    def _refuse_messages(self, name: str, value: Any) -> None:
        for index, message in enumerate(value if isinstance(value, list) and name != "tools" else ()):
            if isinstance(message, Mapping) and self.weights.message_weight(message, f"{name}[{index}]") != 1:
                raise BadExampleError(
                    f"{name}[{index}] has a weight, which is read in datasets of type chat_template alone; use that "
                    "type, or leave weights of messages unread (message_weight_keys: [])"
                )

    def _origin(self, rows: Sequence[Mapping[str, Any]], made: Mapping[str, Any]) -> Sequence[int]:
        """The row that each example is made from. A strategy may drop rows, and cut rows into several examples."""
        if len(made.get("input_ids", ())) == len(rows):
            return range(len(rows))
        origin: list[int] = []
        found: list[Any] = []
        for index, row in enumerate(rows):
            own = self.strategy.tokenize_prompt({key: [value] for key, value in row.items()}).get("input_ids", [])
            origin += [index] * len(own)
            found += own
        if found != made["input_ids"]:
            raise BadExampleError(
                f"{type(self.strategy).__name__} tokenises several rows together, so that their weights cannot be told "
                "apart; use another type of dataset, or take the weights out"
            )
        return origin

    def _labels(self, row_weights: _RowWeights | None, row: Mapping[str, Any], ids: Any, labels: Any) -> list[int]:
        assert row_weights is not None
        if ids is None or labels is None:
            raise BadExampleError(f"{type(self.strategy).__name__} makes no labels, so that nothing can be weighted")
        weights: np.ndarray | float = row_weights.sample
        if row_weights.conversation is not None:
            of_messages = row_weights.conversation.token_weights(self.strategy, self.weights, ids)
            weights = self.weights.times(of_messages, row_weights.sample)
        return self.weights.labels(ids, labels, np.asarray(weights, dtype=np.float32), row)

    def refused_row(self, dataset: Iterable[Mapping[str, Any]], kind: type[Exception] = BadExampleError) -> int | None:
        """The first row that is refused with this type of error; `None` if it is not found soon.

        The weights of all rows are read, which is quick. Only the first thousand rows are tokenised as well.
        """
        for index, row in enumerate(dataset):
            try:
                self.read(row)
                if index < _FULLY:
                    batched = self.strategy.supports_batched
                    self.tokenize_prompt({key: [value] for key, value in row.items()} if batched else row)
            except kind:
                return index
        return None

    def look_at_columns(self, dataset: Any) -> None:
        """Warn of keys of messages that look like weights and are not read, once, before processes are started."""
        if isinstance(self.strategy, ChatTemplateStrategy):
            prompter = self.strategy.prompter
            mapped = prompter.message_property_mappings
            contents = [mapped.get(key, key) for key in ("content", str(prompter.template_thinking_key))]
            self.weights.warn_of_unread_keys(dataset, [prompter.field_messages], contents)


def refuse_unread(weights: DataWeights, dataset: Any, where: str) -> None:
    """Refuse weights in a dataset that Axolotl does not tokenise row by row.

    Raises:
        WITConfigError: if there are weights in its rows.
    """
    features = getattr(dataset, "features", None) or {}
    columns = [name for name in features if name not in NOT_MESSAGES]
    weights.warn_of_unread_keys(dataset, columns)
    weighted = [name for name in columns if name == weights.sample_key]
    weighted += [name for name in columns if any(weights.weighted_columns(features, [name]))]
    for row in dataset.select_columns(weighted) if weighted else ():
        message_weights = [weights.message_weight(message, place) for place, message in messages_of(row, ("content",))]
        if weights.sample_weight(row) != 1 or any(weight != 1 for weight in message_weights):
            raise WITConfigError(
                f"{where}: there are weights in {', '.join(weighted)}, but Axolotl does not tokenise this dataset row "
                "by row (it is tokenised already, or its type makes a dataset of its own), so they cannot be read; use "
                "the type chat_template, or leave them unread (message_weight_keys: [], sample_weight_key: null)"
            )


def _rows(batch: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
