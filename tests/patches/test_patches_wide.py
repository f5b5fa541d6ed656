"""Two of other people's patches at a time, beside ours. Not in `make test`, which has each by itself."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from patchcases import ADAPTERS, MEMORY, OPTIMIZERS, Average, assert_is_the_formulas, assert_is_the_trainers_own

LAYOUTS = {"padded": {}, "packed": {"packing": True, "max_length": 64}}
PAIRS = list(itertools.product(ADAPTERS, MEMORY, LAYOUTS))


@pytest.mark.parametrize(("adapter", "memory", "layout"), PAIRS, ids=[", ".join(pair) for pair in PAIRS])
def test_an_adapter_and_checkpointing(tmp_path: Path, adapter: str, memory: str, layout: str) -> None:
    assert_is_the_formulas(tmp_path, adapter, **MEMORY[memory], **LAYOUTS[layout])


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_adapter_and_an_optimizer(tmp_path: Path, adapter: str, optimizer: str) -> None:
    assert_is_the_trainers_own(tmp_path, adapter, **OPTIMIZERS[optimizer])


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("memory", MEMORY)
def test_an_adapter_checkpointing_and_noise(tmp_path: Path, adapter: str, memory: str) -> None:
    assert_is_the_trainers_own(tmp_path, adapter, neftune_noise_alpha=5.0, **MEMORY[memory])


@pytest.mark.parametrize("adapter", ["full", "LoRA"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_average_and_an_optimizer(tmp_path: Path, adapter: str, optimizer: str) -> None:
    assert_is_the_trainers_own(tmp_path, adapter, callback=Average, **OPTIMIZERS[optimizer])


@pytest.mark.parametrize("adapter", ["full", "LoRA", "DoRA"])
def test_an_adapter_and_a_compiled_model(tmp_path: Path, adapter: str) -> None:
    torch._dynamo.reset()
    assert_is_the_formulas(tmp_path, adapter, torch_compile=True)


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_lion_32bit", "lion_8bit"])
def test_an_optimizer_of_bitsandbytes(tmp_path: Path, optim: str) -> None:
    """On a CPU as far as it goes: what cannot run there without weights cannot with them."""
    pytest.importorskip("bitsandbytes")
    assert_is_the_trainers_own(tmp_path, optim=optim)
