"""`wit verify` on real `axolotl train` runs: one process, and packed with LoRA on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from axokit import LEARNING_RATE, Workplace, train, train_on_ranks

from wit_plugins.cli import main
from wit_plugins.verify.recompute import verify
from wit_plugins.verify.record import read_record

WIT = {"prompt_weight": 0.2, "response_weight": 0.8, "verify": 3}
PACKED = {"sample_packing": True, "micro_batch_size": 1, "pad_to_sequence_len": True}
LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "v_proj", "down_proj"],
    **{f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")},
}
CASES: dict[str, dict[str, Any]] = {
    "padded": {"micro_batch_size": 2, "gradient_accumulation_steps": 2},
    "packed with LoRA on two ranks": {**PACKED, **LORA, "sequence_len": 64, "plugins": ["axokit.UseCPU"]},
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_what_the_formula_gives(tmp_path: Path, name: str) -> None:
    assert LEARNING_RATE > 0.01  # so that the steps begin from different parameters
    case = dict(CASES[name])
    workplace, ranks = Workplace(tmp_path), 2 if "two ranks" in name else 1
    plugins = [*case.pop("plugins", []), "axokit.Recorder", "wit_axolotl.WITPlugin"]
    path = workplace.config("chat", count=24, wit=WIT, plugins=plugins, num_epochs=3, **case)
    if ranks > 1:
        train_on_ranks(path)
    else:
        train(path)
    run = path.parent / "out"
    verdict = verify(read_record(run))
    assert (verdict.problems, verdict.not_recomputed, verdict.missing) == ([], [], [])
    assert [line.rank for line in verdict.lines] == [*map(str, range(ranks)), "log"] * 3
    assert not verdict.differs, verdict.lines
    assert main(["verify", str(run)]) == 0
