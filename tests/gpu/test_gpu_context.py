"""Rows that are cut over two and four GPUs (`cp_size`, `sp_size`), with the attention kernels of GPUs, over NCCL.

The cases and what is asked of them are those of `tests/ranks`, where a CPU's kernel stands for the GPU's.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl.trainer", reason="TRL is not installed", exc_type=ImportError)
from context_cases import CASES, check_case, launch
from gpukit import DEVICE, ON_GPU, skip_if

# By what rows are cut, ranks, over how many of them a row is cut.
LAYOUTS = {
    "two": ("cp_size", 2, 2),
    "four": ("cp_size", 4, 4),
    "two, of two rows": ("cp_size", 4, 2),
    "two, by DeepSpeed": ("sp_size", 2, 2),
    "two, of two rows, by DeepSpeed": ("sp_size", 4, 2),
}
# A CPU shows that all of it starts, with a case of either trainer; `nox -s ranks` has the others there.
CHOSEN = CASES if ON_GPU else {name: CASES[name] for name in ("TRL", "transformers")}


@pytest.mark.parametrize("layout", list(LAYOUTS) if ON_GPU else ["two"])
def test_cut_rows_take_the_step_of_whole_ones(device: str, tmp_path: Path, layout: str) -> None:
    way, ranks, parts = LAYOUTS[layout]
    skip_if("DeepSpeed is not installed" if way == "sp_size" and find_spec("deepspeed") is None else None)
    few = ON_GPU and torch.cuda.device_count() < ranks
    skip_if(f"needs {ranks} GPUs; here is {torch.cuda.device_count()}" if few else None)
    output = launch(tmp_path, ranks, parts, DEVICE, CHOSEN, way)
    for index, case in enumerate(CHOSEN.values()):
        result = tmp_path / f"case-{index}.json"
        assert result.is_file(), output[-6000:]
        check_case(case, ranks, parts, json.loads(result.read_text()), torch.load(tmp_path / f"case-{index}.pt"))
