"""LLaMA-Factory's collator: packing, padding, workers."""

import pickle

import pytest
import torch
from lfcases import WEIGHTS, packed_row
from lfkit import (
    NEAT,
    tokenizer,
)
from llamafactory.data.collator import SFTDataCollatorWith4DAttentionMask
from llamafactory.data.template import TEMPLATES
from llamafactory.train.tuner import run_exp
from wit_llamafactory import WITCallback

from wit_plugins import detach
from wit_plugins.contract.active import ActiveStrategies
from wit_plugins.tokens.codes import decode
from wit_plugins.tokens.collator import CODES_KEY, WeightedCollator


class TestCollator:
    """LLaMA-Factory's own collator, wrapped: all of its branches, on a CPU."""

    def collate(self, rows, **options):
        settings = {
            "template": TEMPLATES["chatml"],
            "pad_to_multiple_of": 8,
            "label_pad_token_id": -100,
            "tokenizer": tokenizer(),
            "block_diag_attn": options.get("neat_packing", False),
            **options,
        }
        collator = SFTDataCollatorWith4DAttentionMask(**settings)
        strategies = ActiveStrategies({"wit": {"prompt_weight": 0.4, "response_weight": 0.6}})
        return collator([dict(row) for row in rows]), WeightedCollator(collator, strategies)(
            [dict(row) for row in rows]
        )

    def expected(self, lengths, width):
        weights = []
        for length in lengths:
            weights += [0.0, *[0.4] * (length // 2 - 1), *[0.6] * (length - length // 2)]
        return weights + [0.0] * (width - len(weights))

    def assert_equal_but_for_the_weights(self, own, batch):
        assert set(batch) - set(own) == {CODES_KEY}
        for key, value in own.items():
            assert value is batch[key] is None or torch.equal(value, batch[key]), key

    def weights_of(self, batch):
        return decode(batch[CODES_KEY])[2]

    @pytest.mark.parametrize("neat", [False, pytest.param(True, marks=NEAT)])
    def test_padding_inside_packed_rows(self, neat):
        lengths = [[5, 7, 6], [8, 4]]
        rows = [packed_row(row, 24, neat) for row in lengths]
        options = {"neat_packing": True, "attn_implementation": "sdpa"} if neat else {}
        own, batch = self.collate(rows, **options)
        self.assert_equal_but_for_the_weights(own, batch)
        expected = torch.tensor([self.expected(row, 24) for row in lengths])
        assert torch.equal(self.weights_of(batch), expected)
        assert own["attention_mask"].dim() == (4 if neat else 2)

    def test_padding_to_a_multiple_of_8(self):
        rows = [
            {
                "input_ids": [*range(10, 10 + n)],
                "attention_mask": [1] * n,
                "labels": [-100] * (n // 2) + [9] * (n - n // 2),
            }
            for n in (5, 11)
        ]
        own, batch = self.collate(rows)
        assert own["input_ids"].shape == (2, 16)
        self.assert_equal_but_for_the_weights(own, batch)
        assert torch.equal(self.weights_of(batch), torch.tensor([self.expected([n], 16) for n in (5, 11)]))

    @NEAT
    def test_flash_attention_trims_the_padding(self):
        lengths = [5, 7, 6]
        own, batch = self.collate(
            [packed_row(lengths, 24, True)], neat_packing=True, attn_implementation="flash_attention_2"
        )
        assert own["attention_mask"] is None
        assert own["input_ids"].shape == (1, 18)
        self.assert_equal_but_for_the_weights(own, batch)
        assert torch.equal(self.weights_of(batch), torch.tensor([self.expected(lengths, 18)]))

    @NEAT
    def test_flash_attention_and_padding_to_a_multiple_of_8(self):
        row = packed_row([5, 7, 6], 18, True)
        own, batch = self.collate([row], neat_packing=True, attn_implementation="flash_attention_2")
        self.assert_equal_but_for_the_weights(own, batch)
        assert torch.equal(self.weights_of(batch), torch.tensor([self.expected([5, 7, 6], own["labels"].shape[1])]))

    @NEAT
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_float_tensors_are_cast_and_the_weights_are_not(self, dtype):
        own, batch = self.collate(
            [packed_row([5, 7], 16, True)], neat_packing=True, attn_implementation="sdpa", compute_dtype=dtype
        )
        assert own["attention_mask"].dtype == dtype
        assert torch.equal(self.weights_of(batch)[0], torch.tensor(self.expected([5, 7], 16)))


def test_collators_go_to_spawned_workers(workplace):
    """LLaMA-Factory's holds the model, whose patched forward does not pickle."""
    weights = WITCallback(*WEIGHTS)
    run_exp(workplace.config(), callbacks=[weights])
    collator = weights.trainer.data_collator
    rows = [weights.trainer.train_dataset[i] for i in range(3)]
    copied = pickle.loads(pickle.dumps(collator))
    here, there = collator([dict(row) for row in rows]), copied([dict(row) for row in rows])
    assert here.keys() == there.keys()
    assert all(torch.equal(here[key], there[key]) for key in here)
    detach(weights.trainer)
    assert weights.trainer.data_collator.model is weights.trainer.model
