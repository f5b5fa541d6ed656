"""Which tokens are prompt, response or neither, and what of an example is refused: by hand."""

import numpy as np
import pytest
import torch

from wit_plugins.errors import BadExampleError
from wit_plugins.tokens.roles import document_starts, example_roles, token_array

N, P, R = 0, 1, 2


def roles(ids, labels, **more):
    return example_roles({"input_ids": ids, "labels": labels, **more})[1].tolist()


def test_of_one_document():
    targets, found, starts = example_roles({"input_ids": [5, 6, 7], "labels": [-100, -100, 9]})
    assert (targets.tolist(), found.tolist(), starts.tolist()) == ([5, 6, 9], [N, P, R], [0])
    assert roles([], []) == []


@pytest.mark.parametrize("where", [{"seq_lengths": [2, 3]}, {"position_ids": [0, 1, 0, 1, 2]}])
def test_of_a_packed_row(where):
    assert roles([5, 6, 7, 8, 9], [-100, 6, 7, -100, 9], **where) == [N, R, N, P, R]


@pytest.mark.parametrize("mask", [[0, 0, 1, 1, 1], np.array([0, 0, 1, 1, 1]), torch.tensor([0, 0, 1, 1, 1])])
def test_of_padding_in_front(mask):
    assert roles([0, 0, 7, 8, 9], [-100, -100, -100, -100, 9], attention_mask=mask) == [N, N, N, P, R]


def test_of_padding_in_front_of_each_document():
    where = {"seq_lengths": [3, 3], "attention_mask": [0, 1, 1, 0, 1, 1]}
    assert roles([0, 6, 7, 0, 8, 9], [-100] * 6, **where) == [N, N, P, N, N, P]


@pytest.mark.parametrize("mask", [[[1, 0], [1, 1]], [(1, 0), (1, 1)], np.array([[1, 0], [1, 1]])])
def test_a_mask_of_several_dimensions_says_nothing_of_single_tokens(mask):
    assert roles([5, 6, 7], [-100, -100, 7], attention_mask=mask) == [N, P, R]


def test_a_mask_of_several_dimensions_for_one_token():
    assert roles([5], [-100], attention_mask=[[0]]) == [N]


def test_an_empty_mask_of_an_empty_example():
    assert roles([], [], attention_mask=[]) == []


@pytest.mark.parametrize(("lengths", "count"), [([2, 2], 5), ([3, 0, 2], 5), ([6, -1], 5)])
def test_lengths_that_do_not_add_up_are_refused(lengths, count):
    with pytest.raises(BadExampleError, match="do not add up"):
        document_starts({"seq_lengths": lengths}, count)


def test_integers_of_every_kind_are_read():
    for values in ([1, 2], np.array([1.0, 2.0]), torch.tensor([1, 2], requires_grad=False), np.array([[1, 2]])):
        assert token_array(values).tolist() == [1, 2]
    assert token_array(torch.tensor([1.0, 2.0], requires_grad=True)).tolist() == [1, 2]
    assert token_array([True, False]).tolist() == [1, 0]


@pytest.mark.parametrize(("values", "named"), [([1, 2.5], "2.5"), ([1, "a"], "'1'"), ([3.0, float("inf")], "inf")])
def test_what_is_no_integer_is_refused(values, named):
    with pytest.raises(BadExampleError, match="must be integers") as caught, np.errstate(invalid="ignore"):
        token_array(values)
    assert named in str(caught.value) or "nan" in str(caught.value)
