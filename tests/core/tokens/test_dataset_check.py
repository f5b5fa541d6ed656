"""The look at a dataset before training: shares that are the dataset's, and data that takes a whole role out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from wit_plugins.tokens.example_reader import ExampleReader
from wit_plugins.tokens.weighted_labels import prepare
from wit_plugins.training.dataset_check import check_dataset


def row(*documents: tuple[int, int, float]) -> dict[str, Any]:
    """A packed row of documents: how many tokens are prompt (beside the first), response, and what the data says."""
    ids: list[int] = []
    labels: list[int] = []
    lengths = []
    for prompt, response, weight in documents:
        own = np.array([-100] * (prompt + 1) + [7] * response)
        ids += [7] * len(own)
        labels += prepare(own, np.full(len(own), weight, dtype=np.float32), 0).tolist() if weight != 1 else own.tolist()
        lengths.append(len(own))
    return {"input_ids": ids, "labels": labels, "seq_lengths": lengths}


def test_the_share_of_prompt_is_the_dataset_s_though_packing_puts_the_longest_first() -> None:
    rows = [row((10, 90, 1.0))] * 500 + [row((50, 50, 1.0))] * 500
    look = check_dataset(rows, "", ExampleReader())
    assert (look.rows, look.size) == (100, 1000)
    assert look.prompt / (look.prompt + look.response) == pytest.approx(0.3, abs=0.01)
    assert look.lines() == ["30% of the tokens are prompt (in 100 of 1,000 rows, at even distances)"]


def test_weights_are_counted_by_examples_and_not_by_packed_rows() -> None:
    rows = [row((2, 2, 1.0), (1, 1, 0.5), (3, 1, 1.0)), row((2, 2, 0.0), (2, 3, 1.0))]
    look = check_dataset(rows, "", ExampleReader(fingerprint=0))
    assert (look.documents, look.weighted) == (5, 2)
    assert look.lines()[1] == "weights stand in the data of 2 of 5 examples"
    assert look.left_out(0.2, 0.8) == []


def test_data_that_takes_a_whole_role_out_is_said() -> None:
    """0 on every prompt token, or on every answer; only where the role would have weighed something."""
    for role, key in ((0, "prompt_weight = 0.2"), (1, "response_weight = 0.8")):
        rows = []
        for prompt, response in ((2, 3), (4, 1)):
            own = np.array([-100] * (prompt + 1) + [7] * response)
            weights = np.where((own != -100) == bool(role), 0, 1).astype(np.float32)
            rows.append({"input_ids": [7] * len(own), "labels": prepare(own, weights, 0).tolist()})
        look = check_dataset(rows, "", ExampleReader(fingerprint=0))
        (said,) = look.left_out(0.2, 0.8)
        assert key in said
        assert ("answers" if role else "prompts") in said
        assert look.left_out(0.0 if role == 0 else 0.2, 0.8 if role == 0 else 0.0) == []


def test_a_role_that_is_not_among_those_is_looked_for() -> None:
    rows = [row((0, 5, 1.0))] * 998
    rows.insert(3, row((5, 5, 1.0)))
    look = check_dataset(rows, "", ExampleReader())
    assert look.prompt == 5
    assert look.rows < 999
