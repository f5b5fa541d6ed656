"""The whole dataset in numbers, read block by block, and what looks wrong about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wit_plugins.cli.driver import Prepared, Split
from wit_plugins.cli.preview.rows import Tokens, blocks, read, row_errors
from wit_plugins.cli.preview.shares import Parts
from wit_plugins.cli.safe_text import visible
from wit_plugins.config import WITConfig
from wit_plugins.tokens.roles import IGNORE_INDEX, PROMPT, RESPONSE
from wit_plugins.tokens.text import TokenText

BINS = 20
HIGH_SHARE = 0.95
_TOLERATED = 0.05  # of the responses; a few odd ones are the data's business
_END_WINDOW = 3  # an end-of-turn token may be followed by a line break inside the response
_UNKNOWN = -1


@dataclass
class Summary:
    """What a dataset consists of, under certain weights.

    Attributes:
        rows (`int`): rows that the collator gets; equal to `documents` unless they are packed.
        documents (`int`): examples as the model sees them.
        tokens (`int`): all tokens, first ones included, padding not.
        prompt, response, first (`int`): tokens by role; a first token is predicted by nothing, so it has none.
        left_out (`int`): tokens behind a first one without a role: they weigh 0 in the data, or are masked.
        placeholders (`dict[str, int]`): tokens that stand for pixels or sound, by kind: `image`, …, and the `mark`s.
        prompt_mass, response_mass (`float`): Σ weights of each role, by which it enters the loss's numerator.
        weighted (`int`): tokens whose weight is not 0, which is what the loss is divided by.
        no_prompt, no_response (`int`): documents without a predicted token of that role.
        weightless (`int`): documents, not among these, of which nothing is trained: they weigh 0 in the data.
        high_share (`int`): documents with a prompt share above 95 %.
        histogram (`np.ndarray`): documents by prompt share, in 20 bins of 5 %.
        padding (`int`): padding tokens that the framework put into the rows.
        room (`int`): tokens that all packed rows together have room for; 0 if nothing is packed.
        responses, untrained_ends, open_ends (`int`): runs of response tokens; those directly followed by an
            end-of-turn token that is not trained; those with no such token at all, though nothing was cut off.
        end_tokens (`dict[int, int]`): by id, the tokens found at untrained ends.
        long (`int`): examples longer than `max_length`, before truncation. -1 if the framework does not say.
        cut_responses (`int`): of those, the ones that lose response tokens, where one end is cut off.
        last_turns (`int`): of those that are cut at their end, the ones that keep response tokens, but none of their
            last turn.
        lost, lost_response (`int`): tokens, and response tokens, of all examples that are not in the dataset any more.
        dropped (`int`): examples that were left out altogether.
        dropped_prompt (`int`): their prompt tokens within the maximum length, where they were left out because no
            response token is: prompt_weight would have counted them.
        unpacked, unpacked_tokens, unpacked_response (`int`): examples of the dataset that the batch sampler packs into
            no row of its first epoch, their tokens, and their response tokens.
        parts ([`Parts`]): the spans, and the sources of the weights.
        complete (`bool`): whether every row was read.
    """

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    prompt: int = 0
    response: int = 0
    first: int = 0
    left_out: int = 0
    placeholders: dict[str, int] = field(default_factory=dict)
    prompt_mass: float = 0.0
    response_mass: float = 0.0
    weighted: int = 0
    no_prompt: int = 0
    no_response: int = 0
    weightless: int = 0
    high_share: int = 0
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    padding: int = 0
    room: int = 0
    responses: int = 0
    untrained_ends: int = 0
    open_ends: int = 0
    end_tokens: dict[int, int] = field(default_factory=dict)
    long: int = _UNKNOWN
    cut_responses: int = 0
    last_turns: int = 0
    lost: int = 0
    lost_response: int = 0
    dropped: int = 0
    dropped_prompt: int = 0
    unpacked: int = 0
    unpacked_tokens: int = 0
    unpacked_response: int = 0
    parts: Parts = field(default_factory=Parts)
    complete: bool = True

    @property
    def predicted(self) -> int:
        """Tokens that have a role."""
        return self.prompt + self.response

    @property
    def prompt_share(self) -> float:
        """Prompt tokens among the predicted ones."""
        return self.prompt / max(1, self.predicted)

    @property
    def prompt_mass_share(self) -> float:
        """The prompt's part of Σ weights."""
        return self.prompt_mass / (self.prompt_mass + self.response_mass or 1.0)

    def add(self, tokens: Tokens, is_special: np.ndarray, max_length: int | None) -> None:
        """Count some rows in.

        Args:
            tokens ([`Tokens`]): the rows.
            is_special (`np.ndarray`): bool `[V]`: which ids are special tokens.
            max_length (`int | None`): how many tokens of an example are kept.
        """
        roles, weights = tokens.roles, np.abs(tokens.weights.astype(np.float64))
        prompt, response = roles == PROMPT, roles == RESPONSE
        count = int(len(tokens) - tokens.padding.sum())
        self.rows += len(tokens.row_starts)
        self.documents += len(tokens.document_starts)
        self.tokens += count
        self.padding += int(tokens.padding.sum())
        self.prompt += int(prompt.sum())
        self.response += int(response.sum())
        first = int(np.count_nonzero(~tokens.padding[tokens.document_starts]))
        self.first += first
        standing = int(np.count_nonzero(tokens.kinds))
        self.left_out += count - int(prompt.sum()) - int(response.sum()) - first - standing
        if standing:
            self._add_placeholders(tokens.kinds)
        self.prompt_mass += float(weights[prompt].sum())
        self.response_mass += float(weights[response].sum())
        self.weighted += int(np.count_nonzero(weights))
        self.parts.add(roles, weights, tokens.spans, tokens.sources)
        if not len(tokens.document_starts):
            return
        prompts = np.add.reduceat(prompt, tokens.document_starts, dtype=np.int64)
        responses = np.add.reduceat(response, tokens.document_starts, dtype=np.int64)
        both = prompts + responses
        # Every token behind a document's first has a role, unless the data says that it weighs nothing.
        real = np.add.reduceat(~tokens.padding, tokens.document_starts, dtype=np.int64)
        weightless = (both == 0) & (real > 1)
        self.weightless += int(weightless.sum())
        self.no_prompt += int(((prompts == 0) & ~weightless).sum())
        self.no_response += int(((responses == 0) & ~weightless).sum())
        shares = prompts[both > 0] / both[both > 0]
        self.high_share += int((shares > HIGH_SHARE).sum())
        self.histogram += np.histogram(shares, bins=BINS, range=(0, 1))[0]
        self._add_ends(tokens, response, is_special, max_length)

    def _add_placeholders(self, kinds: np.ndarray) -> None:
        from wit_plugins.tokens.placeholders import KINDS

        for number, kind in enumerate(KINDS, 1):
            if count := int(np.count_nonzero(kinds == number)):
                self.placeholders[kind] = self.placeholders.get(kind, 0) + count

    def _add_ends(self, tokens: Tokens, response: np.ndarray, is_special: np.ndarray, max_length: int | None) -> None:
        """How the responses end: with a trained special token, before an untrained one, or with none."""
        count = len(tokens)
        is_first = np.zeros(count + 1, dtype=bool)
        is_first[tokens.document_starts] = is_first[count] = True
        special = is_special[np.clip(tokens.input_ids, 0, len(is_special) - 1)]
        last = np.flatnonzero(response & ~(np.append(response[1:], False) & ~is_first[1:]))
        trained = np.zeros(len(last), dtype=bool)
        inside = np.ones(len(last), dtype=bool)
        for back in range(_END_WINDOW):
            at = np.maximum(last - back, 0)
            inside &= response[at] & (last >= back)
            trained |= inside & special[at]
        follows = ~is_first[last + 1]
        after = np.minimum(last + 1, count - 1)
        untrained = ~trained & follows & special[after] & ~tokens.padding[after]
        lengths = np.diff(np.append(tokens.document_starts, count))
        own_length = lengths[np.searchsorted(tokens.document_starts, last, side="right") - 1]
        cut = ~follows & (own_length >= (max_length or np.inf))
        self.responses += len(last)
        self.untrained_ends += int(untrained.sum())
        self.open_ends += int((~trained & ~untrained & ~cut).sum())
        for token, times in zip(*np.unique(tokens.input_ids[after[untrained]], return_counts=True), strict=True):
            self.end_tokens[int(token)] = self.end_tokens.get(int(token), 0) + int(times)


def summarise(
    prepared: Prepared,
    split: Split,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    name: str = "train",
) -> Summary:
    """Read a dataset once (twice with its uncut form), never more than 512 rows in memory.

    Args:
        prepared ([`Prepared`]): the run.
        split ([`Split`]): the dataset.
        limit (`int | None`): how many rows to read at most.
        progress (`Callable | None`): called with the rows and tokens that were read, after every block.
        name (`str`): the dataset's, for messages.

    Raises:
        WITConfigError: if a row cannot be trained on: which, and why.
    """
    summary = Summary()
    text = TokenText(prepared.tokenizer)
    is_special = np.zeros(max(text.special | {len(prepared.tokenizer)}) + 2, dtype=bool)
    is_special[list(text.special)] = True
    pad_id = prepared.tokenizer.pad_token_id
    # Other strategies may look at the columns themselves.
    as_arrays = set(prepared.config.strategies) <= {"dft", "spans"}
    packed = 0
    for block in blocks(split.rows, limit, as_arrays):
        packed += sum(len(row) if isinstance(row, list) else 1 for row in block)
        tokens = read(block, prepared.collator, pad_id, name, summary.rows)
        summary.add(tokens, is_special, prepared.max_length)
        if progress is not None:
            progress(len(block), len(tokens))
    if prepared.row_length is not None:
        summary.room = summary.rows * prepared.row_length
    if limit is not None and summary.rows == limit and _length(split.rows) != limit:
        summary.complete = False
        return summary
    if split.examples is not None and (_length(split.examples) or packed) > packed:
        _count_unpacked(summary, prepared, split.examples, packed, name)
    if split.uncut is not None and prepared.max_length is not None:
        _compare_with_uncut(summary, prepared, split.uncut, progress, name)
    return summary


def _count_unpacked(summary: Summary, prepared: Prepared, examples: Any, packed: int, name: str) -> None:
    """What the sampler leaves out: all examples, without those that stand in its rows."""
    count = tokens = response = 0
    for block in blocks(examples):
        for number, example in enumerate(block, count):
            with row_errors(f"dataset {name}, example {number} (from 0)", example):
                roles = prepared.collator.reader(example).roles
            tokens += len(roles)
            response += int((roles == RESPONSE).sum())
        count += len(block)
    summary.unpacked = count - packed
    summary.unpacked_tokens = tokens - summary.tokens
    summary.unpacked_response = response - summary.response


def _compare_with_uncut(
    summary: Summary, prepared: Prepared, uncut: Any, progress: Callable[[int, int], None] | None, name: str
) -> None:
    """What truncation took away."""
    summary.long = 0
    examples = tokens = response = 0
    unanswered: list[int] = []  # the prompt tokens of each example that keeps no response
    limit = prepared.max_length
    assert limit is not None
    for block in blocks(uncut):
        size = 0
        for number, example in enumerate(block, examples):
            with row_errors(f"dataset {name}, row {number} (from 0) before truncation", example):
                read = prepared.collator.reader(example)
            roles = read.roles
            is_response = roles == RESPONSE
            examples += 1
            size += len(roles)
            response += int(is_response.sum())
            left = slice(-limit, None) if prepared.truncation == "end" else slice(limit)
            if len(roles) and (read.labels[left] == IGNORE_INDEX).all():
                unanswered.append(min(len(roles), limit) - 1)
            if len(roles) > limit:
                summary.long += 1
                gone = is_response[:-limit] if prepared.truncation == "end" else is_response[limit:]
                summary.cut_responses += bool(gone.any())
                if prepared.truncation == "start" and is_response[:limit].any():
                    begins = np.flatnonzero(is_response & ~np.append(False, is_response[:-1]))
                    summary.last_turns += bool(begins[-1] >= limit)
        tokens += size
        if progress is not None:
            progress(len(block), size)
    # What the sampler leaves out of an epoch is in the dataset, and the next epoch has other rows.
    summary.lost = tokens - summary.tokens - summary.unpacked_tokens
    summary.lost_response = max(0, response - summary.response - summary.unpacked_response)
    if prepared.truncation != "split":
        summary.dropped = max(0, examples - summary.documents - summary.unpacked)
    if summary.dropped == len(unanswered) and prepared.truncation in ("start", "end"):
        summary.dropped_prompt = sum(unanswered)


def _length(rows: Any) -> int | None:
    return len(rows) if hasattr(rows, "__len__") else None


def warnings(summary: Summary, config: WITConfig, prepared: Prepared) -> list[str]:
    """What looks wrong, each with what to do about it."""
    found = []
    if not summary.predicted:
        return ["there is no token to train on"]
    if summary.prompt == 0:
        found.append("nothing is masked: every token is response, so there is no prompt to weight; mask the prompt")
    elif summary.no_prompt:
        found.append(f"{_of(summary.no_prompt, summary)} have no prompt token: nothing of them is masked")
    if summary.response == 0:
        found.append("there is no response: every token is masked, so nothing is trained at prompt_weight 0")
    elif summary.no_response:
        found.append(f"{_of(summary.no_response, summary)} have no response token; check the masking and max_length")
    if summary.prompt and summary.response and summary.prompt_share > HIGH_SHARE:
        found.append(
            f"{summary.prompt_share:.1%} of the tokens are prompt: with that many, prompt_weight decides everything "
            f"({config.prompt_weight:g} gives the prompt {summary.prompt_mass_share:.0%} of the loss)"
        )
    if summary.weightless:
        found.append(
            f"{_of(summary.weightless, summary)} weigh 0: by the weights that stand in the data, nothing of them is "
            "trained; take them out, if that is not a mistake"
        )
    if config.prompt_weight > config.response_weight:
        found.append(
            f"prompt_weight = {config.prompt_weight:g} is above response_weight = {config.response_weight:g}: the "
            "model learns to write prompts more than to answer them; were the two exchanged?"
        )
    if summary.long > 0 and prepared.truncation == "split":
        found.append(f"{summary.long:,} examples are longer than {prepared.max_length:,} tokens and are split")
    elif summary.long > 0 and prepared.truncation == "both" and summary.lost_response:
        found.append(
            f"{summary.long:,} examples are longer than {prepared.max_length:,} tokens and are cut; "
            f"{summary.lost_response:,} response tokens are lost: their ends are not learnt; allow more tokens, or "
            "take long examples out"
        )
    elif summary.long > 0 and prepared.truncation == "dropped":
        found.append(
            f"{summary.long:,} examples are longer than {prepared.max_length:,} tokens and are left out, with "
            f"{summary.lost_response:,} response tokens; allow more tokens"
        )
    elif summary.cut_responses and prepared.truncation in ("start", "end"):
        found.append(
            f"{summary.cut_responses:,} examples are longer than {prepared.max_length:,} tokens and lose response "
            f"tokens ({summary.lost_response:,} in all): their ends are not learnt; allow more tokens, or take long "
            "examples out"
        )
    if summary.last_turns and _weights_last_turns(config):
        found.append(
            f"{summary.last_turns:,} examples are cut before their last turn: there, last_turn is the last turn that "
            "is left; allow more tokens, or take long examples out"
        )
    if summary.untrained_ends > _TOLERATED * summary.responses:
        token = max(summary.end_tokens, key=summary.end_tokens.__getitem__)
        text = visible(TokenText(prepared.tokenizer)(token))
        found.append(
            f"{summary.untrained_ends:,} of {summary.responses:,} responses end before {text}, which is not trained "
            "as response: the model may not learn to stop; let the mask include it"
        )
    # Where parts of everything are cut, an example that was cut is not always as long as is allowed.
    open_ends = summary.open_ends - (max(0, summary.long) if prepared.truncation == "both" else 0)
    if open_ends > _TOLERATED * summary.responses:
        found.append(
            f"{open_ends:,} of {summary.responses:,} responses end without any special token (such as "
            f"{visible(str(prepared.tokenizer.eos_token))}): the model may not learn to stop"
        )
    return found


def _weights_last_turns(config: WITConfig) -> bool:
    spans = config.strategies.get("spans", [])
    return any(isinstance(one, Mapping) and one.get("named") == "last_turn" for one in spans)


def _of(count: int, summary: Summary) -> str:
    return f"{count:,} of {summary.documents:,} examples"
