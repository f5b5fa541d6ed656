"""10,000 steps in LLaMA-Factory, and a run that is resumed in its middle. `nox -s long`."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lfkit import Recorder, place, run
from llamafactory.train.tuner import run_exp
from longkit import STEPS, Sums, Watch
from wit_llamafactory import WITCallback

WEIGHTS = {"prompt_weight": 0.2, "response_weight": 0.8}


def test_nothing_grows_and_sums_are_exact_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums, watch, recorder = Sums(monkeypatch), Watch(), Recorder()
    settings: dict[str, Any] = {"max_steps": STEPS, "logging_steps": STEPS, "learning_rate": 1e-4, "bf16": True}
    config = place(tmp_path).config(per_device_train_batch_size=2, **settings)
    with mock.patch.dict(os.environ):
        run_exp(config, callbacks=[watch, recorder, WITCallback(**WEIGHTS)])
    assert recorder.state.global_step == STEPS
    watch.check(tmp_path / "out")
    (logged,) = [entry for entry in recorder.state.log_history if "loss" in entry]
    sums.check(logged, STEPS)


def test_a_run_that_is_resumed_in_its_middle_is_the_same(tmp_path: Path) -> None:
    """Bit by bit, packed: parameters, and every log."""
    workplace = place(tmp_path, count=24)
    adam = {"optim": "adamw_torch", "lr_scheduler_type": "cosine", "learning_rate": 0.01, "num_train_epochs": 4.0}
    settings = {"packing": True, "per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 3, **adam}
    whole = run(workplace.config(**settings), WEIGHTS)
    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    again = {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": checkpoint}
    resumed = run(workplace.config(**settings, **again), WEIGHTS)
    assert len(whole.logged()) > 6
    assert resumed.logged() == whole.logged()
    assert all(torch.equal(resumed.after[name], whole.after[name]) for name in whole.after)
