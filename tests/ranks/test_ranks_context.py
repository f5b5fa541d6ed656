"""Rows that are cut over two and four ranks: the step is that of one process that has them whole.

torch's context parallelism with FSDP2 (`cp_size`) and DeepSpeed's sequence parallelism with ZeRO (`sp_size`), in TRL
and in plain transformers, on CPU processes over gloo: see `ring_on_cpu` and `ulysses_on_cpu` for what a CPU lacks.
Losses, gradients and logs are compared with the formula in float64, one document at a time.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from context_cases import CASES, DEALT_OUT, REFUSED, STREAMED, check_case, documents_of, launch
from rankskit import VARIABLES

# By what rows are cut, the stage of ZeRO, ranks, over how many of them a row is cut.
LAYOUTS = {
    "cp2": ("cp_size", 0, 2, 2),
    "cp4": ("cp_size", 0, 4, 4),
    "cp2x2": ("cp_size", 0, 4, 2),
    "sp2": ("sp_size", 3, 2, 2),
    "sp4": ("sp_size", 2, 4, 4),
    "sp2x2": ("sp_size", 1, 4, 2),
}
REFUSING = {"cp2": {**REFUSED, **DEALT_OUT}, "sp2": REFUSED}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder in which all cases have been run in a layout, once."""
    folders: dict[str, Path] = {}

    def of(layout: str) -> Path:
        if layout not in folders:
            folder = tmp_path_factory.mktemp("context")
            way, stage, ranks, parts = LAYOUTS[layout]
            given = VARIABLES["zero2"] | {"WIT_TEST_STAGE": str(stage)} if way == "sp_size" else {}
            cases = {**cases_of(layout), **REFUSING.get(layout, {})}
            (folder / "output").write_text(launch(folder, ranks, parts, "cpu", cases, way, **given))
            folders[layout] = folder
        return folders[layout]

    return of


def cases_of(layout: str) -> dict[str, dict[str, Any]]:
    return {**CASES, **(STREAMED if layout.startswith("sp") else {})}


@pytest.mark.parametrize(("layout", "case"), [(layout, case) for layout in LAYOUTS for case in cases_of(layout)])
def test_cut_rows_take_the_step_of_whole_ones(launched: Any, layout: str, case: str) -> None:
    cases, folder = cases_of(layout), launched(layout)
    index = list(cases).index(case)
    result = folder / f"case-{index}.json"
    assert result.is_file(), (folder / "output").read_text()[-6000:]
    _, _, ranks, parts = LAYOUTS[layout]
    check_case(cases[case], ranks, parts, json.loads(result.read_text()), torch.load(folder / f"case-{index}.pt"))


@pytest.mark.parametrize(("layout", "case"), [(layout, case) for layout in REFUSING for case in REFUSING[layout]])
def test_what_would_not_be_that_step_stops_before_it(launched: Any, layout: str, case: str) -> None:
    folder, index = launched(layout), [*cases_of(layout), *REFUSING[layout]].index(case)
    result = folder / f"case-{index}.json"
    assert result.is_file(), (folder / "output").read_text()[-6000:]
    assert re.search(REFUSING[layout][case]["error"], json.loads(result.read_text())["error"])


@pytest.mark.parametrize("parts", [2, 4])
def test_the_rows_are_of_lengths_that_cannot_be_cut_and_of_one_that_can(parts: int) -> None:
    longest = {max(len(doc.input_ids) for doc in documents_of(case)) for case in CASES.values()}
    assert {length % (2 * parts) == 0 for length in longest} == {True, False}


def test_one_rank_of_a_group_has_all_that_weighs_in_silent_rows() -> None:
    """Head-tail, the piece with the last token but one (which predicts the last) is one rank's."""
    rows = {len(doc.input_ids) for doc in documents_of({"silent": True})}
    assert rows == {16}
    assert all(not any(doc.is_response[:-1]) for doc in documents_of({"silent": True}))
