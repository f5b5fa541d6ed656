"""Datasets for TRL's shapes."""

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
    rows = []
    for doc in docs:
        hole = length - len(doc.input_ids)
        columns = [("input_ids", doc.input_ids, 0), ("labels", doc.labels, -100)]
        columns += [("attention_mask", [1] * len(doc.input_ids), 0)] if mask else []
        rows.append({k: [fill] * hole + v if left else v + [fill] * hole for k, v, fill in columns})
    return Dataset.from_list(rows)
