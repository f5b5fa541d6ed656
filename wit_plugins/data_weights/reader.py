"""Weights that stand in the data: which keys are read, what they may say, and how they get into the labels.

Used while a framework tokenises, the only moment at which a message, its weight and its tokens are known together.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from wit_plugins.config import WITConfig, checked_weight, multiplied
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.data_weights.columns import evenly, keys_by_features, messages_of
from wit_plugins.errors import BadExampleError
from wit_plugins.tokens.roles import example_roles
from wit_plugins.tokens.weighted_labels import FINGERPRINT_BITS, prepare

if TYPE_CHECKING:  # a run whose data holds no weights loads neither
    from wit_plugins.data_weights.message_tokens import Render, Surroundings, WeightedMessage
    from wit_plugins.tokens.text import TokenText

_CACHED = ("_token_text", "_surroundings")  # attributes that are made again in another process
_VERSION = 2  # of what a value in the data means: what was prepared with another meaning is prepared again
_LOOKS_LIKE_A_WEIGHT = re.compile(r"w(ei|ie)gh?t|loss|scale|train", re.IGNORECASE)


class UnreadWeightWarning(UserWarning):
    """A key of a message looks like a weight, and is not read."""


class DataWeights:
    """Reads the weights that stand in the data, and writes them into labels.

    Picklable, and what is pickled tells caches apart: it holds what decides the labels, and not the roles' weights.

    Args:
        config ([`WITConfig`]): says which keys are read, and which strategies.
        tokenizer (`PreTrainedTokenizerBase`): the one that trains.
        own_key (`str`, *optional*): under which key the framework itself is told to read a message's flag. It is read,
            too, if any is. The framework's caches know it already, so it is not in the fingerprint.
    """

    def __init__(self, config: WITConfig, tokenizer: Any, own_key: str | None = None) -> None:
        keys = config.message_weight_keys
        self.message_keys = tuple(dict.fromkeys([*keys, own_key] if keys and own_key else keys))
        self.sample_key = config.sample_weight_key
        self.tokenizer = tokenizer
        strategies = ActiveStrategies(config.active_strategies())
        self.groups, self.strategies = strategies.groups, ActiveStrategies(strategies.reading_raw)
        self.negative = bool(strategies.needs.replaces_nll)  # whether a weight may be below 0
        self._fingerprint = fingerprint(keys, self.sample_key, strategies)
        self._warned: set[str] = set()  # keys that look like weights and are not read
        self._settled: set[str] = set()  # keys that nothing more is to be said of

    @property
    def active(self) -> bool:
        """Whether anything is read from the data at all."""
        return bool(self.message_keys or self.sample_key or self.reads_all)

    @property
    def reads_all(self) -> bool:
        """Whether something is read off every example, whatever it says: a group, or what strategies ask for."""
        return self.groups is not None or bool(self.strategies.reading_raw)

    @property
    def fingerprint(self) -> int:
        """Of all settings that decide what is written into the labels, below 2^31; for caches, too."""
        return self._fingerprint

    def sample_weight(self, example: Mapping[str, Any]) -> float:
        """What a whole example is multiplied by; 1 if it says nothing.

        Raises:
            BadExampleError: if what it says is no weight.
        """
        value = example.get(self.sample_key) if self.sample_key else None
        return 1.0 if value is None else _weight(value, str(self.sample_key), self.negative)

    @functools.cached_property
    def _token_text(self) -> TokenText:
        from wit_plugins.tokens.text import TokenText

        return TokenText(self.tokenizer)

    @functools.cached_property
    def _surroundings(self) -> Surroundings:
        from wit_plugins.data_weights.message_tokens import Surroundings

        return Surroundings()

    def message_weight(self, message: Mapping[str, Any], where: str, is_answer: bool = True) -> float:
        """What a message or a part of one is multiplied by; 1 if it says nothing.

        Data for other trainers marks its prompts with `false`, which there repeats the mask. So `true` and `false`
        count in answers alone, and leave a prompt the weight of prompts. A number counts everywhere.

        Args:
            message (`Mapping`): with any of the keys that are read; `None` stands for a key that is not there.
            where (`str`): what to call it in an error, such as `messages[3]`.
            is_answer (`bool`): whether it is the assistant's, or the framework trains on it as response anyway.

        Raises:
            BadExampleError: if what it says is no weight, or if two keys say something.
        """
        values = {key: message[key] for key in self.message_keys if message.get(key) is not None}
        if len(values) > 1:
            both = " and ".join(f"{key} = {value!r}" for key, value in values.items())
            raise BadExampleError(f"{where} has two weights, {both}; keep one of them")
        self._find_unread_keys(message, where)
        for key, value in values.items():
            if is_answer or not isinstance(value, (bool, np.bool_)):
                return _weight(value, f"{where}.{key}", self.negative)
        return 1.0

    def group(self, example: Mapping[str, Any]) -> int:
        """The number of an example's group, from 1; 0 if there are none.

        Raises:
            BadExampleError: if it says none, or one that is not listed.
        """
        return 0 if self.groups is None else self.groups.number(example)

    def says_something(self, example: Mapping[str, Any], messages: Sequence[Mapping[str, Any]] = ()) -> bool:
        """Whether there is any weight in an example, its messages or their parts, or anything that reads it."""
        if self.reads_all or (self.sample_key and example.get(self.sample_key) is not None):
            return True
        weighted = False
        for message in messages:
            content = message.get("content")
            for each in (message, *(content if isinstance(content, (list, tuple)) else ())):
                if isinstance(each, Mapping):
                    self._find_unread_keys(each, "messages")
                    weighted |= any(each.get(key) is not None for key in self.message_keys)
        return weighted

    def weighted_columns(self, features: Mapping[str, Any], names: Collection[str]) -> tuple[list[str], list[str]]:
        """Where weights stand in some columns of messages, in words, and which of the columns do not say so.

        Args:
            features (`Mapping`): of a dataset, by the names of its columns.
            names (`Collection[str]`): the columns to look at.
        """
        places_with_weights, unclear = [], []
        for name in names:
            keys = keys_by_features(features.get(name))
            unclear += [name] if keys.unclear else []
            places = [(f"{name}[]", keys.of_messages)]
            places += [(f"{name}[].{content}[]", of_parts) for content, of_parts in keys.of_parts.items()]
            places_with_weights += [
                f"{where}.{key}" for where, own in places for key in self.message_keys if key in own
            ]
        return places_with_weights, unclear

    def warn_of_unread_keys(self, dataset: Any, names: Collection[str], contents: Sequence[str] = ("content",)) -> None:
        """Warn of keys of messages and their parts that look like weights and are not read, each with its first row.

        Rows are read where the features name such a key, or do not name the keys: at most 10,000, at even distances.
        A stream is not read.

        Args:
            dataset: with features, of which only those of a type that `datasets` gave them say something.
            names (`Collection[str]`): its columns of messages.
            contents (`Sequence[str]`): the keys under which a message may have parts.
        """
        features = getattr(dataset, "features", None) or {}
        wanted, columns, unclear = set[str](), [], False
        for name in names:
            keys = keys_by_features(features.get(name))
            unread = {key for own in (keys.of_messages, *keys.of_parts.values()) for key in own if self._is_unread(key)}
            columns += [name] if unread or keys.unclear else []
            wanted, unclear = wanted | unread, unclear or keys.unclear
        if not columns or not hasattr(dataset, "__len__"):
            return
        rows = dataset.select_columns(columns)
        for index in evenly(len(rows)):
            for where, said in messages_of(rows[index], contents):
                self._find_unread_keys(said, f"row {index} (from 0): {where}")
            if not unclear and wanted <= self._warned:
                return

    def messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        where: str = "messages",
        content: str = "content",
        are_answers: Sequence[bool] | None = None,
    ) -> list[WeightedMessage]:
        """Messages with their weights, for [`weigh_tokens`]; their parts of text become one text.

        Args:
            messages: mappings with a role and a content: a text, or a list of parts `{type: text, text, weight}`.
            where (`str`): what to call them in errors.
            content (`str`): under which key the content stands.
            are_answers (`Sequence[bool]`, *optional*): of each, see [`DataWeights.message_weight`]; by default all are.

        Raises:
            BadExampleError: naming the message, the key and the value.
        """
        from wit_plugins.data_weights.message_tokens import WeightedMessage

        weighted = []
        for index, message in enumerate(messages):
            at, is_answer = f"{where}[{index}]", are_answers is None or are_answers[index]
            weight, said = self.message_weight(message, at, is_answer), message.get(content)
            pieces: list[tuple[int, int, float]] = []
            if isinstance(said, (list, tuple)):
                text = ""
                for number, part in enumerate(said):
                    place = f"{at}.{content}[{number}]"
                    own = self.message_weight(part, place, is_answer) if isinstance(part, Mapping) else 1.0
                    words = part.get("text") if isinstance(part, Mapping) else part
                    if not isinstance(words, str):
                        raise BadExampleError(
                            f"{place} = {part!r}: only parts of text can be weighted; "
                            "write {type: text, text: …, weight: …}"
                        )
                    if own != 1:
                        pieces.append((len(text), len(text) + len(words), own))
                    text += words
            else:
                text = said or ""
            weighted.append(WeightedMessage(text, weight, tuple(pieces)))
        return weighted

    def weigh_messages(
        self,
        messages: Sequence[WeightedMessage],
        render: Render,
        input_ids: Sequence[int],
        offsets: np.ndarray | None = None,
        ends: Collection[int] = (),
    ) -> np.ndarray:
        """The weights `[T]` of the tokens of rendered messages, float32; see [`weigh_tokens`]."""
        from wit_plugins.data_weights.message_tokens import weigh_tokens

        return weigh_tokens(messages, render, input_ids, self._token_text, offsets, ends, self._surroundings)

    def offsets(self, text: str, input_ids: Sequence[int]) -> np.ndarray:
        """Which characters of a text each of its `T` tokens writes, int64 `[T, 2]`.

        Raises:
            BadExampleError: if the tokens are not those of the text.
        """
        from wit_plugins.data_weights.message_tokens import token_offsets

        return token_offsets(text, input_ids, self._token_text)

    def labels(
        self,
        input_ids: Sequence[int],
        labels: Sequence[int],
        weights: np.ndarray | float,
        raw_example: Mapping[str, Any],
    ) -> list[int]:
        """The labels of one document with its tokens' weights in them, see `wit_plugins.tokens.weighted_labels`.

        They stay as they are if everything weighs 1, no strategy reads the example and it has no group.

        Args:
            input_ids, labels: the framework's own, `T` of them, before truncation and packing.
            weights (`np.ndarray | float`): of its messages, `[T]`, times that of the sample.
            raw_example (`Mapping`): the example as it stands in the data, for strategies that ask for it.

        Raises:
            BadExampleError: if labels and ids do not fit each other, or it says no group of those that are listed.
            ValueError: if a strategy returns what are no weights.
        """
        data = np.broadcast_to(np.asarray(weights, dtype=np.float32), len(input_ids))
        own = self.times(data, self.raw_weights(input_ids, labels, raw_example))
        return self.carry(labels, own, self.group(raw_example))

    @staticmethod
    def times(weights: np.ndarray, factors: np.ndarray | float) -> np.ndarray:
        """The product `[T]` of two weights of each token, float32: of its message and of its sample, say.

        Raises:
            BadExampleError: if it leaves float32.
        """
        try:
            return multiplied(np.asarray(weights, dtype=np.float32), factors, "another weight that stands in the data")
        except ValueError as error:
            raise BadExampleError(str(error)) from None

    def raw_weights(
        self, input_ids: Sequence[int], labels: Sequence[int], raw_example: Mapping[str, Any]
    ) -> np.ndarray:
        """What strategies that read the example give the tokens of one document, float32 `[T]`; 1 if there are none.

        Takes, and raises, what [`DataWeights.labels`] does.
        """
        if not self.strategies.reading_raw:
            return np.ones(len(input_ids), dtype=np.float32)
        ids, own = np.asarray(input_ids, dtype=np.int64), np.asarray(labels, dtype=np.int64)
        example = {"input_ids": ids, "labels": own}
        targets, roles, _ = example_roles(example)
        text, offsets = self._token_text.decode(targets.tolist())
        read = self.strategies.static_weights(
            targets, roles, example, self.tokenizer, text, offsets, raw_example=raw_example
        )
        return np.where(roles != 0, read, np.float32(1))

    def carry(self, labels: Sequence[int], weights: np.ndarray, group: int = 0) -> list[int]:
        """Labels that carry weights `[T]` and a group: for frameworks that cut a document while they tokenise it.

        They stay as they are if everything weighs 1, no strategy reads the example and it has no group.
        """
        own_labels = np.asarray(labels, dtype=np.int64)
        if not self.reads_all and (weights == 1).all():
            return own_labels.tolist()
        return prepare(own_labels, np.asarray(weights, dtype=np.float32), self.fingerprint, group).tolist()

    def _is_unread(self, key: Any) -> bool:
        """Whether a key looks like a weight and is none that is read."""
        looks = bool(_LOOKS_LIKE_A_WEIGHT.search(str(key))) and not str(key).endswith("_detail")
        return looks and key not in self.message_keys

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _CACHED} | {
            "_warned": set(),
            "_settled": set(),
        }

    def _find_unread_keys(self, message: Mapping[str, Any], where: str) -> None:
        """Warn of keys that look like weights and are not read, of each once."""
        for key in message.keys() - self._settled:
            unread = self._is_unread(key)
            if unread and message[key] is None:
                continue
            self._settled.add(key)
            if unread:
                self._warned.add(key)
                warnings.warn(
                    f"{where} has a key {key!r} that looks like a weight and is not read; read are "
                    f"{', '.join(self.message_keys) or 'none'} (message_weight_keys)",
                    UnreadWeightWarning,
                    stacklevel=3,
                )


def fingerprint(message_keys: Sequence[str], sample_key: str | None, strategies: ActiveStrategies) -> int:
    """See [`DataWeights.fingerprint`]."""
    said: list[Any] = [_VERSION, list(message_keys), sample_key, strategies.reading_raw, strategies.code_reading_raw]
    if strategies.groups is not None:  # which they are; what they weigh is in no label
        said += [strategies.groups.key, strategies.groups.names]
    if strategies.needs.replaces_nll:  # under which weights may be below 0
        said.append("negative")
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - FINGERPRINT_BITS)


def _weight(value: Any, key: str, negative: bool) -> float:
    """A weight as the data has it: a number ≥ 0 (or any, with `negative`), or true and false for 1 and 0.

    Raises:
        BadExampleError: if it is anything else.
    """
    if isinstance(value, np.generic):
        value = value.item()
    try:
        return checked_weight(float(value) if isinstance(value, bool) else value, key, negative)
    except ValueError as error:
        below = isinstance(value, (int, float)) and value < 0 and not negative
        way = ", or name the strategy unlikelihood, which trains against tokens of such a weight" if below else ""
        raise BadExampleError(f"{error}{way}") from None
