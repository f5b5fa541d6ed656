"""Other people's patches beside ours, each by itself; `nox -s patches` has them in pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
from patchcases import (
    ADAPTERS,
    MEMORY,
    OPTIMIZERS,
    Average,
    assert_is_the_formulas,
    assert_is_the_trainers_own,
    make,
)
from support import all_relative_error
from wit_trl import WITCallback

from wit_plugins import WITConfigError


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter(tmp_path: Path, adapter: str) -> None:
    assert_is_the_formulas(tmp_path, adapter)


@pytest.mark.parametrize("memory", MEMORY)
def test_checkpointing(tmp_path: Path, memory: str) -> None:
    assert_is_the_formulas(tmp_path, "LoRA", **MEMORY[memory])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer(tmp_path: Path, optimizer: str) -> None:
    assert_is_the_trainers_own(tmp_path, **OPTIMIZERS[optimizer])


def test_noise_in_the_embeddings(tmp_path: Path) -> None:
    """NEFTune draws the same noise, whatever our checks of the first batch compute."""
    assert_is_the_trainers_own(tmp_path, neftune_noise_alpha=5.0)


def test_an_average_of_the_model(tmp_path: Path) -> None:
    """A copy that is made while the weights are attached averages what is trained."""
    own, weighted = assert_is_the_trainers_own(tmp_path, callback=Average)
    before, after = dict(own.named_parameters()), dict(weighted.named_parameters())
    assert all_relative_error(after, before) < 1e-5


def test_label_smoothing_is_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(WITConfigError, match="label_smoothing_factor"):
        WITCallback(trainer, prompt_weight=0.2)
