"""What a rank runs of the table in LLaMA-Factory: its own command's `run_exp`, on a configuration and its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rankskit
from lfkit import LEARNING_RATE, Place
from llamafactory.train.tuner import run_exp
from wit_llamafactory import WITCallback

DOCUMENTS = 16


def settings(workplace: Path, case: dict[str, Any], parallel: str, ranks: int, folder: Path) -> dict[str, Any]:
    """LLaMA-Factory's configuration of a case, without the weights: all documents are one step."""
    accumulate = case.get("accumulate", 1)
    changes: dict[str, Any] = {
        **rankskit.parallel_arguments(parallel),
        "model_name_or_path": str(workplace / ("tied" if case.get("tied") else "model")),
        "dataset": "silent" if case.get("silent") else "train",
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": DOCUMENTS // (ranks * accumulate),
        "gradient_accumulation_steps": accumulate,
        "learning_rate": LEARNING_RATE,
        **case.get("args", {}),
    }
    if case.get("packed"):
        changes |= {"neat_packing": True, "cutoff_len": 256, "per_device_train_batch_size": 1}
        changes["gradient_accumulation_steps"] = rankskit.PACKED_ROWS // ranks
    if case.get("lora"):
        changes |= {"finetuning_type": "lora", "adapter_name_or_path": str(workplace / "adapter")}
    if case.get("evaluated"):
        changes |= {"eval_dataset": "held_out", "eval_strategy": "epoch", "per_device_eval_batch_size": 1}
    return Place(workplace).config(**changes)


def run(workplace: Path, case: dict[str, Any], parallel: str, folder: Path) -> None:
    weights = WITCallback(*rankskit.WEIGHTS, **case.get("wit", {}))
    run_exp(settings(workplace, case, parallel, rankskit.world_size(), folder), callbacks=[weights])
    trainer: Any = weights.trainer
    assert len(trainer.train_dataset) == (rankskit.PACKED_ROWS if case.get("packed") else DOCUMENTS)
    rankskit.keep(trainer, parallel, folder)
