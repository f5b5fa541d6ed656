"""Reads the weights that stand in TRL's rows, and writes them into the labels of these rows.

`datasets.map` calls the classes here, so they pickle. The labels of a prepared dataset are *sealed*: they are strings,
so that a collator without weights fails when it makes a tensor of them. TRL's head (since 1.15) does not check whether
a label is in the vocabulary; without the seal such a run would train on nonsense.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from wit_plugins.data_weights.reader import DataWeights
from wit_plugins.errors import BadExampleError
from wit_plugins.foreign import Delegate
from wit_plugins.tokens.roles import IGNORE_INDEX, token_array
from wit_plugins.tokens.weighted_labels import read_prepared

if TYPE_CHECKING:
    from wit_plugins.data_weights.message_tokens import WeightedMessage

MARK = "wit_prepared"  # a column of prepared datasets: the fingerprint of the settings
RAW = "wit_raw"  # a column, while TRL tokenises: the row as it was, for strategies that read it
_CONVERSATIONS = ("prompt", "completion", "messages", "conversations")  # columns that TRL reads as messages


class Template(Delegate):
    """Stands in the tokenizer's place while TRL tokenises, so that the chat template sees no weights.

    Most templates take a content that is one text. For these, a content in parts is joined into one text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the trainer's.
        keys (`Sequence[str]`): the keys of messages and of their parts that are weights.
        chat_template (`str | None`): the template that TRL uses in the place of the tokenizer's.
    """

    _holder = "tokenizer"

    def __init__(self, tokenizer: Any, keys: Sequence[str], chat_template: str | None = None) -> None:
        self.tokenizer, self.keys, self.chat_template = tokenizer, tuple(keys), chat_template
        self.joins_parts = not self._writes_parts()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer's own."""
        return self.tokenizer(*args, **kwargs)

    def apply_chat_template(self, messages: Sequence[Any], **kwargs: Any) -> Any:
        """Call the tokenizer's own method with messages without weights."""
        return self.tokenizer.apply_chat_template(self.plain(messages), **kwargs)

    def plain(self, messages: Sequence[Any]) -> list[Any]:
        """Messages without their weights."""
        return [self._plain(message) for message in messages]

    def render(self, row: Mapping[str, Any], messages: Sequence[Any], contents: Sequence[str]) -> str:
        """The text that TRL would tokenise for a row if its messages (plain ones) had these contents."""
        tools = row.get("tools")
        made = []
        for message, text in zip(messages, contents, strict=True):
            own = message.get("content")
            if isinstance(own, list):
                message = {**message, "content": [{"type": "text", "text": text}]}
            elif isinstance(own, str) or text:
                message = {**message, "content": text}
            made.append(message)
        options = {"chat_template": self.chat_template, **(row.get("chat_template_kwargs") or {})}
        options["tools"] = json.loads(tools) if isinstance(tools, str) else tools
        return self.tokenizer.apply_chat_template(made, tokenize=False, **options)

    def _plain(self, message: Any) -> Any:
        if not isinstance(message, Mapping):
            return message
        made = {key: value for key, value in message.items() if key not in self.keys}
        content = made.get("content")
        if isinstance(content, list):
            texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
            if self.joins_parts and all(isinstance(text, str) for text in texts):
                made["content"] = "".join(texts)  # type: ignore[arg-type]
            else:
                made["content"] = self.plain(content)
        return made

    def _writes_parts(self) -> bool:
        contents = ("x", [{"type": "text", "text": "x"}])
        try:
            text, parts = (
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": content}], tokenize=False, chat_template=self.chat_template
                )
                for content in contents
            )
        except Exception:  # whatever a template raises; one that takes no parts, or no tokenizer's at all
            return False
        return bool(text == parts)


class Weigh:
    """Writes the weights of tokens into the labels of rows that TRL has tokenised and not truncated yet.

    Args:
        data ([`DataWeights`]): what is read from the data.
        template ([`Template`]): the rows were tokenised with it.
        name (`str`): the dataset's, for messages.
        assistant_only (`bool`): whether TRL trains on nothing but messages of the assistant.
        completion_only (`bool`): whether TRL trains on nothing but completions, where there are some.
    """

    def __init__(
        self,
        data: DataWeights,
        template: Template,
        name: str,
        assistant_only: bool = False,
        completion_only: bool = True,
    ) -> None:
        self.data, self.template, self.name = data, template, name
        self.assistant_only, self.completion_only = assistant_only, completion_only

    def __call__(self, rows: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        """The columns that change, of some rows (a batch of `datasets.map`).

        Raises:
            BadExampleError: naming the row, the message, the key and the value.
        """
        labels: list[Any] = []
        marks: list[int] = []
        for place, index in enumerate(indices):
            row = {name: column[place] for name, column in rows.items()}
            if row.get(MARK) is not None:
                labels.append(row["labels"])
                marks.append(row[MARK])
                continue
            try:
                labels.append(seal(self._labels(row)))
            except BadExampleError as error:
                raise BadExampleError(f"example {index} of the {self.name} dataset: {error}") from None
            marks.append(self.data.fingerprint)
        return {"labels": labels, MARK: marks}

    def _labels(self, row: dict[str, Any]) -> Any:
        raw = row.pop(RAW, row)
        if not says_something(row, self.data):
            return row["labels"]
        weights: Any = self.data.sample_weight(row)
        found = conversations(row)
        names = ("prompt", "completion") if "prompt" in row else ("messages",)
        weighted = [each for name in names for each in self._messages(found.pop(name, ()), name)]
        for name, others in found.items():
            if any(each.weight != 1 or each.pieces for each in self.data.messages(others, name)):
                raise BadExampleError(
                    f"{name} has weights, but TRL tokenises other columns, so it cannot be said which tokens they are "
                    "for; rename it to messages, or leave them out (message_weight_keys=[])"
                )
        if weighted:

            def render(contents: Sequence[str]) -> str:
                plain = self.template.plain([message for name in names for message in row.get(name) or ()])
                return self.template.render(row, plain, contents)

            of_messages = self.data.weigh_messages(weighted, render, row["input_ids"])
            weights = self.data.times(of_messages, weights)
        return self.data.labels(row["input_ids"], row["labels"], weights, raw)

    def _messages(self, messages: Sequence[Any], column: str) -> list[WeightedMessage]:
        trains_on_all = not self.assistant_only and not (self.completion_only and column == "prompt")
        are_answers = [trains_on_all or message.get("role") == "assistant" for message in messages]
        return self.data.messages(messages, column, are_answers=are_answers)


class KeepsResponse:
    """Tells whether a prepared row keeps a label after truncation, so that a row without one can be dropped.

    TRL drops such rows by itself, by labels that are not -100. It cannot read prepared labels.

    Args:
        max_length (`int`): how many tokens are kept.
        truncation_mode (`str`): `keep_start` or `keep_end`.
    """

    def __init__(self, max_length: int, truncation_mode: str) -> None:
        self.kept = slice(-max_length, None) if truncation_mode == "keep_end" else slice(max_length)

    def __call__(self, row: Mapping[str, Any]) -> bool:
        """Whether a label is left. A row that is not prepared is kept here, since TRL looks at it itself."""
        return row.get(MARK) is None or bool((own_labels(row["labels"])[self.kept] != IGNORE_INDEX).any())


def seal(labels: Sequence[int]) -> list[str]:
    """Labels as strings, so that a collator which does not know them fails instead of training on codes."""
    return [str(label) for label in labels]


def is_sealed(labels: Any) -> bool:
    """Whether labels are sealed: strings instead of integers."""
    return len(labels) > 0 and isinstance(labels[0], str)


def opened(labels: Sequence[str]) -> np.ndarray:
    """The integers in sealed labels, int64 `[T]`."""
    return np.fromiter(map(int, labels), dtype=np.int64, count=len(labels))


def own_labels(labels: Any) -> np.ndarray:
    """TRL's own labels, int64 `[T]`, from plain, prepared or sealed labels."""
    found = opened(labels) if is_sealed(labels) else token_array(labels)
    prepared = read_prepared(found)
    return found if prepared is None else prepared.labels


def conversations(row: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The columns of a row that hold messages."""
    named = {name: row[name] for name in _CONVERSATIONS if isinstance(row.get(name), list)}
    return {name: messages for name, messages in named.items() if all(isinstance(m, Mapping) for m in messages)}


def says_something(row: Mapping[str, Any], data: DataWeights) -> bool:
    """Whether a row has any weight."""
    return data.says_something(row, [message for messages in conversations(row).values() for message in messages])


def found_weights(dataset: Any, data: DataWeights) -> list[str] | None:
    """Where weights stand in a dataset, in words. `None` if only the rows of a stream can tell.

    The dataset's features name its columns and keys, so a large dataset is not read. `datasets` gives every row each
    key that any row has, mostly as `None`.
    """
    features = dataset.features
    if features is None:
        return None
    found = [f"strategies: {name}" for name in data.strategies.reading_raw]
    if data.groups is not None:
        found.append(f"groups of {data.groups.strategy.name}: column {data.groups.key}")
    if data.sample_key in features:
        found.append(f"column {data.sample_key}")
    in_messages, unclear = data.weighted_columns(features, _CONVERSATIONS)
    found += in_messages
    # Before anything is tokenised.
    data.warn_of_unread_keys(dataset, _CONVERSATIONS)
    if found or not unclear:
        return found
    if not hasattr(dataset, "__len__"):
        return None
    for row in dataset.select_columns(unclear):
        if says_something(row, data):
            return unclear
    return []
