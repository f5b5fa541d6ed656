"""Some rows, document by document, in runs of tokens that are shown alike: what the terminal and the page both draw."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from wit_plugins.cli.driver import Prepared
from wit_plugins.cli.preview.rows import read
from wit_plugins.cli.preview.scale import Scale
from wit_plugins.tokens.roles import NEITHER, PROMPT, RESPONSE
from wit_plugins.tokens.text import TokenText

LEFT_OUT = "left out"  # without a role, and not a document's first
_SCATTERED = 3.0  # tokens a run, below which weights change too often to be named one by one


@dataclass
class Token:
    """One token of a document.

    Attributes:
        token_id (`int`): its id.
        text (`str`): its raw text.
        special (`bool`): whether it is a special token, and not text that looks like one.
        role (`int`): `PROMPT`, `RESPONSE` or `NEITHER`.
        weight (`float`): its static weight.
        position (`int`): its position in its document, from 0.
        spans (`tuple[str, ...]`): the names of the spans that it is in.
        kind (`str`): what it stands for, `image` and the like; empty for text.
        count (`int`): how many neighbouring tokens this box stands for, where they stand for pixels or sound.
    """

    token_id: int
    text: str
    special: bool
    role: int
    weight: float
    position: int
    spans: tuple[str, ...] = ()
    kind: str = ""
    count: int = 1


@dataclass
class Run:
    """Neighbouring tokens of one role and, unless weights change all the time, of one weight."""

    role: int
    tokens: list[Token]

    @property
    def label(self) -> tuple[str, str]:
        """Role and weight in words."""
        if self.tokens[0].kind:
            return self.tokens[0].kind, "–"
        if self.role == NEITHER:
            return ("first" if all(token.position == 0 for token in self.tokens) else LEFT_OUT), "–"
        weights = sorted({token.weight for token in self.tokens})
        weight = f"{weights[0]:.4g}" + (f"–{weights[-1]:.4g}" if len(weights) > 1 else "")
        return ("prompt" if self.role == PROMPT else "response"), weight


@dataclass
class Document:
    """One document of a row.

    Attributes:
        index, count (`int`): its place among the documents of its row, from 1, and how many these are.
        tokens (`list[Token]`): all of them.
        ends_at_limit (`bool`): whether it is exactly as long as the maximum, so that it may have been cut.
    """

    index: int
    count: int
    tokens: list[Token]
    ends_at_limit: bool

    def runs(self) -> Iterator[Run]:
        """Its tokens in runs."""
        by_weight = [(t.role, t.weight, t.kind) for t in self.tokens]
        many = sum(1 for _ in itertools.groupby(by_weight)) * _SCATTERED > len(self.tokens) + 10
        for (role, *_), group in itertools.groupby(
            self.tokens, key=lambda t: (t.role, t.kind) if many else (t.role, t.weight, t.kind)
        ):
            yield Run(role, list(group))

    @property
    def size(self) -> int:
        """The number of its tokens."""
        return sum(token.count for token in self.tokens)

    def share(self, role: int) -> float:
        """A role's part of the predicted tokens."""
        predicted = sum(token.role != NEITHER for token in self.tokens)
        return sum(token.role == role for token in self.tokens) / max(1, predicted)

    @property
    def prompt_mass(self) -> float:
        """The prompt's part of Σ weights."""
        total = sum(token.weight for token in self.tokens)
        return sum(token.weight for token in self.tokens if token.role == PROMPT) / (total or 1.0)

    @property
    def counts(self) -> tuple[int, int]:
        """Prompt and response tokens."""
        return sum(t.role == PROMPT for t in self.tokens), sum(t.role == RESPONSE for t in self.tokens)


@dataclass
class Row:
    """One row as the collator gets it: a document, or several packed ones, and the padding that is in it."""

    number: int
    documents: list[Document]
    padding: int


def view(rows: list[Any], numbers: list[int], prepared: Prepared, text: TokenText, dataset: str = "train") -> list[Row]:
    """Rows ready to be drawn.

    Raises:
        WITConfigError: if one cannot be trained on: which, and why.
    """
    made = []
    for row, number in zip(rows, numbers, strict=False):
        tokens = read([row], prepared.collator, prepared.tokenizer.pad_token_id, dataset, number)
        end = len(tokens) - int(tokens.padding.sum())
        starts = tokens.document_starts
        documents = []
        for index, piece in enumerate(np.split(np.arange(len(tokens)), starts[1:])):
            inside = [i for i in piece.tolist() if i < end or not tokens.padding[i]]
            if not inside:
                continue
            ids = tokens.input_ids[inside].tolist()
            within = {name: mask[inside].tolist() for name, mask in tokens.spans.items()}
            listed = [
                Token(
                    token_id,
                    shown,
                    token_id in text.special,
                    int(role),
                    float(weight),
                    position,
                    tuple(name for name, mask in within.items() if mask[position]),
                )
                for position, (token_id, shown, role, weight) in enumerate(
                    zip(ids, text.spell(ids), tokens.roles[inside], tokens.weights[inside], strict=True)
                )
            ]
            at_limit = prepared.max_length is not None and len(listed) == prepared.max_length
            if tokens.kinds[inside].any():
                listed = _boxes(listed, tokens.kinds[inside].tolist())
            documents.append(Document(index + 1, len(starts), listed, at_limit))
        made.append(Row(number, documents, len(tokens) - sum(document.size for document in documents)))
    return made


def _boxes(tokens: list[Token], kinds: list[int]) -> list[Token]:
    """The same tokens, each run of those that stand for pixels or sound as one: `image × 256`, marks included."""
    from wit_plugins.tokens.placeholders import KINDS, MARK

    made: list[Token] = []
    for in_box, group in itertools.groupby(zip(tokens, kinds, strict=True), key=lambda each: each[1] != 0):
        pairs = list(group)
        if not in_box:
            made += [token for token, _ in pairs]
            continue
        names = [KINDS[kind - 1] for _, kind in pairs]
        shown = {name: names.count(name) for name in dict.fromkeys(names) if name != MARK} or {MARK: len(names)}
        said = ", ".join(f"{name} × {count:,}" for name, count in shown.items())
        first = pairs[0][0]
        made.append(Token(first.token_id, said, True, NEITHER, 0.0, first.position, (), next(iter(shown)), len(pairs)))
    return made


def scale_of(rows: list[Row]) -> Scale:
    """The scale on which the weights of these rows are drawn."""
    return Scale.of(token.weight for row in rows for document in row.documents for token in document.tokens)
