"""`wit verify` on real LLaMA-Factory runs: one process, and packed with LoRA on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lfkit import place, run, train_on_ranks

from wit_plugins.cli import main
from wit_plugins.verify.recompute import verify
from wit_plugins.verify.record import read_record

WIT = {"prompt_weight": 0.2, "response_weight": 0.8, "verify": 3}
LORA = {"finetuning_type": "lora", "lora_target": "q_proj,v_proj,down_proj", "lora_rank": 4, "lora_dropout": 0.0}
ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
CASES: dict[str, dict[str, Any]] = {
    "padded": ACCUMULATED,
    "packed, where documents attend to each other": {**ACCUMULATED, "packing": True, "per_device_train_batch_size": 1},
    "LoRA on two ranks": {**LORA, "per_device_train_batch_size": 4},
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_what_the_formula_gives(tmp_path: Path, name: str) -> None:
    workplace, ranks = place(tmp_path, count=24), 2 if "two ranks" in name else 1
    if ranks > 1:
        config = str(workplace.write(wit=WIT, num_train_epochs=2.0, **CASES[name]))
        train_on_ranks([config], [config])
    else:
        run(workplace.config(num_train_epochs=2.0, **CASES[name]), WIT)
    verdict = verify(read_record(tmp_path / "out"))
    assert (verdict.problems, verdict.not_recomputed, verdict.missing) == ([], [], [])
    assert [line.rank for line in verdict.lines] == [*map(str, range(ranks)), "log"] * 3
    assert not verdict.differs, verdict.lines
    assert main(["verify", str(tmp_path / "out")]) == 0
