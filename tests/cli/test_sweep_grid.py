"""The grid of a sweep: cells, labels, folders, which of them are alike."""

import csv
from fractions import Fraction

import pytest
from sweepkit import grid, made_up, order, short

from wit_plugins import WITConfigError
from wit_plugins.cli.sweep.grid import one_per_ratio, parse_weights, ratio_note, same_ratio


def test_the_grid_has_no_cell_that_trains_nothing():
    assert [cell.label for cell in grid("0,0.2", "0,1")] == ["(0, 1)", "(0.2, 0)", "(0.2, 1)"]
    with pytest.raises(WITConfigError, match="trains nothing"):
        grid("0", "0")


@pytest.mark.parametrize("text", ["", "a", "0.2,,1", "-1", "inf", "nan", "1e-60", "1/0"])
def test_weights_that_are_none(text):
    with pytest.raises(WITConfigError, match="--prompt-weight"):
        parse_weights(text, "--prompt-weight")


def test_cells_that_differ_only_in_scale():
    """Over the paper's grid against a count of equal quotients in integers."""
    steps = "0,0.2,0.4,0.6,0.8,1.0"
    found = {tuple(sorted(cell.label for cell in group)) for group in same_ratio(grid(steps, steps))}
    pairs = [(p, r) for p in range(6) for r in range(6) if (p, r) != (0, 0)]
    expected = set()
    for p, r in pairs:
        group = [(a, b) for a, b in pairs if a * r == b * p]
        if len(group) > 1:
            expected.add(tuple(sorted(f"({a / 5:g}, {b / 5:g})" for a, b in group)))
    assert found == expected
    assert len(one_per_ratio(grid(steps, steps))) == len({Fraction(p, r) if r else None for p, r in pairs})
    assert "(0.1, 0.3)" in ratio_note(grid("0.1,0.2", "0.3,0.6"))  # 0.1/0.3 and 0.2/0.6 differ as floats
    assert ratio_note(grid("0.1", "0.3,0.6")) is None


def test_no_two_cells_share_a_folder_a_label_or_a_row(tmp_path):
    """Seven and more digits, a third and its decimals; and one number written in several ways is one cell."""
    made = grid("0.1000001,0.1000002,1/3,0.333333,1e-7,1e12,12345678", "1")
    assert len({cell.name for cell in made}) == len({cell.label for cell in made}) == 7
    for cell in made:
        prompt, response = cell.name.removeprefix("p").split("_r")
        assert (float(prompt), float(response)) == cell.weights
    assert [cell.name for cell in grid("0.2,1/5,2e-1,0.20,0.2000000000000000000001", "1.0")] == ["p0.2_r1"]
    made_up(tmp_path, prompts="0.1000001,0.1000002")
    made_up(tmp_path, prompts="0.10000010,1/3,0.3333333333333333")
    with open(tmp_path / "runs" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["prompt_weight"]) for row in rows] == [0.1000001, 0.1000002, 1 / 3]
    assert [float(row["eval_prompt_loss"]) for row in rows] == [2 - 0.1000001, 2 - 0.1000002, 2 - 1 / 3]
    assert len(order(tmp_path)) == 3


@pytest.mark.parametrize("text", ["1e999999999", "1e-999999999", "9" * 5000, "1e1_000_000_000", "1e22"], ids=short)
def test_numbers_that_would_take_for_ever(text):
    with pytest.raises(WITConfigError, match="is not a finite number"):
        parse_weights(text, "--prompt-weight")
