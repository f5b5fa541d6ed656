"""What the ranks train on, and the reference is computed from."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trlkit import dataset

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
PACKED_ROWS = 4  # that TRL makes of the documents with max_length 16


def documents_of(case: dict[str, Any]) -> Dataset:
    """Eight documents of different lengths; in a `silent` case every second one weighs nothing, as the data says.

    Samplers deal the rows out in turns, so that with two ranks one has no weighted token at all.
    """
    rows = dataset("tokenised")
    return rows.add_column("weight", [float(not case.get("silent") or index % 2 == 0) for index in range(len(rows))])
