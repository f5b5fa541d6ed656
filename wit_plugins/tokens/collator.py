"""The collator wrapper: codes in, the framework's own collator, codes out.

Runs in data-loader workers. The framework's collator stays in charge of padding, packing and flattening; the wrapper
only exchanges `labels` before it and after it, and checks that every code came through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from wit_plugins.config import multiplied
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.errors import BadExampleError, WeightsNotAppliedError, WITConfigError
from wit_plugins.foreign import Delegate
from wit_plugins.tokens.codes import decode, encode, framework_labels, restore_codes, weighing
from wit_plugins.tokens.example_reader import ExampleReader, ReadExample
from wit_plugins.tokens.roles import IGNORE_INDEX, NEITHER
from wit_plugins.tokens.span_bits import SPANS_KEY, bits_in_batch, to_bits

if TYPE_CHECKING:
    from wit_plugins.tokens.reference_scores import Scores
    from wit_plugins.tokens.text import TokenText

CODES_KEY = "weighted_labels"
SCORES_KEY = "weighted_scores"
DATA = "the data"  # as a source of weights, beside the strategies


@dataclass
class Explained:
    """One example, and where its weights come from.

    Attributes:
        codes (`np.ndarray`): int64 `[T]`, as in training.
        spans (`dict[str, np.ndarray]`): see [`WeightedCollator.find_spans`]; under the log's names where it has one.
        sources (`dict[str, np.ndarray]`): what each strategy multiplies the weights by, float32 `[T]`.
    """

    codes: np.ndarray
    spans: dict[str, np.ndarray] = field(default_factory=dict)
    sources: dict[str, np.ndarray] = field(default_factory=dict)


class WeightedCollator(Delegate):
    """Wraps a collator so that its batches carry every token's weight, target and role.

    The batch keeps what the wrapped collator made of it, with `labels` as the framework would have had them (int64,
    -100 on everything but the response) and one more tensor of the same shape, `weighted_labels`: int64 codes (see
    `wit_plugins.tokens.codes`). If strategies have spans to log, there is a third, `weighted_spans` (int64, see
    `wit_plugins.tokens.span_bits`). If strategies compare with scores in a folder, there is `weighted_scores` (the bits
    of float32 as int64, since frameworks round floats; see `wit_plugins.tokens.reference_scores`).

    Frameworks read options off their collator (`padding_free`, `pad_to_multiple_of`, …), so its other attributes are
    those of the wrapped collator.

    Args:
        collator (`Callable`): the framework's collator. It gets the examples as they are, labels exchanged: a list of
            examples, or (sample packing by a batch sampler) a list of lists of examples.
        strategies ([`ActiveStrategies`]): who gives the weights.
        reader ([`ExampleReader`], *optional*): reads and checks the examples; by default as they are.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the one that trains, for strategies that read the text.

    Raises:
        WITConfigError: if a strategy reads the text, and there is no tokenizer.
    """

    _holder = "collator"

    def __init__(
        self,
        collator: Callable[..., Any],
        strategies: ActiveStrategies,
        reader: ExampleReader | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.collator = collator
        self.strategies = strategies
        self.reader = reader or ExampleReader()
        self._reading, self._locating = strategies.needs.text, strategies.needs.documents
        self.scores: Scores | None = None
        if strategies.needs.reference is not None:
            from wit_plugins.tokens.reference_scores import Scores

            self.scores = Scores(strategies.needs.reference)
        self._token_text: TokenText | None = None
        if self._reading and hasattr(tokenizer, "convert_ids_to_tokens"):
            from wit_plugins.tokens.text import TokenText

            self._token_text = TokenText(tokenizer)
        if self._reading and self._token_text is None:
            names = sorted({name for names in self._reading.values() for name in names})
            raise WITConfigError(
                f"strategies: {', '.join(names)} reads the text of the examples, but the trainer's processing_class = "
                f"{tokenizer!r} is no tokenizer; give the trainer its tokenizer, or take the strategy out"
            )

    def __call__(self, features: list[Any], *args: Any, **kwargs: Any) -> Any:
        """Collate examples into a batch.

        Raises:
            WeightsNotAppliedError: if the wrapped collator changed, dropped or added a label, or, where spans are
                logged, put tokens into another order.
            BadExampleError: if an example cannot be trained on (lengths that differ, ids out of range); it is named by
                its place in the batch.
        """
        examples = _flat(features)
        if not all("labels" in example for example in examples):
            return self.collator(features, *args, **kwargs)  # e.g. prediction; a training step without codes stops
        checksum = _Checksum()
        sent: list[tuple[np.ndarray, np.ndarray]] = []
        scored: list[tuple[np.ndarray, np.ndarray]] = []
        try:
            exchanged = [self._exchange(item, checksum, sent, scored) for item in features]
        except BadExampleError as error:
            # Every example before it was added to the checksum.
            place = f"example {checksum.examples} of a batch of {len(examples)}"
            raise BadExampleError(f"{place}: {error}") from None
        batch = self.collator(exchanged, *args, **kwargs)
        if "shift_labels" in batch:
            raise WeightsNotAppliedError(
                f"{type(self.collator).__name__} returns shift_labels; pre-shifted labels are not supported"
            )
        codes = restore_codes(batch["labels"])
        if checksum != _Checksum.of(codes.numpy()):
            raise WeightsNotAppliedError(
                f"{type(self.collator).__name__} does not carry the examples' labels through (it builds, drops or "
                "changes them), so the weights would be wrong; use a collator that keeps the labels column, such as "
                "DataCollatorForSeq2Seq"
            )
        batch["labels"] = framework_labels(codes)
        batch[CODES_KEY] = codes
        if self.strategies.logged_spans:
            # Examples that are alike could not be told apart by their codes, and their spans need not be alike.
            logged = ", ".join(self.strategies.logged_spans.values())
            batch[SPANS_KEY] = self._beside(codes, sent, f"spans whose losses are logged ({logged})")
        if self.scores is not None:
            batch[SCORES_KEY] = self._beside(codes, scored, f"scores ({self.scores.folder})")
        return batch

    def _beside(self, codes: torch.Tensor, sent: list[tuple[np.ndarray, np.ndarray]], what: str) -> torch.Tensor:
        """What was said of each example's tokens, put to where their codes came out: int64 `[B, L]`.

        Raises:
            WeightsNotAppliedError: if the wrapped collator put tokens into another order.
        """
        found = bits_in_batch(codes.numpy(), sent)
        if found is None:
            raise WeightsNotAppliedError(
                f"{type(self.collator).__name__} puts the examples or their tokens into another order, so the {what} "
                "cannot be found in its batches; use a collator that keeps the order, such as DataCollatorForSeq2Seq "
                "(a sampler may sort)"
            )
        return torch.from_numpy(found)

    def _exchange(
        self,
        item: Any,
        checksum: _Checksum,
        sent: list[tuple[np.ndarray, np.ndarray]],
        scored: list[tuple[np.ndarray, np.ndarray]],
    ) -> Any:
        if isinstance(item, Mapping):
            codes, bits = self._read(item)
            if self.scores is not None:
                scored.append((codes, self.log_probs(item).view(np.int32).astype(np.int64)))
            checksum.add(codes)
            if self.strategies.logged_spans:
                sent.append((codes, bits))
            return {**item, "labels": _like(item["labels"], codes)}
        return [self._exchange(example, checksum, sent, scored) for example in item]

    def log_probs(self, example: Mapping[str, Any]) -> np.ndarray:
        """What the reference in the folder of scores says of the tokens of one example, float32 `[T]`.

        Raises:
            WITConfigError: if there are no complete scores in the folder.
            BadExampleError: if there are none of a document.
        """
        from wit_plugins.tokens.reference_scores import scored_documents

        assert self.scores is not None
        read = self.reader(example)
        found = np.zeros(len(read.roles), dtype=np.float32)
        for document in scored_documents(read):
            found[document.place] = self.scores(document)
        return found

    def codes(self, example: Mapping[str, Any]) -> np.ndarray:
        """The codes of one example, int64 `[T]`, from its `input_ids`, `labels` and document boundaries."""
        return self._read(example)[0]

    def _read(self, example: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """The codes of one example, and the logged spans that its tokens are in, as bits: int64 `[T]` both."""
        read = self.reader(example)
        weights, logged = np.zeros(len(read.roles), dtype=np.float32), self.strategies.logged_spans
        bits = np.zeros(len(read.roles) if logged else 0, dtype=np.int64)
        for piece, document in self._documents(read, example):
            weights[piece] = self.strategies.static_weights(**document)
            if logged:
                bits[piece] = to_bits(self.strategies.find_spans(**document), logged, len(read.roles[piece]))
            if self._locating:
                own = read.roles if read.placeholders is None else np.maximum(read.roles, read.placeholders)
                self._check_whole(own[piece])
        if logged:
            bits |= to_bits(self._groups(read), logged, len(bits))
        labelled = read.labels != IGNORE_INDEX
        if read.data_weights is None:
            return encode(read.targets, read.roles, weights, labelled, None, read.placeholders), bits
        if (read.data_weights < 0).any() and not self.strategies.needs.replaces_nll:
            raise BadExampleError(
                "weights in the data are below 0, which only the strategy unlikelihood reads; name it, or tokenise the "
                "data again without such weights"
            )
        # What weighs 0 in the data is left out as what the framework masks is: not trained on, counted or reported.
        left_out = (read.data_weights == 0) & (read.roles != NEITHER)
        roles = np.where(left_out, NEITHER, read.roles).astype(np.uint8)
        weights = multiplied(weights, read.data_weights, "those that stand in the data")
        return encode(read.targets, roles, weights, labelled & ~left_out, left_out, read.placeholders), bits

    def explain(self, example: Mapping[str, Any]) -> Explained:
        """Where the weights of one example come from, for the preview."""
        explained = Explained(self.codes(example))
        read = self.reader(example)
        if read.data_weights is not None and (read.groups is None or (read.data_weights != 1).any()):
            explained.sources[DATA] = read.data_weights
        elif len(self.strategies.options_by_name) == 1:  # WIT alone: its weights are the codes'
            explained.sources["wit"] = decode(torch.from_numpy(explained.codes))[2].numpy()
            return explained
        names = self.strategies.logged_spans
        explained.spans = {names.get(name, name): mask for name, mask in self.find_spans(example).items()}
        for piece, document in self._documents(read, example):
            for name, own in self.strategies.static_factors(**document).items():
                explained.sources.setdefault(name, np.ones(len(read.roles), dtype=np.float32))[piece] = own
        return explained

    def find_spans(self, example: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The parts of one example that strategies look for, by name: bool `[T]`, only where a token is predicted."""
        read = self.reader(example)
        found: dict[str, np.ndarray] = {}
        for piece, document in self._documents(read, example):
            for name, mask in self.strategies.find_spans(**document).items():
                found.setdefault(name, np.zeros(len(read.roles), dtype=bool))[piece] = np.asarray(mask, dtype=bool) & (
                    read.roles[piece] != NEITHER
                )
        return found | {name: mask & (read.roles != NEITHER) for name, mask in self._groups(read).items()}

    def _groups(self, read: ReadExample) -> dict[str, np.ndarray]:
        """The groups of an example's tokens, as spans: bool `[T]` by name."""
        groups = self.strategies.groups
        return {} if groups is None or read.groups is None else groups.masks(read.groups)

    def _documents(self, read: ReadExample, example: Mapping[str, Any]) -> Iterator[tuple[slice, dict[str, Any]]]:
        """Each document of an example, so that a packed row gives the same weights as its documents on their own."""
        example = self.reader.view(example)
        if read.data_weights is not None:
            example = {**example, "labels": read.labels}
        if self.strategies.needs.by_role_alone and not self._locating:
            yield slice(0, len(read.roles)), self._document(read.targets, read.roles, example)
            return
        for start, end in zip(read.starts, [*read.starts[1:], len(read.roles)], strict=True):
            piece = slice(start, end)
            if read.roles[piece].any():  # padding is none
                yield piece, self._document(read.targets[piece], read.roles[piece], example)

    def _document(self, input_ids: np.ndarray, roles: np.ndarray, example: Mapping[str, Any]) -> dict[str, Any]:
        """What is known of one document."""
        known: dict[str, Any] = {"input_ids": input_ids, "roles": roles, "example": example}
        if self._token_text is not None:
            known["tokenizer"] = self._token_text.tokenizer
            if self._reading.keys() & {"text", "offsets"}:
                known["text"], known["offsets"] = self._token_text.decode(input_ids.tolist())
        return known

    def _check_whole(self, roles: np.ndarray) -> None:
        """Documents are told apart behind the collator by their first tokens, which alone have no role."""
        if np.count_nonzero(np.diff(np.flatnonzero(roles)) > 1):
            raise BadExampleError(
                "attention_mask is 0 in the middle of a document, which "
                f"{', '.join(self._locating)} (strategies) would take for two; take these tokens out of the example"
            )


class _Checksum:
    """Count and sum (modulo 2^64) of the codes with a weight: equal before and after an honest collator."""

    def __init__(self, count: int = 0, total: int = 0):
        self.count, self.total, self.examples = count, total, 0

    def add(self, codes: np.ndarray) -> None:
        self.examples += 1
        kept = weighing(codes)
        self.count += kept.size
        self.total = (self.total + int(kept.sum(dtype=np.int64))) % (1 << 64)

    @classmethod
    def of(cls, codes: np.ndarray) -> _Checksum:
        checksum = cls()
        checksum.add(codes)
        return checksum

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Checksum) and (self.count, self.total) == (other.count, other.total)


def _flat(features: list[Any]) -> list[Mapping[str, Any]]:
    return [e for item in features for e in ([item] if isinstance(item, Mapping) else _flat(item))]


def _like(labels: Any, codes: np.ndarray) -> Any:
    if isinstance(labels, torch.Tensor):
        return torch.from_numpy(codes).reshape(labels.shape)
    if isinstance(labels, np.ndarray):
        return codes.reshape(labels.shape)
    return codes.tolist()
