"""What TRL's rows say of weights, and their labels with the weights in them. Functions of `datasets.map`: picklable.

The labels of prepared datasets are *sealed*: written as text, of which a collator without weights can make no tensor.
TRL's head does not look (since 1.15) whether a label is in the vocabulary, and such a run would train on nonsense.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wit_plugins.data_weights.message_tokens import WeightedMessage
from wit_plugins.data_weights.reader import DataWeights
from wit_plugins.errors import BadExampleError
from wit_plugins.foreign import Delegate
from wit_plugins.tokens.roles import IGNORE_INDEX, token_array
from wit_plugins.tokens.weighted_labels import read_prepared

MARK = "wit_prepared"  # a column of prepared datasets: the fingerprint of the settings
RAW = "wit_raw"  # a column, while TRL tokenises: the row as it was, for strategies that read it
_CONVERSATIONS = ("prompt", "completion", "messages", "conversations")  # columns that TRL reads as messages


class Template(Delegate):
    """A tokenizer whose chat template sees no weights, for TRL in the tokenizer's place.

    Parts of text become one text where the template does not write them so by itself (most take a text alone).

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the trainer's.
        keys (`Sequence[str]`): of messages and their parts, that are weights.
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
        """The tokenizer's own, without weights in the messages."""
        return self.tokenizer.apply_chat_template(self.plain(messages), **kwargs)

    def plain(self, messages: Sequence[Any]) -> list[Any]:
        """Messages without their weights."""
        return [self._plain(message) for message in messages]

    def render(self, row: Mapping[str, Any], messages: Sequence[Any], contents: Sequence[str]) -> str:
        """The text that TRL tokenises for a row's messages (plain ones), with these contents in the place of theirs."""
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
    """The labels of rows that TRL has tokenised, whole, with their tokens' weights in them.

    Args:
        data ([`DataWeights`]): what is read from the data.
        template ([`Template`]): what they were tokenised with.
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

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        """The columns that change.

        Raises:
            BadExampleError: naming the row, the message, the key and the value.
        """
        if row.get(MARK) is not None:
            return {}
        try:
            return {"labels": seal(self._labels(dict(row))), MARK: self.data.fingerprint}
        except BadExampleError as error:
            raise BadExampleError(f"example {index} of the {self.name} dataset: {error}") from None

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
            messages = self.template.plain([message for name in names for message in row.get(name) or ()])
            of_messages = self.data.weigh_messages(
                weighted, lambda contents: self.template.render(row, messages, contents), row["input_ids"]
            )
            weights = self.data.times(of_messages, weights)
        return self.data.labels(row["input_ids"], row["labels"], weights, raw)

    def _messages(self, messages: Sequence[Any], column: str) -> list[WeightedMessage]:
        trains_on_all = not self.assistant_only and not (self.completion_only and column == "prompt")
        are_answers = [trains_on_all or message.get("role") == "assistant" for message in messages]
        return self.data.messages(messages, column, are_answers=are_answers)


class KeepsResponse:
    """Whether TRL would keep a row: where it truncates, it drops those of which no label is left.

    It looks for labels that are not -100, of which prepared ones say something else.

    Args:
        max_length (`int`): how many tokens are kept.
        truncation_mode (`str`): which.
    """

    def __init__(self, max_length: int, truncation_mode: str) -> None:
        self.kept = slice(-max_length, None) if truncation_mode == "keep_end" else slice(max_length)

    def __call__(self, row: Mapping[str, Any]) -> bool:
        """See above; rows that are not prepared are left to TRL."""
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
    """TRL's own labels, int64 `[T]`, whatever has been made of them."""
    found = opened(labels) if is_sealed(labels) else token_array(labels)
    prepared = read_prepared(found)
    return found if prepared is None else prepared.labels


def conversations(row: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The columns of a row that hold messages."""
    named = {name: row[name] for name in _CONVERSATIONS if isinstance(row.get(name), list)}
    return {name: messages for name, messages in named.items() if all(isinstance(m, Mapping) for m in messages)}


def says_something(row: Mapping[str, Any], data: DataWeights) -> bool:
    """Whether any weight stands in a row."""
    return data.says_something(row, [message for messages in conversations(row).values() for message in messages])


def found_weights(dataset: Any, data: DataWeights) -> list[str] | None:
    """Where weights stand in a dataset, in words; `None` if only the rows of a stream can tell.

    Columns and keys are told by its features, so that a large dataset is not read; a key that is there in any row is
    there in all, mostly as `None`.
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
