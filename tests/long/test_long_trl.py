"""10,000 steps in TRL: nothing grows, and the sums over all of them are exact in bfloat16. `nox -s long`."""

from pathlib import Path
from typing import Any

import torch
from longkit import STEPS, Sums, Watch
from support import llama
from trlkit import dataset, sft_trainer
from wit_trl import WITCallback


def long_run(folder: Path, **args: Any) -> Any:
    watch = Watch()
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-4, **args}
    trainer = sft_trainer(folder, dataset("tokenised", 16), **settings)
    trainer.add_callback(WITCallback(trainer, prompt_weight=0.2, response_weight=0.8))
    trainer.add_callback(watch)
    trainer.train()
    return trainer, watch


def test_nothing_grows(tmp_path: Path) -> None:
    trainer, watch = long_run(tmp_path, logging_steps=10)
    assert trainer.state.global_step == STEPS
    watch.check(tmp_path)


def test_sums_of_the_whole_run_in_bfloat16(tmp_path: Path, monkeypatch: Any) -> None:
    sums = Sums(monkeypatch)
    trainer, _ = long_run(tmp_path, model=llama(torch.bfloat16), bf16=True, logging_steps=STEPS)
    (logged,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    sums.check(logged, STEPS)
