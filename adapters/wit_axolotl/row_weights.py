"""The weights in a row of a `chat_template` dataset: the weights of its messages, and the tokens of each message.

Axolotl turns messages into *turns*: it maps roles and names, joins parts, and may add or remove a system message. A
turn keeps no unknown key, so weights are read from the row. To find the turns in the tokens, Axolotl's own prompter
renders the same turns with other contents.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from axolotl.prompt_strategies.chat_template import ChatTemplateStrategy, MistralStrategy
from axolotl.utils.dict import remove_none_values

from wit_plugins.data_weights.message_tokens import WeightedMessage
from wit_plugins.data_weights.reader import DataWeights
from wit_plugins.errors import BadExampleError

_DETAIL = "train_detail"  # what Axolotl's guide calls the key; it reads the one that the dataset names
_Pieces = tuple[tuple[int, int, float], ...]


@dataclass(frozen=True)
class Conversation:
    """One conversation as Axolotl gives it to its template, with weights.

    Attributes:
        turns (`list`): Axolotl's turns.
        tools (`list | None`): Axolotl's tools.
        messages (`list`): the weights of each turn's content.
        thoughts (`dict`): the weights of a turn's reasoning, by the turn's number, where it has some.
        thinking (`str`): under which key a turn has its reasoning.
    """

    turns: list[dict[str, Any]]
    tools: Any
    messages: list[WeightedMessage]
    thoughts: dict[int, WeightedMessage]
    thinking: str

    def token_weights(
        self, strategy: ChatTemplateStrategy, weights: DataWeights, input_ids: Sequence[int]
    ) -> np.ndarray:
        """The weights of the conversation's tokens, float32 `[T]`.

        Raises:
            BadExampleError: if messages of different weights cannot be told apart.
        """
        if isinstance(strategy, MistralStrategy):
            raise BadExampleError(
                "tokenizer_use_mistral_common: that tokenizer does not say what it writes for which message, so "
                "messages cannot be weighted; take the option out, or leave weights of messages unread "
                "(message_weight_keys: [])"
            )
        prompter = copy.copy(strategy.prompter)
        prompter.tokenizer = _AsText(prompter.tokenizer)

        def render(key: str, texts: Mapping[int, str]) -> str:
            turns = [{**turn, key: texts[i]} if i in texts else turn for i, turn in enumerate(self.turns)]
            return str(prompter.build_prompt(turns, tools=self.tools))

        def render_contents(contents: Sequence[str]) -> str:
            return render("content", {i: text for i, text in enumerate(contents) if isinstance(self._text(i), str)})

        ends = strategy._eot_token_ids  # those of the option eot_tokens
        found = weights.weigh_messages(self.messages, render_contents, input_ids, ends=ends)
        # A template may leave the reasoning of earlier turns out.
        written = [i for i in self.thoughts if render(self.thinking, {i: "…"}) != render(self.thinking, {})]
        if written:
            thoughts = [self.thoughts[i] for i in written]
            found *= weights.weigh_messages(
                thoughts, lambda texts: render(self.thinking, dict(zip(written, texts, strict=True))), input_ids
            )
        return found

    def _text(self, index: int) -> Any:
        return self.turns[index].get("content")


class _AsText:
    """A tokenizer that renders a conversation to text and does not tokenise it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def apply_chat_template(self, conversation: Any, tokenize: bool, return_dict: bool, **options: Any) -> Any:
        return self._tokenizer.apply_chat_template(conversation, tokenize=False, **options)


def read_conversation(
    strategy: ChatTemplateStrategy, weights: DataWeights, row: Mapping[str, Any]
) -> Conversation | None:
    """The weights of a row's messages; `None` if all of them weigh 1.

    It also warns of keys that look like weights and are not read, where messages are one text and no column shows them.

    Raises:
        BadExampleError: naming the message, the key and the value.
    """
    prompter = strategy.prompter
    prompt = remove_none_values(dict(row))
    if not weights.message_keys or prompt.get(prompter.field_messages) is None:
        return None
    said = strategy._get_messages(prompt)
    if isinstance(prompt[prompter.field_messages], str):
        for message in said:
            weights.message_weight({k: v for k, v in message.items() if k not in weights.message_keys}, "messages")
    if not any(has_weight_key(message, weights) for message in said):
        return None
    turns = strategy.get_conversation_thread(prompt)
    # Axolotl puts a system message of the row in front, or takes one out.
    first = len(said) - len(turns)
    messages: list[WeightedMessage] = []
    thoughts: dict[int, WeightedMessage] = {}
    thinking = str(prompter.template_thinking_key)
    for index, turn in enumerate(turns):
        text = turn.get("content")
        text = text if isinstance(text, str) else ""
        if first + index < 0:
            messages.append(WeightedMessage(text))
            continue
        where = f"{prompter.field_messages}[{first + index}]"
        reader = _MessageReader(strategy, weights, said[first + index], where, is_answer(strategy, turn))
        messages.append(WeightedMessage(text, reader.weight(), reader.pieces("content", text)))
        if isinstance(turn.get(thinking), str) and (pieces := reader.parts(thinking, turn[thinking])):
            thoughts[index] = WeightedMessage(turn[thinking], 1.0, pieces)
    if not thoughts and all(message.weight == 1 and not message.pieces for message in messages):
        return None
    return Conversation(turns, strategy._get_tools(prompt), messages, thoughts, thinking)


def is_answer(strategy: ChatTemplateStrategy, turn: Mapping[str, Any]) -> bool:
    """Whether a turn is an answer: its role is trained on, or a flag in the data makes it response.

    With `roles_to_train: []` flags alone decide what is trained on; then the assistant's turns are answers.
    """
    return turn.get("role") in (strategy.roles_to_train or ("assistant",)) or bool(turn.get("training"))


def without_weights(strategy: ChatTemplateStrategy, weights: DataWeights, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row without its flags, which Axolotl would turn into masks. Here flags are weights.

    Axolotl masks text that is flagged with 0 or false. A zero inside an answer would split the answer into two runs of
    response tokens, and strategies would take them for two turns. Axolotl also trains on whole prompts whose parts have
    flags. Without the flags an answer stays response, with weight 0 where it was flagged, and a prompt stays prompt. If
    Axolotl would train on no answer of the row, the messages' flags stay, so that Axolotl leaves the row out as it does
    by itself.
    """
    prompter, keys = strategy.prompter, set(weights.message_keys)
    messages: Any = row.get(prompter.field_messages)
    if not keys or not messages:
        return row
    if is_text := isinstance(messages, str):
        messages = strategy._get_messages({prompter.field_messages: messages})
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        return row  # Axolotl says what is wrong
    mapped, flag = prompter.message_property_mappings, prompter.message_field_training
    details = prompter.message_field_training_detail
    contents = [mapped.get(key, key) for key in ("content", str(prompter.template_thinking_key))]
    made, keeps_answer, flagged = [], False, []
    for message in messages:
        changed = dict(message)
        for key in contents:
            if isinstance(parts := message.get(key), list):
                changed[key] = [
                    {k: v for k, v in part.items() if k not in keys} if isinstance(part, Mapping) else part
                    for part in parts
                ]
        role = message.get(mapped.get("role", "role"))
        says = message.get(flag) if flag in keys else None
        if is_answer(strategy, {"role": prompter.roles.get(role, role), "training": says}):
            if details and isinstance(said := message.get(details), list) and "train" in keys:
                changed[details] = [
                    {**d, "train": True} if isinstance(d, Mapping) and d.get("train") is not None else d for d in said
                ]
            keeps_answer |= says is None or bool(says)
            if says is not None and not says:
                flagged.append(changed)
        made.append(changed)
    for changed in flagged if keeps_answer else ():
        changed[flag] = True
    if made == messages:
        return row
    return {**row, prompter.field_messages: json.dumps(made) if is_text else made}


def has_weight_key(message: Mapping[str, Any], weights: DataWeights) -> bool:
    """Whether a message or one of its parts has a key that is read."""
    parts = [part for value in message.values() if isinstance(value, list) for part in value]
    keys = set(weights.message_keys)
    return not keys.isdisjoint(message) or any(
        isinstance(part, Mapping) and not keys.isdisjoint(part) for part in parts
    )


class _MessageReader:
    """The weights of one message."""

    def __init__(
        self,
        strategy: ChatTemplateStrategy,
        weights: DataWeights,
        message: Mapping[str, Any],
        where: str,
        is_answer: bool,
    ) -> None:
        self._prompter = strategy.prompter
        self._weights = weights
        self._message = message
        self._where = where
        self._is_answer = is_answer

    def weight(self) -> float:
        return self._weight(self._message, self._where)

    def _weight(self, said: Mapping[str, Any], where: str) -> float:
        keys = self._weights.message_keys
        return self._weights.message_weight({k: said[k] for k in keys if k in said}, where, self._is_answer)

    def pieces(self, key: str, text: str) -> _Pieces:
        """Character ranges of the content with their weights, from its parts or from `train_detail`."""
        parts, details = self.parts(key, text), self._details()
        if parts and details:
            raise BadExampleError(
                f"{self._where} has parts with weights and a {self._detail_key}, of which Axolotl reads the parts "
                "only; keep one of them"
            )
        return parts or details

    def parts(self, key: str, text: str) -> _Pieces:
        """Character ranges with weights from parts `{type, text, weight}`, which Axolotl joins to one text."""
        key = self._prompter.message_property_mappings.get(key, key)
        said = self._message.get(key)
        if not isinstance(said, list):
            return ()
        joined, pieces = "", []
        for number, part in enumerate(said):
            if not isinstance(part, Mapping):
                continue  # as Axolotl does
            at = f"{self._where}.{key}[{number}]"
            weight = self._weight(part, at)
            words = part.get("text") or part.get("content") or part.get("value") or ""
            if weight != 1 and not (isinstance(words, str) and words):
                raise BadExampleError(f"{at} = {dict(part)!r}: only parts of text can be weighted")
            if weight != 1:
                pieces.append((len(joined), len(joined) + len(words), weight))
            joined += words
        if pieces and joined != text:
            raise BadExampleError(f"{self._where}.{key}: Axolotl did not join its parts, so they cannot be weighted")
        return tuple(pieces)

    @property
    def _detail_key(self) -> str:
        return self._prompter.message_field_training_detail or _DETAIL

    def _details(self) -> _Pieces:
        """Character ranges with weights from a `train_detail`: `[{begin_offset, end_offset, train, weight}]`."""
        key, pieces = self._detail_key, []
        said = self._message.get(key)
        for number, detail in enumerate(said if isinstance(said, list) else ()):
            at = f"{self._where}.{key}[{number}]"
            weight = self._of_detail(detail, at)
            if weight is None:
                continue
            if not self._prompter.message_field_training_detail:
                raise BadExampleError(
                    f"{at} has a weight, but Axolotl is not told to read it; add message_field_training_detail: {key} "
                    "to the dataset"
                )
            begin, end = detail.get("begin_offset"), detail.get("end_offset")
            if not all(isinstance(offset, int) and offset >= 0 for offset in (begin, end)) or end < begin:
                raise BadExampleError(
                    f"{at}: begin_offset = {begin!r}, end_offset = {end!r}: are characters of the content, counted "
                    "from 0, the end one inclusive"
                )
            if weight != 1:
                pieces.append((begin, end + 1, weight))
        return tuple(pieces)

    def _of_detail(self, detail: Mapping[str, Any], at: str) -> float | None:
        """The weight beside `train`, or the value of `train`; `None` if there is neither."""
        said = {key: detail[key] for key in self._weights.message_keys if detail.get(key) is not None}
        if len(said) > 1:
            said.pop("train", None)  # Axolotl requires it beside a weight: it says whether there is a label
        elif said and "train" not in detail:
            raise BadExampleError(f"{at} has no train beside its weight; Axolotl needs it (train: true)")
        if not self._prompter.message_field_training_detail and set(said) <= {"train"}:
            return None  # Axolotl does not read it, and it has no weight of ours
        return self._weights.message_weight(said, at, self._is_answer) if said else None
