"""Axolotl on one, two and four ranks: loss, gradients and the parameters after the step are those of one process.

On the CPU over gloo. Not in `make test`, which has a cross-section (`tests/axolotl/test_axolotl_runs.py`).
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"  # before Axolotl is imported: it reports to its makers otherwise

import pytest
import yaml
from axokit import rows
from rankskit import (
    CASES,
    HELD_OUT,
    RANKS,
    VARIABLES,
    Launches,
    free_port,
    keep_saved,
    rendezvous,
    run_together,
    write_models,
)
from run_axolotl import PACKED, UNPACKED, settings
from support import Document, subprocess_env
from words import tokenizer

TABLE = CASES


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    made = Launches(tmp_path_factory.mktemp("axolotl"), "run_axolotl", TABLE)
    write_models(made.workplace, tokenizer(), vocab_size=64)

    def write(name: str, data: list[dict[str, object]]) -> None:
        (made.workplace / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))

    for count in (UNPACKED, PACKED):
        write(f"chat-{count}", rows("chat", count))
        write(f"silent-{count}", [{**row, "weight": float(i == 0)} for i, row in enumerate(rows("chat", count))])
    write("held_out", rows("chat", HELD_OUT, seed=9))
    return made


def documents(count: int, seed: int = 0) -> list[Document]:
    """The rows as the template of these tests writes them; Axolotl trains on the answer without what ends it."""
    made, encode = [], tokenizer()
    for row in rows("chat", count, seed):
        question, answer = (encode(message["content"])["input_ids"] for message in row["messages"])
        user, assistant, end = encode.convert_tokens_to_ids(["<u>", "<a>", "<end>"])
        ids = [user, *question, end, assistant, *answer, end]
        made.append(Document(ids, [False] * (len(question) + 3) + [True] * len(answer) + [False]))
    return made


def assert_step(launches: Launches, case: dict[str, Any], folder: Path) -> None:
    docs = documents(PACKED if case.get("packed") else UNPACKED)[: 1 if case.get("silent") else None]
    launches.assert_step(case, folder, docs, documents(HELD_OUT, seed=9))


@pytest.mark.parametrize("case", list(TABLE))
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2", "zero2", "zero3"])
def test_so_many_ranks_take_the_step_of_one(launches: Launches, parallel: str, ranks: int, case: str) -> None:
    assert_step(launches, *launches.of(case, parallel, ranks))


@pytest.mark.parametrize("name", ["accumulated", "packed LoRA"])
def test_two_nodes(launches: Launches, tmp_path: Path, name: str) -> None:
    """`axolotl train` as docs/scale.md has it for two machines: two launchers, one rendezvous, a rank each."""
    case, file = TABLE[name], tmp_path / "config.yaml"
    changes = {"save_strategy": "epoch", "dataset_prepared_path": str(tmp_path / "prepared")}
    file.write_text(yaml.safe_dump({**settings(launches.workplace, case, "ddp", 2, tmp_path), **changes}))
    binaries, port = Path(sys.executable).parent, free_port()
    environment = subprocess_env(**VARIABLES["ddp"])
    environment["PATH"] = os.pathsep.join([str(binaries), environment["PATH"]])  # it starts torchrun by its name
    command = [str(binaries / "axolotl"), "train", str(file), "--launcher", "torchrun", "--", "--nproc-per-node", "1"]
    code, printed = run_together([[*command, *rendezvous(node, 2, port)] for node in (0, 1)], [environment] * 2)
    assert code == 0, printed[-6000:]
    keep_saved(tmp_path / "out", tmp_path)
    assert_step(launches, case, tmp_path)


def under_ray(launches: Launches, name: str, folder: Path, hidden: str = "") -> tuple[int, str]:
    """`axolotl train --use-ray` of a case with two workers, which do not find the module `hidden`."""
    changes = {"save_strategy": "epoch", "dataset_prepared_path": str(folder / "prepared")}
    changes["plugins"] = ["ray_axolotl.OnCPU", "wit_axolotl.WITPlugin"]
    changes["ddp"] = True  # without it Axolotl counts the steps of an epoch as one worker would take them
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({**settings(launches.workplace, TABLE[name], "ddp", 2, folder), **changes}))
    environment = subprocess_env(**VARIABLES["ddp"], RAY_USAGE_STATS_ENABLED="0")
    script = [sys.executable, str(Path(__file__).parents[1] / "kits" / "ray_axolotl.py"), hidden]
    command = [*script, "train", str(file), "--use-ray", "--ray-num-workers", "2"]
    return run_together([command], [environment])


@pytest.mark.parametrize("name", ["accumulated", "silent accumulated", "packed LoRA"])
def test_two_ray_workers(launches: Launches, tmp_path: Path, name: str) -> None:
    code, printed = under_ray(launches, name, tmp_path)
    assert code == 0, printed[-6000:]
    assert len(set(re.findall(r"RayTrainWorker pid=(\d+)", printed))) == 2
    keep_saved(tmp_path / "out", tmp_path)
    assert_step(launches, TABLE[name], tmp_path)


def test_ray_workers_without_the_package_do_not_train(launches: Launches, tmp_path: Path) -> None:
    """Axolotl would print that the plugin cannot be imported there, and train without weights."""
    code, printed = under_ray(launches, "full", tmp_path, hidden="wit_axolotl")
    assert code != 0
    assert "No module named 'wit_axolotl" in printed, printed[-6000:]
    assert not [*(tmp_path / "out").rglob("*.safetensors")]
