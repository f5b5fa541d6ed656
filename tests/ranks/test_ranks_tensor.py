"""Tensor parallelism (`tp_plan="auto"`) on two and four ranks: the step is one process's, and the head stays split.

On the CPU over gloo, through TRL's trainer and transformers' own. The loss, the gradients (as the step of plain SGD)
and the roles' losses in the logs are those of the formula, in float64 and of the whole model; with strategies that look
at the model's probabilities, those of one process. Nothing as large as the head goes through a collective.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks_tensor import assert_step_of_one_process
from support import subprocess_env

CASES: dict[str, dict[str, Any]] = {
    "full": {"evaluate": True},
    "accumulated": {"accumulate": 2},
    "tied": {"tied": True},
    "weight_sum": {"settings": {"normalization": "weight_sum"}},
    "padding-free": {"args": {"padding_free": True, "max_length": None}},
    "packed": {"args": {"packing": True, "max_length": 16}},
    "a soft cap": {"model": "gemma2"},
    "a bias": {"model": "phi"},
    "logits": {"settings": {"loss_impl": "logits"}},
    "transformers' trainer": {"trainer": "transformers", "evaluate": True},
    "transformers' trainer, accumulated": {"trainer": "transformers", "accumulate": 4, "tied": True},
    "dynamic weights": {"settings": {"strategies": {"dft": {}}}},
    "entropies": {"settings": {"strategies": {"eaft": {}}}},
    "drawn targets": {"settings": {"strategies": {"otr": {"samples": 4, "beta": 0.1, "temperature": 1.0}}}},
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder in which all cases have been run on so many ranks, once."""
    folders: dict[int, Path] = {}

    def of(ranks: int) -> Path:
        if ranks not in folders:
            folders[ranks] = folder = tmp_path_factory.mktemp(f"tensor-{ranks}")
            script = Path(__file__).parents[1] / "kits" / "ranks_tensor.py"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            environment = subprocess_env()
            done = subprocess.run(
                [*command, str(script), str(folder), json.dumps(list(CASES.values()))],
                env=environment,
                cwd=folder,
                capture_output=True,
                text=True,
            )
            (folder / "output").write_text(done.stdout + done.stderr)
        return folders[ranks]

    return of


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_split_model_takes_the_step_of_one_process(launched: Any, tmp_path: Path, ranks: int, case: str) -> None:
    folder, index = launched(ranks), list(CASES).index(case)
    assert (folder / f"case-{index}.json").is_file(), (folder / "output").read_text()[-6000:]
    assert_step_of_one_process(folder, index, CASES[case], tmp_path)
