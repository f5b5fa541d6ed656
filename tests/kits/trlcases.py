"""Datasets for TRL's shapes."""

import trainkit
import trl
from datasets import Dataset
from packaging.version import Version

TRL = Version(trl.__version__)


def in_one_batch(trainer):
    """However many rows packing made, they are one step."""
    assert len(trainer.train_dataset) <= trainer.args.per_device_train_batch_size
    return trainer


def padded(docs, length, left=False, mask=True):
    """The same documents with padding that is in the dataset already."""
    return Dataset.from_list(trainkit.padded(docs, length, left, mask))
