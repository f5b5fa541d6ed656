"""Spans in a batch: each token's are where the collator put the token, whatever the collator does; else it stops."""

import pickle

import numpy as np
import pytest
import torch
from collators import FirstTokenMasked, FlatteningCollator, PaddingCollator, packed_examples
from hypothesis import given, settings
from hypothesis import strategies as st

from wit_plugins import WeightsNotAppliedError, WITConfigError, hookimpl
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.testing import registered
from wit_plugins.tokens.collator import CODES_KEY, WeightedCollator
from wit_plugins.tokens.span_bits import SPANS_KEY

NAMES = {f"span {i}": f"s{i}" for i in range(62)}


class Marks:
    """Says by a token's id and its place in which of 62 spans it is; its code says the id alone."""

    @hookimpl
    def static_weights(self, input_ids):
        return np.ones(len(input_ids))

    @hookimpl
    def find_spans(self, input_ids):
        return {name: marks(input_ids) >> index & 1 == 1 for index, name in enumerate(NAMES)}

    @hookimpl
    def logged_spans(self, options):
        return dict(list(NAMES.items())[: options.get("logged", 62)])


def marks(ids):
    """Some bits for each token of a document, int64."""
    mixed = (np.asarray(ids, dtype=np.int64) + 1) * 2654435761 * 97 + (np.arange(len(ids)) + 1) * 40503 * 2654435761
    return mixed & ((1 << 62) - 1)


@pytest.fixture(scope="module", autouse=True)
def _marks():
    with registered(Marks(), "marks"):
        yield


def strategies(**options):
    return ActiveStrategies({"wit": {"prompt_weight": 0.5, "response_weight": 1.0}, "marks": options})


COLLATORS = {
    "padded": PaddingCollator(),
    "multiple of 8": PaddingCollator(8),
    "left": PaddingCollator(left=True),
    "flattened": FlatteningCollator(),
    "first labels taken out": FirstTokenMasked(),
}


@given(drawn=packed_examples(), name=st.sampled_from(sorted(COLLATORS)))
@settings(max_examples=150, deadline=None)
def test_bits_are_where_the_tokens_are(drawn, name):
    examples, expected = drawn
    rows = []
    for example, tokens in zip(examples, expected, strict=True):
        starts = [t for t, position in enumerate(example.get("position_ids") or []) if position == 0]
        starts = starts or np.cumsum([0, *example.get("seq_lengths", [])[:-1]]).tolist()
        ends = [*starts[1:], len(tokens)]
        own = [marks(example["input_ids"][start:end]) for start, end in zip(starts, ends, strict=True)]
        is_real = [role != 0 for role, _ in tokens]
        rows.append(np.where(is_real, np.concatenate(own), 0))
    batch = WeightedCollator(COLLATORS[name], strategies())(examples)
    assert batch[SPANS_KEY].dtype == torch.int64
    width = batch[SPANS_KEY].shape[1]
    if name == "flattened":
        rows = [np.concatenate(rows)]
    holes = [np.zeros(width - len(row), dtype=np.int64) for row in rows]
    rows = [
        np.concatenate((hole, row) if name == "left" else (row, hole)) for row, hole in zip(rows, holes, strict=True)
    ]
    assert np.array_equal(batch[SPANS_KEY].numpy(), np.stack(rows))


class Sorting(PaddingCollator):
    """The longest example first, as older collators do."""

    def __call__(self, examples):
        return super().__call__(sorted(examples, key=lambda example: -len(example["input_ids"])))


class Reversing(FlatteningCollator):
    def __call__(self, examples):
        return {key: value.flip(1) for key, value in super().__call__(examples).items()}


@pytest.mark.parametrize("collator", [Sorting(), Reversing()])
def test_another_order_is_refused_where_spans_are_logged(collator):
    """Without spans the weights are right in any order of the examples."""
    examples = [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    with pytest.raises(WeightsNotAppliedError, match=f"{type(collator).__name__} puts .* another order.*s0, s1"):
        WeightedCollator(collator, strategies())(examples)
    assert SPANS_KEY not in WeightedCollator(collator, strategies(logged=0))(examples)


def test_what_nobody_logs_takes_no_room():
    """Others may look for spans, for the check before training alone."""
    example = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    made = WeightedCollator(PaddingCollator(), strategies(logged=0))
    assert made.strategies.looks_for_spans
    assert set(made([example])) == {"input_ids", "labels", CODES_KEY}


def test_an_empty_batch_has_no_spans():
    batch = WeightedCollator(PaddingCollator(), strategies())([{"input_ids": [5], "labels": [5]}])
    assert batch[SPANS_KEY].tolist() == [[0]]


def test_pickled_for_another_process():
    made = pickle.loads(pickle.dumps(WeightedCollator(PaddingCollator(), strategies(logged=3))))
    assert made.strategies.logged_spans == {"marks: span 0": "s0", "marks: span 1": "s1", "marks: span 2": "s2"}


class Logs:
    """Logs what it is told to."""

    @hookimpl
    def static_weights(self, input_ids):
        return np.ones(len(input_ids))

    @hookimpl
    def logged_spans(self, options):
        return options["names"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"a": "white space"}, r"the span 'a' is to be logged as 'white space'; a name in the log is made of letters"),
        ({"a": "b/c"}, "is to be logged as 'b/c'"),
        ({"a": ""}, "is to be logged as ''"),
        ({"a": 3}, "is to be logged as 3"),
        ({"a": "one", "b": "one"}, "to be logged as 'one', and so is one of logs; give one of them another name"),
        ({"a": "s4"}, "to be logged as 's4', and so is one of marks"),
        (
            {"a": "one", "b": "two"},
            r"64 spans have their losses logged, and 62 can; .*\(the last ones are logs: a, logs: b",
        ),
    ],
)
def test_names_that_cannot_be_logged(names, message):
    with registered(Logs(), "logs"), pytest.raises(WITConfigError, match=message):
        ActiveStrategies({"wit": {"prompt_weight": 0.5, "response_weight": 1.0}, "marks": {}, "logs": {"names": names}})
