"""Which document of a batch a token is in, and where: from the codes alone, whatever a collator made of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from words import tokenizer

from wit_plugins import WITConfig, WITConfigError, hookimpl
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.errors import BadExampleError
from wit_plugins.loss import micro_batch
from wit_plugins.testing import registered
from wit_plugins.tokens.codes import decode, locate
from wit_plugins.tokens.collator import CODES_KEY, WeightedCollator

WIT = {"prompt_weight": 0.2, "response_weight": 0.0}


class Located:
    @hookimpl
    def dynamic_weights(self, log_probs, documents, positions):
        return positions / (1 + documents)


def collated(rows, left):
    """Packed rows of documents, padded on one side by a collator that knows nothing of them."""
    length = max(sum(map(len, row)) for row in rows)
    examples = [
        {
            "input_ids": [i for doc in row for i in range(1, 1 + len(doc))],
            "labels": [i if r else -100 for doc in row for i, r in enumerate(doc, 1)],
            "seq_lengths": [len(doc) for doc in row],
        }
        for row in rows
    ]

    def pad(features):
        return {
            key: torch.tensor(
                [
                    [fill] * (length - len(f[key])) + f[key] if left else f[key] + [fill] * (length - len(f[key]))
                    for f in features
                ]
            )
            for key, fill in (("input_ids", 0), ("labels", -100))
        }

    return WeightedCollator(pad, ActiveStrategies({"wit": WIT}))(examples)


documents = st.lists(st.booleans(), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(documents, min_size=1, max_size=4), min_size=1, max_size=3), st.booleans())
def test_every_token_is_found(rows, left):
    """Documents of one token have none that is predicted, so they have no number."""
    codes = collated(rows, left)[CODES_KEY]
    expected = torch.full((*codes.shape, 2), -1)
    number = -1
    for b, row in enumerate(rows):
        at = codes.shape[1] - sum(map(len, row)) if left else 0
        for doc in row:
            number += len(doc) > 1
            for position in range(1, len(doc)):
                expected[b, at + position] = torch.tensor([number, position])
            at += len(doc)
    found = torch.stack(locate(codes), dim=-1)
    real = expected[..., 0] >= 0
    assert torch.equal(found[real], expected[real])


def test_nobody_looks_for_documents_unless_asked(monkeypatch):
    monkeypatch.setattr(micro_batch, "locate", None)
    codes = collated([[[False, True, True]]], False)[CODES_KEY]
    micro_batch.MicroBatch(codes, ActiveStrategies({"wit": WIT, "dft": {}, "eaft": {}}))
    with registered(Located(), "located"), pytest.raises(TypeError, match="not callable"):
        micro_batch.MicroBatch(codes, ActiveStrategies({"wit": WIT, "located": {}}))


@pytest.mark.parametrize(("strategies", "asked"), [({}, 1), ({"spans": [{"match": "zzz", "weight": 2.0}]}, 3)])
def test_roles_alone_are_asked_for_once_a_row(monkeypatch, strategies, asked):
    """Five hundred documents of a packed row take as long as one, where nothing but their roles decides."""
    config = WITConfig(prompt_weight=0.2, response_weight=0.8, strategies=strategies)
    active = ActiveStrategies(config.active_strategies())
    lengths = []
    own = active.static_weights
    monkeypatch.setattr(active, "static_weights", lambda **d: lengths.append(len(d["roles"])) or own(**d))
    row = {"input_ids": list(range(5, 17)), "labels": [-100, -100, 7, 8] * 3, "seq_lengths": [4, 4, 4]}
    collator = WeightedCollator(lambda rows: rows, active, tokenizer=tokenizer())
    weights = decode(torch.from_numpy(collator.codes(row)))[2]
    assert weights.tolist() == pytest.approx([0.0, 0.2, 0.8, 0.8] * 3)
    assert lengths == [12 // asked] * asked


def test_a_hole_in_a_document_is_refused_where_it_would_matter():
    """Behind it the collator's output says that another document begins."""
    example = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, -100, 8, 9], "attention_mask": [1, 1, 0, 1, 1]}
    assert np.count_nonzero(WeightedCollator(None, ActiveStrategies({"wit": WIT})).codes(example) != -100) == 3
    with registered(Located(), "located"):
        collator = WeightedCollator(None, ActiveStrategies({"wit": WIT, "located": {}}))
        with pytest.raises(BadExampleError, match=r"0 in the middle of a document, which located \(strategies\)"):
            collator.codes(example)
        for mask in ([0, 1, 1, 1, 1], [1, 1, 1, 1, 1]):
            collator.codes({**example, "attention_mask": mask})
        collator.codes({**example, "labels": [-100, -100, 7, 8, -100], "attention_mask": [1, 1, 1, 1, 0]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 1}, "eaft: top_k = 1: is a whole number of tokens, at least 2"),
        ({"top_k": 2.5}, "eaft: top_k = 2.5: is a whole number"),
        ({"alpha": -1}, "eaft: alpha = -1: is a number >= 0, such as 1"),
        ({"alpha": True}, "eaft: alpha = True"),
        ({"divisor": 0}, "eaft: divisor = 0: is above 0"),
        ({"divisor": float("nan")}, "eaft: divisor = nan"),
        ({"alhpa": 1}, "eaft: there is no option 'alhpa'; did you mean 'alpha'"),
    ],
)
def test_options_of_eaft_that_are_wrong(options, message):
    with pytest.raises(WITConfigError, match=message):
        ActiveStrategies({"wit": WIT, "eaft": options})


class Selecting:
    @hookimpl
    def select_tokens(self, log_probs):
        return log_probs < -1


def test_selections_that_cannot_be(monkeypatch):
    log_probs, roles = torch.tensor([-0.5, -2.0]), torch.tensor([2, 2], dtype=torch.uint8)
    with registered(Selecting(), "one"), registered(Selecting(), "two"):
        assert ActiveStrategies({"wit": WIT, "one": {}}).on_device.dynamic_weights(log_probs, roles).tolist() == [0, 1]
        assert not ActiveStrategies({"wit": WIT, "one": {}}).needs.per_token
        with pytest.raises(WITConfigError, match="one and two both select tokens"):
            ActiveStrategies({"wit": WIT, "one": {}, "two": {}})
        monkeypatch.setattr(Selecting, "select_tokens", hookimpl(lambda self, log_probs: log_probs))
    with registered(Selecting(), "floats"), pytest.raises(ValueError, match="a selection of torch.float32, not"):
        ActiveStrategies({"wit": WIT, "floats": {}}).on_device.dynamic_weights(log_probs, roles)


def test_an_entropy_of_nobody_knows_how_many():
    class Vague:
        @hookimpl
        def dynamic_weights(self, topk_entropy):
            return topk_entropy

    with registered(Vague(), "vague"), pytest.raises(WITConfigError, match=r"vague: .*put @entropy_of_top\(20\)"):
        ActiveStrategies({"wit": WIT, "vague": {}})
