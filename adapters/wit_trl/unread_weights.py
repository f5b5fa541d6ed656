"""Refuses a trainer whose data has weights that nobody has read.

TRL tokenises, and drops the columns, before anything is attached. So each `SFTTrainer` that is made after this package
was imported keeps its datasets as they were before. `check` looks at these datasets when weights are attached.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from wit_plugins import WITConfig, WITConfigError
from wit_plugins.data_weights.reader import DataWeights, UnreadWeightWarning
from wit_trl.row_weights import MARK, found_weights, says_something

NOTES = "_wit_datasets"  # on a trainer: its datasets, each with TRL's name for it, which two of them may share
_WAY_OUT = (
    "prepare it before the trainer is made: dataset = wit_trl.prepare_dataset(dataset, tokenizer, args), with the same "
    "settings; or leave the weights out: message_weight_keys=[], sample_weight_key=None"
)


class Look:
    """Looks at the rows of a stream as they come by: no row may be lost, and only the rows can tell. It pickles."""

    def __init__(self, name: str) -> None:
        self.name, self.data = name, None

    data: DataWeights | None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Check the row. Returns `{}`, so that `datasets.map` leaves the row as it is.

        Raises:
            WITConfigError: if weights were attached that do not read the row's, or not as it was prepared.
        """
        if self.data is not None:
            if row.get(MARK) is not None:
                _check_marks({row[MARK]}, self.data, self.name)
            elif says_something(row, self.data):
                raise _unread(["its rows"], self.name)
        return {}


def note(trainer: Any, name: str, dataset: Any) -> Any:
    """Keep a dataset as it was before TRL truncates and packs it. Returns the dataset that TRL goes on with."""
    kept = dataset
    if isinstance(dataset, IterableDataset) and dataset.features is None:
        kept = Look(name)
        dataset = dataset.map(kept)
    vars(trainer).setdefault(NOTES, []).append((name, kept))
    return dataset


def check(trainer: Any, config: WITConfig) -> None:
    """Refuse a trainer whose data has weights that are not in its labels.

    Raises:
        WITConfigError: naming the dataset, where the weights stand, and the way out.
    """
    data = DataWeights(config, trainer.processing_class)
    if not data.active:
        return
    if trainer._is_vision_dataset:
        _check_no_weights(trainer, data)
        return
    noted = vars(trainer).get(NOTES)
    for name, dataset in _as_they_are(trainer) if noted is None else noted:
        if isinstance(dataset, Look):
            dataset.data = data
        else:
            _check(dataset, data, name)


def _as_they_are(trainer: Any) -> list[tuple[str, Any]]:
    """The datasets of a trainer that was made before this package was imported, or that has TRL prepare nothing.

    Raises:
        WITConfigError: if TRL kept what it should have dropped.
    """
    evaluation = trainer.eval_dataset
    by_name = evaluation if isinstance(evaluation, dict) else {"eval": evaluation}
    named = [("train", trainer.train_dataset), *by_name.items()]
    named = [(name, each) for name, each in named if isinstance(each, (Dataset, IterableDataset))]
    args = trainer.args
    if trainer._skip_prepare_dataset:
        return [(name, each) for name, each in named if each.column_names is not None]
    for name, dataset in named:
        columns = dataset.column_names
        if columns is None or set(columns) <= {"input_ids", "labels", "seq_lengths"}:
            warnings.warn(
                f"the trainer was made before wit_trl was imported, and it cannot be seen any more whether weights "
                f"stood in the {name} dataset; import wit_trl first",
                UnreadWeightWarning,
                stacklevel=5,
            )
        elif MARK in columns and args.max_length is not None:
            raise WITConfigError(
                f"the trainer was made before wit_trl was imported, so that of the prepared {name} dataset TRL has not "
                "dropped the examples of which no response is left; import wit_trl first"
            )
    return [(name, each) for name, each in named if each.column_names is not None]


def _check_no_weights(trainer: Any, data: DataWeights) -> None:
    """Refuse weights in data with images, which TRL tokenises in its collator, where nobody reads them.

    Raises:
        WITConfigError: naming the dataset and where the weights stand.
    """
    for name, dataset in _as_they_are(trainer):
        if found := found_weights(dataset, data):
            raise WITConfigError(
                f"weights stand in the {name} dataset ({', '.join(found)}), which has images: TRL tokenises it in its "
                "collator, where weights of messages, parts and samples are not read; leave them out: "
                "message_weight_keys=[], sample_weight_key=None, and no strategy that reads rows; the strategy spans "
                "weighs parts of the text"
            )


def _check(dataset: Any, data: DataWeights, name: str) -> None:
    if MARK in (dataset.column_names or ()):
        if isinstance(dataset, Dataset):  # a stream's documents say it themselves
            _check_marks(set(dataset.unique(MARK)), data, name)
        return
    found = found_weights(dataset, data)
    if found:
        raise _unread(found, name)


def _check_marks(marks: set[int | None], data: DataWeights, name: str) -> None:
    if marks - {data.fingerprint}:
        raise WITConfigError(
            f"the {name} dataset was prepared with other settings than these (message_weight_keys, sample_weight_key, "
            "groups, or strategies that read raw examples); call wit_trl.prepare_dataset with the same settings"
        )


def _unread(found: list[str], name: str) -> WITConfigError:
    return WITConfigError(
        f"weights stand in the {name} dataset ({', '.join(found)}), and TRL has tokenised it without them; {_WAY_OUT}"
    )
