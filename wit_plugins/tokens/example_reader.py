"""How a trainer's examples are read: the framework's own view of a row, and the rows that are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from wit_plugins.errors import BadExampleError, WITConfigError
from wit_plugins.tokens.codes import MAX_VOCAB_SIZE
from wit_plugins.tokens.roles import IGNORE_INDEX, NEITHER, example_roles, token_array
from wit_plugins.tokens.weighted_labels import read_prepared

if TYPE_CHECKING:
    from wit_plugins.tokens.placeholders import Placeholders

_SEEING_OR_HEARING = ("vision_config", "audio_config", "vq_config")  # parts of a model's configuration
_SHOWN_TOKENS = 16  # of a refused example, in the message
_PADDING_RUN = 2  # one masked pad id may be an end of text; two in a row are padding


class ReadExample(NamedTuple):
    """One example of `T` tokens, as it was read.

    Attributes:
        targets (`np.ndarray`): int64 `[T]`, see [`example_roles`].
        roles (`np.ndarray`): uint8 `[T]`.
        starts (`np.ndarray`): int64, the first token of each document.
        labels (`np.ndarray`): int64 `[T]`, the framework's own.
        data_weights (`np.ndarray | None`): float32 `[T]`, the weights in the data; `None` if there are none.
        input_ids (`np.ndarray`): int64 `[T]`, what the model reads.
        groups (`np.ndarray | None`): uint8 `[T]`, the number of each token's group; `None` if there are no groups.
        placeholders (`np.ndarray | None`): uint8 `[T]`, what tokens without role and label stand for, see
            `wit_plugins.tokens.placeholders`; `None` in a model that reads text alone.
    """

    targets: np.ndarray
    roles: np.ndarray
    starts: np.ndarray
    labels: np.ndarray
    data_weights: np.ndarray | None
    input_ids: np.ndarray
    groups: np.ndarray | None = None
    placeholders: np.ndarray | None = None


@dataclass(frozen=True)
class ExampleReader:
    """Reads examples as the trainer trains on them, and refuses rows that no model can be trained on.

    It can be pickled, because data-loader workers read examples too.

    Args:
        vocab_size (`int`): the number of ids that the model can read. Other ids are refused.
        head_size (`int`, *optional*): the number of ids that the model can predict, if they are fewer. Larger ids are
            refused where a token is predicted.
        pad_token_id (`int`, *optional*): the padding id, for rows without `attention_mask`.
        cuts_documents (`bool`): rows begin and end anywhere in a document, so padding may be in a row's middle.
        columns (`frozenset[str]`, *optional*): the columns that the trainer keeps; by default all. Other columns are
            not read, because they never reach training.
        own_view (`Callable`, *optional*): turns an example into the framework's own view of it, see
            [`TrainerAdapter.read_example`].
        fingerprint (`int`, *optional*): the fingerprint of this run's settings for weights in the data, see
            `wit_plugins.tokens.weighted_labels`. Documents that were prepared with other settings are refused.
        needs_prepared (`bool`): whether each document must carry the fingerprint of its preparation.
        needs_groups (`bool`): whether each token must carry its document's group.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): decodes the beginning of a refused example for the message.
            A user can find the example by it, even where a framework has shuffled the rows.
        placeholders ([`Placeholders`], *optional*): which ids stand for pixels or sound; `None` for a model that reads
            text alone.
    """

    vocab_size: int = MAX_VOCAB_SIZE
    head_size: int | None = None
    pad_token_id: int | None = None
    cuts_documents: bool = False
    columns: frozenset[str] | None = None
    own_view: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    fingerprint: int | None = None
    needs_prepared: bool = False
    needs_groups: bool = False
    tokenizer: Any = field(default=None, compare=False, repr=False)
    placeholders: Placeholders | None = None

    def view(self, example: Mapping[str, Any]) -> Mapping[str, Any]:
        """An example as it reaches training: only the columns that the trainer keeps, as the framework reads them."""
        if self.columns is not None:
            example = {name: value for name, value in example.items() if name in self.columns}
        return example if self.own_view is None else self.own_view(example)

    def __call__(self, example: Mapping[str, Any]) -> ReadExample:
        """Read one example.

        Raises:
            BadExampleError: if its columns do not fit each other, hold ids that the model does not have, or hold
                padding that cannot be distinguished from prompt.
            WITConfigError: if its weights were prepared with other settings than this run's.
        """
        example = self.view(example)
        try:
            return self._read(example)
        except BadExampleError as error:
            raise BadExampleError(f"{error}{self._beginning(example)}") from None

    def _beginning(self, example: Mapping[str, Any]) -> str:
        """The first words of a refused example, for the message; empty if they cannot be decoded."""
        if self.tokenizer is None:
            return ""
        first = [int(token) for token in list(example["input_ids"])[:_SHOWN_TOKENS] if isinstance(token, Integral)]
        known = [token for token in first if 0 <= token < self.vocab_size]
        text = str(self.tokenizer.decode(known)).strip() if known else ""
        return f" (the example begins {text!r})" if text else ""

    def _read(self, example: Mapping[str, Any]) -> ReadExample:
        input_ids, labels = token_array(example["input_ids"]), token_array(example["labels"])
        prepared = read_prepared(labels)
        if prepared is not None:
            labels = prepared.labels
        self._check_fingerprints(() if prepared is None else prepared.fingerprints.tolist())
        targets, roles, starts = example_roles({**example, "input_ids": input_ids, "labels": labels})
        kinds = None if self.placeholders is None else self._placeholders(example, input_ids, labels, roles)
        self._check_ids("input_ids", input_ids if kinds is None else np.where(kinds == 0, input_ids, 0))
        self._check_ids("labels", labels)
        self._check_predicted(targets, roles)
        if self.pad_token_id is not None and example.get("attention_mask") is None:
            self._check_padding((input_ids == self.pad_token_id) & (labels == IGNORE_INDEX), starts)
        weights, groups = (None, None) if prepared is None else (prepared.weights, prepared.groups)
        if self.needs_groups and (groups is None or not groups[roles != NEITHER].all()):
            raise WITConfigError(
                "a strategy asks for the group of each sample, but this data was tokenised without groups; have it "
                "tokenised with the same settings (docs/data-weights.md)"
            )
        groups_or_none = groups if self.needs_groups else None
        return ReadExample(targets, roles, starts, labels, weights, input_ids, groups_or_none, kinds)

    def _placeholders(
        self, example: Mapping[str, Any], input_ids: np.ndarray, labels: np.ndarray, roles: np.ndarray
    ) -> np.ndarray:
        """What masked tokens stand for, uint8 `[T]`. Those that stand for something lose their role.

        A placeholder that the framework gives a label is trained on, as the framework would.
        """
        types = example.get("mm_token_type_ids")
        assert self.placeholders is not None
        kinds = self.placeholders(input_ids, None if types is None else token_array(types))
        kinds[labels != IGNORE_INDEX] = 0
        kinds[roles == NEITHER] = 0  # padding, and the first token of a document
        roles[kinds != 0] = NEITHER
        return kinds

    def _check_fingerprints(self, fingerprints: Sequence[int]) -> None:
        if any(fingerprint != self.fingerprint for fingerprint in fingerprints):
            raise WITConfigError(
                "the tokenised data carries weights that were read from it with other settings than this run's "
                "(message_weight_keys, sample_weight_key, groups, strategies that read raw examples, or their code) or "
                "by another version of this package; tokenise it again: delete the cache or the prepared dataset, or "
                "name another folder for it"
            )
        if self.needs_prepared and not fingerprints and not self.cuts_documents:
            raise WITConfigError(
                "a strategy reads the examples as they were before tokenisation (raw_example), but this data was "
                "tokenised without it; have it prepared with the same settings (docs/data-weights.md)"
            )

    def _check_ids(self, column: str, ids: np.ndarray) -> None:
        wrong = (ids < 0) | (ids >= self.vocab_size)
        if column == "labels":
            wrong &= ids != IGNORE_INDEX
        if not wrong.any():
            return
        at = int(np.argmax(wrong))
        masked = f", or {IGNORE_INDEX} where a token is masked" if column == "labels" else ""
        raise BadExampleError(
            f"{column} has {int(ids[at])} at position {at}; the model knows 0 to {self.vocab_size - 1:,}{masked}; "
            "tokenise with the model's own tokenizer, or resize the model's embeddings to the tokenizer's"
        )

    def _check_predicted(self, targets: np.ndarray, roles: np.ndarray) -> None:
        """Refuse a predicted id that the head has no row for. `targets` int64 `[T]`, `roles` uint8 `[T]`."""
        if self.head_size is None:
            return
        wrong = (targets >= self.head_size) & (roles != NEITHER)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise BadExampleError(
                f"input_ids has {int(targets[at])} at position {at}, which the model can read but not predict: its "
                f"head has {self.head_size:,} rows; resize it to the embedding, or leave such tokens out of the data"
            )

    def _check_padding(self, padding: np.ndarray, starts: np.ndarray) -> None:
        """Refuse padding without an attention mask. `padding` is true where a pad id is masked, bool `[T]`."""
        if not padding.any():
            return
        ends = [*starts[1:], len(padding)]
        if self.cuts_documents:
            runs = [_longest_run(padding)]
        else:
            documents = [padding[start:end] for start, end in zip(starts, ends, strict=True)]
            runs = [max(_leading(document), _leading(document[::-1])) for document in documents]
        if max(runs) < _PADDING_RUN:
            return
        raise BadExampleError(
            f"input_ids has {max(runs)} masked pad tokens ({self.pad_token_id}) in a row and no attention_mask that "
            "tells them from prompt, so that they would be trained on; take the padding off (the trainer pads by "
            "itself), or give unpacked examples an attention_mask"
        )


def placeholders_of(model: Any, processor: Callable[[], Any]) -> Placeholders | None:
    """Which ids stand for pixels or sound, for a model that has more than a text model in it; for others `None`.

    Args:
        model (`nn.Module`): the unwrapped model.
        processor (`Callable`): gives the model's processor, or at least its tokenizer.

    Raises:
        WITConfigError: if it cannot be found out.
    """
    config = model.config
    if config.get_text_config() is config and not any(getattr(config, part, None) for part in _SEEING_OR_HEARING):
        return None
    from wit_plugins.tokens.placeholders import find_placeholders

    return find_placeholders(model, processor())


def _leading(flags: np.ndarray) -> int:
    """The number of true flags before the first false one."""
    return int(np.argmin(flags)) if not flags.all() else len(flags)


def _longest_run(flags: np.ndarray) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    return int((edges[1::2] - edges[::2]).max())
