"""What a rank runs of the table in TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rankskit
from datasets import Dataset
from trl import SFTConfig
from trlkit import dataset, sft_trainer
from wit_trl import WITCallback, prepare_dataset
from words import tokenizer


def documents_of(case: dict[str, Any]) -> Dataset:
    """Eight documents of different lengths, and what each of them weighs."""
    rows = dataset("tokenised")
    return rows.add_column("weight", [float(not case.get("silent") or index == 0) for index in range(len(rows))])


def run(workplace: Path, case: dict[str, Any], parallel: str, folder: Path) -> None:
    ranks, accumulate = rankskit.world_size(), case.get("accumulate", 1)
    arguments: dict[str, Any] = {"max_steps": 1, "gradient_accumulation_steps": accumulate, **case.get("args", {})}
    arguments |= rankskit.parallel_arguments(parallel)
    # The first arguments that are made decide how the processes talk to each other.
    settings = SFTConfig(str(folder), bf16=False, **rankskit.parallel_arguments(parallel))
    data = prepare_dataset(documents_of(case), tokenizer(), settings)
    arguments["per_device_train_batch_size"] = max(1, len(data) // (ranks * accumulate))
    if case.get("packed"):
        arguments |= {"packing": True, "max_length": 16}
        arguments |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rankskit.PACKED_ROWS // ranks}
    more: dict[str, Any] = {}
    if case.get("evaluated"):
        arguments |= {"eval_strategy": "epoch", "per_device_eval_batch_size": 1}
        more["eval_dataset"] = dataset("tokenised", rankskit.HELD_OUT, seed=9)
    trainer = sft_trainer(folder, data, rankskit.fresh_model(workplace, case), more, **arguments)
    assert len(trainer.train_dataset) == (rankskit.PACKED_ROWS if case.get("packed") else len(data))
    weights = dict(zip(("prompt_weight", "response_weight"), rankskit.WEIGHTS, strict=True))
    trainer.add_callback(WITCallback(trainer, **weights, **case.get("wit", {})))
    trainer.train()
    rankskit.keep(trainer, parallel, folder)
