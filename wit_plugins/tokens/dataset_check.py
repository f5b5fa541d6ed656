"""A look at the training examples before training: is there a prompt, a response, and does anything weigh something?"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from wit_plugins.errors import BadExampleError, WITConfigError
from wit_plugins.tokens.collator import DATA
from wit_plugins.tokens.reader import ExampleReader
from wit_plugins.tokens.roles import PROMPT, RESPONSE
from wit_plugins.tokens.transport import decode, is_left_out

if TYPE_CHECKING:
    from wit_plugins.tokens.collator import WeightedCollator

_FIRST = 100
_READ = 10_000  # examples, where all would take too long


class UnmatchedSpanWarning(UserWarning):
    """Something that a strategy is to weight is nowhere in the training data."""


def can_be_read_again(dataset: Any) -> bool:
    """Whether looking at a dataset's examples takes none of them away: whether it has a length and an order."""
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def check_dataset(dataset: Any, masking_hint: str, reader: ExampleReader) -> tuple[int, int]:
    """Make sure that a dataset has prompt tokens and response tokens.

    The first 100 examples are read; if they lack a role, the rest is read too, until the role is found.

    Args:
        dataset: examples with `input_ids` and `labels`, see [`can_be_read_again`].
        masking_hint (`str`): how a user masks the prompt, for the message.
        reader ([`ExampleReader`]): how the trainer reads its examples.

    Returns:
        The numbers of prompt and response tokens in the first 100 examples.

    Raises:
        WITConfigError: if a role is missing, the examples carry no labels, or one of them cannot be trained on.
    """
    if not len(dataset):
        raise WITConfigError(
            "the training dataset is empty: it had no examples, or the framework has left all of them out while it "
            "tokenised them (no response survives the maximum length, or every label is -100); look at the data, the "
            "masking and the maximum length"
        )
    prompt = response = 0
    # Silent for the usual dataset, whose first examples settle it; a bar for one that has to be read through.
    for index in tqdm(range(len(dataset)), desc="Looking for prompt and response tokens", delay=5):
        if index >= _FIRST and prompt and response:
            break
        try:
            more = _count(dataset[index], masking_hint, reader)
        except BadExampleError as error:
            raise BadExampleError(f"example {index} of the training dataset: {error}") from None
        prompt, response = prompt + more[0], response + more[1]
    _require_both(prompt, response, f"any of its {len(dataset)} examples", masking_hint)
    return prompt, response


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
    makers: dict[int, dict[str, int]] = {PROMPT: {}, RESPONSE: {}}  # of each role: how many tokens each has made 0
    for index in tqdm(range(len(dataset)), desc="Looking for a token that weighs something", delay=5):
        example = dataset[index]
        try:
            if _weighs(torch.from_numpy(collator.codes(example))):
                return
            if index < _FIRST:  # to name what made them 0, a few examples are enough
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
    looked = f" (of its first {_FIRST} examples: " if len(dataset) > _FIRST else " ("
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


def weighted_examples(dataset: Any, reader: ExampleReader) -> tuple[int, int]:
    """In how many of the first 100 examples (rows, where they are packed) weights stand in the data, and of how many.

    Args:
        dataset: that has been through [`check_dataset`].
        reader ([`ExampleReader`]): how the trainer reads its examples.
    """
    count = min(_FIRST, len(dataset))
    weights = (reader(dataset[index]).data_weights for index in range(count))
    return sum(own is not None and bool((own != 1).any()) for own in weights), count


class StreamCheck:
    """The same look at a stream: at its first 100 examples as they come by in training, since none may be lost.

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
        # What weighs 0 in the data has no role any more, and may have been of the role that was not seen.
        return bool(weighing and (left_out or (prompt and response)))

    def add(self, codes: torch.Tensor) -> None:
        """Count a batch's codes `[B, L]`.

        Raises:
            WITConfigError: if a role is missing in 100 rows, or nothing in them weighs anything.
        """
        _, roles, weights = decode(codes)
        own = [roles == PROMPT, roles == RESPONSE, is_left_out(codes), weights != 0]
        self.counts = [a + b for a, b in zip(self.counts, [*(int(o.sum()) for o in own), len(roles)], strict=True)]
        if self.counts[-1] >= _FIRST:
            self.finish([self.counts])

    def finish(self, counts: list[list[int]]) -> None:
        """There are no more: judge what was counted, by this process or by several.

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
        reader ([`ExampleReader`]): what refused it.
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

    Reads until everything was found once, at most 10,000 examples, at even distances. A dataset without a length is not
    read.

    Args:
        dataset: the training examples.
        collator ([`WeightedCollator`]): with the strategies, as it trains.
    """
    if not (collator.strategies.looks_for_spans and can_be_read_again(dataset)):
        return
    size, seen, matched = len(dataset), set[str](), set[str]()
    read = _evenly(size)
    for index in tqdm(read, desc="Looking for what is weighted", delay=5):
        try:
            found = collator.find_spans(dataset[index])
        except BadExampleError as error:
            raise BadExampleError(f"example {index} of the training dataset: {error}") from None
        seen |= found.keys()
        matched |= {name for name, mask in found.items() if mask.any()}
        if seen and seen == matched:
            return
    where = f"any of the {size:,} training examples"
    if len(read) < size:
        where = f"{len(read):,} of the {size:,} training examples, read at even distances"
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
        collator ([`WeightedCollator`]): with the strategies, as it trains.

    Raises:
        WITConfigError: if there are none.
    """
    if collator.scores is None:
        return
    try:
        collator.scores.open()
    except WITConfigError as error:
        raise WITConfigError(f"strategies: {', '.join(collator.strategies.referring)}: {error}") from None
    for name, dataset in datasets.items():
        if not can_be_read_again(dataset):
            continue
        for index in tqdm(_evenly(len(dataset)), desc=f"Looking for the scores of the {name} dataset", delay=5):
            example = dataset[index]
            if "input_ids" not in example or example.get("labels") is None:
                break  # for generation
            try:
                collator.log_probs(example)
            except BadExampleError as error:
                raise BadExampleError(f"example {index} of the {name} dataset: {error}") from None


def _evenly(size: int) -> list[int]:
    """Numbers of examples, from the first to the last."""
    return np.unique(np.linspace(0, size - 1, min(size, _READ)).astype(np.int64)).tolist() if size else []


def _count(example: Mapping[str, Any], masking_hint: str, reader: ExampleReader) -> tuple[int, int]:
    if "input_ids" not in example:
        raise WITConfigError(
            f"the training examples have no input_ids (columns: {sorted(example)}); weights need tokenised examples"
        )
    if example.get("labels") is None:
        raise WITConfigError(f"the training examples have no labels, so nothing is masked; {masking_hint}")
    roles = reader(example).roles
    return int(np.count_nonzero(roles == PROMPT)), int(np.count_nonzero(roles == RESPONSE))
