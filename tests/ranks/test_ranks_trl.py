"""TRL on one, two and four ranks: the first loss, every gradient and the parameters after the step are one process's.

On the CPU over gloo. Not in `make test`, which has a cross-section (`tests/trl/test_distributed.py`, `tests/core`).
"""

from __future__ import annotations

from typing import Any

import pytest
from rankskit import CASES, HELD_OUT, RANKS, WEIGHTS, Launches, write_models
from run_trl import documents_of
from support import from_dataset, llama, reference_step
from trlkit import dataset
from words import tokenizer

TABLE = {**CASES, "padding-free": {"args": {"padding_free": True, "max_length": None}}}


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    made = Launches(tmp_path_factory.mktemp("trl"), "run_trl", TABLE)
    write_models(made.workplace, tokenizer())
    return made


def assert_case(launches: Launches, name: str, parallel: str, ranks: int, nodes: int = 1) -> None:
    case, folder = launches.of(name, parallel, ranks, nodes)
    rows = documents_of(case)
    docs = [doc for doc, row in zip(from_dataset(rows), rows, strict=True) if row["weight"]]
    launches.assert_step(case, folder, docs, from_dataset(dataset("tokenised", HELD_OUT, seed=9)))


@pytest.mark.parametrize("case", list(TABLE))
@pytest.mark.parametrize("ranks", RANKS)
def test_ddp(launches: Launches, ranks: int, case: str) -> None:
    assert_case(launches, case, "ddp", ranks)


@pytest.mark.parametrize("case", list(TABLE))
@pytest.mark.parametrize("ranks", RANKS)
def test_fsdp2(launches: Launches, ranks: int, case: str) -> None:
    assert_case(launches, case, "fsdp2", ranks)


@pytest.mark.parametrize("case", list(TABLE))
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("stage", [2, 3])
def test_zero(launches: Launches, stage: int, ranks: int, case: str) -> None:
    assert_case(launches, case, f"zero{stage}", ranks)


@pytest.mark.parametrize("case", list(TABLE))
def test_two_nodes(launches: Launches, case: str) -> None:
    """Two launchers with one rendezvous and two ranks each, as on two machines."""
    assert_case(launches, case, "ddp", ranks=4, nodes=2)


def test_the_table_would_see_a_wrong_denominator() -> None:
    """Each rank's own mean, which is what a step without the global count would take, is another loss."""
    docs: Any = documents_of({})
    model = llama()
    loss, _ = reference_step(model, from_dataset(docs), *WEIGHTS)
    halves = [reference_step(model, from_dataset(docs.select(range(i, len(docs), 2))), *WEIGHTS)[0] for i in (0, 1)]
    assert abs(sum(halves) / 2 - loss) > 1e-3 * loss
