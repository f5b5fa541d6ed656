"""Rows that are cut over two and four ranks (`cp_size`): the step is that of one process that has them whole.

torch's context parallelism with FSDP2, in TRL and in plain transformers, on CPU processes over gloo: see `ring_on_cpu`
for what of it a CPU lacks. Losses, gradients and logs are compared with the formula in float64, one document at a time.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from context_cases import CASES, REFUSED, check_case, documents_of, launch

LAYOUTS = {"two": (2, 2), "four": (4, 4), "two, of two rows": (4, 2)}  # ranks, over how many of them a row is cut


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder in which all cases have been run in a layout, once."""
    folders: dict[str, Path] = {}

    def of(layout: str) -> Path:
        if layout not in folders:
            folder = tmp_path_factory.mktemp("context")
            output = launch(folder, *LAYOUTS[layout], "cpu", {**CASES, **(REFUSED if layout == "two" else {})})
            (folder / "output").write_text(output)
            folders[layout] = folder
        return folders[layout]

    return of


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_cut_rows_take_the_step_of_whole_ones(launched: Any, layout: str, case: str) -> None:
    folder, index = launched(layout), list(CASES).index(case)
    result = folder / f"case-{index}.json"
    assert result.is_file(), (folder / "output").read_text()[-6000:]
    ranks, parts = LAYOUTS[layout]
    check_case(CASES[case], ranks, parts, json.loads(result.read_text()), torch.load(folder / f"case-{index}.pt"))


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_would_not_be_that_step_stops_before_it(launched: Any, case: str) -> None:
    folder, index = launched("two"), [*CASES, *REFUSED].index(case)
    result = folder / f"case-{index}.json"
    assert result.is_file(), (folder / "output").read_text()[-6000:]
    assert re.search(REFUSED[case]["error"], json.loads(result.read_text())["error"])


@pytest.mark.parametrize("parts", [2, 4])
def test_the_rows_are_of_lengths_that_cannot_be_cut_and_of_one_that_can(parts: int) -> None:
    longest = {max(len(doc.input_ids) for doc in documents_of(case)) for case in CASES.values()}
    assert {length % (2 * parts) == 0 for length in longest} == {True, False}


def test_one_rank_of_a_group_has_all_that_weighs_in_silent_rows() -> None:
    """Head-tail, the piece with the last token but one (which predicts the last) is one rank's."""
    rows = {len(doc.input_ids) for doc in documents_of({"silent": True})}
    assert rows == {16}
    assert all(not any(doc.is_response[:-1]) for doc in documents_of({"silent": True}))
