"""LLaMA-Factory on one, two and four ranks: the first loss, every gradient and the parameters after the step are one's.

On the CPU over gloo. Not in `make test`, which has a cross-section (`tests/llamafactory/test_lf_distributed.py`).
"""

from __future__ import annotations

import pytest
from lfkit import Doc, Place, alpaca, chatml, tokenizer
from rankskit import CASES, HELD_OUT, RANKS, Launches, write_models
from run_llamafactory import DOCUMENTS
from support import Document

TABLE = CASES


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    made = Launches(tmp_path_factory.mktemp("llamafactory"), "run_llamafactory.py", TABLE)
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


def assert_case(launches: Launches, name: str, parallel: str, ranks: int, nodes: int = 1) -> None:
    case, folder = launches.of(name, parallel, ranks, nodes)
    docs = documents(chatml(DOCUMENTS))[: 1 if case.get("silent") else None]
    launches.assert_step(case, folder, docs, documents(chatml(HELD_OUT, seed=9)))


@pytest.mark.parametrize("case", list(TABLE))
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("parallel", ["ddp", "zero2", "zero3", "fsdp2"])
def test_so_many_ranks_take_the_step_of_one(launches: Launches, parallel: str, ranks: int, case: str) -> None:
    assert_case(launches, case, parallel, ranks)
