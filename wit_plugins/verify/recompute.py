"""Recomputes the kept steps of a run and compares."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from wit_plugins.verify.characters import Data, NotRecomputedError, Text, data_factors, mask_faults, span_factors
from wit_plugins.verify.documents import Document, Reading, readings
from wit_plugins.verify.formula import ONE_LINE, Sums, add, load, own_loss
from wit_plugins.verify.record import Record, Step

# By how much of itself a loss may differ: what sums of rounded numbers lose, by the type in which the run computed.
_TOLERANCES = {"float64": 1e-6, "float32": 2e-5}
_HALF = 2e-2
_LOGGED = 1e-4  # some trainers round what they log to four decimals
_OWN_LOSS = 1e-4
_FAULTS = 5  # of a kind and step that are named


@dataclass
class Line:
    """One line of the table.

    Attributes:
        step (`int`): the steps that were taken before.
        rank (`str`): a rank's number, `all` for the step, `log` for what was logged of it.
        logged, recomputed (`float`): the loss by the run, and by the formula.
        tokens (`dict[float, int]`): how many predicted tokens have each weight.
        differs (`bool`): whether by more than rounding.
    """

    step: int
    rank: str
    logged: float
    recomputed: float
    tokens: dict[float, int]
    differs: bool


@dataclass
class Verdict:
    """What came out.

    Attributes:
        lines (`list[Line]`): the table.
        problems (`list[str]`): what cannot be so.
        not_recomputed (`list[str]`): what is not known here; no line is about it.
        missing (`list[int]`): steps that were to be kept and are not there.
    """

    lines: list[Line] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    not_recomputed: list[str] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)

    @property
    def differs(self) -> bool:
        """Whether anything is not as the formula has it."""
        return bool(self.problems) or any(line.differs for line in self.lines)


class Weigher:
    """What a document's tokens are multiplied by, beside their roles' weights.

    Args:
        record ([`Record`]): of the run.
        data ([`Data`], *optional*): the rows that it was trained on.
        verdict ([`Verdict`]): to which problems of the text are added.
    """

    def __init__(self, record: Record, data: Data | None, verdict: Verdict) -> None:
        self._spans = record.settings["strategies"].get("spans")
        self._data, self._verdict = data, verdict
        self.tokenizer: Any = None
        if (record.folder / "tokenizer").is_dir():
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(record.folder / "tokenizer")
        self.pad: int | None = getattr(self.tokenizer, "pad_token_id", None)
        self._special = _special(self.tokenizer)
        self._named: Counter[str] = Counter()

    def __call__(self, document: Document) -> Sequence[float]:
        """The factors, `[T]`.

        Raises:
            NotRecomputedError: if they cannot be found again.
        """
        self._check_edges(document)
        factors = [1.0] * len(document.ids)
        if (self._spans is None and self._data is None) or len(document.ids) < 2:
            return factors
        if self.tokenizer is None:
            raise NotRecomputedError("spans and weights in the data, since no tokenizer was kept")
        text = Text(self.tokenizer, document.ids)
        if self._spans is not None:
            factors = span_factors(text, document, self._spans)
        if self._data is not None:
            found = self._data.find(text.text)
            if found is None:
                self._problem("data", f"{text.text[:60]!r} is made from no row of --data (a stale cache, or cut off)")
            else:
                for fault in mask_faults(text, document, found):
                    self._problem("mask", fault)
                weights = data_factors(text, document, found, self._special)
                factors = [a * b for a, b in zip(factors, weights, strict=True)]
        return factors

    def _check_edges(self, document: Document) -> None:
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if bos is not None and document.ids[:2] == [bos, bos]:
            self._problem("bos", f"a document begins twice with the token {self.tokenizer.bos_token!r}")
        pad, eos = self.pad, getattr(self.tokenizer, "eos_token_id", None)
        at_edges = [document.ids[0] == pad, (document.ids[-1], document.labels[-1]) == (pad, -100)]
        if pad is not None and pad != eos and any(at_edges):
            edge = "begins" if at_edges[0] else "ends"
            self._problem(
                "pad", f"a document {edge} with padding ({self.tokenizer.pad_token!r}), which counts as prompt"
            )

        # LLaMA-Factory's efficient_eos predicts the end of a turn at the token behind it.
        other = sum(label not in (-100, i, eos) for i, label in zip(document.ids, document.labels, strict=True))
        if other:
            self._problem("labels", f"{other} labels of a document are not the tokens that stand there")

    def _problem(self, kind: str, text: str) -> None:
        self._named[kind] += 1
        if self._named[kind] <= _FAULTS:
            self._verdict.problems.append(text)


def verify(record: Record, data: Data | None = None, dtype: str = "float64", base: str | None = None) -> Verdict:
    """Recompute all steps that a run has kept.

    Args:
        record ([`Record`]): what it kept.
        data ([`Data`], *optional*): the rows that it was trained on, for weights that stand in them.
        dtype (`str`): in which the model computes, `float64` or `float32`.
        base (`str`, *optional*): the base model of an adapter.

    Returns:
        [`Verdict`].

    Raises:
        WITConfigError: if a model cannot be loaded.
    """
    there = {step.number for step in record.steps}
    verdict = Verdict(missing=[number for number in record.planned if number not in there])
    unknown = sorted(set(record.settings["strategies"]) - {"spans", *ONE_LINE})
    if unknown:
        verdict.not_recomputed.append(f"strategies: {', '.join(unknown)}")
        return verdict
    weigh = Weigher(record, data, verdict)
    for step in record.steps:
        try:
            _verify_step(step, record, weigh, verdict, load(step.model, dtype, base))
        except NotRecomputedError as error:
            verdict.not_recomputed.append(f"step {step.number}: {error}")
    return verdict


def _verify_step(step: Step, record: Record, weigh: Weigher, verdict: Verdict, model: Any) -> None:
    by_rank: list[Sums] = []
    for share in step.shares:
        sums = Sums()
        for number, batch in enumerate(share.batches):
            if "input_ids" not in batch:
                raise NotRecomputedError("the model was called with embeddings in the place of ids")
            for reading in readings(batch, number, weigh.pad):
                add(sums, model, reading, record.settings, weigh)
        by_rank.append(sums)
    _check_own_loss(step, model, weigh.pad, verdict)
    denominator = sum(sums.denominator for sums in by_rank)
    kept = {share.denominator for share in step.shares}
    if None in kept:
        raise NotRecomputedError("the trainer counted no denominator, so it averages micro-batches")
    if any(not math.isclose(value or 0.0, denominator, rel_tol=1e-6) for value in kept):
        shown = ", ".join(f"{value:g}" for value in sorted(value or 0.0 for value in kept))
        verdict.problems.append(f"step {step.number}: the run divided by {shown}, and its rows count {denominator:g}")
    tolerance = _TOLERANCES.get(record.dtype, _HALF)
    whole = sum(sums.loss for sums in by_rank) / (denominator or 1)
    for share, sums in zip(step.shares, by_rank, strict=True):
        recomputed = sums.loss / (denominator or 1)
        differs = not math.isclose(share.loss, recomputed, rel_tol=tolerance, abs_tol=tolerance * abs(whole))
        tokens = dict(sorted(sums.tokens.items()))
        verdict.lines.append(Line(step.number, str(share.rank), share.loss, recomputed, tokens, differs))
    if step.logged is not None:
        logged = step.logged - sum(sum(share.aux_losses) for share in step.shares)
        differs = not math.isclose(logged, whole, rel_tol=tolerance, abs_tol=_LOGGED)
        total = sum((sums.tokens for sums in by_rank), Counter[float]())
        verdict.lines.append(Line(step.number, "log", logged, whole, dict(sorted(total.items())), differs))


def _check_own_loss(step: Step, model: Any, pad: int | None, verdict: Verdict) -> None:
    """At the weights 0 and 1 the formula must be the loss that the model itself computes of a document."""
    for reading in _single_documents(step, pad):
        plain = Sums()
        settings = {"prompt_weight": 0.0, "response_weight": 1.0, "normalization": "nonzero_tokens", "strategies": {}}
        add(plain, model, reading, settings, lambda document: [1.0] * len(document.ids))
        loss = own_loss(model, reading) if plain.own else None
        if loss is None:
            continue
        expected = sum(plain.own) / len(plain.own)
        if not math.isclose(loss, expected, rel_tol=_OWN_LOSS, abs_tol=_OWN_LOSS):
            verdict.problems.append(
                f"step {step.number}: the model itself computes a loss of {loss:.6g} where the cross entropy is "
                f"{expected:.6g}: it has a loss of its own (a z-loss, further heads), which the run left out"
            )
        return


def _single_documents(step: Step, pad: int | None) -> Iterator[Reading]:
    for batch in step.shares[0].batches:
        for reading in readings(batch, 0, pad):
            if len(reading.documents) == 1 and len(reading.documents[0].ids) > 1:
                yield reading


def _special(tokenizer: Any) -> set[int]:
    if tokenizer is None:
        return set()
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}
