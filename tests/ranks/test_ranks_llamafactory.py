"""LLaMA-Factory on one, two and four ranks: the first loss, every gradient and the parameters after the step are one's.

On the CPU over gloo. Not in `make test`, which has a cross-section (`tests/llamafactory/test_lf_distributed.py`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lfkit import RAY, Doc, Place, alpaca, chatml, environment, start_with_ray, tokenizer
from rankskit import CASES, HELD_OUT, RANKS, WEIGHTS, Launches, free_port, keep_saved, run_together, write_models
from run_llamafactory import DOCUMENTS, settings
from support import Document

TABLE = CASES


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    made = Launches(tmp_path_factory.mktemp("llamafactory"), "run_llamafactory", TABLE)
    tokens = tokenizer()
    write_models(made.workplace, tokens, vocab_size=len(tokens), max_position_embeddings=512, eos_token_id=1)
    place = Place(made.workplace)
    place.dataset("train", alpaca(DOCUMENTS))
    silent = [{**row, "weight": float(index == 0)} for index, row in enumerate(alpaca(DOCUMENTS))]
    place.dataset("silent", silent)
    place.dataset("held_out", alpaca(HELD_OUT, seed=9))
    return made


def documents(made: list[Doc]) -> list[Document]:
    return [Document(doc.input_ids, doc.is_response) for doc in made]


def assert_step(launches: Launches, case: dict[str, Any], folder: Path) -> None:
    docs = documents(chatml(DOCUMENTS))[: 1 if case.get("silent") else None]
    launches.assert_step(case, folder, docs, documents(chatml(HELD_OUT, seed=9)))


@pytest.mark.parametrize("case", list(TABLE))
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("parallel", ["ddp", "zero2", "zero3", "fsdp2"])
def test_so_many_ranks_take_the_step_of_one(launches: Launches, parallel: str, ranks: int, case: str) -> None:
    assert_step(launches, *launches.of(case, parallel, ranks))


@pytest.mark.parametrize("name", ["accumulated", "packed LoRA"])
def test_two_nodes(launches: Launches, tmp_path: Path, name: str) -> None:
    """`llamafactory-wit train` as docs/scale.md has it for two machines: two launchers with a rank each."""
    case, file = TABLE[name], tmp_path / "cfg.yaml"
    weights = dict(zip(("prompt_weight", "response_weight"), WEIGHTS, strict=True))
    file.write_text(yaml.safe_dump({**settings(launches.workplace, case, "ddp", 2, tmp_path), "wit": weights}))
    command = [sys.executable, "-c", "import sys; from wit_llamafactory.command import main; sys.exit(main())"]
    variables = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "1", "NNODES": "2"}
    variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    nodes = [
        environment(**variables, NODE_RANK=str(node), HF_DATASETS_CACHE=str(tmp_path / f"cache-{node}"))
        for node in (0, 1)
    ]
    code, printed = run_together([[*command, "train", str(file)]] * 2, nodes)
    assert code == 0, printed[-6000:]
    assert "num nodes: 2, node rank: 1" in printed  # LLaMA-Factory's own launcher
    keep_saved(tmp_path / "out", tmp_path)
    assert_step(launches, case, tmp_path)


@pytest.mark.parametrize("name", ["accumulated", "silent accumulated", "packed LoRA"])
def test_two_ray_workers(launches: Launches, tmp_path: Path, name: str) -> None:
    """`USE_RAY=1 llamafactory-wit train` with two workers of a Ray on this machine."""
    case, file = TABLE[name], tmp_path / "cfg.yaml"
    weights = dict(zip(("prompt_weight", "response_weight"), WEIGHTS, strict=True))
    file.write_text(yaml.safe_dump({**settings(launches.workplace, case, "ddp", 2, tmp_path), "wit": weights, **RAY}))
    done = start_with_ray(file)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "2 workers for distributed training" in done.stdout + done.stderr
    keep_saved(tmp_path / "out", tmp_path)
    assert_step(launches, case, tmp_path)
