"""Carry the weights in a row of the data through LLaMA-Factory's converters to its tokenisation.

LLaMA-Factory's converters keep the roles and contents of messages and drop everything else. They run unchanged here.
The weights of the row are added to the first aligned message, as text under a key of its own, until the example is
tokenised.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llamafactory.data.converter import (
    AlpacaDatasetConverter,
    DatasetConverter,
    OpenAIDatasetConverter,
    SharegptDatasetConverter,
)

from wit_plugins.data_weights.message_tokens import WeightedMessage
from wit_plugins.data_weights.reader import DataWeights
from wit_plugins.errors import BadExampleError

KEY = "wit"  # of an aligned message, beside its role and content
_KNOWN = (AlpacaDatasetConverter, SharegptDatasetConverter, OpenAIDatasetConverter)
BETWEEN_TOOL_RESPONSES = "\n</tool_response>\n<tool_response>\n"  # where `formatting: openai` makes one of several


class Part(NamedTuple):
    """The weights of one message of the data, and the number of characters of its content in the aligned message."""

    length: int
    weight: float
    pieces: Sequence[tuple[int, int, float]]

    @property
    def says_something(self) -> bool:
        """Whether any of its tokens has another weight than 1."""
        return self.weight != 1 or any(weight != 1 for _, _, weight in self.pieces)


@dataclass(frozen=True)
class RowWeights:
    """The weights of one example of the data.

    Attributes:
        sample (`float`): multiplies all of its tokens. system (`Part | None`): the weights of its system message;
        `None` if it has none. messages (`tuple`): for each aligned message, the messages of the data that it was made
        from; empty if no message
            has a weight.
        raw (`dict | None`): the example itself, if a strategy reads it.
        group (`int`): the number of its group; 0 if there are none.
    """

    sample: float
    system: Part | None
    messages: tuple[tuple[Part, ...], ...]
    raw: dict[str, Any] | None
    group: int = 0

    @classmethod
    def read(cls, messages: Sequence[Mapping[str, Any]]) -> RowWeights | None:
        """Read the weights from aligned messages; `None` if everything weighs 1."""
        text = messages[0].get(KEY) if messages else None
        if not text:
            return None
        sample, system, parts, raw, group = json.loads(text)
        made = tuple(tuple(Part(*part) for part in message) for message in parts)
        return cls(sample, None if system is None else Part(*system), made, raw, group)


class WeightedConverter:
    """Wraps one of LLaMA-Factory's converters and adds the weights. It can be pickled: other processes convert too.

    Args:
        converter (`DatasetConverter`): LLaMA-Factory's.
        data ([`DataWeights`]): reads the weights.
    """

    def __init__(self, converter: DatasetConverter, data: DataWeights) -> None:
        self.converter, self.data = converter, data

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        """The aligned example. Its first message has one more key if there are weights.

        Raises:
            BadExampleError: if a value is no weight, or the format of the data has no place for weights.
        """
        weights = self.weights(example)
        if any(isinstance(message.get(self._content), (list, tuple)) for message in self._messages(example)):
            # LLaMA-Factory takes texts only, so the parts of a content become one text.
            joined = [
                {**message, self._content: own.content}
                for message, own in zip(self._messages(example), weights, strict=True)
            ]
            aligned = self.converter({**example, self.converter.dataset_attr.messages: joined})
        else:
            aligned = self.converter(example)
        messages = [*aligned["_prompt"], *aligned["_response"]]
        said = [self._say(example, aligned, weights)] if messages else []
        for message, text in zip(messages, [*said, *[""] * len(messages)], strict=False):
            message[KEY] = text
        return aligned

    def warn_of_unread_keys(self, dataset: Any) -> None:
        """Warn of keys of messages that look like weights and are not read."""
        if isinstance(self.converter, (SharegptDatasetConverter, OpenAIDatasetConverter)):
            self.data.warn_of_unread_keys(dataset, [self.converter.dataset_attr.messages], [self._content])

    def weights(self, example: Mapping[str, Any]) -> list[WeightedMessage]:
        """The weights of an example's messages; empty for formats without messages.

        Raises:
            BadExampleError: naming message, key and value.
        """
        self.data.sample_weight(example)
        self.data.group(example)
        self._look_for_unknown_messages(example)
        messages = self._messages(example)
        name = self.converter.dataset_attr.messages or ""
        return self.data.messages(messages, name, self._content, self._are_answers(messages))

    def _look_for_unknown_messages(self, example: Mapping[str, Any]) -> None:
        """Refuse weights of messages in a format that was added to LLaMA-Factory's own."""
        if isinstance(self.converter, _KNOWN):
            return
        for column, value in example.items():
            messages = [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []
            if any(message.get(key) is not None for message in messages for key in self.data.message_keys):
                raise BadExampleError(
                    f"{column}: its messages have weights, which are read with formatting: sharegpt and openai, not "
                    f"with {self.converter.dataset_attr.formatting}; use one of these, or set message_weight_keys: []"
                )

    def _are_answers(self, messages: Sequence[Mapping[str, Any]]) -> list[bool]:
        """Which messages are answers. Earlier answers are among them, also with `mask_history`."""
        attributes = self.converter.dataset_attr
        answering = (attributes.assistant_tag, attributes.function_tag)
        return [message.get(attributes.role_tag) in answering for message in messages]

    @property
    def _content(self) -> str:
        return str(self.converter.dataset_attr.content_tag)

    def _messages(self, example: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        if isinstance(self.converter, (SharegptDatasetConverter, OpenAIDatasetConverter)):
            return example[self.converter.dataset_attr.messages] or ()
        return ()

    def _say(self, example: Mapping[str, Any], aligned: dict[str, Any], weights: list[WeightedMessage]) -> str:
        """The text that carries the weights of an aligned example; none if everything weighs 1."""
        raw = dict(example) if self.data.strategies.reading_raw else None
        sample, group = self.data.sample_weight(example), self.data.group(example)
        parts = [Part(len(own.content), own.weight, own.pieces) for own in weights]
        system, messages = None, [[part] for part in parts]
        if any(part.says_something for part in parts):
            system, messages = self._aligned(example, aligned, parts)
        elif sample == 1 and not self.data.reads_all:
            return ""
        else:
            messages = []
        try:
            return json.dumps([sample, system, messages, raw, group], ensure_ascii=False)
        except TypeError as error:
            names = ", ".join(self.data.strategies.reading_raw)
            raise BadExampleError(
                f"strategies: {names} reads the examples as they stand in the data (raw_example), and one holds what "
                f"JSON cannot write ({error}); turn that column into text or numbers, or take it out"
            ) from None

    def _aligned(
        self, example: Mapping[str, Any], aligned: dict[str, Any], parts: list[Part]
    ) -> tuple[Part | None, list[list[Part]]]:
        """The parts of the system message, and the parts of each aligned message."""
        attributes, rows = self.converter.dataset_attr, list(self._messages(example))
        system = None
        if attributes.system_tag and rows and rows[0][attributes.role_tag] == attributes.system_tag:
            system, parts, rows = parts[0], parts[1:], rows[1:]
        made: list[list[Part]] = []
        if isinstance(self.converter, OpenAIDatasetConverter):
            waiting: list[Part] = []
            for part, row in zip(parts, rows, strict=True):
                if row[attributes.role_tag] == attributes.observation_tag:
                    waiting.append(part)
                    continue
                made += [waiting, [part]] if waiting else [[part]]
                waiting = []
        else:
            made = [[part] for part in parts]
        messages = [*aligned["_prompt"], *aligned["_response"]]
        for message, own in zip(messages, made, strict=False):
            between = len(BETWEEN_TOOL_RESPONSES) * (len(own) - 1)
            if len(own) > 1 and len(message["content"]) != between + sum(part.length for part in own):
                break
        else:
            if len(made) == len(messages):
                return system, made
        raise BadExampleError(
            f"{attributes.messages}: LLaMA-Factory makes {len(messages)} messages of {len(rows)} here, and it cannot "
            "be said which; leave weights of messages out of this example"
        )
