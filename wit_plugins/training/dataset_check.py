"""A look at the training examples before training: is there a prompt, a response, and does anything weigh something?"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from wit_plugins.data_weights.columns import evenly
from wit_plugins.errors import BadExampleError, WITConfigError
from wit_plugins.tokens.codes import decode, is_left_out
from wit_plugins.tokens.collator import DATA
from wit_plugins.tokens.example_reader import ExampleReader, ReadExample
from wit_plugins.tokens.roles import PROMPT, RESPONSE

if TYPE_CHECKING:
    from wit_plugins.tokens.collator import WeightedCollator

_LOOKED_AT = 100
_SECONDS = 10.0  # how long spans are looked for


class UnmatchedSpanWarning(UserWarning):
    """A part of the text that a strategy weights is nowhere in the training data."""


def can_be_read_again(dataset: Any) -> bool:
    """Whether a dataset's examples can be read more than once: whether it has a length and an order."""
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


class LeftOutWarning(UserWarning):
    """The weights in the data are 0 on all prompts, or on all answers."""


@dataclass
class DatasetLook:
    """What was read of a dataset before training.

    Attributes:
        size (`int`): its rows.
        rows (`int`): the number of rows that were read.
        documents, weighted (`int`): the documents in the read rows, and how many of them have weights in the data.
        prompt, response (`int`): the read tokens by role.
        left_out_prompt, left_out_response (`int`): the read tokens of each role to which the data gives the weight 0.
    """

    size: int
    rows: int = 0
    documents: int = 0
    weighted: int = 0
    prompt: int = 0
    response: int = 0
    left_out_prompt: int = 0
    left_out_response: int = 0

    def add(self, read: ReadExample) -> None:
        """Count a row."""
        prompt, response = read.roles == PROMPT, read.roles == RESPONSE
        self.rows += 1
        self.prompt += int(np.count_nonzero(prompt))
        self.response += int(np.count_nonzero(response))
        weights = read.data_weights
        for start, end in zip(read.starts, [*read.starts[1:], len(read.roles)], strict=True):
            if read.roles[start:end].any():  # padding is no document
                self.documents += 1
                self.weighted += weights is not None and bool((weights[start:end] != 1).any())
        if weights is not None:
            self.left_out_prompt += int(np.count_nonzero(prompt & (weights == 0)))
            self.left_out_response += int(np.count_nonzero(response & (weights == 0)))

    def lines(self) -> list[str]:
        """The lines about the dataset that are printed when training starts."""
        where = f" (in {self.rows:,} of {self.size:,} rows, at even distances)" if self.rows < self.size else ""
        sentences = [f"{self.prompt / (self.prompt + self.response):.0%} of the tokens are prompt{where}"]
        if self.weighted:
            sentences.append(f"weights stand in the data of {self.weighted:,} of {self.documents:,} examples{where}")
        return sentences

    def left_out(self, prompt_weight: float, response_weight: float) -> list[str]:
        """A sentence for each role whose weight is above 0, but whose tokens all weigh 0 in the data."""
        where = f"the {self.rows:,} rows that were looked at" if self.rows < self.size else "the training dataset"
        roles = (
            ("prompts", "prompt_weight", prompt_weight, self.prompt, self.left_out_prompt),
            ("answers", "response_weight", response_weight, self.response, self.left_out_response),
        )
        return [
            f"the weights that stand in the data are 0 on all {name} of {where}, so {key} = {weight:g} trains nothing; "
            "if that is not meant, take these weights out of the data, or leave them unread (message_weight_keys, "
            "sample_weight_key)"
            for name, key, weight, count, left_out in roles
            if weight and count and count == left_out
        ]


def check_dataset(dataset: Any, masking_hint: str, reader: ExampleReader) -> DatasetLook:
    """Make sure that a dataset has prompt tokens and response tokens.

    100 examples are read, at even distances, since packing sorts by length. If they lack a role, the rest is read too,
    until the role is found.

    Args:
        dataset: examples with `input_ids` and `labels`, see [`can_be_read_again`].
        masking_hint (`str`): how a user masks the prompt, for the message.
        reader ([`ExampleReader`]): how the trainer reads its examples.

    Raises:
        WITConfigError: if a role is missing, the examples carry no labels, or one of them cannot be trained on.
    """
    if not len(dataset):
        raise WITConfigError(
            "the training dataset is empty: it had no examples, or the framework has left all of them out while it "
            "tokenised them (no response survives the maximum length, or every label is -100); look at the data, the "
            "masking and the maximum length"
        )
    look = DatasetLook(len(dataset))
    first = evenly(look.size, _LOOKED_AT)
    rest = np.setdiff1d(np.arange(look.size), first)
    # The first rows are enough for most datasets. A progress bar appears if all rows have to be read.
    for index in tqdm([*first, *rest.tolist()], desc="Looking for prompt and response tokens", delay=5):
        if look.rows >= len(first) and look.prompt and look.response:
            break
        try:
            look.add(_read(dataset[index], masking_hint, reader))
        except BadExampleError as error:
            raise BadExampleError(f"example {index} of the training dataset: {error}") from None
    _require_both(look.prompt, look.response, f"any of its {look.size} examples", masking_hint)
    return look


def check_weighs(dataset: Any, collator: WeightedCollator) -> None:
    """Make sure that some token of a dataset has a final weight other than 0.

    Examples are read until there is one: usually the first.

    Args:
        dataset: that has been through [`check_dataset`].
        collator ([`WeightedCollator`]): with the strategies, as it trains.

    Raises:
        WITConfigError: if none has, naming what made the weights 0.
    """
    counts = {PROMPT: 0, RESPONSE: 0}
    makers: dict[int, dict[str, int]] = {PROMPT: {}, RESPONSE: {}}  # by role: how many tokens each source makes 0
    for index in tqdm(range(len(dataset)), desc="Looking for a token that weighs something", delay=5):
        example = dataset[index]
        try:
            if _weighs(torch.from_numpy(collator.codes(example))):
                return
            if index < _LOOKED_AT:  # a few examples are enough for the error message
                roles, sources = collator.reader(example).roles, collator.explain(example).sources
                for role, by_source in makers.items():
                    counts[role] += int(np.count_nonzero(roles == role))
                    for name, factors in sources.items():
                        by_source[name] = by_source.get(name, 0) + int(np.count_nonzero(factors[roles == role] == 0))
        except BadExampleError as error:
            raise BadExampleError(f"example {index} of the training dataset: {error}") from None
    parts = [
        f"{each} of {counts[role]:,} {what} tokens weigh 0 by {_maker(name, what)}"
        for role, what in ((PROMPT, "prompt"), (RESPONSE, "response"))
        for name, number in makers[role].items()
        if number and (each := "all" if number == counts[role] else f"{number:,}")
    ]
    looked = f" (of its first {_LOOKED_AT} examples: " if len(dataset) > _LOOKED_AT else " ("
    raise _nothing_weighs("the training dataset", f"{looked}{'; '.join(parts)})")


def _weighs(codes: torch.Tensor) -> bool:
    return bool((decode(codes)[2] != 0).any())


def _maker(name: str, role: str) -> str:
    if name == "wit":
        return f"{role}_weight = 0"
    return "weights that stand in the data" if name == DATA else f"strategies: {name}"


def _nothing_weighs(where: str, why: str) -> WITConfigError:
    return WITConfigError(
        f"nothing in {where} weighs anything, so nothing would be trained{why}; give prompt_weight or response_weight "
        "a value above 0, or look at the weights in the data and in strategies with `wit preview`"
    )


class StreamCheck:
    """The same check for a stream. It reads the first 100 examples while they are trained on, so that none is lost.

    Args:
        masking_hint (`str`): how a user masks the prompt, for the message.
        weighing (`Mapping[str, Any]`): the strategies by name with their options, for the message.
    """

    def __init__(self, masking_hint: str, weighing: Mapping[str, Any]) -> None:
        self._masking_hint, self._weighing = masking_hint, weighing
        # Prompt tokens, response tokens, those that weigh 0 in the data, tokens that weigh something, rows.
        self.counts = [0, 0, 0, 0, 0]

    @property
    def settled(self) -> bool:
        """Whether there is nothing more to look for."""
        prompt, response, left_out, weighing, _ = self.counts
        # A token that weighs 0 in the data has lost its role, so it may have had the missing one.
        return bool(weighing and (left_out or (prompt and response)))

    def add(self, codes: torch.Tensor) -> None:
        """Count a batch's codes `[B, L]`.

        Raises:
            WITConfigError: if a role is missing in 100 rows, or nothing in them weighs anything.
        """
        _, roles, weights = decode(codes)
        masks = [roles == PROMPT, roles == RESPONSE, is_left_out(codes), weights != 0]
        self.counts = [a + b for a, b in zip(self.counts, [*(int(o.sum()) for o in masks), len(roles)], strict=True)]
        if self.counts[-1] >= _LOOKED_AT:
            self.finish([self.counts])

    def finish(self, counts: list[list[int]]) -> None:
        """Judge the counts of all processes, when no more examples are needed or left.

        Raises:
            WITConfigError: if a role is missing, or nothing weighs anything.
        """
        prompt, response, left_out, weighing, rows = (sum(each) for each in zip(*counts, strict=True))
        if not rows:
            return
        if not left_out:
            _require_both(prompt, response, f"its first {rows} rows", self._masking_hint)
        if not weighing:
            wit = self._weighing.get("wit", {})
            zero = [f"{name} = 0" for name in ("prompt_weight", "response_weight") if wit.get(name) == 0]
            others = [f"strategies: {name}" for name in self._weighing if name != "wit"]
            parts = []
            if prompt + response:
                parts.append(f"{prompt:,} prompt and {response:,} response tokens by {', '.join(zero + others)}")
            if left_out:
                parts.append(f"{left_out:,} tokens by weights that stand in the data")
            raise _nothing_weighs(f"the first {rows} rows of the training dataset", f" ({'; '.join(parts)})")


def locate_bad_example(dataset: Any, reader: ExampleReader, name: str) -> BadExampleError | None:
    """The first example that cannot be trained on, named by its position; `None` if it cannot be found.

    Args:
        dataset: is read until the example is found, if it can be read again.
        reader ([`ExampleReader`]): the reader that refused the example.
        name (`str`): the dataset's, for the message.
    """
    if not can_be_read_again(dataset):
        return None
    for index in range(len(dataset)):
        example = dataset[index]
        if isinstance(example, Mapping) and example.get("labels") is not None and "input_ids" in example:
            try:
                reader(example)
            except BadExampleError as error:
                return BadExampleError(f"example {index} of the {name} dataset: {error}")
    return None


def _require_both(prompt: int, response: int, seen: str, masking_hint: str) -> None:
    if not response:
        raise WITConfigError(
            f"the training dataset has no response in {seen}: every label is -100, so there is nothing to train on; "
            "check the masking and the maximum length (truncation may have cut the responses off)"
        )
    if not prompt:
        raise WITConfigError(
            f"the training dataset has nothing masked in {seen}: no label is -100, so there is no prompt to weight; "
            f"{masking_hint}"
        )


def warn_of_unmatched_spans(dataset: Any, collator: WeightedCollator) -> None:
    """Warn if a part of the text that a strategy looks for (a pattern of `spans`, say) is not in the dataset.

    Reads until everything was found once: at most 10,000 examples, at even distances, and for at most 10 seconds, since
    other ranks wait meanwhile. A dataset without a length is not read.

    Args:
        dataset: the training examples.
        collator ([`WeightedCollator`]): with the strategies, as it trains.
    """
    if not (collator.strategies.looks_for_spans and can_be_read_again(dataset)):
        return
    size, seen, matched = len(dataset), set[str](), set[str]()
    # In an order of chance, so that what was read when the time is over is a sample of all.
    order = np.random.default_rng(0).permutation(evenly(size)).tolist()
    began, read = time.monotonic(), 0
    for index in tqdm(order, desc="Looking for what is weighted", delay=5):
        if time.monotonic() - began > _SECONDS:
            break
        read += 1
        try:
            masks = collator.find_spans(dataset[index])
        except BadExampleError as error:
            raise BadExampleError(f"example {index} of the training dataset: {error}") from None
        seen |= masks.keys()
        matched |= {name for name, mask in masks.items() if mask.any()}
        if seen and seen == matched:
            return
    where = f"any of the {size:,} training examples"
    if read < size:
        where = f"{read:,} of the {size:,} training examples"
    for name in sorted(seen - matched):
        warnings.warn(
            f"strategies: {name}: matches nothing in {where}, so its weight changes nothing there; look at the text "
            "with `wit preview` (the pattern may be written otherwise, or the template may leave it out)",
            UnmatchedSpanWarning,
            stacklevel=3,
        )


def check_scores(datasets: Mapping[str, Any], collator: WeightedCollator) -> None:
    """Make sure that there are scores of the documents, if strategies compare with those in a folder.

    At most 10,000 examples of each dataset are read, at even distances; a stream is not.

    Args:
        datasets (`Mapping[str, Any]`): by name, for the message.
        collator ([`WeightedCollator`]): with the strategies, as it trains. It has scores.

    Raises:
        WITConfigError: if there are none.
    """
    assert collator.scores is not None
    try:
        collator.scores.open()
    except WITConfigError as error:
        raise WITConfigError(f"strategies: {', '.join(collator.strategies.needs.references)}: {error}") from None
    for name, dataset in datasets.items():
        if not can_be_read_again(dataset):
            continue
        for index in tqdm(evenly(len(dataset)), desc=f"Looking for the scores of the {name} dataset", delay=5):
            example = dataset[index]
            if "input_ids" not in example or example.get("labels") is None:
                break  # for generation
            try:
                collator.log_probs(example)
            except BadExampleError as error:
                raise BadExampleError(f"example {index} of the {name} dataset: {error}") from None


def _read(example: Mapping[str, Any], masking_hint: str, reader: ExampleReader) -> ReadExample:
    if "input_ids" not in example:
        raise WITConfigError(
            f"the training examples have no input_ids (columns: {sorted(example)}); weights need tokenised examples"
        )
    if example.get("labels") is None:
        raise WITConfigError(f"the training examples have no labels, so nothing is masked; {masking_hint}")
    return reader(example)
