"""Models that also see or hear: what is refused with them, and trainers whose collator tokenises.

Nothing of this module is imported for a model that reads text alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from wit_plugins.config import WITConfig
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.data_weights.reader import DataWeights
from wit_plugins.errors import WITConfigError
from wit_plugins.tokens.batch_collator import BatchCollator, CollatedExamples
from wit_plugins.tokens.collator import WeightedCollator
from wit_plugins.tokens.example_reader import ExampleReader
from wit_plugins.training.adapter import TrainerAdapter
from wit_plugins.training.dataset_check import can_be_read_again
from wit_plugins.training.parallelism import cp_size, sp_size

if TYPE_CHECKING:
    from transformers import Trainer

_WHY = "the model also sees or hears"


def prepare(
    trainer: Trainer, adapter: TrainerAdapter, config: WITConfig, strategies: ActiveStrategies, reader: ExampleReader
) -> tuple[Any, ExampleReader, Any]:
    """How the examples of such a model are read: with which collator and reader, and the training examples as read.

    Args:
        trainer (`transformers.Trainer`): before anything of it is changed.
        adapter ([`TrainerAdapter`]): what the trainer's framework says of it.
        config ([`WITConfig`]): the settings.
        strategies ([`ActiveStrategies`]): who gives the weights.
        reader ([`ExampleReader`]): reads examples that are tokenised.

    Raises:
        WITConfigError: if something was asked for that is not known to be exact with such a model.
    """
    _check(trainer, config, strategies)
    dataset = getattr(trainer, "train_dataset", None)
    if not _tokenises_late(trainer, adapter):
        return WeightedCollator, reader, dataset
    _check_late(strategies)
    look = _NoWeights(config)
    for name in ("train_dataset", "eval_dataset"):
        look.check(name, getattr(trainer, name, None))
    # A row of a batch is as the collator made it: no columns to leave out, and nothing for the framework to view.
    reader = replace(reader, columns=None, own_view=None, cuts_documents=False, needs_prepared=False)
    make = functools.partial(BatchCollator, look=look)
    if dataset is None or not can_be_read_again(dataset):
        return make, reader, dataset
    return make, reader, CollatedExamples(dataset, trainer.data_collator)


class _NoWeights:
    """Refuses weights that stand in the data, which nobody reads where the framework tokenises in its collator.

    A dataset's columns are looked at before training, and each row as it comes by. It pickles.

    Args:
        config ([`WITConfig`]): says which keys are read.
    """

    def __init__(self, config: WITConfig) -> None:
        self.data = DataWeights(config, None)

    def check(self, name: str, dataset: Any) -> None:
        """Raise [`WITConfigError`] if the features of a dataset, or of several by name, name weights."""
        if isinstance(dataset, Mapping):
            for each, own in dataset.items():
                self.check(f"{name} {each}", own)
            return
        features = getattr(dataset, "features", None)
        if self.data.active and features:
            found, _ = self.data.weighted_columns(features, list(features))
            found += [f"column {self.data.sample_key}"] if self.data.sample_key in features else []
            if found:
                raise self._refusal(f"{name} ({', '.join(found)})")

    def __call__(self, example: Mapping[str, Any]) -> None:
        """Raise [`WITConfigError`] if an example says a weight."""
        lists = [value for value in example.values() if isinstance(value, list)]
        messages = [each for value in lists for each in value if isinstance(each, Mapping)]
        if self.data.active and self.data.says_something(example, messages):
            raise self._refusal("an example of the data")

    @staticmethod
    def _refusal(where: str) -> WITConfigError:
        return WITConfigError(
            f"weights stand in {where}, which is tokenised in the collator, where weights of messages, parts and "
            "samples are not read; leave them out: message_weight_keys: [], sample_weight_key: null; the strategy "
            "spans weighs parts of the text"
        )


def _tokenises_late(trainer: Any, adapter: TrainerAdapter) -> bool:
    """Whether the examples become ids in the collator: as the adapter says, or because the first one has none."""
    late = adapter.tokenises_in_collator(trainer)
    if late is not None:
        return late
    for dataset in (getattr(trainer, "train_dataset", None), getattr(trainer, "eval_dataset", None)):
        if dataset is not None and can_be_read_again(dataset) and len(dataset):
            first = dataset[0]
            return isinstance(first, Mapping) and "input_ids" not in first
    return False


def _check(trainer: Any, config: WITConfig, strategies: ActiveStrategies) -> None:
    needs = strategies.needs
    split = {
        "cp_size": cp_size(trainer.accelerator),
        "sp_size": sp_size(trainer.accelerator),
        "tp_size": trainer.get_tp_size() if hasattr(trainer, "get_tp_size") else 1,
    }
    for name, parts in split.items():
        if parts > 1:
            raise WITConfigError(
                f"{name} = {parts}: {_WHY}, and its rows or its head are split over ranks, which is not shown to be "
                "exact with images, video or audio; set it to 1"
            )
    if config.verify:
        raise WITConfigError(
            f"verify = {config.verify}: {_WHY}, and what `wit verify` keeps of a step are its texts; set verify to 0"
        )
    refused = {
        "reads scores from a folder, which are found by a document's ids, and ids do not say which image stands beside "
        "them": needs.references if needs.reference is not None else (),
        "loads a second model, which is done for models that read text alone": (
            needs.anchors if needs.anchor_model is not None else ()
        ),
        "looks at the attention of the last layer, which is found in models that read text alone": (
            needs.prompt_attention
        ),
    }
    for what, names in refused.items():
        if names:
            raise WITConfigError(f"strategies: {', '.join(names)} {what}; {_WHY}: take it out")


def _check_late(strategies: ActiveStrategies) -> None:
    """Strategies that read what stands in the data beside the text."""
    groups = strategies.groups
    names = [*strategies.reading_raw, *([] if groups is None else [groups.strategy.name])]
    if names:
        raise WITConfigError(
            f"strategies: {', '.join(names)}: reads columns of the examples, or weighs groups of them; the framework "
            "tokenises these examples in its collator, where the columns are gone: take it out"
        )
