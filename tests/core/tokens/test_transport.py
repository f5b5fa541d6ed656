"""Property-based: whatever documents, weights, packings, paddings and vocabularies, everything survives exactly."""

import pickle

import numpy as np
import pytest
import torch
from collators import FirstTokenMasked, FlatteningCollator, PaddingCollator, packed_examples, pad
from hypothesis import given, settings
from hypothesis import strategies as st

from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.errors import WeightsNotAppliedError
from wit_plugins.tokens.codes import MAX_VOCAB_SIZE, decode, encode, framework_labels, restore_codes, weighing
from wit_plugins.tokens.collator import CODES_KEY, WeightedCollator

float32s = st.floats(0, float(np.finfo(np.float32).max), width=32, allow_subnormal=True)


@st.composite
def tokens(draw, max_length=30):
    length = draw(st.integers(1, max_length))
    targets = draw(st.lists(st.integers(0, MAX_VOCAB_SIZE - 1), min_size=length, max_size=length))
    roles = draw(st.lists(st.integers(0, 2), min_size=length, max_size=length))
    weights = draw(st.lists(float32s, min_size=length, max_size=length))
    return np.array(targets), np.array(roles, dtype=np.uint8), np.array(weights, dtype=np.float32)


@given(tokens())
def test_round_trip_is_exact_even_through_float64(drawn):
    targets, roles, weights = drawn
    codes = encode(targets, roles, weights)
    assert ((codes == -100) == (roles == 0)).all()
    assert (codes < 2**53).all()
    through = restore_codes(torch.from_numpy(codes).to(torch.float64))
    assert torch.equal(through, torch.from_numpy(codes))
    got_targets, got_roles, got_weights = (t.numpy() for t in decode(through))
    real = roles != 0
    assert (got_roles == roles).all()
    assert (got_targets[real] == targets[real]).all()
    assert (got_targets[~real] == -100).all()
    # Bit for bit, so that subnormals and the largest float32 count as well.
    assert (got_weights.view(np.uint32)[real] == weights.view(np.uint32)[real]).all()
    assert (got_weights[~real] == 0).all()
    labels = framework_labels(through).numpy()
    assert (labels == np.where(roles == 2, targets, -100)).all()


def test_a_weight_below_zero_is_the_negative_of_a_code():
    targets, roles = np.array([0, 5, 7, 100, 9, 3]), np.array([1, 2, 1, 2, 0, 2], np.uint8)
    weights = np.array([-1e-45, -0.5, 2.0, -1e12, 1.0, 0.0], np.float32)
    codes = encode(targets, roles, weights)
    through = restore_codes(torch.from_numpy(codes).to(torch.float64))
    read_targets, read_roles, read_weights = decode(through)
    assert read_targets.tolist() == [0, 5, 7, 100, -100, 3]
    assert read_roles.tolist() == roles.tolist()
    assert read_weights.tolist() == [*weights[:4].tolist(), 0, 0]
    assert (
        framework_labels(through).tolist()
        == framework_labels(torch.from_numpy(encode(targets, roles, np.abs(weights)))).tolist()
    )
    assert weighing(codes).tolist() == [code for code in codes.tolist() if code != -100]


def test_negative_zero_is_zero():
    codes = encode(np.array([5]), np.array([1], np.uint8), np.array([-0.0], np.float32))
    targets, roles, weights = decode(torch.from_numpy(codes))
    assert (targets.item(), roles.item(), weights.item()) == (5, 1, 0.0)


@pytest.mark.parametrize("target", [-1, MAX_VOCAB_SIZE])
def test_ids_that_do_not_fit_are_refused(target):
    with pytest.raises(ValueError, match=str(target)):
        encode(np.array([target]), np.array([2], np.uint8), np.ones(1, np.float32))


@pytest.mark.parametrize("weight", [-np.inf, np.nan, np.inf])
def test_weights_that_do_not_fit_are_refused(weight):
    with pytest.raises(ValueError, match="finite"):
        encode(np.array([1]), np.array([2], np.uint8), np.array([weight], np.float32))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bfloat16])
def test_types_that_lose_bits_are_refused(dtype):
    with pytest.raises(ValueError, match="cannot hold the weights"):
        restore_codes(torch.zeros(3, dtype=dtype))


@settings(deadline=None)
@given(
    packed_examples(),
    st.sampled_from([PaddingCollator(), PaddingCollator(8), PaddingCollator(4, left=True), FlatteningCollator()]),
    st.floats(0, 2, width=32),
    st.floats(0, 2, width=32),
    st.sampled_from([list, np.array, torch.tensor]),
)
def test_collators_carry_everything(drawn, collator, prompt_weight, response_weight, container):
    examples, expected = drawn
    if isinstance(collator, PaddingCollator):
        container = list
    given_examples = [{**e, "labels": container(e["labels"])} for e in examples]
    strategies = ActiveStrategies({"wit": {"prompt_weight": prompt_weight, "response_weight": response_weight}})
    batch = WeightedCollator(collator, strategies)(given_examples)
    assert batch["labels"].dtype == batch[CODES_KEY].dtype == torch.int64
    targets, roles, weights = decode(batch[CODES_KEY])
    if isinstance(collator, FlatteningCollator):
        expected = [[token for row in expected for token in row]]
    for r, row in enumerate(expected):
        width = targets.shape[1]
        row = [(0, None)] * (width - len(row)) + row if getattr(collator, "left", False) else row
        row = row + [(0, None)] * (width - len(row))
        by_role = {0: 0.0, 1: np.float32(prompt_weight), 2: np.float32(response_weight)}
        assert roles[r].tolist() == [role for role, _ in row]
        assert weights[r].tolist() == [by_role[role] for role, _ in row]
        assert targets[r].tolist() == [-100 if role == 0 else token for role, token in row]
    # What the framework would have had, the label of a document's first token included.
    assert torch.equal(batch["labels"], collator(given_examples)["labels"].to(torch.int64))


def wit(prompt_weight=0.4, response_weight=0.6):
    return ActiveStrategies({"wit": {"prompt_weight": prompt_weight, "response_weight": response_weight}})


def test_nested_lists_of_examples():
    example = {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}
    batch = WeightedCollator(FlatteningCollator(), wit())([[example, example]])
    _, _, weights = decode(batch[CODES_KEY])
    assert torch.equal(weights, torch.tensor([[0, 0.4, 0.6, 0, 0.4, 0.6]]))


def test_examples_are_left_alone():
    example = {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}
    WeightedCollator(PaddingCollator(), wit())([example])
    assert example == {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}


def test_padding_inside_an_example_is_neither():
    example = {"input_ids": [5, 6, 7, 0, 0], "labels": [-100, 6, -100, -100, -100], "attention_mask": [1, 1, 1, 0, 0]}
    batch = WeightedCollator(PaddingCollator(), wit())([example])
    assert decode(batch[CODES_KEY])[1].tolist() == [[0, 2, 1, 0, 0]]


def test_padding_with_a_label_is_trained_on_as_in_the_framework():
    example = {"input_ids": [5, 6, 0], "labels": [-100, 6, 0], "attention_mask": [1, 1, 0]}
    batch = WeightedCollator(PaddingCollator(), wit())([example])
    assert decode(batch[CODES_KEY])[1].tolist() == [[0, 2, 2]]


def test_a_collator_may_mask_what_is_never_predicted():
    batch = WeightedCollator(FirstTokenMasked(), wit())([{"input_ids": [5, 6, 7], "labels": [5, -100, 7]}])
    assert batch["labels"].tolist() == [[-100, -100, 7]]
    assert decode(batch[CODES_KEY])[1].tolist() == [[0, 1, 2]]


class OverwritingCollator:
    """Builds labels from the ids, as `DataCollatorForLanguageModeling(mlm=False)` of transformers does."""

    def __call__(self, examples):
        ids = pad([e["input_ids"] for e in examples], 0, 1)
        return {"input_ids": ids, "labels": ids.clone()}


class CuttingCollator(PaddingCollator):
    def __call__(self, examples):
        return super().__call__([{k: v[:2] for k, v in e.items()} for e in examples])


class ShiftingCollator(PaddingCollator):
    def __call__(self, examples):
        batch = super().__call__(examples)
        return {**batch, "shift_labels": batch["labels"]}


@pytest.mark.parametrize("collator", [OverwritingCollator(), CuttingCollator(), ShiftingCollator()])
def test_collators_that_touch_labels_are_refused(collator):
    with pytest.raises(WeightsNotAppliedError, match=type(collator).__name__):
        WeightedCollator(collator, wit())([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])


def test_pickles_and_delegates():
    wrapped = WeightedCollator(PaddingCollator(8), wit())
    assert wrapped.multiple == 8
    again = pickle.loads(pickle.dumps(wrapped))
    example = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    assert torch.equal(again([example])[CODES_KEY], wrapped([example])[CODES_KEY])


def test_examples_without_labels_pass():
    assert CODES_KEY not in WeightedCollator(lambda examples: {"n": len(examples)}, wit())([{"input_ids": [1]}])
