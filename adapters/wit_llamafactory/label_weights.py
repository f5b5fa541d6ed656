"""Weights in the data become weights of tokens while LLaMA-Factory's own processors tokenise.

A processor goes through the pairs of question and answer that its template returns, cuts them and sets their labels.
Here the template returns ids that carry their weights. So cutting and labelling are LLaMA-Factory's own, and ids and
weights are cut together.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from llamafactory.data.processor.supervised import PackedSupervisedDatasetProcessor, SupervisedDatasetProcessor
from llamafactory.extras.constants import IGNORE_INDEX

from wit_llamafactory.row_weights import BETWEEN_TOOL_RESPONSES, Part, RowWeights
from wit_plugins.data_weights.message_tokens import WeightedMessage
from wit_plugins.data_weights.reader import DataWeights
from wit_plugins.errors import BadExampleError
from wit_plugins.foreign import Delegate, exchanged
from wit_plugins.tokens.weighted_labels import read_prepared

_WHOLE = 1 << 40  # a cutoff_len that cuts nothing


class _Id(int):
    """A token's id that carries the token's weight.

    Attributes:
        weight (`float`): the weight by the token's message and part.
        pair (`int`): the number of the token's pair of question and answer.
        factor (`float`): the factor by strategies that read the example.
    """

    weight: float
    pair: int
    factor: float = 1.0


class _Token(str):
    """A token that a template names directly, without tokenising a text."""


class _Writer:
    """Takes the place of a template's tokenizer, and returns the texts that would have been tokenised."""

    def __init__(self, tokenizer: Any) -> None:
        self.bos_token_id = None if tokenizer.bos_token_id is None else _Token(tokenizer.bos_token)
        self.eos_token_id = None if tokenizer.eos_token_id is None else _Token(tokenizer.eos_token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[str]:
        return [text]

    def convert_tokens_to_ids(self, token: str) -> _Token:
        return _Token(token)


class WeightedTemplate(Delegate):
    """Wraps one of LLaMA-Factory's templates for one example that has weights.

    Args:
        template (`Template`): LLaMA-Factory's template.
        said ([`RowWeights`]): the example's weights.
        data ([`DataWeights`]): locates the messages.
    """

    _holder = "_template"

    def __init__(self, template: Any, said: RowWeights, data: DataWeights) -> None:
        self._template, self._said, self._data = template, said, data
        self._pairs: list[tuple[list[_Id], list[_Id]]] | None = None
        self._end_factor = 1.0

    def encode_multiturn(
        self, tokenizer: Any, messages: list[dict[str, Any]], system: str | None, tools: str | None, *more: Any
    ) -> list[tuple[list[_Id], list[_Id]]]:
        """The template's own pairs of ids, which carry their weights.

        Raises:
            BadExampleError: if messages of different weights cannot be told apart.
        """
        if self._pairs is None:
            pairs = self._template.encode_multiturn(tokenizer, messages, system, tools, *more)
            size = sum(len(side) for pair in pairs for side in pair)
            weights = np.ones(size, dtype=np.float32)
            if self._said.messages:
                written = _Conversation(self._template, self._said, tokenizer, messages, system, tools, more)
                weights = written.weigh(self._data, pairs)
            given = iter(weights.tolist())
            self._pairs = [
                (_known(source, given, index), _known(target, given, index))
                for index, (source, target) in enumerate(pairs)
            ]
        return [(list(source), list(target)) for source, target in self._pairs]

    def weights(self, input_ids: Sequence[int], labels: Sequence[int]) -> np.ndarray:
        """The weights of the tokens that the processor made from the pairs, float32 `[T]`.

        With `efficient_eos` the end token of an answer is predicted at the first token of the next question, or after
        the last answer. That prediction belongs to the answer.
        """
        made, last = [], 0
        for token, label in zip(input_ids, labels, strict=True):
            if not isinstance(token, _Id):
                made.append(self._of_answer(last) * self._end_factor)
                continue
            last, weight = token.pair, token.weight
            if label != IGNORE_INDEX and label is not token:
                weight = self._of_answer(token.pair - 1)
            made.append(weight * token.factor)
        return DataWeights.times(np.array(made, dtype=np.float32), self._said.sample)

    def multiply(self, input_ids: Sequence[int], factors: np.ndarray) -> None:
        """Multiply the weights of tokens by the strategies' factors."""
        for token, factor in zip(input_ids, factors.tolist(), strict=True):
            if isinstance(token, _Id):
                token.factor = factor
            else:
                self._end_factor = factor

    def _of_answer(self, pair: int) -> float:
        return self._said.messages[2 * pair + 1][0].weight if self._said.messages and pair >= 0 else 1.0


def _known(ids: Sequence[int], weights: Any, pair: int) -> list[_Id]:
    made = [_Id(token) for token in ids]
    for token in made:
        token.weight, token.pair = next(weights), pair
    return made


class _Conversation:
    """The texts that a template writes for an example, and the message of each.

    The template writes each answer separately, so the text of an answer is known. A system message and a question, or
    several tools' answers, may be in one text, in which their contents are looked for.
    """

    def __init__(
        self,
        template: Any,
        said: RowWeights,
        tokenizer: Any,
        messages: list[dict[str, Any]],
        system: str | None,
        tools: str | None,
        more: tuple[Any, ...],
    ) -> None:
        self.template, self.said, self.tokenizer = template, said, tokenizer
        self.messages, self.system, self.rest = messages, system or "", (tools, *more)

    def weigh(self, data: DataWeights, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> np.ndarray:
        """The weights of the ids of all pairs, float32 `[T]`."""
        texts = {
            index: self._contents(message["content"], parts)
            for index, (message, parts) in enumerate(zip(self.messages, self.said.messages, strict=True))
        }
        sides = [side for pair in self._write(texts, self._system_content()) for side in pair]
        ids, offsets, begins = self._tokenise(data, sides)
        if ids != [token for pair in pairs for side in pair for token in side]:
            raise BadExampleError(
                "the template does not tokenise what it writes piece by piece, so it cannot be said which tokens a "
                "message became; leave weights of messages out (message_weight_keys: []), or use the strategy spans"
            )
        weighted = [] if self.said.system is None else [_message(self._system_content(), self.said.system)]
        for index, parts in enumerate(self.said.messages):
            if index % 2 and not parts[0].pieces:
                begin, end = begins[index], begins[index + 1]
                written = (begin, end) if end > begin else None
                weighted.append(WeightedMessage("", parts[0].weight, written=written))
            elif index % 2 and self.messages[index]["role"] == "function":
                raise BadExampleError("a tool call is written anew by the template, so no part of it can be weighted")
            else:
                weighted += [_message(text, part) for text, part in zip(texts[index], parts, strict=True)]

        def render(contents: Sequence[str]) -> str:
            given = iter(contents)
            system = "" if self.said.system is None else next(given)
            own = {index: [next(given) for _ in parts] for index, parts in enumerate(self.said.messages)}
            kept = {i: texts[i] if i % 2 and not self.said.messages[i][0].pieces else own[i] for i in own}
            return "".join(piece for pair in self._write(kept, system) for side in pair for piece in side)

        return data.weigh_messages(weighted, render, ids, offsets)

    def _system_content(self) -> str:
        """The system message as it stands in the data. LLaMA-Factory may have added text to its end."""
        return "" if self.said.system is None else self.system[: self.said.system.length]

    def _contents(self, content: str, parts: Sequence[Part]) -> list[str]:
        """The contents that an aligned message was made from."""
        if len(parts) == 1:
            return [content]
        made, at = [], 0
        for part in parts:
            made.append(content[at : at + part.length])
            at += part.length + len(BETWEEN_TOOL_RESPONSES)
        return made

    def _write(self, contents: dict[int, list[str]], system: str) -> list[tuple[list[str], list[str]]]:
        """The texts that the template would tokenise, in the place of their ids."""
        messages = [
            {**message, "content": BETWEEN_TOOL_RESPONSES.join(contents[index])}
            for index, message in enumerate(self.messages)
        ]
        system += self.system[len(self._system_content()) :]
        return self.template.encode_multiturn(_Writer(self.tokenizer), messages, system, *self.rest)

    def _tokenise(self, data: DataWeights, sides: Sequence[Sequence[str]]) -> tuple[list[int], np.ndarray, list[int]]:
        """The ids of what is written, the characters that each writes, and where each side begins and the last ends."""
        ids: list[int] = []
        offsets, begins, at = [np.zeros((0, 2), dtype=np.int64)], [0], 0
        for side in sides:
            for piece in side:
                if isinstance(piece, _Token):
                    own = [self.tokenizer.convert_tokens_to_ids(piece)]
                    offsets.append(np.array([[at, at + len(piece)]], dtype=np.int64))
                else:
                    own = self.tokenizer.encode(piece, add_special_tokens=False)
                    offsets.append(data.offsets(piece, own) + at)
                ids += own
                at += len(piece)
            begins.append(at)
        return ids, np.concatenate(offsets), begins


def _message(content: str, part: Part) -> WeightedMessage:
    return WeightedMessage(content, part.weight, tuple((begin, end, weight) for begin, end, weight in part.pieces))


class _Weighing(SupervisedDatasetProcessor):
    """A processor of LLaMA-Factory's whose labels carry the weights that stand in the data.

    Attributes:
        data ([`DataWeights`]): writes them.
    """

    template: Any
    data_args: Any
    data: DataWeights

    def _encode_data_example(
        self, prompt: list[dict[str, Any]], response: list[dict[str, Any]], *args: Any, **kwargs: Any
    ) -> tuple[list[int], list[int]]:
        said = RowWeights.read(prompt)
        if said is None:
            return super()._encode_data_example(prompt, response, *args, **kwargs)
        template = WeightedTemplate(self.template, said, self.data)
        try:
            with exchanged(self, "template", template):
                if said.raw is not None:
                    uncut = copy.copy(self.data_args)
                    uncut.cutoff_len = _WHOLE
                    with exchanged(self, "data_args", uncut):
                        input_ids, labels = super()._encode_data_example(prompt, response, *args, **kwargs)
                    template.multiply(input_ids, self.data.raw_weights(input_ids, labels, said.raw))
                input_ids, labels = super()._encode_data_example(prompt, response, *args, **kwargs)
            if len(input_ids) != len(labels):
                raise BadExampleError(
                    f"LLaMA-Factory makes {len(labels)} labels for its {len(input_ids)} tokens, since nothing is left "
                    f"of a question within cutoff_len = {self.data_args.cutoff_len}; set a larger one"
                )
            labels = self.data.carry(labels, template.weights(input_ids, labels), said.group)
        except BadExampleError as error:
            raise BadExampleError(f"the example that begins with {_beginning(prompt)}: {error}") from None
        return [int(token) for token in input_ids], labels

    def print_data_example(self, example: dict[str, list[int]]) -> None:
        """LLaMA-Factory's printout, of labels that are token ids."""
        prepared = read_prepared(np.asarray(example["labels"], dtype=np.int64))
        super().print_data_example(example if prepared is None else {**example, "labels": prepared.labels.tolist()})


class WeightedProcessor(_Weighing):
    """Of unpacked examples."""


class WeightedPackedProcessor(_Weighing, PackedSupervisedDatasetProcessor):
    """Of packed examples."""


def weighted_processor(processor: Any, data: DataWeights) -> Any:
    """The same processor, whose labels carry weights; those of other stages, or that generate, are left as they are."""
    kinds = {
        SupervisedDatasetProcessor: WeightedProcessor,
        PackedSupervisedDatasetProcessor: WeightedPackedProcessor,
    }
    kind: Any = kinds.get(type(processor))
    if kind is None:
        return processor
    made = kind(processor.template, processor.tokenizer, processor.processor, processor.data_args)
    made.data = data
    return made


def _beginning(prompt: Sequence[dict[str, Any]]) -> str:
    text = prompt[0]["content"]
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
